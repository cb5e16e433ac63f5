"""Which linear layers stay in BF16 or FP8: a recipe's patterns -> Hugging Face module names. Pure.

TensorRT-LLM builds layers that match exclude_modules (fnmatch) as plain layers (quantization/quantize.py@89fd9b74,
quantize_layers). Layers that are served as one are kept together: TensorRT-LLM has one attention.qkv for q, k and v,
and its fuse_gate_mlp concatenates mlp.fc with mlp.gate whatever their formats (models/modeling_utils.py, 1.2). ModelOpt
gives each of these groups one scale (0.47.0, export/unified_export_hf.py, requantize_resmooth_fused_llm_layers).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from builder.architectures import catalog, names
from builder.architectures.catalog import UNKNOWN
from builder.architectures.facts import Architecture
from builder.checkpoint import sharding
from builder.core.errors import UnsupportedError, UsageError
from builder.formats.base import NumberFormat
from builder.formats.registry import BF16, FP8, NVFP4
from builder.formats.schemes import LayerScheme


def linears(tensors: Mapping[str, tuple[str, Sequence[int]]], architecture: Architecture = UNKNOWN) -> list[str]:
    """The modules that can be quantized, from a model's headers {tensor: (dtype, shape)}, in layer order."""
    weights = [name for name, (_, shape) in tensors.items() if names.is_quantizable(architecture, name, shape)]
    return sorted((name.removesuffix(".weight") for name in weights), key=_in_order)


def _in_order(name: str) -> list[tuple[int, str]]:
    """A sort key that compares numbers as numbers: layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def groups(modules: Iterable[str], architecture: Architecture = UNKNOWN) -> dict[str, tuple[str, ...]]:
    """{group: modules that are kept or quantized together}, in order (names.group_of)."""
    found: dict[str, list[str]] = {}
    for module in modules:
        found.setdefault(names.group_of(architecture, module), []).append(module)
    return {group: tuple(members) for group, members in found.items()}


def keep(
    patterns: Sequence[str], known: Sequence[str], flag: str = "--keep-bf16", architecture: Architecture = UNKNOWN
) -> tuple[str, ...]:
    """The modules of `known` that the patterns (`model.layers.0.*`, `*.down_proj`) keep, extended to whole groups.

    UsageError for a pattern that matches nothing, UnsupportedError if no layer would be left to quantize.
    """
    named: set[str] = set()
    for pattern in patterns:
        matching = {module for module in known if fnmatchcase(module, pattern)}
        if not matching:
            raise _matches_nothing(pattern, known, flag)
        named |= matching
    together = [members for members in groups(known, architecture).values() if named.intersection(members)]
    modules = tuple(module for members in together for module in members)
    if modules and len(modules) == len(known):
        raise _nothing_left(known, flag)
    return modules


def assigned(
    scheme: LayerScheme, known: Sequence[str], architecture: Architecture = UNKNOWN
) -> dict[str, NumberFormat]:
    """{module: format} of the modules of `known` that a scheme does not leave in its format of most layers.

    UnsupportedError for a model without MLPs or experts.
    """
    rest = [module for module in known if not names.in_mlp(architecture, module)]
    if known and len(rest) == len(known):
        raise UnsupportedError(
            f"--format {scheme.name} quantizes MLPs and experts, and the model has none.",
            hint=f"--format {scheme.whole.name}",
        )
    attention = [module for module in rest if names.in_attention(architecture, module)]
    return dict.fromkeys(rest, BF16) | dict.fromkeys(attention, scheme.attention)


def check_apart(kept: Sequence[str], fp8: Sequence[str], known: Sequence[str]) -> None:
    """UsageError for a layer in both BF16 and FP8, UnsupportedError if no layer would be left to quantize."""
    if both := [module for module in kept if module in set(fp8)]:
        raise UsageError(
            f"{', '.join(both[:3])}{', ...' * (len(both) > 3)} would be both in BF16 and in FP8.",
            why="q, k and v are kept together, as are gate and up, so a pattern can select more layers than it names.",
            hint="Remove the pattern from --keep-bf16 or from --keep-fp8.",
        )
    if kept and fp8 and len(kept) + len(fp8) == len(known):
        raise _nothing_left(known, "--keep-fp8")


def check_left(formats: Mapping[str, NumberFormat], known: Sequence[str], whole: NumberFormat) -> None:
    """UnsupportedError if patterns leave no layer in the format of most layers, with schemes and families counted."""
    if known and len(formats) == len(known) and whole not in formats.values():
        raise UnsupportedError(
            f"No linear layer would be in {whole.title}: all {len(known)} are in {_titles(formats)}.",
            hint="Keep fewer layers with --keep-bf16 and --keep-fp8, or choose another --format.",
        )


def _nothing_left(known: Sequence[str], flag: str) -> UnsupportedError:
    title = "FP8" if flag == "--keep-fp8" else "BF16"
    return UnsupportedError(
        f"All {len(known)} linear layers would stay in {title}: nothing is left to quantize.",
        hint=f"Keep fewer: {flag} '{known[-1]}'. For a whole model in {title}: --format {title.lower()}",
    )


def widened(patterns: Sequence[str], modules: Iterable[str]) -> list[str]:
    """The kept modules that no pattern names: they are served as one layer with a named one."""
    return [module for module in modules if not any(fnmatchcase(module, pattern) for pattern in patterns)]


def _matches_nothing(pattern: str, known: Sequence[str], flag: str) -> UsageError:
    leaves = list(dict.fromkeys("*." + module.rpartition(".")[2] for module in known))
    near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
    near += [leaf for leaf in difflib.get_close_matches(f"*.{pattern.rpartition('.')[2]}", leaves, n=2, cutoff=0.6)]
    return UsageError(
        f"{flag} {pattern!r} matches no linear layer that would be quantized.",
        why=f"Patterns match Hugging Face module names, such as {known[0]}. Embeddings, norms and lm_head are never "
        "quantized."
        if known
        else "The model has no such layer.",
        hint=f"Similar: {', '.join(near or [*known[:1], *leaves])}",
    )


def check_split(formats: Mapping[str, NumberFormat], config: Mapping[str, Any], parallel: sharding.Parallel) -> None:
    """UnsupportedError if the formats of single layers can't be written for these pipeline stages."""
    architecture = catalog.of(config)
    layers = {names.engine_layer(architecture, module): one.title for module, one in formats.items()}
    sharding.local_layers(layers, config, parallel)


