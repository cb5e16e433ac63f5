"""ModelOpt's quantizers in a model: their configuration from number formats, and checks before they see data.

Works with ModelOpt 0.37 to 0.47. Imports ModelOpt and torch only inside functions.
"""

from __future__ import annotations

import copy
import glob
from collections.abc import Mapping, Sequence
from typing import Any

from builder.architectures import catalog, names
from builder.architectures.attention import attention_layers
from builder.core.errors import UnsupportedError
from builder.formats.assignment import ModelFormats
from builder.formats.base import NumberFormat
from builder.formats.kv_cache import KvCacheFormat
from builder.formats.registry import BF16, FP8, for_tensorrt_llm
from builder.quantize import modelopt

# ModelOpt 0.47 leaves these alone (configs/ptq/units/default_disabled_quantizers); 0.37 does not know them yet.
NEVER = ("*linear_attn.conv1d", "*linear_attn.in_proj_a", "*linear_attn.in_proj_b", "*linear_attn.in_proj_ba")


def config(mtq: Any, formats: ModelFormats, never: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration for `mtq.quantize`: the whole model's, the KV cache's quantizers, then those of single layers.

    never: further modules that must not be quantized.

    `quant_cfg` is a mapping up to ModelOpt 0.43 and a list from 0.44 on. In both a later entry wins.
    """
    made = formats.whole.modelopt(mtq)
    ours, cache = made["quant_cfg"], copy.deepcopy(formats.cache.modelopt(mtq))
    single = {
        f"{glob.escape(module)}.{part}_quantizer": settings
        for number_format, modules in formats.layers.items()
        for module in modules
        for part, settings in number_format.quantizers(mtq).items()
    } | {f"{module}.*_quantizer": None for module in (*map(glob.escape, never), *NEVER)}
    # transformers 5 joins a layer's experts in one module, whose quantizers have numbers (_QuantFusedExperts).
    kept = {experts for module in formats.modules(BF16) if (experts := names.experts_of(module))}
    single |= {f"{glob.escape(experts)}.*quantizer*": None for experts in sorted(kept)}
    if isinstance(ours, dict):
        ours.update({name: settings for name, settings in dict(cache).items() if name != "default"})
        ours.update({name: {"enable": False} if one is None else dict(one) for name, one in single.items()})
    else:
        ours.extend(entry for entry in cache if entry["quantizer_name"] != "*")
        ours.extend(
            {"quantizer_name": name, **({"enable": False} if one is None else {"cfg": dict(one)})}
            for name, one in single.items()
        )
    return made


def config_of_inputs(mtq: Any, cache: KvCacheFormat) -> dict[str, Any]:
    """The configuration for `mtq.quantize` that reads the ranges of inputs and of the KV cache; weights stay.

    FP8's quantizers record the largest magnitude, which is what the scale of an input is made of in every format.
    """
    made: dict[str, Any] = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    ours, entries = made["quant_cfg"], copy.deepcopy(cache.modelopt(mtq))
    if isinstance(ours, dict):
        ours.update({name: settings for name, settings in dict(entries).items() if name != "default"})
        del ours["*weight_quantizer"]
    else:
        ours.extend(entry for entry in entries if entry["quantizer_name"] != "*")
        ours[:] = [entry for entry in ours if entry["quantizer_name"] != "*weight_quantizer"]
    return made


def collecting_weights(model: Any) -> list[Any]:
    """The quantizers of weights that collect ranges now."""
    named = (one for name, one in model.named_modules() if "weight_quantizer" in name)
    return [one for one in named if getattr(one, "_if_calib", False) and one._calibrator is not None]


def finish_collected(weights: Sequence[Any]) -> list[Any]:
    """Ends the collection for those of these quantizers that have a range, and returns the others.

    ModelOpt (0.37 and 0.47, calib/max.py) reads every weight with each batch again, which finds the same: a third of
    the time of a calibration with rows of 256 tokens. Experts that no token has reached have no range yet in 0.37.
    """
    rest = []
    for one in weights:
        if one._calibrator.compute_amax() is None:
            rest.append(one)
        else:
            one.disable_calib()
    return rest


def share_ranges(model: Any, formats: ModelFormats) -> None:
    """Gives projections that are served as one layer (q, k and v; gate and up) one range, where the exporter does not.

    TensorRT-LLM would otherwise round such weights a second time, to the largest scale of the layer.
    """
    from modelopt.torch.export.quant_utils import preprocess_linear_fusion

    modules, architecture = dict(model.named_modules()), catalog.of(model.config.to_dict())
    for number_format, layers in by_format(model, formats).items():
        fused: dict[tuple[str, str], list[Any]] = {}
        for name in layers if number_format.prepare_export else ():
            parent, _, leaf = name.rpartition(".")
            fused.setdefault((parent, names.fused_name(architecture, name) or leaf), []).append(modules[name])
        for members in fused.values():
            preprocess_linear_fusion(members)


def round_weights(model: Any, formats: ModelFormats) -> None:
    """Rounds the weights of FP8 layers as ModelOpt's TensorRT-LLM exporter does, which divides by the scale in float32.

    Its Hugging Face exporter divides in BF16 if the scale is one number, so one weight of fifty would get the
    neighbouring code; its simulation multiplies by the reciprocal, which rounds some ties otherwise. A weight that
    already has a value of the format gets the same code in all three.
    """
    modules = dict(model.named_modules())
    for number_format, layers in by_format(model, formats).items():
        for name in layers if number_format.prepare_export else ():
            module = modules[name]
            module.weight.copy_(number_format.round_weight(module.weight, module.weight_quantizer.amax))
    if formats.whole.prepare_export:
        for experts in modules.values():
            for weight, quantizer in _joined_weights(experts):
                weight.copy_(formats.whole.round_weight(weight, quantizer.amax))


def _joined_weights(module: Any) -> list[tuple[Any, Any]]:
    """(weight, quantizer) of each expert's part of the parameters of a module that holds all experts, those that are
    quantized; [] for any other module."""
    if not hasattr(module, "down_proj_weight_quantizers"):
        return []
    return [(weight, one) for weight, one in module.iter_weights_for_calibration() if one.is_enabled]


def by_format(model: Any, formats: ModelFormats) -> dict[NumberFormat, list[str]]:
    """{format: its linear layers} of a model with ModelOpt's quantizers, without those that are off."""
    single = {module: one for one, modules in formats.layers.items() for module in modules}
    found: dict[NumberFormat, list[str]] = {}
    for name, module in model.named_modules():
        if _quantizes_weight(module):
            found.setdefault(single.get(name, formats.whole), []).append(name)
    return found


def check(model: Any, formats: ModelFormats) -> dict[str, int]:
    """Counts the quantizers before they see data. UnsupportedError for what would be quantized wrongly in silence."""
    modules = dict(model.named_modules())
    linears = {name: module.weight.shape for name, module in modules.items() if _quantizes_weight(module)}
    for one, layers in by_format(model, formats).items():
        modelopt.check_sizes({name: linears[name] for name in layers}, one)
    _check_not_zero({name: modules[name].weight for name in linears})
    _check_not_joined(model, formats.whole)
    _check_single_layers(model, formats, linears)
    if not linears and formats.whole is not BF16 and not _quantizes_experts(modules):
        raise UnsupportedError(f"ModelOpt finds nothing to quantize in {type(model).__name__}.", hint=ANOTHER)
    quantized = sum(len(layers) for one, layers in formats.layers.items() if one is not BF16)
    return {
        "quantized_linears": len(linears) - quantized,
        **{f"{one.label}_linears": len(formats.modules(one)) for one in dict.fromkeys((FP8, BF16, *formats.layers))},
        "kv_scales": _check_cache(model, formats),
    }


ANOTHER = "Choose another model."


def _quantizes_weight(module: Any) -> bool:
    return hasattr(module, "weight") and getattr(getattr(module, "weight_quantizer", None), "is_enabled", False)


def _quantizes_experts(modules: Mapping[str, Any]) -> bool:
    """Whether there are weights to quantize in modules that hold all experts of a mixture, as in transformers 5."""
    return any(
        ".experts." in name and "weight_quantizer" in name and getattr(one, "is_enabled", False)
        for name, one in modules.items()
    )


def _check_cache(model: Any, formats: ModelFormats) -> int:
    """The number of quantizers of the KV cache that are on."""
    ends = ("k_bmm_quantizer", "v_bmm_quantizer")
    found = [module for name, module in model.named_modules() if name.endswith(ends) and module.is_enabled]
    layers = attention_layers(catalog.with_common_keys(model.config.to_dict()))
    if formats.cache.quantized and len(found) < 2 * layers:
        raise UnsupportedError(
            f"ModelOpt can't quantize the KV cache of {type(model).__name__}.",
            why=f"It put {len(found)} quantizers into {layers} layers' attention.",
            hint="Leave the cache in the model's own type: --kv-cache-dtype auto",
        )
    return len(found)


def _check_single_layers(model: Any, formats: ModelFormats, linears: Mapping[str, Sequence[int]]) -> None:
    """UnsupportedError for layers with a format of their own that the model does not have as modules."""
    modules = dict(model.named_modules())
    joined = _joined_experts(model, formats.modules(BF16))
    lost = [n for n in formats.modules(BF16) if n in linears or not (n in joined or _is_own(modules, n))]
    lost += [n for one, layers in formats.layers.items() if one is not BF16 for n in layers if n not in linears]
    if lost:
        raise UnsupportedError(
            f"{len(lost)} layers that should be kept are not modules of their own in {type(model).__name__}: "
            f"{', '.join(lost[:5])}.",
            why="transformers joins the experts of a mixture in one module, which ModelOpt quantizes as a whole.",
            hint="Keep all experts of a layer, with a pattern such as '*.layers.0.mlp.experts.*', or none.",
        )


def _check_not_joined(model: Any, one: NumberFormat) -> None:
    """UnsupportedError for a format with scales of inputs and experts in one module: ModelOpt searches these scales for
    linear layers only, and its exporter fails on the others (0.47, with transformers 5)."""
    experts = [(name, module) for name, module in model.named_modules() if name.endswith("experts")]
    joined = [name for name, module in experts if any(p.dim() == 3 for p in module.parameters(recurse=False))]
    if one.scales_inputs and joined:
        raise UnsupportedError(
            f"ModelOpt can't quantize the experts of {type(model).__name__} to {one.title}.",
            why=f"transformers joins them in one module ({joined[0]}), and {one.title} needs a scale for each input.",
            hint="Choose one without such scales that the card runs (`builder gpus`): --format "
            + ", ".join(other.name for other in for_tensorrt_llm() if not other.scales_inputs),
        )


def _is_own(modules: Mapping[str, Any], name: str) -> bool:
    """Whether ModelOpt knows this layer by its name."""
    return hasattr(modules.get(name), "weight_quantizer")


def _joined_experts(model: Any, kept: Sequence[str]) -> set[str]:
    """Those kept layers that are experts in one module, if all projections of all experts of that module are kept."""
    modules, architecture = dict(model.named_modules()), catalog.of(model.config.to_dict())
    members: dict[str, list[str]] = {}
    for name in kept:
        members.setdefault(names.experts_of(name) or "", []).append(name)
    whole = set[str]()
    for experts, layers in members.items():
        quantizers = getattr(modules.get(experts), "down_proj_weight_quantizers", None)
        roles = [names.role(architecture, name) for name in layers]
        if quantizers is not None and all(roles.count(one) == len(quantizers) for one in ("gate", "up", "down")):
            whole.update(layers)
    return whole


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
