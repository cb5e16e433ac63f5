"""quantization_config of compressed-tensors: which linear layer is in which format. Pure.

The library is compressed_tensors 0.18; files named in comments are its own.

    {"config_groups": {"group_0": {"targets": ["Linear"], "format": ..., "weights": {...}, "input_activations": {...}}},
     "ignore": ["lm_head"], "kv_cache_scheme": {...} or null, "format": ..., "quant_method": "compressed-tensors"}
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from builder.core.errors import IntegrityError, UnsupportedError
from builder.formats import kv_cache, registry
from builder.formats.base import NumberFormat, Scheme
from builder.formats.declared import REGEX, DeclaredFormats
from builder.formats.kv_cache import KvCacheFormat
from builder.formats.registry import BF16

METHOD = "compressed-tensors"
VERSION = "0.18.0"  # of the library that this module was compared with
# The fields of QuantizationArgs and their defaults, as they are written for a weight (quantization/quant_args.py).
ARGUMENTS: Mapping[str, Any] = {
    "actorder": None,
    "block_structure": None,
    "dynamic": False,
    "group_size": None,
    "num_bits": 8,
    "observer": "memoryless_minmax",
    "observer_kwargs": {},
    "scale_dtype": None,
    "strategy": None,
    "symmetric": True,
    "type": "int",
    "zp_dtype": None,
}
# What decides how tensors are read. The others say how the numbers were found.
MEANING = ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic", "block_structure")
MIXED = "mixed-precision"
SHAPE = "weight_shape"  # a tensor beside a packed weight: outputs and inputs before it was packed
# Older names of the same storage (compressors/naive_quantized/base.py: one class, three names).
SAME_COMPRESSOR = {"naive-quantized": ("float-quantized", "int-quantized")}
LINEAR = ("Linear", "LinearBase")  # classes that a target can name; LinearBase is vLLM's
KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "observer": "static_minmax"}


def document(
    formats: Mapping[str, NumberFormat], unquantized: Iterable[str], cache: KvCacheFormat, head: str = "lm_head"
) -> dict[str, Any]:
    """quantization_config for {linear layer: its format}. `unquantized` are the other linear layers, the output layer
    `head` among them even where the file does not hold it (tied embeddings).

    UnsupportedError for a format that compressed-tensors lacks.
    """
    grouped: dict[NumberFormat, list[str]] = {}
    for module, one in formats.items():
        grouped.setdefault(one, []).append(module)
    kept = [*dict.fromkeys([*unquantized, head])]
    # vLLM looks a fused layer up by its class before it looks at its parts' names, so Linear stands for one format only
    # (model_executor/layers/quantization/compressed_tensors/utils.py, find_matched_target).
    several = len(grouped) > 1
    if cache.quantized and not cache.compressed_tensors:
        raise UnsupportedError(
            f"compressed-tensors has no {cache.title}.", why="It has an FP8 KV cache.", hint="--to unified"
        )
    groups = {
        f"group_{n}": _group(_scheme(one), _targets(modules, [*formats, *kept]) if several else ["Linear"])
        for n, (one, modules) in enumerate(grouped.items())
    }
    compressors = {group["format"] for group in groups.values()}
    return {
        "config_groups": groups,
        "format": compressors.pop() if len(compressors) == 1 else MIXED if compressors else "dense",
        "global_compression_ratio": None,
        "ignore": sorted(kept),
        "kv_cache_scheme": {**ARGUMENTS, **KV_CACHE} if cache.quantized else None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": VERSION,
    }


def _scheme(one: NumberFormat) -> Scheme:
    if one.compressed_tensors is None:
        known = ", ".join(f.name for f in registry.all_formats().values() if f.compressed_tensors)
        raise UnsupportedError(
            f"compressed-tensors has no format like {one.title}.", why=f"It has: {known}.", hint="--to unified"
        )
    return one.compressed_tensors


def _group(scheme: Scheme, targets: Sequence[str]) -> dict[str, Any]:
    inputs = scheme.inputs
    return {
        "format": scheme.compressor,
        "input_activations": None if inputs is None else _arguments(inputs),
        "output_activations": None,
        "targets": list(targets),
        "weights": _arguments(scheme.weights),
    }


def _arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """All fields of QuantizationArgs. Ranges that are found anew for each input need no observer."""
    return {**ARGUMENTS, **({"observer": None} if given.get("dynamic") is True else {}), **given}


def _targets(modules: Sequence[str], known: Collection[str]) -> list[str]:
    """The modules by name; one regular expression for those that differ in numbers only, where it matches no other."""
    templates: dict[str, list[str]] = {}
    for module in known:
        templates.setdefault(_template(module), []).append(module)
    chosen, found = set(modules), []
    for module in modules:
        template = _template(module)
        same = templates[template]
        found.append(f"{REGEX}{template}$" if len(same) > 1 and chosen.issuperset(same) else module)
    return list(dict.fromkeys(found))


def _template(module: str) -> str:
    """A regular expression for the names that differ from this one in numbers only."""
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in module.split("."))


def declared(quantization: Mapping[str, Any], modules: Collection[str]) -> DeclaredFormats:
    """What a quantization_config declares for the linear layers `modules`.

    UnsupportedError for a format, a transform or a status that is not supported, IntegrityError if it is not valid.
    """
    check_status(quantization)
    groups = _checked_groups(quantization)
    formats = {name: format_of(group, quantization.get("format")) for name, group in groups.items()}
    ignored = _Entries(_strings(quantization.get("ignore") or [], "ignore"))
    targets = {name: _Entries(group.get("targets") or []) for name, group in groups.items()}
    found: dict[str, NumberFormat] = {}
    for module in modules:
        name = None if ignored.names(module) or ignored.matches(module) else _group_of(module, targets)
        if name is not None and formats[name] is not BF16:
            found[module] = formats[name]
    used = set(found.values())
    if len(used) == 1:
        others = [*(module for module in modules if module not in found), *ignored.exact]
        return DeclaredFormats(used.pop(), {}, tuple(dict.fromkeys(others)))
    return DeclaredFormats(None, found, ())


def cache_of(quantization: Mapping[str, Any]) -> KvCacheFormat:
    """The format of the KV cache that a quantization_config declares. UnsupportedError for one that is unknown here."""
    scheme = quantization.get("kv_cache_scheme")
    if scheme is None:
        return kv_cache.AUTO
    if isinstance(scheme, Mapping) and _same(scheme, KV_CACHE):
        return kv_cache.FP8
    raise UnsupportedError(
        "The checkpoint's KV cache is in a format that is not supported.",
        why=f"kv_cache_scheme: {_shown(scheme)}. Supported: FP8 with one scale for a layer's keys and one for its "
        "values.",
        hint="Give a checkpoint without kv_cache_scheme, or quantize the original model.",
    )


def check_status(quantization: Mapping[str, Any]) -> None:
    """UnsupportedError for weights that are not stored as compressed-tensors compresses them."""
    status = quantization.get("quantization_status", "compressed")
    if status != "compressed":
        raise UnsupportedError(
            f"The checkpoint's quantization_status is {status!r}, not 'compressed'.",
            why="Its weights are stored as floats.",
            hint="Save it again with llm-compressor: model.save_pretrained(DIRECTORY, save_compressed=True)",
        )
    sparse, transform = quantization.get("sparsity_config"), quantization.get("transform_config")
    if isinstance(sparse, Mapping) and sparse.get("format", "dense") != "dense":
        raise UnsupportedError(f"Sparse checkpoints are not supported (sparsity_config: {_shown(sparse)}).")
    if transform:
        raise UnsupportedError(
            "The checkpoint needs rotations while it runs (transform_config), which is not supported.",
            why=f"transform_config: {_shown(transform)}",
            hint="Give a checkpoint whose rotations are fused into its weights, or the original model.",
        )


def _checked_groups(quantization: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(one, Mapping) for one in groups.values()):
        raise IntegrityError(
            "quantization_config has no valid config_groups.",
            why=_shown(groups),
            hint="Copy or download config.json again.",
        )
    for name, group in groups.items():
        unknown = [
            t
            for t in _strings(group.get("targets") or [], f"{name}.targets")
            if _is_class(t) and not t.startswith(REGEX)
        ]
        if others := [target for target in unknown if target not in LINEAR]:
            raise UnsupportedError(
                f"The checkpoint quantizes modules of the class {', '.join(others)}, which is not supported.",
                why="Linear layers are supported.",
                hint="Give a checkpoint that targets Linear, or the original model.",
            )
    return groups


def format_of(group: Mapping[str, Any], default: str | None = None) -> NumberFormat:
    """The number format of a group; BF16 where it quantizes nothing. default: the `format` of the whole checkpoint.

    UnsupportedError for any other.
    """
    weights, inputs = group.get("weights"), group.get("input_activations")
    if weights is None and inputs is None and group.get("output_activations") is None:
        return BF16
    compressor = group.get("format") or default
    for one in registry.all_formats().values():
        scheme = one.compressed_tensors
        if scheme is None or group.get("output_activations") is not None:
            continue
        stored = compressor == scheme.compressor or scheme.compressor in SAME_COMPRESSOR.get(str(compressor), ())
        if stored and _same(weights, scheme.weights) and _same(inputs, scheme.inputs):
            return one
    known = ", ".join(one.title for one in registry.all_formats().values() if one.compressed_tensors)
    raise UnsupportedError(
        f"The checkpoint has layers in a format of compressed-tensors that is not supported: {_named(group, default)}.",
        why=f"Supported: {known}.",
        hint="Give a checkpoint in one of these formats, or the original model.",
    )


def _same(given: Any, wanted: Mapping[str, Any] | None) -> bool:
    """Whether arguments mean the same, with the defaults of QuantizationArgs filled in."""
    if given is None or wanted is None:
        return given is wanted
    if not isinstance(given, Mapping) or given.get("actorder") in ("group", "dynamic", True):
        return False
    return all(_value(given, key) == _value(wanted, key) for key in MEANING)


def _value(arguments: Mapping[str, Any], key: str) -> Any:
    value = arguments.get(key)
    if key == "dynamic" and arguments.get("strategy") == "tensor_group" and not value:
        return "local"  # the block scales of inputs are never static; ModelOpt and old versions write false
    if key == "group_size" and arguments.get("strategy") in ("channel", "token", "tensor"):
        return None  # -1 for a channel
    return ARGUMENTS[key] if value is None else value


def _named(group: Mapping[str, Any], default: str | None) -> str:
    def short(arguments: Any) -> str:
        if not isinstance(arguments, Mapping):
            return "not quantized"
        size = f" {arguments['group_size']}" if arguments.get("group_size") not in (None, -1) else ""
        dynamic = ", dynamic" if arguments.get("dynamic") else ""
        kind = f"{arguments.get('type', 'int')}{arguments.get('num_bits', 8)}"
        return f"{kind} per {arguments.get('strategy')}{size}{dynamic}"

    weights, inputs = short(group.get("weights")), short(group.get("input_activations"))
    return ascii(f"{group.get('format') or default}, weights {weights}, inputs {inputs}")[1:-1][:200]


class _Entries:
    """The entries of `targets` or `ignore`, by kind: names of modules, regular expressions, names of classes."""

    def __init__(self, entries: Sequence[str]) -> None:
        self.expressions = [_compiled(entry) for entry in entries if entry.startswith(REGEX)]
        self.linear = not set(entries).isdisjoint(LINEAR)
        self.exact = dict.fromkeys(e for e in entries if not e.startswith(REGEX) and not _is_class(e))

    def names(self, module: str) -> bool:
        """Whether an entry is the module's name."""
        return module in self.exact

    def matches(self, module: str) -> bool:
        """Whether a regular expression matches it, from its beginning."""
        return any(expression.match(module) for expression in self.expressions)


def _group_of(module: str, groups: Mapping[str, _Entries]) -> str | None:
    """The group of a linear layer: by its name, else by an expression, else by its class (utils/match.py,
    match_targets)."""
    return (
        next((name for name, entries in groups.items() if entries.names(module)), None)
        or next((name for name, entries in groups.items() if entries.matches(module)), None)
        or next((name for name, entries in groups.items() if entries.linear), None)
    )


def _is_class(entry: str) -> bool:
    """Whether an entry names a class: those begin with a capital letter and have no dots."""
    return "." not in entry and entry[:1].isupper()


def _compiled(entry: str) -> re.Pattern[str]:
    try:
        return re.compile(entry[len(REGEX) :])
    except re.error as error:
        raise UnsupportedError(
            f"quantization_config has a regular expression that is not valid: {ascii(entry)[:100]}.",
            why=str(error),
            hint="Correct it in config.json, or quantize the original model.",
        ) from None


def _strings(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise IntegrityError(f"quantization_config: {where} is not a list of names.", why=_shown(value))
    return value


def _shown(value: Any) -> str:
    return ascii(value)[:200]
