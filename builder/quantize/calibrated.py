"""The ranges that ModelOpt's quantizers hold after a calibration, by the names of the checkpoint's tensors.

transformers 5 renames tensors as it loads them (backbone.layers is model.layers in Nemotron-H) and joins the experts of
a mixture in one module, to which ModelOpt 0.47 gives one quantizer for the inputs of all (quantization/plugins/
huggingface.py, _QuantFusedExperts). Imports nothing heavy; the model comes with its libraries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from builder.quantize.ranges import Ranges

# The part of an expert's linear layer in a name: of one expert, or of the parameter that holds all of them.
EXPERT = re.compile(r"(?P<experts>.+?\bexperts)(?:\.\d+)?\.(?P<projection>\w+)")


def ranges(model: Any, tensors: Iterable[str]) -> Ranges:
    """What the calibrated quantizers of a model recorded.

    tensors: the names of the checkpoint, in which each expert has tensors of its own. A layer that no token reached, or
    whose input is not quantized, is absent from the result.
    """
    modules = dict(model.named_modules())

    def cache_of(attention: str) -> tuple[float, float] | None:
        quantizers = (getattr(modules.get(attention), f"{kind}_bmm_quantizer", None) for kind in "kv")
        keys, values = map(_amax, quantizers)
        return None if keys is None or values is None else (keys, values)

    return by_checkpoint_names(model, tensors, lambda place: _amax(_input_quantizer(modules, place)), cache_of)


def by_checkpoint_names(
    model: Any,
    tensors: Iterable[str],
    input_of: Callable[[str], float | None],
    cache_of: Callable[[str], tuple[float, float] | None],
) -> Ranges:
    """Ranges by the names of the checkpoint's tensors, in which experts are apart.

    input_of: that of the inputs of a linear layer of the model, by its name there. cache_of: those of the keys and
    values of an attention. None where there are none.
    """
    module_of = renamed(model)
    inputs: dict[str, float] = {}
    cache: dict[str, tuple[float, float]] = {}
    for tensor in tensors:
        if not tensor.endswith(".weight"):
            continue
        layer, place = tensor.removesuffix(".weight"), module_of(tensor)
        if (amax := input_of(place)) is not None:
            inputs[layer] = amax
        if (both := cache_of(place.rpartition(".")[0])) is not None:
            cache[layer.rpartition(".")[0]] = both
    return Ranges(inputs, cache)


def layers(model: Any, tensors: Iterable[str]) -> set[str]:
    """Those linear layers whose weights ModelOpt quantizes. tensors: the names of the checkpoint."""
    modules, module_of = dict(model.named_modules()), renamed(model)
    found = set()
    for tensor in (name for name in tensors if name.endswith(".weight")):
        quantizers = _weight_quantizers(modules, module_of(tensor))
        if any(getattr(one, "is_enabled", False) for one in quantizers):
            found.add(tensor.removesuffix(".weight"))
    return found


def renamed(model: Any) -> Callable[[str], str]:
    """A function from a weight's name in the checkpoint to that of the module or parameter in the loaded model."""
    conversions = getattr(model, "_weight_conversions", None)
    if not conversions:  # transformers 4 keeps the names
        return lambda tensor: tensor.removesuffix(".weight")
    from transformers import core_model_loading as loading

    converters = [one for one in conversions if isinstance(one, loading.WeightConverter)]
    renamings = [one for one in conversions if one not in converters]
    return lambda tensor: loading.rename_source_key(tensor, renamings, converters)[0].removesuffix(".weight")


def _input_quantizer(modules: Mapping[str, Any], place: str) -> Any:
    """The quantizer of the inputs of a linear layer, or of all experts' inputs to its projection."""
    own = getattr(modules.get(place), "input_quantizer", None)
    experts, part = _joined(modules, place)
    return own if own is not None else getattr(experts, f"{part}_input_quantizer", None)


def _weight_quantizers(modules: Mapping[str, Any], place: str) -> list[Any]:
    """The quantizer of the weight of a linear layer, or those of all experts' weights of its projection."""
    own = getattr(modules.get(place), "weight_quantizer", None)
    experts, part = _joined(modules, place)
    return [own] if own is not None else list(getattr(experts, f"{part}_weight_quantizers", []))


def _joined(modules: Mapping[str, Any], place: str) -> tuple[Any, str]:
    """The module that holds the experts of a layer, and which of its two parameters this one is a part of."""
    found = EXPERT.fullmatch(place)
    if found is None:
        return None, ""
    experts, last = modules.get(found["experts"]), found["projection"] == "down_proj"
    return experts, "down_proj" if last else getattr(experts, "_first_proj_attr", "gate_up_proj")


def _amax(quantizer: Any) -> float | None:
    """The largest magnitude that a quantizer saw; None if it is off or saw nothing."""
    if quantizer is None or not quantizer.is_enabled or quantizer.amax is None:
        return None
    return float(quantizer.amax.float().max())
