"""Worker process of `--calibrate-scales`: python -m builder.quantize.scales_worker JOB.json

Reads the ranges of inputs, keys and values from the dequantized model, as max calibration does, and writes scales.
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
from builder.core.errors import UnsupportedError
from builder.core.process import emit, worker_main
from builder.core.safetensors_io import Tensors
from builder.formats import kv_cache
from builder.formats.kv_cache import KvCacheFormat
from builder.model import dtypes
from builder.quantize import calibrated, experts, quantizers, stored_scales, worker
from builder.quantize.device import check_device


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Calibrates, and writes the scales into the checkpoint's files. Returns facts."""
    import torch

    unified = Path(job["model"])
    check_device(job.get("gpus", ()))
    found, cache = describe_directory(unified), kv_cache.get(job["kv_cache_dtype"])
    batches = worker.read_batches(job)
    worker.import_libraries()
    model = _load(unified, found, trust_remote_code=job["trust_remote_code"])
    limit = worker.row_limit(job, model.config)
    with torch.inference_mode():
        routed = _calibrate(model, batches, found, cache)
    ranges = calibrated.ranges(model, found.headers)
    scales = stored_scales.of_inputs(found.layers, ranges.inputs, catalog.of(found.config))
    of_cache = stored_scales.of_cache(cache, ranges.cache)
    del model  # the weights in memory are not needed to write
    gc.collect()
    emit(progress={"label": "writing the scales", "done": 0, "total": None})
    changed = stored_scales.replace(unified, {**scales, **of_cache})
    if of_cache:
        stored_scales.declare_cache(unified, cache)
    return {
        "input_scales": len(scales),
        "kv_scales": len(of_cache),
        "changed_scales": changed,
        "coverage": coverage.of_batches(batches, limit),
        **routed.facts(),
    }


def _load(unified: Path, found: Description, *, trust_remote_code: bool) -> Any:
    """The dequantized model in the 16-bit dtype that it is served in."""
    import torch
    from transformers import AutoConfig

    from builder.quantize import stored_model

    emit(progress={"label": "loading the checkpoint", "done": 0, "total": None})
    config = AutoConfig.from_pretrained(unified, local_files_only=True, trust_remote_code=trust_remote_code)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers would look for ModelOpt's weights
    where: dict[str, Any] = {"device_map": "auto"} if torch.cuda.is_available() else {}
    dtype = getattr(torch, dtypes.served(found.config))
    model = stored_model.load(unified, config, found.formats, dtype=dtype, **where)
    _scale_inputs(model, unified, found)
    return model


def _scale_inputs(model: Any, unified: Path, found: Description) -> None:
    """Multiplies the inputs of layers that have a pre-quantization scale (AWQ, SmoothQuant) by it, as the server does
    before it rounds them."""
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
        scale = read(stored, f"{layer}.{leaf}").to(modules[layer].weight)
        modules[layer].register_forward_pre_hook(lambda _, args, scale=scale: (args[0] * scale, *args[1:]))


def _calibrate(model: Any, batches: list[Any], found: Description, cache: KvCacheFormat) -> experts.RoutedTokens:
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


if __name__ == "__main__":
    sys.exit(worker_main(sys.argv, run, worker.known))
