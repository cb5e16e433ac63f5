"""The runners in transformers: `bf16` (the snapshot), `simulated` (ModelOpt), `checkpoint` (the unified layout).

| runner | weights | inputs of linear layers | KV cache |
| bf16 | the model's | - | - |
| simulated | NVFP4 by ModelOpt, calibrated as the checkpoint was | NVFP4, dynamic blocks | FP8, its own amax |
| checkpoint | dequantized from `unified/` | NVFP4 under its input_scale | FP8 under the scales that the target serves |
The table shows NVFP4; a layer in another format (builder/formats) is rounded as that format says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from builder.checkpoint.layouts import hf_quant_config
from builder.core.errors import IntegrityError, NotMeasurable, UnsupportedError
from builder.core.safetensors_io import Tensors
from builder.evaluate.datasets import Ids
from builder.evaluate.runners import scoring
from builder.evaluate.runners.layered import Layered, layered
from builder.formats import kv_cache
from builder.formats.arithmetic.dtypes import read
from builder.formats.assignment import of_job
from builder.formats.base import NumberFormat
from builder.formats.declared import DeclaredFormats, declared
from builder.formats.kv_cache import KvCacheFormat
from builder.model import dtypes, streamed
from builder.model import loading as model_loading
from builder.model.files import CONFIG, json_object, parse_config
from builder.model.hashed_files import SourceFiles
from builder.quantize import calibrated, expert_inputs, stored_model

LOW = "low"  # a job's `memory` for a model that is computed layer by layer
ATTENTION = "builder_kv_cache"  # the name of our attention function in transformers


class Causal:
    """A causal language model of transformers. Texts are padded on the right, which no earlier token sees."""

    def __init__(self, model: Any, batch_tokens: int) -> None:
        self.model = model.eval()
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.batch_tokens = scoring.tokens_on(model.device, batch_tokens, self.vocab_size)

    def logits(self, batch: Sequence[Ids]) -> Iterator[Tensor]:
        logits = self.model(scoring.padded(batch).to(self.model.device), use_cache=False).logits
        for row, ids in zip(logits, batch, strict=True):
            yield row[: len(ids)]


@contextmanager
def bf16(job: Mapping[str, Any]) -> Iterator[Causal | Layered]:
    """The model as it is in the snapshot, whole or, if the job's `memory` is low, layer by layer. With CUDA, accelerate
    spreads a whole one over GPUs and host memory (not tested)."""
    if job.get("memory") == LOW:
        with layered():
            model = streamed.open_model(job, _device(), dtype=dtype_of(job, _stated(job)))
        yield Layered(model, job["batch_tokens"])
    else:
        yield Causal(model_loading.load(job, dtype=dtype_of(job, "auto"), **places()), job["batch_tokens"])
    SourceFiles.of_job(job).check_unchanged()


@contextmanager
def simulated(job: Mapping[str, Any]) -> Iterator[Causal]:
    """ModelOpt's fake-quantized model, calibrated again on the checkpoint's rows: independent of the files written."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import unified_export_hf

    from builder.quantize import quantizers, worker
    from builder.quantize.simulation import enable_cpu_simulation

    model, rows = worker.load({**job, **job["calibration"]})
    formats = of_job({**job["calibration"], "kv_cache_dtype": job["kv_cache_dtype"]})
    worker.calibrate(model, rows, formats)
    with torch.inference_mode():
        quantizers.round_weights(model, formats)
    if not torch.cuda.is_available():
        enable_cpu_simulation()
    unified_export_hf.requantize_resmooth_fused_llm_layers(model)  # q, k and v share a range, as in the checkpoint
    dtype = dtype_of(job, None)
    model = model if dtype is None else model.to(dtype)
    mtq.fold_weight(model)  # quantized once, not in each forward
    yield Causal(model, job["batch_tokens"])
    SourceFiles.of_job(job).check_unchanged()


