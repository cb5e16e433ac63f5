"""Worker process of `--calibrate-scales`: python -m builder.quantize.scales_worker JOB.json

Reads the ranges of inputs, keys and values from the dequantized model, as max calibration does, and writes scales: with
the whole model in memory or, if the job has `partial`, one decoder layer at a time, which finds the same.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.architectures import catalog
from builder.calibration import coverage
from builder.checkpoint.description import Description, describe_directory
from builder.core.errors import BuilderError, UnsupportedError
from builder.core.safetensors_io import Tensors
from builder.core.worker import emit, worker_main
from builder.formats import kv_cache
from builder.formats.kv_cache import KvCacheFormat
from builder.model import dtypes
from builder.quantize import calibrated, experts, quantizers, stored_scales, worker
from builder.quantize.device import check_device
from builder.quantize.ranges import Ranges


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Calibrates, and writes the scales into the checkpoint's files. Returns facts."""
    unified = Path(job["model"])
    check_device(job.get("gpus", ()))
    found, cache = describe_directory(unified), kv_cache.get(job["kv_cache_dtype"])
    batches, config = worker.read_batches(job), _config(job)
    ranges, routed = (_ranges_by_layer if job.get("partial") else _ranges_of_whole)(job, config, batches, found)
    gc.collect()  # the weights in memory are not needed to write
    scales = stored_scales.of_inputs(found.layers, ranges.inputs, catalog.of(found.config))
    of_cache = stored_scales.of_cache(cache, ranges.cache)
    emit(progress={"label": "writing the scales", "done": 0, "total": None})
    changed = stored_scales.replace(unified, {**scales, **of_cache})
    if of_cache:
        stored_scales.declare_cache(unified, cache)
    return {
        "input_scales": len(scales),
        "kv_scales": len(of_cache),
        "changed_scales": changed,
        "coverage": coverage.of_batches(batches, worker.row_limit(job, config)),
        **routed,
    }


def _ranges_of_whole(
    job: Mapping[str, Any], config: Any, batches: list[Any], found: Description
) -> tuple[Ranges, dict[str, Any]]:
    """Ranges that ModelOpt's quantizers record, and the tokens of each expert, with the whole model in memory."""
    import torch

    worker.import_libraries()
    from builder.quantize import stored_model

    where: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
    emit(progress={"label": "loading the checkpoint", "done": 0, "total": None})
    model = stored_model.load(Path(job["model"]), config, found.formats, dtype=_dtype(found), **where)
    _scale_inputs(model, Path(job["model"]), found, model.device)
    with torch.inference_mode():
        routed = _calibrate(model, batches, kv_cache.get(job["kv_cache_dtype"]))
    return calibrated.ranges(model, found.headers), routed.facts()


def _ranges_by_layer(
    job: Mapping[str, Any], config: Any, batches: list[Any], found: Description
) -> tuple[Ranges, dict[str, Any]]:
    """The same with one dequantized decoder layer in memory at a time, without ModelOpt. Results of finished layers are
    kept under the job's `partial`. UnsupportedError if keys and values of some layers can't be seen."""
    import torch

    from builder.quantize import expert_inputs, stored_model, streamed_calibration, streamed_worker

    emit(progress={"label": "opening the checkpoint", "done": 0, "total": None})
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    unified = Path(job["model"])
    model = stored_model.load_streamed(unified, config, found.formats, dtype=_dtype(found), device=device)
    expert_inputs.one_by_one(model.config)
    _scale_inputs(model.model, unified, found, device)
    ranges, facts = streamed_calibration.calibrate(model, batches, list(found.headers), Path(job["partial"]))
    streamed_worker.check_cache(found.config, kv_cache.get(job["kv_cache_dtype"]), ranges)
    return ranges, {name: facts[name] for name in ("experts", "experts_see_all") if name in facts}


def _config(job: Mapping[str, Any]) -> Any:
    """transformers' configuration of the model, without its quantization: it would look for ModelOpt's weights."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(job["model"], local_files_only=True, trust_remote_code=job["trust_remote_code"])
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _dtype(found: Description) -> Any:
    """The 16-bit dtype that the model is served in."""
    import torch

    return getattr(torch, dtypes.served(found.config))


def _scale_inputs(model: Any, unified: Path, found: Description, device: Any) -> None:
    """Multiplies the inputs of layers that have a pre-quantization scale (AWQ, SmoothQuant) by it, as the server does
    before it rounds them. device: where layers without weights will compute."""
    from builder.formats.arithmetic.dtypes import read

    stored, modules = Tensors(unified), dict(model.named_modules())
    for layer, number_format in found.layers.items():
        leaf = next((one.unified for one in number_format.tensors if one.name == "pre_quant_scale"), None)
        if leaf is None or f"{layer}.{leaf}" not in stored:
            continue
        if layer not in modules:
            raise UnsupportedError(
                f"The scales of {layer} can't be calibrated.",
                why=f"It has a pre-quantization scale, and in transformers it is no module of {type(model).__name__}.",
            )
        weight = modules[layer].weight
        scale = read(stored, f"{layer}.{leaf}").to(device if weight.is_meta else weight.device, weight.dtype)
        modules[layer].register_forward_pre_hook(lambda _, args, scale=scale: (args[0] * scale, *args[1:]))


def _calibrate(model: Any, batches: list[Any], cache: KvCacheFormat) -> experts.RoutedTokens:
    """Runs the batches through the model with quantizers that record ranges. Returns the tokens of each expert."""
    import modelopt.torch.quantization as mtq

    routed = experts.RoutedTokens()

    def forward(model: Any) -> None:
        nonlocal routed
        with experts.counted(model) as routed:
            for done, ids in enumerate(batches):
                emit(progress={"label": "calibrating", "done": done, "total": len(batches)})
                model.base_model(ids.to(model.device), use_cache=False)

    with worker.unsupported("calibrate"):
        mtq.quantize(model, quantizers.config_of_inputs(mtq, cache), forward)
    experts.widen_ranges(model, routed)
    return routed


def known(error: BaseException, job: Mapping[str, Any]) -> BuilderError | None:
    """The error to show for a problem that the user can solve; None for any other."""
    from builder.quantize import streamed_worker

    return streamed_worker.known(error, job) if job.get("partial") else worker.known(error, job)


if __name__ == "__main__":
    sys.exit(worker_main(sys.argv, run, known))
