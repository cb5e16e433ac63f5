"""Worker process of the quantize stage: python -m builder.quantize.worker JOB.json

The job names a local model directory, calibration rows, a sequence length, a batch size, the number formats and a
destination, where the worker writes `unified/` and `tensorrt_llm/`. Events go to the parent (core.worker.emit).
ModelOpt 0.37 to 0.47, with transformers 4.57 or 5, with or without CUDA.
"""

from __future__ import annotations

import errno
import gc
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from builder.architectures import catalog
from builder.calibration import coverage
from builder.checkpoint import huggingface
from builder.checkpoint.finished import write_second_layout
from builder.checkpoint.tensor_checks import wrong_floats
from builder.core import temporary
from builder.core.errors import BuilderError, IntegrityError, StageError, UnsupportedError, out_of_memory
from builder.core.hashes import Hashes
from builder.core.safetensors_io import Tensors
from builder.core.worker import emit, leave, worker_main
from builder.formats import algorithms
from builder.formats.assignment import ModelFormats, of_job
from builder.model import loading as model_loading
from builder.model.hashed_files import SourceFiles
from builder.model.imports import only_needed
from builder.quantize import calibrated, experts, quantizers, stored_scales, unified_files, unified_plan, writer
from builder.quantize.device import check_device
from builder.quantize.ranges import Ranges
from builder.quantize.source_weights import SourceModel
from builder.quantize.unified_plan import UnifiedPlan


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Writes both layouts from one calibration. Returns facts for the manifest: counts, seconds of each part."""
    destination = Path(job["destination"])
    unified = destination / "unified"
    clock = Clock()
    device = check_device(job.get("gpus", ()))
    source, formats = SourceModel.open(Path(job["model"])), of_job(job)
    planned = _plan(source, formats)
    _check_algorithm(job, planned)
    batches = read_batches(job)  # first, so that errors in tokenizer, template or rows come before ModelOpt is imported
    clock.lap("rows")
    import_libraries()
    said = _count_warnings()
    clock.lap("import")
    model = _model(job)
    clock.lap("load")
    facts = calibrate(model, batches, formats)
    covered = coverage.of_batches(batches, row_limit(job, model.config)) if formats.calibrated else {}
    clock.lap("calibrate")
    ranges = _ranges(model, planned)
    _check_algorithm(job, ranges)
    if ranges is None:
        _export(model, source, unified, formats)
        facts["large_kv"] = sum(n for text, n in said.items() if "Large KV activation" in text)
    del model  # never held while its tensors are written from the files: they need no more than a few megabytes
    gc.collect()
    if ranges is not None:
        emit(progress={"label": "writing the checkpoint", "done": 0, "total": None})
        work = writer.Work(algorithm=algorithms.of_job(job).name)
        facts |= writer.write(source, formats, ranges, unified, work)
    clock.lap("write")
    with Hashes(destination) as hashes:
        emit(progress={"label": "writing the TensorRT-LLM layout", "done": 0, "total": None})
        lacking = write_second_layout(source.config, hashes)
        hashed = hashes.finish()
    # Weights in memory are pages of the files until they are touched, and tokenizer files were copied just now.
    SourceFiles.of_job(job).check_unchanged()
    clock.lap("layouts")
    return {
        **facts,
        "backend": "modelopt",
        "writer": "modelopt" if ranges is None else "builder",
        "device": device,
        "calibration_tokens": sum(batch.numel() for batch in batches),
        "coverage": covered,
        "warnings": dict(said),
        "no_tensorrt_llm": lacking,
        "hashed": hashed,
        "seconds": clock.laps,
    }


def import_libraries() -> None:
    """Does the heavy imports with the garbage collector off, which saves a fifth of their time (0.9 of 4.4 s)."""
    gc.disable()
    emit(progress={"label": "importing ModelOpt", "done": 0, "total": None})
    with only_needed():
        import modelopt.torch.quantization  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    gc.freeze()
    gc.enable()


def load(job: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """The model and the batches of token ids, each [rows, <= seq_len]."""
    batches = read_batches(job)
    return _model(job), batches


def _model(job: Mapping[str, Any]) -> Any:
    """The model in the dtype that it is served in, on the GPUs if there are any."""
    import torch

    emit(progress={"label": "loading the model", "done": 0, "total": None})
    where: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
    return model_loading.to_quantize(job, **where)


def read_batches(job: Mapping[str, Any]) -> list[Any]:
    """The calibration rows as batches of token ids, cut at the model's own length limit."""
    with only_needed():
        from transformers import AutoConfig

    from builder.calibration.rows import check_tokens, token_batches
    from builder.tokenizer import loading as tokenizer_loading

    emit(progress={"label": "reading the calibration rows", "done": 0, "total": None})
    source, trust = Path(job["model"]), job["trust_remote_code"]
    tokenizer = tokenizer_loading.load(source, trust_remote_code=trust)
    with model_loading.refused(source):
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=trust)
    limit = row_limit(job, config)
    batches = token_batches(Path(job["rows"]), tokenizer, seq_len=limit, batch_size=job["batch_size"])
    check_tokens(sum(batch.numel() for batch in batches), sum(map(len, batches)), job.get("min_tokens", 0))
    return batches