@contextmanager
def checkpoint(job: Mapping[str, Any]) -> Iterator[Causal | Layered]:
    """The unified layout on disk, dequantized here. `kv_cache_dtype` auto keeps the KV cache in the dtype of
    computation; otherwise it is in the format that the checkpoint declares, under the scales of `cache_scales`."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    unified = Path(job["unified"])
    config = AutoConfig.from_pretrained(job["model"], trust_remote_code=job["trust_remote_code"])
    if config.tie_word_embeddings and not json_object(unified / CONFIG).get("tie_word_embeddings", True):
        config.tie_word_embeddings = False  # a rotated model has an output layer of its own (transform/spinquant.py)
    stored = Tensors(unified)
    quantization = hf_quant_config(unified)["quantization"]
    formats = declared(quantization)
    dtype = dtype_of(job, None) or torch.bfloat16
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": ATTENTION}
    runner: Causal | Layered
    if job.get("memory") == LOW:
        with layered():
            by_layer = stored_model.load_streamed(unified, config, formats, device=_device(), **options)
        model, runner = by_layer.model, Layered(by_layer, job["batch_tokens"])
    else:
        model = stored_model.load(unified, config, formats, **options, **places())
        runner = Causal(model, job["batch_tokens"])
    _quantize_inputs(model, stored, formats)
    _quantize_cache(model, cache_scales(stored, quantization, job))
    yield runner


def dtype_of(job: Mapping[str, Any], default: Any) -> Any:
    """The dtype of computation: the recipe's. By default the model's own on a GPU and, as in the reference executor,
    float32 on a CPU, so that runners differ only in what they quantize."""
    if job["dtype"] != "auto":
        return getattr(torch, job["dtype"])
    return default if torch.cuda.is_available() else torch.float32


def _stated(job: Mapping[str, Any]) -> Any:
    """The dtype that config.json states, as transformers' "auto" takes it; None if it states none."""
    stated = dtypes.stated(parse_config((Path(job["model"]) / CONFIG).read_bytes(), job["model"]))
    return getattr(torch, stated) if stated else None


def _device() -> torch.device:
    """Where a model is computed layer by layer."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def places() -> dict[str, Any]:
    return {"device_map": "auto"} if torch.cuda.is_available() else {}


def _quantize_inputs(model: Any, stored: Tensors, formats: DeclaredFormats) -> None:
    """Makes each quantized linear layer round its input as its format says, also those that are parts of joined
    experts. NotMeasurable if one is neither."""
    modules, place_of = dict(model.named_modules()), expert_inputs.places(model)
    last: dict[str, Any] = {}
    experts: dict[str, dict[tuple[str, int], list[RoundedInput]]] = {}
    for name, number_format in stored_model.linears(stored, formats).items():
        rounded = RoundedInput(number_format, stored_model.tensors_of(stored, name, number_format), last)
        place, _, number = place_of(name).partition("#")
        module, _, leaf = place.rpartition(".")
        if isinstance(linear := modules.get(place), torch.nn.Linear):
            linear.register_forward_pre_hook(rounded)
        elif number and module in modules and expert_inputs.is_joined(modules[module]):
            experts.setdefault(module, {}).setdefault((leaf, int(number)), []).append(rounded)
        else:
            raise NotMeasurable(
                f"{name} is not a linear layer in transformers' {type(model).__name__}.",
                why="transformers stores the experts of a mixture in one tensor, and how it multiplies with this one "
                "is not known here.",
                hint="Measure ModelOpt's simulation or the served model: --runner simulated, --runner served",
            )
    if experts:
        expert_inputs.one_by_one(model.config)
    for module, inputs in experts.items():
        _check_alike(module, inputs)
        modules[module].forward = expert_inputs.replaced(modules[module], _rounding(inputs))


def _rounding(inputs: Mapping[tuple[str, int], Sequence[RoundedInput]]) -> expert_inputs.Each:
    """Rounds the inputs of those experts' projections that are quantized."""

    def each(leaf: str, expert: int, values: Tensor) -> Tensor:
        rounded = inputs.get((leaf, expert))
        return rounded[0](None, (values,))[0] if rounded else values

    return each


