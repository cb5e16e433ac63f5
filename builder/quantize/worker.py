"""The child process of the quantize stage: python -m builder.quantize.worker JOB.json

The job names a local model directory, calibration rows, a sequence length, a batch size, the KV cache's type, the
modules that stay in BF16 or FP8 and a destination, where it leaves `unified/` and `tensorrt_llm/`. Events go to the
parent (builder.core.process.emit).
ModelOpt 0.37 to 0.47, with transformers 4.57 or 5, with or without CUDA.
"""

from __future__ import annotations

import copy
import errno
import gc
import glob
import logging
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from builder.architectures import catalog, names, served
from builder.architectures.attention import rope
from builder.checkpoint import huggingface, layouts
from builder.checkpoint.tensor_checks import wrong_floats
from builder.core.errors import BuilderError, IntegrityError, StageError, UnsupportedError
from builder.core.process import emit, worker_main
from builder.core.safetensors_io import Tensors
from builder.model import loading as model_loading
from builder.model.hashed_files import SourceFiles
from builder.quantize import modelopt
from builder.quantize.device import check_device


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Both layouts from one calibration; returns what the parent remembers: counts and seconds of each part."""
    destination, source = Path(job["destination"]), Path(job["model"])
    unified = destination / "unified"
    clock = _Clock()
    _import_all()
    device = check_device(job.get("gpus", ()))
    said = _count_warnings()
    clock.lap("import")
    model, batches = _load(job)
    clock.lap("load")
    counts = _calibrate(model, batches, job["kv_cache_dtype"] == "fp8", job.get("kept", ()), job.get("fp8", ()))
    clock.lap("calibrate")
    _export(model, unified, job.get("fp8", ()))
    del model  # the second layout is made from the first, byte by byte: never two models in memory
    gc.collect()
    clock.lap("export")
    lacking = _second_layout(unified, source, destination / "tensorrt_llm")
    # Weights in memory are pages of the files until they are touched, and tokenizer files were copied just now.
    SourceFiles.of_job(job).check_unchanged()
    clock.lap("layouts")
    tokens = sum(batch.numel() for batch in batches)
    large = sum(n for text, n in said.items() if "Large KV activation" in text)
    return {
        **counts,
        "device": device,
        "calibration_tokens": tokens,
        "large_kv": large,
        "warnings": dict(said),
        "no_tensorrt_llm": lacking,
        "seconds": clock.laps,
    }


def _import_all() -> None:
    """The heavy imports, with the garbage collector off: it takes a fifth of their time (0.9 of 4.4 s, 2 cores)."""
    gc.disable()
    emit(progress={"label": "importing ModelOpt", "done": 0, "total": None})
    import modelopt.torch.export
    import modelopt.torch.quantization  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    gc.freeze()
    gc.enable()


def _load(job: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """The model in the type that it is served in, on the GPUs if there are any, and the batches of token ids, each
    [rows, <= seq_len]."""
    import torch

    batches = _batches(job)  # first: what is wrong with tokenizer, template or rows is known before weights are loaded
    emit(progress={"label": "loading the model", "done": 0, "total": None})
    where: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
    return model_loading.to_quantize(job, **where), batches


def _batches(job: Mapping[str, Any]) -> list[Any]:
    """The calibration rows as batches of token ids, no longer than the model's own limit."""
    from transformers import AutoConfig

    from builder.calibration.rows import check_tokens, token_batches
    from builder.tokenizer import loading as tokenizer_loading

    emit(progress={"label": "reading the calibration rows", "done": 0, "total": None})
    source, trust = Path(job["model"]), job["trust_remote_code"]
    tokenizer = tokenizer_loading.load(source, trust_remote_code=trust)
    with model_loading.refused(source):
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=trust)
    longest = getattr(config, "max_position_embeddings", None) or job["seq_len"]
    batches = token_batches(
        Path(job["rows"]), tokenizer, seq_len=min(job["seq_len"], longest), batch_size=job["batch_size"]
    )
    check_tokens(sum(batch.numel() for batch in batches), sum(map(len, batches)), job.get("least_tokens", 0))
    return batches


def _calibrate(
    model: Any, batches: list[Any], fp8_kv: bool, kept: Sequence[str] = (), fp8: Sequence[str] = ()
) -> dict[str, int]:
    """Inserts the quantizers, in `kept` none that is on, in `fp8` those of FP8, and runs the batches through (max
    calibration); returns counts."""
    import modelopt.torch.quantization as mtq
    import torch

    counts: dict[str, int] = {}

    def forward(model: Any) -> None:
        counts.update(_check_quantizers(model, fp8_kv, kept, fp8))
        body = model.base_model  # without lm_head: it isn't quantized, and its logits are the largest tensor of all
        for done, ids in enumerate(batches):
            emit(progress={"label": "calibrating", "done": done, "total": len(batches)})
            body(ids.to(model.device), use_cache=False)  # with a cache 0.47's layerwise calibration is wrong
        emit(progress={"label": "calibrating", "done": len(batches), "total": len(batches)})

    with torch.inference_mode(), _unsupported("quantize"):
        table = catalog.of(model.config.to_dict()).tensors
        never = [table.head] if table else []  # ModelOpt knows it as lm_head only
        mtq.quantize(model, _config(mtq, fp8_kv, [*kept, *never], fp8), forward)
        _share_ranges(model, fp8)
    return counts


