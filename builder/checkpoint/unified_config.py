"""The configuration of ModelOpt's Hugging Face layout: hf_quant_config.json, and the same in config.json. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from builder.formats.base import NumberFormat, Scheme
from builder.formats.declared import MIXED
from builder.formats.kv_cache import KvCacheFormat

METHOD = "modelopt"
DESCRIBED = ("FP8", "NVFP4", "W4A16_NVFP4")  # the formats of whole models for which ModelOpt writes config_groups
SHARED = ("num_bits", "type", "group_size")  # what ModelOpt says of a group, beside `dynamic`


def quantization(
    formats: Mapping[str, NumberFormat], unquantized: Iterable[str], cache: KvCacheFormat
) -> dict[str, Any]:
    """`quantization` of hf_quant_config.json for {quantized linear layer: its format}, as ModelOpt writes it."""
    used = set(formats.values())
    kv = {"kv_cache_quant_algo": cache.quant_algo}
    if len(used) == 1 and (one := used.pop()).whole_model:
        entry = one.layer_entry
        rest = {key: value for key, value in entry.items() if key != "quant_algo"}
        return {"quant_algo": one.quant_algo, **kv, **rest, "exclude_modules": excluded(unquantized, sorted(formats))}
    layers = {name: one.layer_entry for name, one in formats.items()}
    return {"quant_algo": MIXED if formats else None, **kv, "quantized_layers": layers}


def excluded(unquantized: Iterable[str], quantized: Sequence[str]) -> list[str]:
    """The entries of exclude_modules for modules in the model's order: the shortest prefix of each, with a star, that
    no quantized layer begins with. quantized: sorted.

    ModelOpt 0.47, export/quant_utils.py, _prefix_wildcard_summarize_exclude_modules: an earlier entry that covers a
    module is not repeated.
    """
    found: set[str] = set()
    for module in unquantized:
        entry = next((one for one in _patterns(module) if one in found or not _begins(quantized, one)), module)
        found.add(entry)
    return sorted(found)


def _patterns(module: str) -> Iterator[str]:
    """`a*`, `a.*`, `a.b*`, `a.b.*` of a module a.b.c."""
    parts = module.split(".")
    for n in range(1, len(parts)):
        yield ".".join(parts[:n]) + "*"
        yield ".".join(parts[:n]) + ".*"


def _begins(quantized: Sequence[str], pattern: str) -> bool:
    """Whether a quantized layer begins with the pattern's prefix."""
    prefix = pattern[:-1]
    at = bisect_left(quantized, prefix)
    return at < len(quantized) and quantized[at].startswith(prefix)


def block(document: Mapping[str, Any], formats: Mapping[str, NumberFormat]) -> dict[str, Any]:
    """quantization_config of config.json for a hf_quant_config.json (ModelOpt 0.47, export/convert_hf_config.py)."""
    stated = document["quantization"]
    grouped: dict[NumberFormat, list[str]] = {}
    for module, one in formats.items():
        grouped.setdefault(one, []).append(module)
    mixed = stated["quant_algo"] == MIXED
    described = mixed or stated["quant_algo"] in DESCRIBED
    groups = {
        f"group_{n}": {**_group(one.compressed_tensors), "targets": sorted(modules) if mixed else ["Linear"]}
        for n, (one, modules) in enumerate(grouped.items())
        if one.compressed_tensors is not None
    }
    layers = {"quantized_layers": stated["quantized_layers"]} if mixed else {}
    cache = stated.get("kv_cache_quant_algo")
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"} if cache == "FP8" else cache
    return {
        **({"config_groups": groups} if described and len(groups) == len(grouped) else {}),
        **layers,
        "ignore": stated.get("exclude_modules") or [],
        "quant_algo": stated["quant_algo"],
        **({"kv_cache_scheme": scheme} if cache else {}),
        "producer": document["producer"],
        "quant_method": METHOD,
    }


def _group(scheme: Scheme) -> dict[str, Any]:
    def arguments(given: Mapping[str, Any]) -> dict[str, Any]:
        channel = {"strategy": "channel"} if given.get("strategy") == "channel" else {}
        return {"dynamic": False, **{key: given[key] for key in SHARED if key in given}, **channel}

    inputs = {} if scheme.inputs is None else {"input_activations": arguments(scheme.inputs)}
    return {**inputs, "weights": arguments(scheme.weights)}
