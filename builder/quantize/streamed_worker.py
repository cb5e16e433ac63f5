"""Worker process of `--memory low`: python -m builder.quantize.streamed_worker JOB.json

Calibrates with one decoder layer in memory at a time, stores each layer's result, and writes both layouts from the
model's files. ModelOpt is not imported; ranges and bytes equal those of its max calibration of the whole model.
"""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from builder.architectures import catalog, names
from builder.architectures.attention import attention_layers
from builder.calibration import coverage
from builder.checkpoint import layouts
from builder.core.errors import BuilderError, UnsupportedError, out_of_memory
from builder.core.worker import emit, leave, worker_main
from builder.formats import algorithms
from builder.formats.algorithms import Algorithm
from builder.formats.assignment import ModelFormats, of_job
from builder.formats.kv_cache import KvCacheFormat
from builder.model.hashed_files import SourceFiles
from builder.quantize import data_free, unified_plan, worker, writer
from builder.quantize.ahead import Ahead
from builder.quantize.device import check_device
from builder.quantize.ranges import Ranges
from builder.quantize.source_weights import SourceModel
from builder.quantize.unified_plan import UnifiedPlan
from builder.quantize.writer import Work

SECOND = "tensorrt_llm"


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Writes both layouts from one calibration. Returns facts for the manifest: counts, seconds of each part."""
    source = SourceModel.open(Path(job["model"]))
    planned = unified_plan.plan(source.config, source.headers, source.dtype, of_job(job))
    unified_plan.check(planned.layers)
    with closing(_begun(job, source, Path(job["destination"]))) as ahead:
        return _made(job, source, planned, ahead)


def _begun(job: Mapping[str, Any], source: SourceModel, destination: Path) -> Ahead:
    """A thread that writes both layouts while the rows are run: scales alone depend on them. Where an algorithm rounds
    weights with the rows, it does not begin."""
    formats, algorithm = of_job(job), algorithms.of_job(job)

    def write(model: SourceModel, unified: Path, work: Work) -> dict[str, Any]:
        counts = data_free.write_unified(model, formats, unified, replace(work, algorithm=algorithm.name))
        # Of no bytes of the source, but it ends here, too, when the worker ends.
        layouts.write_if_served(unified, model.config, unified.with_name(SECOND), lambda nbytes: work.done(0))
        return counts

    ahead = Ahead(lambda: source, write, {}, destination, downloaded=False)
    if not algorithm.reads_rows:
        ahead.begin()
    return ahead


def _made(job: Mapping[str, Any], source: SourceModel, planned: UnifiedPlan, ahead: Ahead) -> dict[str, Any]:
    destination, formats, clock = Path(job["destination"]), of_job(job), worker.Clock()
    _import_all()
    device = check_device(job.get("gpus", ()))
    batches = _batches(job, source)
    clock.lap("rows")
    algorithm = algorithms.of_job(job)
    needed = formats.calibrated or algorithm.reads_rows
    if algorithm is algorithms.GPTQ:
        _check_enough(batches, planned, formats)
    ranges, found = calibrate(job, batches, source, planned) if needed else (Ranges(), {})
    work = _work(algorithm, found.pop("solved", {}))
    check_cache(source.config, formats.cache, ranges)
    clock.lap("calibrate")
    counts = _written(source, formats, ranges, destination / "unified", work, ahead)
    SourceFiles.of_job(job).check_unchanged()  # weights are pages of the files
    clock.lap("write")
    limit = worker.row_limit(job, SimpleNamespace(**source.config))
    return {
        **counts,
        **found,
        "algorithm": algorithm.name,
        "backend": "streamed",
        "writer": "builder",
        "device": device,
        "calibration_tokens": sum(batch.numel() for batch in batches),
        "coverage": coverage.of_batches(batches, limit) if needed else {},
        "warnings": {},
        "seconds": clock.laps,
    }


def _written(
    source: SourceModel, formats: ModelFormats, ranges: Ranges, unified: Path, work: Work, ahead: Ahead
) -> dict[str, Any]:
    """Writes both layouts, or takes what is written and gives it the scales. Returns the writer's facts, and why there
    is no second layout."""
    second = unified.with_name(SECOND)

    def tell(nbytes: int) -> None:
        emit(progress={"label": "writing the checkpoint", "done": nbytes, "total": None})

    tell(0)
    if ahead.take(source, {}, unified, tell) is not None:
        counts = writer.rescale(source, formats, ranges, unified)
        if counts is not None:
            lacking = layouts.write_if_served(unified, source.config, second, rescaled=True)
            return {**counts, "no_tensorrt_llm": lacking}
        shutil.rmtree(unified)
        shutil.rmtree(second, ignore_errors=True)
    counts = writer.write(source, formats, ranges, unified, work)
    return {**counts, "no_tensorrt_llm": layouts.write_if_served(unified, source.config, second)}


def _import_all() -> None:
    """Does the imports that every model needs, with the garbage collector off, which saves a fifth of their time."""
    gc.disable()
    import tokenizers  # noqa: F401

    from builder.quantize import streamed_calibration  # noqa: F401  # imports torch

    gc.freeze()
    gc.enable()


def _batches(job: Mapping[str, Any], source: SourceModel) -> list[Any]:
    """The calibration rows as batches of token ids. Rows of text need neither transformers' tokenizer, whose tokens are
    those of tokenizer.json (tokenizer/loading.py), nor its configuration."""
    from builder.calibration.rows import check_tokens, token_batches
    from builder.tokenizer.loading import ServedTokenizer

    with open(job["rows"], encoding="utf-8") as lines:
        of_text = all("text" in json.loads(line) for line in lines)
    limit = source.config.get("max_position_embeddings")
    if not of_text or not limit or job["trust_remote_code"] or not (source.directory / "tokenizer.json").is_file():
        return worker.read_batches(job)
    emit(progress={"label": "reading the calibration rows", "done": 0, "total": None})
    seq_len, rows = min(job["seq_len"], limit), Path(job["rows"])
    batches = token_batches(rows, ServedTokenizer(source.directory), seq_len=seq_len, batch_size=job["batch_size"])
    check_tokens(sum(batch.numel() for batch in batches), sum(map(len, batches)), job.get("min_tokens", 0))
    return list(batches)


def _work(algorithm: Algorithm, solved: Mapping[str, Path]) -> Work:
    """How to write: what an algorithm did not round on the way is left to `mse`, in formats that it treats."""
    return Work(algorithm=algorithms.MSE.name if algorithm.reads_rows else algorithm.name, solved=solved)


def _check_enough(batches: Sequence[Any], planned: UnifiedPlan, formats: ModelFormats) -> None:
    """UnsupportedError if there are too few tokens for GPTQ in the widest layer that sees all of them."""
    tokens, widest = sum(batch.numel() for batch in batches), max(gptq_widths(planned), default=0)
    if not widest or tokens >= (least := algorithms.GPTQ.least_tokens(widest)):
        return
    raise UnsupportedError(
        f"{tokens:,} calibration tokens are too few for algorithm gptq.",
        why=f"The widest layer has {widest:,} inputs and needs {least:,} tokens. With fewer, GPTQ gains nothing.",
        hint="Calibrate on more text (--calib-samples 512 --calib-seq-len 2048), or use "
        f"--algorithm {algorithms.with_few_tokens(formats.whole).name}",
    )


def gptq_widths(planned: UnifiedPlan) -> set[int]:
    """The numbers of inputs of the layers that GPTQ rounds, without those of routed experts."""
    every = (layer for group in planned.groups for layer in group)
    return {
        layer.part.shape[-1]
        for layer in every
        if algorithms.GPTQ.treats(layer.number_format) and names.experts_of(layer.module) is None
    }


def calibrate(
    job: Mapping[str, Any], batches: Sequence[Any], source: SourceModel, planned: UnifiedPlan
) -> tuple[Ranges, dict[str, Any]]:
    """The ranges of the rows, and facts: the tokens of each expert and, under `solved`, {linear layer: file} of those
    whose weights the job's algorithm rounded with the rows.

    Uses the first GPU if there is one.
    """
    import torch

    from builder.model import streamed
    from builder.quantize import expert_inputs, streamed_calibration, streamed_solve

    emit(progress={"label": "opening the model", "done": 0, "total": None})
    device = torch.device("cuda", 0) if torch.cuda.is_available() else None
    model = streamed.open_decoder(job, device, max(batch.shape[1] for batch in batches))
    expert_inputs.one_by_one(model.config)
    tensors = [*(f"{module}.weight" for module in planned.layers), *(part.name for part in planned.copies)]
    solver, partial = None, Path(job["partial"])
    if algorithms.of_job(job).reads_rows:
        solver = streamed_solve.LayerSolver(source, planned, job, model, partial)
    return streamed_calibration.calibrate(model, batches, tensors, partial, solver=solver)


def check_cache(config: Mapping[str, Any], cache: KvCacheFormat, ranges: Ranges) -> None:
    """UnsupportedError if keys and values of some layers were not seen."""
    layers = attention_layers(catalog.with_common_keys(config))
    if cache.quantized and len(ranges.cache) < layers:
        raise UnsupportedError(
            f"The ranges of the KV cache of {(config.get('architectures') or ['this model'])[0]} can't be calibrated.",
            why=f"{len(ranges.cache)} of {layers} layers call transformers' attention functions.",
            hint="Leave the cache in the model's own type: --kv-cache-dtype auto",
        )


def known(error: BaseException, job: Mapping[str, Any]) -> BuilderError | None:
    """The error to show for a problem that the user can solve; None for any other."""
    text = str(error)
    if out_of_memory(error):
        fewer = f"fewer rows at once (--set calibration.batch_size={max(1, job['batch_size'] // 2)})"
        return UnsupportedError(
            "One decoder layer with a batch of calibration rows does not fit into memory.",
            why=text.splitlines()[0] if text else "",
            hint=f"Use {fewer if job['batch_size'] > 1 else 'shorter rows (--calib-seq-len 512)'}.",
        )
    if isinstance(error, FloatingPointError):
        return worker.not_finite(Path(job["model"]), text)
    return worker.known(error, job)


if __name__ == "__main__":
    leave(worker_main(sys.argv, run, known, prepare=_import_all))