# The weight and the input of a layer in FP8: what FP8_DEFAULT_CFG says of both, in all versions of ModelOpt.
_FP8 = {"num_bits": (4, 3), "axis": None}


def _config(mtq: Any, fp8_kv: bool, kept: Sequence[str] = (), fp8: Sequence[str] = ()) -> dict[str, Any]:
    """NVFP4_DEFAULT_CFG, with FP8_KV_CFG's quantizers, none in `kept` and FP8_DEFAULT_CFG's in `fp8`: a mapping up to
    ModelOpt 0.43, a list from 0.44 on. In both a later entry wins."""
    config: dict[str, Any] = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
    ours, kv = config["quant_cfg"], copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"]) if fp8_kv else {}
    off = [f"{glob.escape(name)}.*_quantizer" for name in kept]
    e4m3 = [f"{glob.escape(name)}.{part}_quantizer" for name in fp8 for part in ("weight", "input")]
    if isinstance(ours, dict):
        ours.update({name: cfg for name, cfg in dict(kv).items() if name != "default"})
        ours.update({name: {"enable": False} for name in off} | {name: dict(_FP8) for name in e4m3})
    else:
        ours.extend(entry for entry in kv if entry["quantizer_name"] != "*")
        ours.extend({"quantizer_name": name, "enable": False} for name in off)
        ours.extend({"quantizer_name": name, "cfg": dict(_FP8)} for name in e4m3)
    return config


def _share_ranges(model: Any, fp8: Sequence[str]) -> None:
    """One range for what is served as one layer in FP8: q, k and v; gate and up.

    ModelOpt's exporter does it for all formats but FP8 (export/unified_export_hf.py, 0.37 to 0.47), and TensorRT-LLM
    then rounds such weights a second time, to the largest scale of the layer.
    """
    from modelopt.torch.export.quant_utils import preprocess_linear_fusion

    modules, architecture = dict(model.named_modules()), catalog.of(model.config.to_dict())
    fused: dict[tuple[str, str], list[Any]] = {}
    for name in fp8:
        parent, _, leaf = name.rpartition(".")
        fused.setdefault((parent, names.fused_name(architecture, name) or leaf), []).append(modules[name])
    for members in fused.values():
        preprocess_linear_fusion(members)


def _round_weights(model: Any, fp8: Sequence[str]) -> None:
    """Makes the weights of these layers what they are in FP8.

    ModelOpt's Hugging Face exporter divides by the scale in BF16, its TensorRT-LLM one in float32 as its simulation
    does: one weight of fifty gets the neighbouring code. A weight that lies on an FP8 value gets the same in all three.
    """
    modules = dict(model.named_modules())
    for name in fp8:
        module = modules[name]
        module.weight.copy_(module.weight_quantizer(module.weight))


def _check_not_zero(weights: Mapping[str, Any]) -> None:
    """UnsupportedError for weights of nothing but zeros, as in blocks that were added to a model and not trained: their
    scale would be 0. The first row tells for almost every other weight."""
    zero = [name for name, weight in weights.items() if not (bool(weight[:1].any()) or bool(weight.any()))]
    if zero:
        raise UnsupportedError(
            f"{len(zero)} linear layers of the model have weights of nothing but zeros: {', '.join(zero[:5])}"
            f"{', ...' * (len(zero) > 5)}.",
            why="NVFP4 and FP8 divide by the largest weight. They are zero in the model's own files.",
            hint="If that is meant, keep these layers as they are: "
            + " ".join(f"--keep-bf16 '{name}'" for name in zero[:5])
            + ". If not, fetch the model again or choose another revision.",
        )


