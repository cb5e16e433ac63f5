"""Recipe, GPU profile and model -> trtllm-build flags, each with its reason and source. Pure: no GPU, no TensorRT-LLM.

Version facts are data in configs/trtllm/<version>/ (versions.py); rules.py applies their rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from builder.architectures import attention, catalog
from builder.core.errors import UnsupportedError, UsageError
from builder.core.release import order
from builder.formats.base import NumberFormat
from builder.formats.declared import MIXED
from builder.formats.kv_cache import KvCacheFormat
from builder.lora import modules as lora_modules
from builder.lora.adapter import Adapter
from builder.model import dtypes
from builder.recipe import card_formats, schema
from builder.recipe.target_facts import target_facts
from builder.trtllm import probe_results, rules
from builder.trtllm.probe_results import Answer
from builder.trtllm.rules import Flag, Note, Subject
from builder.trtllm.versions import Version, check, load, versions

__all__ = [
    "Flag", "Note", "Version", "asked_for", "build_config", "check", "check_format", "command", "load", "notes",
    "resolve", "sizes", "versions", "window_notes",
]  # fmt: skip
R08 = "tensorrt_llm/commands/build.py (1.2), rule R08"

SIZES = ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens")
# _init_max_seq_len (tensorrt_llm/builder.py): these kinds of rotary scaling do not lengthen max_position_embeddings.
UNSCALED = ("su", "longrope", "llama3")
# Fields of BuildConfig that EngineConfig.to_dict removes: they describe a run of the builder (rule R51).
NOT_IN_ENGINE = ("dry_run", "visualize_network")
WORDS = ("lora_target_modules",)  # flags that take several words


def resolve(
    resolved: schema.Resolved,
    model_config: Mapping[str, Any],
    answers: Sequence[Answer] = (),
    adapters: Sequence[Adapter] = (),
) -> list[Flag]:
    """The flags for this recipe, GPU and model (its config.json), in the order of the command line. adapters: those of
    the recipe, opened.

    Probe answers of a card take precedence over the profile and the tables. What trtllm-build would silently rewrite is
    resolved here. UsageError for flags that this version does not have or does not allow together, UnsupportedError for
    what the version, the card or the model cannot do.
    """
    asked, gpu = resolved.recipe, resolved.gpu
    subject = _subject(resolved, model_config, answers)
    check_format(resolved)
    _check_set_once(resolved)
    flags = {flag.name: flag for flag in sizes(resolved, model_config)}
    if (world_size := asked.engine.world_size) > 1:  # sharding.check checks the split
        flags["workers"] = Flag("workers", str(world_size), "one for each rank; capped at the machine's GPUs", R08)
    ours = _asked_flags(subject.version, asked.engine.flags)
    number_format = asked.quantization.number_format
    profile = {name: Flag(name, f.value, f.reason, f.source) for name, f in gpu.flags.items()}
    profile["gemm_plugin"] = _gemm_plugin(number_format)
    profile |= _lora(adapters, asked.lora.max_rank)
    flags |= probe_results.upgrade(profile, ours, subject, answers) | ours
    dtype = subject.dtype
    if dtype == "float16" and "gpt_attention_plugin" not in asked.engine.flags:
        flags["gpt_attention_plugin"] = Flag("gpt_attention_plugin", dtype, "the model computes in it", "config.json")
    for flag in flags.values():
        check(subject.version, flag.name, flag.value)
    rules.refuse(subject, flags)
    flags = rules.rewrite(subject, flags)
    probe_results.refuse(subject, flags, answers)
    if target_facts(asked.target).builds_tensorrt and flags["gemm_plugin"].value == number_format.gemm_plugin:
        _check_gemm(subject, number_format, _out_features(model_config, asked.engine.tp))
    rules.check_kernels(subject, flags)
    return list(flags.values())


def _gemm_plugin(one: NumberFormat) -> Flag:
    """The GEMM plugin that suits the format of the weights."""
    return Flag("gemm_plugin", one.gemm_plugin, one.gemm_plugin_why, one.gemm_plugin_source)


def _lora(adapters: Sequence[Adapter], max_rank: int | None) -> dict[str, Flag]:
    """What an engine needs so that it takes these adapters; --lora_dir would only be read for their modules."""
    if not adapters:
        return {}
    rank = max(adapter.rank for adapter in adapters)
    if max_rank is not None and max_rank < rank:
        raise UsageError(
            f"lora.max_rank is {max_rank}, and the largest of the adapters' ranks is {rank}.",
            hint=f"--set lora.max_rank={rank}",
        )
    modules = lora_modules.enabled(module for adapter in adapters for module in adapter.modules)
    names = " ".join(lora_modules.BY_HF[module].name for module in modules)
    why, where = f"for the adapters {', '.join(adapter.name for adapter in adapters)}", "tensorrt_llm/lora_helper.py"
    made = {
        "lora_plugin": ("auto", why),
        "lora_target_modules": (names, "the layers that they change; q, k and v only together"),
        "max_lora_rank": (str(max_rank or rank), "lora.max_rank" if max_rank else "the largest of their ranks"),
    }
    return {name: Flag(name, value, reason, where) for name, (value, reason) in made.items()}


def notes(
    resolved: schema.Resolved,
    model_config: Mapping[str, Any],
    flags: Sequence[Flag],
    answers: Sequence[Answer] = (),
) -> list[Note]:
    """What a user should know about these flags: what they cost, and what trtllm-build will choose or warn about."""
    if not target_facts(resolved.recipe.target).builds_tensorrt:
        return []
    subject = _subject(resolved, model_config, answers)
    if probe_results.without_fmha(subject, answers):
        subject = replace(subject, fmha_head_sizes=())
    found = rules.notes(subject, {flag.name: flag for flag in flags})
    if not subject.version.has_triton_templates:
        text = f"There are no Triton templates for TensorRT-LLM {subject.version.version}: stop at `builder engine`."
        found.append(Note("version", text))
    found += probe_results.notes(subject, flags, answers)
    return [*found, *(Note("GPU profile", text) for text in resolved.gpu.notes)]


def window_notes(model_config: Mapping[str, Any], flags: Sequence[Flag]) -> list[Note]:
    """A note for a model with sliding-window attention, if sequences may be longer than the window.

    LLaMAConfig and QWenConfig.from_hugging_face (tensorrt_llm/models, 1.2) do not read sliding_window, so an engine
    has none; upstream sets it when the engine is run (examples/models/core/llama/README.md, Mistral v0.1:
    max_attention_window_size). The reference executor attends to all tokens too.
    """
    window = attention.sliding_window(model_config)
    longest = next(int(flag.value) for flag in flags if flag.name == "max_seq_len")
    if window is None or longest <= window:
        return []
    text = (
        f"The model attends to its last {window} tokens (sliding_window), the served model to all of up to "
        f"{longest}: longer sequences get different answers than in transformers. --max-seq-len {window} avoids this."
    )
    return [Note("model", text)]


def _subject(resolved: schema.Resolved, config: Mapping[str, Any], answers: Sequence[Answer]) -> Subject:
    asked, gpu = resolved.recipe, resolved.gpu
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    size = config.get("head_dim") or (hidden // heads if hidden and heads else None)
    tp = asked.engine.tp
    widths = {
        "hidden_size": hidden,
        "intermediate_size (into mlp.down_proj)": _share(config.get("intermediate_size"), tp),
        "heads x head size (into self_attn.o_proj)": _share(heads * size if heads and size else None, tp),
    }
    subject = Subject(
        version=load(asked.engine.tensorrt_llm),
        sm=gpu.sm,
        architecture=catalog.engine_architecture(config),
        quant_algo=resolved.quant_algo,
        whole_algo=asked.quantization.number_format.quant_algo,
        kv_cache_algo=asked.quantization.cache_format.quant_algo,
        tp=tp,
        pp=asked.engine.pp,
        heads=heads,
        head_size=size,
        dtype=dtypes.served(config),
        in_features={name: width for name, width in widths.items() if width},
        fmha_head_sizes=tuple(gpu.fmha_head_sizes),
        kv_reuse=asked.repository.enable_kv_cache_reuse,
        chunked_context=asked.repository.enable_chunked_context,
    )
    return replace(subject, fmha_head_sizes=probe_results.head_sizes(subject, answers))


def _share(width: int | None, tp: int) -> int | None:
    return width // tp if width else None


def check_format(resolved: schema.Resolved) -> None:
    """UnsupportedError if the card, the target or this TensorRT-LLM version on it does not run a format of the recipe.

    The error names the formats that do, and what else would help.
    """
    asked = resolved.recipe
    part, target = asked.quantization, target_facts(asked.target)
    if not target.needs_gpu or resolved.gpu.sm is None:
        return
    wanted: list[NumberFormat | KvCacheFormat] = [*resolved.quantized_formats, part.cache_format]
    for one in wanted:
        if isinstance(one, NumberFormat) and one.compressed_only:
            continue  # no target serves it: preflight/checks.py, check_served
        if not card_formats.runs(one, resolved.gpu, asked.target):
            raise _does_not_run(one, resolved)
        if not card_formats.runs(one, resolved.gpu, asked.target, asked.engine.tensorrt_llm):
            raise _too_old(one, resolved)
    facts = load(asked.engine.tensorrt_llm).facts if target.builds_tensorrt else {}
    if resolved.quant_algo == MIXED and "mixed_precision" in facts:
        raise UnsupportedError(
            f"trtllm-build {asked.engine.tensorrt_llm} is not known to build {part.number_format.title} with layers in "
            "FP8.",
            why=str(facts["mixed_precision"]),
            hint=f"--set engine.tensorrt_llm={versions()[-1]}, or keep these layers in BF16: --keep-bf16",
        )


def _does_not_run(one: NumberFormat | KvCacheFormat, resolved: schema.Resolved) -> UnsupportedError:
    asked, gpu = resolved.recipe, resolved.gpu
    flag, known = _alternatives(one, resolved, asked.engine.tensorrt_llm)
    cards, others = card_formats.cards_with(one, asked.target), card_formats.other_targets(one, gpu, asked.target)
    elsewhere = f"With it, {one.title} runs on {', '.join(cards)}." if cards else one.targets_source
    hints = [f"{flag} {known[0]}" if known else "", *(_other_target(one, resolved, name) for name in others)]
    hints += [
        f"a card of {cards[0]}" if cards and not others else "",
        "the reference executor on a CPU: --gpu cpu --target reference",
    ]
    return UnsupportedError(
        f"{gpu.name} can't run {one.title} with the {asked.target} target.",
        why=f"{gpu.name} ({gpu.title}) runs {', '.join(known)} with this target. {elsewhere}".strip(),
        hint="; or ".join(filter(None, hints)),
    )


def _other_target(one: NumberFormat | KvCacheFormat, resolved: schema.Resolved, target: str) -> str:
    """The command-line flags for another target, with a TensorRT-LLM version of its that runs the format."""
    version = resolved.recipe.engine.tensorrt_llm
    since = card_formats.support(one, resolved.gpu, target)
    if target_facts(target).builds_tensorrt:
        needed = versions()[-1] if version not in versions() else version
    else:
        needed = since.since if since and order(since.since) > order(version) else version
    return f"--target {target}" + (f" --set engine.tensorrt_llm={needed}" if needed != version else "")


def _too_old(one: NumberFormat | KvCacheFormat, resolved: schema.Resolved) -> UnsupportedError:
    asked, gpu = resolved.recipe, resolved.gpu
    since = card_formats.support(one, gpu, asked.target)
    assert since is not None
    flag, known = _alternatives(one, resolved, asked.engine.tensorrt_llm)
    newest = versions()[-1] if target_facts(asked.target).builds_tensorrt else since.since
    newer = newest if order(newest) >= order(since.since) else since.since
    hint = f"--set engine.tensorrt_llm={newer}" + (f"; or {flag} {known[0]}" if known else "")
    return UnsupportedError(
        f"{gpu.name} runs {one.title} with the {asked.target} target since TensorRT-LLM {since.since}, and "
        f"{asked.engine.tensorrt_llm} was asked for.",
        why=since.source,
        hint=hint,
    )


def _alternatives(
    one: NumberFormat | KvCacheFormat, resolved: schema.Resolved, version: str | None = None
) -> tuple[str, list[str]]:
    """The command-line flag for another format in its place, and the formats that run, the best first."""
    gpu, target = resolved.gpu, resolved.recipe.target
    if isinstance(one, NumberFormat):
        return "--format", [other.name for other in card_formats.running(gpu, target, version)]
    return "--kv-cache-dtype", [other.name for other in card_formats.running_caches(gpu, target, version)]


def _out_features(config: Mapping[str, Any], tp: int) -> dict[str, int]:
    """Output sizes of a rank's linear layers by name. o_proj and down_proj have hidden_size outputs."""
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    found = {"hidden_size": hidden, "intermediate_size": _share(config.get("intermediate_size"), tp)}
    if hidden and heads:
        kv = attention.kv_heads(config)
        found["q, k and v together"] = (heads // tp + 2 * max(kv // tp, 1)) * attention.head_size(config)
    return {name: width for name, width in found.items() if width}


def _check_gemm(subject: Subject, number_format: NumberFormat, outputs: Mapping[str, int]) -> None:
    """What the format's GEMM would reject when it first runs, which is after everything was built."""
    wrong = [f"{n} inputs ({name})" for name, n in subject.in_features.items() if n % number_format.gemm_inputs]
    wrong += [f"{n} outputs ({name})" for name, n in outputs.items() if n % number_format.gemm_outputs]
    if wrong:
        raise UnsupportedError(
            f"The {number_format.title} GEMM plugin does not support this model's layer sizes: {', '.join(wrong)}.",
            why=f"On each GPU inputs must be a multiple of {number_format.gemm_inputs} and outputs of "
            f"{number_format.gemm_outputs} (cpp/tensorrt_llm/plugins/fp4GemmPlugin/fp4GemmPlugin.cpp@1a43c7d6).",
            hint="TensorRT's kernels may support them: --set engine.flags.gemm_plugin=disable, or use another model.",
        )


def _check_set_once(resolved: schema.Resolved) -> None:
    """UsageError if engine.flags contradicts a size that has its own recipe key."""
    engine = resolved.recipe.engine
    for name in SIZES:
        if name in engine.flags and engine.flags[name] != str(getattr(engine, name)):
            raise UsageError(
                f"{name} is set twice: engine.{name} is {getattr(engine, name)}, engine.flags.{name} is "
                f"{engine.flags[name]}.",
                hint=f"Set it once: --set engine.{name}={engine.flags[name]}",
            )


def _asked_flags(version: Version, asked: Mapping[str, str]) -> dict[str, Flag]:
    """engine.flags as Flags. A switch that is on (`enable`, `true`) has the value ""; one that is off is left out."""
    found = {}
    for name, value in asked.items():
        if name in SIZES:  # set to the same value under its own key
            continue
        if name in version.flags and version.flags[name]["kind"] == "store_true":
            if value.lower() in ("disable", "false"):
                continue
            value = "" if value.lower() in ("enable", "true") else value
        found[name] = Flag(name, value, "asked for", "recipe")
    return found


def sizes(resolved: schema.Resolved, model_config: Mapping[str, Any]) -> list[Flag]:
    """The four sizes as flags.

    A default max_seq_len is reduced to the model's positions; UnsupportedError for one that the user set and is longer.
    """
    engine = resolved.recipe.engine
    found = {name: getattr(engine, name) for name in SIZES}
    reasons = {name: resolved.origins.get(f"engine.{name}", "default") for name in found}
    longest = _positions(model_config)
    if longest and found["max_seq_len"] > longest:
        if asked_for(reasons["max_seq_len"]):
            raise UnsupportedError(
                f"--max-seq-len {found['max_seq_len']} is more than this model's {longest} positions.",
                why="max_position_embeddings (and rope_scaling) in its config.json; TensorRT-LLM would only warn "
                "(rule R16).",
                hint=f"--max-seq-len {longest}",
            )
        found["max_seq_len"], reasons["max_seq_len"] = longest, "the model's max_position_embeddings"
        if found["max_input_len"] >= longest:
            found["max_input_len"], reasons["max_input_len"] = longest - longest // 4, "three quarters of max_seq_len"
    return [Flag(name, str(value), reasons[name], "recipe") for name, value in found.items()]


def _positions(config: Mapping[str, Any]) -> int | None:
    """max_position_embeddings times the rotary factor, as trtllm-build deduces max_seq_len (rules R15, R16).

    Not where max_position_embeddings is scaled already, which a smaller original_max_position_embeddings shows
    (Qwen2.5-14B-Instruct-1M and many fine-tunes with YaRN): trtllm-build multiplies once more there, and accepts
    positions that no rotary table of the model was made for.
    """
    longest = config.get("max_position_embeddings")
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = scaling.get("type", scaling.get("rope_type"))
    original = scaling.get("original_max_position_embeddings") or longest
    factor = 1 if kind in UNSCALED or original != longest else scaling.get("factor") or 1
    return math.ceil(longest * factor) if longest else None


def asked_for(origin: str) -> bool:
    """Whether a user set the value: it comes neither from a default nor from the GPU profile."""
    return origin != "default" and not origin.startswith("GPU profile")


def command(flags: Sequence[Flag], *, checkpoint: Path, output: Path, timing_cache: Path) -> list[str]:
    """The trtllm-build command line. Paths come last, because the flags before them are the same on every machine."""
    argv = ["trtllm-build"]
    for flag in flags:
        words = flag.value.split() if flag.name in WORDS else [flag.value]
        argv += [f"--{flag.name}", *filter(None, words)]
    # The default is model.cache in the working directory: a PermissionError for most users of containers.
    timing = ["--input_timing_cache", str(timing_cache), "--output_timing_cache", str(timing_cache)]
    return [*argv, "--checkpoint_dir", str(checkpoint), "--output_dir", str(output), *timing]


def build_config(version: Version, flags: Sequence[Flag], pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """What trtllm-build would write as build_config into the engine's config.json for these flags.

    `pretrained` is the checkpoint's config.json. Source: BuildConfig.to_dict, EngineConfig.to_dict (builder.py, 1.2).
    """
    values = {flag.name: flag.value for flag in flags}
    config = {name: value for name, value in version.build_config_defaults.items() if name not in NOT_IN_ENGINE}
    for name, spec in version.flags.items():
        field = spec.get("build_config_field")
        if spec["group"] != "plugin" and field and name in values and field not in NOT_IN_ENGINE:
            config[field] = _config_value(spec, values[name])
    plugins = _plugin_config(version, values, pretrained)
    config["lora_config"] = _lora_config(config["lora_config"], values)
    config["kv_cache_type"] = str(config["kv_cache_type"] or "paged").upper()
    if plugins["remove_input_padding"] and not plugins["multiple_profiles"]:  # rules R19, R24
        batch = config["max_batch_size"] * config["max_beam_width"]
        config["opt_num_tokens"] = config["opt_num_tokens"] or min(batch, config["max_num_tokens"])
    config["plugin_config"] = plugins
    return config


def _lora_config(defaults: Mapping[str, Any], values: Mapping[str, str]) -> dict[str, Any]:
    """LoraConfig as an engine has it (tensorrt_llm/lora_helper.py@037d4ba1; load_hf_lora fills in the last field)."""
    made = dict(defaults)
    if "lora_target_modules" in values:
        made["lora_target_modules"] = values["lora_target_modules"].split()
        made["trtllm_modules_to_hf_modules"] = {one.name: one.hf for one in lora_modules.MODULES}
    if "max_lora_rank" in values:
        made["max_lora_rank"] = int(values["max_lora_rank"])
    return made


def _plugin_config(version: Version, values: Mapping[str, str], pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """PluginConfig as build() leaves it. "auto" stays "auto": only reading the attribute resolves it, not dumping it
    (plugin.py@c20322ff, PluginConfig.__getattribute__; in 1.0 and 1.1 PluginConfig.to_dict)."""
    plugins: dict[str, Any] = {**version.facts["plugin_fields"], "dtype": pretrained["dtype"]}
    for name, spec in version.flags.items():
        if spec["group"] == "plugin":
            plugins[name] = _plugin_value(spec, values.get(name, spec["default"]))
    plugins["paged_kv_cache"] = values.get("kv_cache_type", "paged") == "paged"
    plugins["paged_state"] = False  # rule R14: these models have no recurrent state
    plugins["nccl_plugin"] = pretrained["dtype"] if pretrained["mapping"]["world_size"] > 1 else None  # rule R37
    plugins["manage_weights"] = "fast_build" in values  # rule R50
    return plugins | _quantized_plugins(pretrained)


def _quantized_plugins(pretrained: Mapping[str, Any]) -> dict[str, Any]:
    """The plugins that build() turns on for the checkpoint's format (builder.py, 1.2; plugin.py@c20322ff)."""
    algo, dtype = (pretrained.get("quantization") or {}).get("quant_algo"), pretrained["dtype"]
    if algo == "W4A16_AWQ":  # weight only, per group
        return {"weight_only_groupwise_quant_matmul_plugin": dtype}
    if algo == "FP8_PER_CHANNEL_PER_TOKEN":  # set_fp8_rowwise_quant_plugins
        plugins = dict.fromkeys(("fp8_rowwise_gemm_plugin", "rmsnorm_quantization_plugin"), dtype)
        return {**plugins, "quantize_per_token_plugin": True, "quantize_tensor_plugin": True}
    return {}


def _config_value(spec: Mapping[str, Any], raw: Any) -> Any:
    if spec["kind"] == "store_true":
        return raw == ""
    if spec["kind"] == "int":
        return int(raw)
    return spec.get("config_values", {}).get(raw, raw)


def _plugin_value(spec: Mapping[str, Any], raw: Any) -> Any:
    if spec["kind"] == "bool_str":
        return raw == "enable"
    if spec["kind"] == "int":
        return int(raw)
    return None if raw == "disable" else raw