def _check_alike(module: str, inputs: Mapping[tuple[str, int], Sequence[RoundedInput]]) -> None:
    """NotMeasurable if projections with one multiplication, gate and up, round their input differently."""
    for (leaf, expert), found in inputs.items():
        projections = 2 if leaf.startswith("gate_up") else 1
        if len(found) != projections or len({one.key for one in found}) != 1:
            raise NotMeasurable(
                f"Gate and up of expert {expert} in {module} round their input differently.",
                why="transformers multiplies with both at once, so both get one input.",
                hint="Measure the served model: --runner served",
            )


class RoundedInput:
    """Rounds a linear layer's input; `key` tells how. Consecutive layers with the same input (q, k, v; gate, up) share
    `last`, so it is rounded once."""

    def __init__(self, number_format: NumberFormat, stored: Mapping[str, Tensor], last: dict[str, Any]) -> None:
        calibrated = [one.name for one in number_format.tensors if one.calibrated and one.name in stored]
        self._format, self._last = number_format, last
        self._stored = {name: stored[name] for name in calibrated}
        raw = [stored[name].reshape(-1).view(torch.uint8).numpy().tobytes() for name in calibrated]
        self.key = (number_format.name, *raw)

    def __call__(self, layer: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        last = self._last
        if last.get("input") is not inputs[0] or last["key"] != self.key:
            scales = {name: scale.to(inputs[0].device) for name, scale in self._stored.items()}
            rounded = self._format.round_input(inputs[0], scales)
            last.update(input=inputs[0], key=self.key, rounded=rounded)
        return (last["rounded"],)


CacheScales = tuple[Tensor, Tensor, KvCacheFormat]  # of keys and values, and the format that they are stored in


def cache_scales(stored: Tensors, quantization: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, CacheScales]:
    """{attention, as the checkpoint names it: its scales}, {} where the job or the checkpoint has no quantized cache.

    The job's `engine_cache`: the scales are those of an engine (KvCacheFormat.engine_scales), which may lie far from
    the ones in the Hugging Face layout: an engine's FP8 cache has none below 1. What is measured is what is served.
    IntegrityError for a layer with one of its two scales."""
    cache = kv_cache.of_checkpoint(quantization.get("kv_cache_quant_algo"))
    if not (cache.quantized and kv_cache.get(job["kv_cache_dtype"]).quantized):
        return {}
    found: dict[str, dict[str, Tensor]] = {}
    for key in stored:
        module, _, leaf = key.rpartition(".")
        if leaf in ("k_scale", "v_scale"):
            found.setdefault(module.rpartition(".")[0], {})[leaf] = read(stored, key).reshape(())
    if halves := [name for name, scales in found.items() if len(scales) < 2]:
        raise IntegrityError(
            f"The checkpoint has only {next(iter(found[halves[0]]))} of k_scale and v_scale of {halves[0]}.",
            why="The quantized KV cache of a layer needs both.",
            hint="Make or download the checkpoint again.",
        )
    scales = {name: (both["k_scale"], both["v_scale"]) for name, both in found.items()}
    if job.get("engine_cache"):
        scales = {name: cache.engine_scales(*both) for name, both in scales.items()}
    return {name: (*both, cache) for name, both in scales.items()}


def _quantize_cache(model: Any, scales: Mapping[str, CacheScales]) -> None:
    """Sets the format and the scales that `attend` reads."""
    modules, module_of = dict(model.named_modules()), calibrated.renamed(model)
    for name, found in scales.items():
        attention = modules.get(module_of(f"{name}.k_proj.weight").rpartition(".")[0])
        if attention is None:
            raise UnsupportedError(f"The scales of {name} belong to no attention of {type(model).__name__}.")
        attention.k_scale, attention.v_scale, attention.kv_cache_format = found


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """transformers' sdpa over keys (after RoPE) and values rounded as in the checkpoint's KV cache."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for_cache = [(key, getattr(module, "k_scale", None)), (value, getattr(module, "v_scale", None))]
    key, value = (x if s is None else module.kv_cache_format.round(x, s.to(x.device)) for x, s in for_cache)
    return sdpa_attention_forward(module, query, key, value, mask, **options)