def _check_quantizers(model: Any, fp8_kv: bool, kept: Sequence[str] = (), fp8: Sequence[str] = ()) -> dict[str, int]:
    """Counts ModelOpt's quantizers before they see data; UnsupportedError for what would come out wrong in silence."""
    linears = {
        name: module.weight.shape
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight_quantizer", None), "is_enabled", False) and hasattr(module, "weight")
    }
    caches = [module for name, module in model.named_modules() if name.endswith(("k_bmm_quantizer", "v_bmm_quantizer"))]
    kv = [quantizer for quantizer in caches if quantizer.is_enabled]
    kind = type(model).__name__
    modelopt.check_sizes(linears)
    modules = dict(model.named_modules())
    _check_not_zero({name: modules[name].weight for name in linears})
    lost = [name for name in kept if name in linears or not hasattr(modules.get(name), "weight_quantizer")]
    lost += [name for name in fp8 if name not in linears]
    if lost:
        raise UnsupportedError(
            f"{len(lost)} layers that should be kept are no layers of their own in {kind}: {', '.join(lost[:5])}.",
            why="transformers joins the experts of a mixture in one module, which ModelOpt quantizes as a whole.",
            hint="Leave them out of --keep-bf16 and --keep-fp8.",
        )
    if not linears:
        raise UnsupportedError(f"ModelOpt finds nothing to quantize in {kind}.", hint="Choose another model.")
    if fp8_kv and len(kv) < 2 * model.config.num_hidden_layers:
        raise UnsupportedError(
            f"ModelOpt can't quantize the KV cache of {kind}.",
            why=f"It put {len(kv)} quantizers into {model.config.num_hidden_layers} layers' attention.",
            hint="Leave the cache in the model's own type: --kv-cache-dtype auto",
        )
    return {
        "quantized_linears": len(linears) - len(fp8),
        "fp8_linears": len(fp8),
        "kept_linears": len(kept),
        "kv_scales": len(kv),
    }


def _export(model: Any, unified: Path, fp8: Sequence[str] = ()) -> None:
    """The unified Hugging Face layout by ModelOpt's exporter; it replaces the weights in place."""
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import nvfp4_tensor

    emit(progress={"label": "writing the checkpoint", "done": 0, "total": None})
    if not torch.cuda.is_available():
        # Before 0.45 fp4_compatible() asks CUDA for its capability on any machine, and asserts.
        nvfp4_tensor.fp4_compatible = lambda: False
    with torch.inference_mode(), _unsupported("export"):
        _round_weights(model, fp8)
        export_hf_checkpoint(model, export_dir=unified)


def _second_layout(unified: Path, source: Path, tensorrt_llm: Path) -> str | None:
    """Completes the first layout and makes the second of it; says why not, for an architecture that has none."""
    emit(progress={"label": "writing the TensorRT-LLM layout", "done": 0, "total": None})
    huggingface.complete(unified, source)
    config = catalog.with_common_keys(layouts.read_json(source / "config.json"))
    try:
        served.check_engine(config)
        rope(config)
    except UnsupportedError as error:
        return error.what
    layouts.write_tensorrt_llm(unified, config, tensorrt_llm)
    return None


class _unsupported:
    """What ModelOpt doesn't implement for a model, as our error. `doing` is the verb of the message."""

    def __init__(self, doing: str) -> None:
        self.doing = doing

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        if isinstance(error, NotImplementedError):
            raise UnsupportedError(
                f"ModelOpt can't {self.doing} this model.", why=str(error), hint="Choose another model."
            ) from error


class _Clock:
    """Seconds between laps, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 3)
        self._last = now


def _count_warnings() -> Counter[str]:
    """From now on: how often each warning was given, by `warnings` or ModelOpt's loggers. They reach the log too."""
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


def _not_finite(model: Path, said: str) -> IntegrityError:
    """ModelOpt's calibrator saw NaN or Inf: the tensors of the model that hold some, if it is the model's fault."""
    tensors = Tensors(model)
    found = [(name, wrong_floats(info, tensors.data(name))) for name, info in tensors.items()]
    named = [f"{name} {wrong}" for name, wrong in found if wrong]
    return IntegrityError(
        "NaN or Inf came up while calibrating.",
        why="\n".join(named[:10]) or said,
        hint="Fetch the model again, or choose another revision: these weights can't be quantized."
        if named
        else "The weights are finite, so it is the arithmetic: try other --calib-data, or a model in another dtype.",
    )


def known(error: BaseException, job: Mapping[str, Any]) -> BuilderError | None:
    """What a user can do something about, in words; None for a fault of ours."""
    text = str(error)
    if isinstance(error, AssertionError) and "in amax" in text:
        return _not_finite(Path(job["model"]), text)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return StageError(
            f"The disk that holds {Path(job['destination']).parent} is full.",
            why="Nothing half-made was kept.",
            hint="Free some space (`builder clean` removes what no repository needs) or choose another --output.",
        )
    if isinstance(error, MemoryError) or "out of memory" in text or "DefaultCPUAllocator" in text:
        return UnsupportedError(
            "The model does not fit into this machine's memory.",
            why=text.splitlines()[0] if text else "",
            hint="Calibrate with less at once (--calib-seq-len 512), or use a machine with more memory.",
        )
    return None


if __name__ == "__main__":
    sys.exit(worker_main(sys.argv, run, known))