def row_limit(job: Mapping[str, Any], config: Any) -> int:
    """The most tokens of a row: the job's, or the model's own limit."""
    return int(min(job["seq_len"], getattr(config, "max_position_embeddings", None) or job["seq_len"]))


def calibrate(model: Any, batches: list[Any], formats: ModelFormats) -> dict[str, Any]:
    """Inserts the formats' quantizers and runs the batches through the model (max calibration), unless only weights are
    read. Returns counts of layers, and the tokens of each expert."""
    import modelopt.torch.quantization as mtq
    import torch

    from builder.quantize.simulation import enable_cpu_simulation

    counts: dict[str, Any] = {}
    routed = experts.RoutedTokens()
    if not torch.cuda.is_available():
        enable_cpu_simulation()  # AWQ's search multiplies with quantized weights

    def forward(model: Any) -> None:
        nonlocal routed
        label = "searching input scales" if counts else "calibrating"  # AWQ runs the batches twice
        if not counts:
            counts.update(quantizers.check(model, formats))
        body = model.base_model  # without lm_head: it isn't quantized, and its logits are the largest tensor of all
        weights = [] if formats.whole.scales_inputs else quantizers.collecting_weights(model)
        with experts.counted(model) as routed:
            for done, ids in enumerate(batches):
                emit(progress={"label": label, "done": done, "total": len(batches)})
                weights = quantizers.finish_collected(weights)
                body(ids.to(model.device), use_cache=False)  # with a cache 0.47's layerwise calibration is wrong
        emit(progress={"label": label, "done": len(batches), "total": len(batches)})

    with torch.inference_mode(), unsupported("quantize"):
        table = catalog.of(model.config.to_dict()).tensors
        never = [table.head] if table else []  # ModelOpt knows it as lm_head only
        mtq.quantize(model, quantizers.config(mtq, formats, never), forward if formats.calibrated else None)
        if not formats.calibrated:
            counts.update(quantizers.check(model, formats))
        quantizers.share_ranges(model, formats)
        few = experts.widen_ranges(model, routed)
    return {**counts, **routed.facts(), **({"rare_experts": few} if few else {})}


def _plan(source: SourceModel, formats: ModelFormats) -> UnifiedPlan | None:
    """What our writer makes of the model. None where ModelOpt's exporter must write it: formats whose weights depend on
    scales of inputs that it searched, experts that stay stacked, and families whose tensors are not known."""
    if catalog.of(source.config) is catalog.UNKNOWN:
        return None
    try:
        made = unified_plan.plan(source.config, source.headers, source.dtype, formats)
        unified_plan.check(made.layers)
    except UnsupportedError:
        return None
    return made


def _check_algorithm(job: Mapping[str, Any], ours: UnifiedPlan | Ranges | None) -> None:
    """UnsupportedError if block scales are to be searched, which ModelOpt's exporter does not (ours: None)."""
    algorithm = algorithms.of_job(job)
    if ours is None and algorithm is not algorithms.MAX:
        raise UnsupportedError(
            f"The block scales of this model can't be chosen by algorithm {algorithm.name}.",
            why="ModelOpt's exporter must write its checkpoint: its tensors are not known to the builder, or its "
            "experts stay stacked in one tensor.",
            hint="Leave the algorithm out: --algorithm max",
        )


def _ranges(model: Any, planned: UnifiedPlan | None) -> Ranges | None:
    """The ranges to write the checkpoint from. None where ModelOpt's exporter must write it."""
    if planned is None or calibrated.layers(model, planned.tensors) != planned.layers.keys():
        return None
    return calibrated.ranges(model, planned.tensors)