def check_flags(
    formats: Mapping[str, NumberFormat],
    flags: Mapping[str, str],
    whole: NumberFormat = NVFP4,
    architecture: Architecture = UNKNOWN,
) -> None:
    """UnsupportedError for layers in a format of their own that trtllm-build would treat as the others, which are in
    `whole`, under these flags."""
    # models/modeling_utils.py (1.2), DecoderLayerList, reads attention.qkv.activation_global_scaling_factor.
    if formats and flags.get("norm_quant_fusion") == "enable":
        raise UnsupportedError(
            f"norm_quant_fusion treats every layer as {whole.title}, and some stay in {_titles(formats)}.",
            hint="--set engine.flags.norm_quant_fusion=disable",
        )
    outputs = [(module, one) for module, one in formats.items() if names.role(architecture, module) == "o"]
    if outputs and (reason := output_must_be_quantized(flags)):
        module, one = outputs[0]
        raise UnsupportedError(
            f"{module} can't stay in {one.title} in this engine: {reason}.",
            why=f"The attention kernel then outputs FP8 or FP4, scaled for a layer in {whole.title} that follows it "
            "(gptAttentionPlugin.cpp, supportsFormatCombination; models/modeling_utils.py, set_fp8_context_fhma; 1.2).",
            hint=_without_output_scale(flags),
        )


def _without_output_scale(flags: Mapping[str, str]) -> str:
    """What to type so that the attention kernel does not scale its output. Paged context FMHA over an FP8 KV cache is
    always in FP8 (rule R30), so both are turned off together."""
    fp4 = " --set engine.flags.fuse_fp4_quant=disable" * _is_on(flags, "fuse_fp4_quant", "disable")
    if not (_is_on(flags, "use_fp8_context_fmha") and _is_on(flags, "context_fmha")):
        return f"{fp4.strip()}, or keep other layers (--keep-bf16)."
    without = "--set engine.flags.use_fp8_context_fmha=disable"
    if not _is_on(flags, "use_paged_context_fmha"):
        return f"{without}{fp4}, or keep other layers (--keep-bf16)."
    return (
        f"--kv-cache-dtype auto{fp4}, or {without} --set engine.flags.use_paged_context_fmha=disable{fp4} "
        "(costs KV reuse and chunked context), or keep other layers (--keep-bf16)."
    )


def _is_on(flags: Mapping[str, str], name: str, default: str = "enable") -> bool:
    return flags.get(name, default) == "enable"


def _titles(formats: Mapping[str, NumberFormat]) -> str:
    return " or ".join(sorted({one.title for one in formats.values()}))


# Formats of q_proj and o_proj that TensorRT-LLM's LLM class does not join where a checkpoint has layers in FP8.
APART = ((NVFP4, FP8), (BF16, FP8), (BF16, NVFP4))
BY_Q_PROJ = "the attention's output is in q_proj's format there"


def check_llm_class(
    formats: Mapping[str, NumberFormat],
    known: Sequence[str],
    whole: NumberFormat = NVFP4,
    architecture: Architecture = UNKNOWN,
) -> None:
    """UnsupportedError for layers that TensorRT-LLM's LLM class (1.2) would load or feed in another format, where a
    checkpoint has more than one quantized format."""
    if not any(one not in (BF16, whole) for one in formats.values()):
        return
    roles = {module: names.role(architecture, module) for module in known}
    if fused := [module for module in known if roles[module] == "qkv"]:
        raise UnsupportedError(
            f"--target llmapi finds no format for {fused[0]} where formats are mixed.",
            why="It looks for q_proj's (_torch/models/modeling_utils.py, apply_layerwise_quant_config).",
            hint="Keep layers in BF16: --keep-bf16",
        )
    every = dict.fromkeys(known, whole) | dict(formats)
    for output in (module for module in known if roles[module] == "o"):
        attention = output.rpartition(".")[0]
        q_proj = next((n for n in known if roles[n] == "q" and n.startswith(f"{attention}.")), "")
        if (every.get(q_proj), every[output]) in APART:
            raise UnsupportedError(
                f"{output} in {every[output].title} can't follow {q_proj} in {every[q_proj].title} with "
                "--target llmapi.",
                why=f"TensorRT-LLM's LLM class: {BY_Q_PROJ} (_torch/models/modeling_utils.py, "
                "apply_layerwise_quant_config; _torch/attention_backend/trtllm.py@00bede19, forward).",
                hint=f"Keep both alike: --keep-fp8 '{attention}.*', or {output} in BF16.",
            )


def output_must_be_quantized(flags: Mapping[str, str]) -> str:
    """Why attention's output projection must be quantized under these flags; "" if it need not."""
    if _is_on(flags, "use_fp8_context_fmha") and _is_on(flags, "context_fmha"):
        return "FP8 context FMHA is on"
    return "fuse_fp4_quant is on" if _is_on(flags, "fuse_fp4_quant", "disable") else ""