def _export(model: Any, source: SourceModel, unified: Path, formats: ModelFormats) -> None:
    """The unified Hugging Face layout by ModelOpt's exporter; it replaces the weights in place."""
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import nvfp4_tensor

    emit(progress={"label": "writing the checkpoint", "done": 0, "total": None})
    if not torch.cuda.is_available():
        # Before 0.45 fp4_compatible() asks CUDA for its capability on any machine, and asserts.
        nvfp4_tensor.fp4_compatible = lambda: False
    with torch.inference_mode(), unsupported("export"):
        quantizers.round_weights(model, formats)
        export_hf_checkpoint(model, export_dir=unified)
    _measured_cache_scales(model, unified, formats)
    huggingface.complete(unified, source.directory)


def _measured_cache_scales(model: Any, unified: Path, formats: ModelFormats) -> None:
    """Gives ModelOpt's export the KV cache scales that our writer gives: 0.37 raises those of an FP8 cache to 1, under
    which small keys and values lose digits. TensorRT-LLM's layout has no smaller ones anyway."""
    tensors = Tensors(unified)
    scales = stored_scales.of_cache(formats.cache, calibrated.ranges(model, tensors).cache)
    unified_files.renumber(unified, {name: scale for name, scale in scales.items() if name in tensors})


class unsupported:
    """Turns ModelOpt's NotImplementedError into an UnsupportedError. `doing` is the verb of its message."""

    def __init__(self, doing: str) -> None:
        self.doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, NotImplementedError):
            raise UnsupportedError(
                f"ModelOpt can't {self.doing} this model.", why=str(error), hint="Choose another model."
            ) from error


class Clock:
    """Measures the seconds of each part, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Ends a part, which began when the last one ended."""
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 3)
        self._last = now


def _count_warnings() -> Counter[str]:
    """Counts, from now on, the warnings of `warnings` and of ModelOpt's loggers. They are logged as well."""
    said: Counter[str] = Counter()

    class Counting(logging.StreamHandler):  # type: ignore[type-arg]
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                said[record.getMessage().splitlines()[0][:200]] += 1
            super().emit(record)

    logging.getLogger("modelopt").addHandler(Counting())
    show: Callable[..., None] = warnings.showwarning

    def counting(message: Warning | str, *rest: Any, **named: Any) -> None:
        said[(str(message).strip().splitlines() or [""])[0][:200]] += 1
        show(message, *rest, **named)

    warnings.showwarning = counting
    return said


def not_finite(model: Path, said: str) -> IntegrityError:
    """The error for NaN or Inf during calibration: names the model's tensors that hold some, if any do."""
    tensors = Tensors(model)
    found = [(name, wrong_floats(info, tensors.stored(name))) for name, info in tensors.items()]
    named = [f"{name} {wrong}" for name, wrong in found if wrong]
    return IntegrityError(
        "NaN or Inf during calibration.",
        why="\n".join(named[:10]) or said,
        hint="Fetch the model again, or choose another revision: these weights can't be quantized."
        if named
        else "The weights are finite, so activations overflow. Use other --calib-data, or a model in another dtype.",
    )


def _full(path: Path, destination: Path) -> StageError:
    """The error for a full disk that holds `path`: that of the output directory, or of temporary files."""
    if path.is_relative_to(destination):
        return StageError(
            f"The disk that holds {destination.parent} is full.",
            why="No partial checkpoint was kept.",
            hint="Free some space (`builder clean` removes what no repository needs) or choose another --output.",
        )
    place = temporary.outside(path.parent)  # that of this process goes with it
    return StageError(
        f"The disk that holds {place} is full.",
        why=f"No file could be written there, for lack of bytes or of inodes (`df -h {place}`, `df -i`).",
        hint="Free some space there. For temporary files, TMPDIR can name a directory on another disk.",
    )


def known(error: BaseException, job: Mapping[str, Any]) -> BuilderError | None:
    """The error to show for a problem that the user can solve; None for any other."""
    text = str(error)
    if isinstance(error, AssertionError) and "in amax" in text:
        return not_finite(Path(job["model"]), text)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return _full(Path(str(getattr(error, "filename", None) or job["destination"])), Path(job["destination"]))
    if out_of_memory(error):
        return UnsupportedError(
            "The model does not fit into this machine's memory.",
            why=text.splitlines()[0] if text else "",
            hint="Use shorter rows (--calib-seq-len 512), or a machine with more memory.",
        )
    return None


if __name__ == "__main__":
    leave(worker_main(sys.argv, run, known, prepare=import_libraries))
