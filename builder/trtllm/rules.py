"""Applies the rules of trtllm-build (configs/trtllm/<version>/rules.json) before trtllm-build does so silently. Pure.

`refuse` rejects what trtllm-build would fail on later, `rewrite` applies what it would override or ignore,
`check_kernels` checks the result as the C++ side will, and `notes` explains the rest. The order is that of build().
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from builder.core.errors import UnsupportedError, UsageError
from builder.formats import kv_cache
from builder.formats.declared import MIXED
from builder.formats.registry import NVFP4
from builder.trtllm.versions import Version

FP8_FAMILY = ("FP8", "W4A8_AWQ", "NVFP4")  # and not MIXED_PRECISION, whatever it mixes (builder.py, 1.2, build)
# What rule R32 refuses: QuantMode's is_int8_weight_only, is_int4_weight_only (also per group), has_act_and_weight_quant
# and the scalings per channel and per token (tensorrt_llm/quantization/mode.py, 1.2, from_quant_algo).
INTEGER = (
    "W8A16", "W4A16", "W4A16_AWQ", "W4A8_AWQ", "W8A16_GPTQ", "W4A16_GPTQ", "FP8_PER_CHANNEL_PER_TOKEN",
    "W8A8_SQ_PER_CHANNEL", "W8A8_SQ_PER_TENSOR_PLUGIN", "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN",
    "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN", "W8A8_SQ_PER_TENSOR_PER_TOKEN_PLUGIN",
)  # fmt: skip
# Fp8RowwiseLinear and SmoothQuantLinear (rule R53). W8A8_SQ_PER_CHANNEL without a plugin is Int8SmoothQuantLinear.
WITHOUT_LORA = ("FP8_PER_CHANNEL_PER_TOKEN", *(name for name in INTEGER if name.endswith("_PLUGIN")))
FMHA_ON = "Context FMHA is on with --gpu sm120-fmha, or --set engine.flags.context_fmha=enable (paged FMHA likewise)."
IN_WORDS = {
    "C++ check fails": "TensorRT-LLM's C++ runtime would not load the engine",
    "unsupported": "TensorRT-LLM does not support it",
}
SWIGLU = ("gemm_swiglu_plugin", "low_latency_gemm_swiglu_plugin")


@dataclass(frozen=True)
class Flag:
    """One trtllm-build flag as it will be passed, with its reason and source. A switch has the value ""."""

    name: str
    value: str
    reason: str
    source: str


@dataclass(frozen=True)
class Note:
    """What a user should know about the flags; `rule` is its id in rules.json, "version", "model", "probe"
    or "GPU profile"."""

    rule: str
    text: str


@dataclass(frozen=True)
class Subject:
    """What the rules depend on besides the flags: version, card, model, number formats. None: not known.

    quant_algo: what the checkpoint says; whole_algo: that of the layers in the model's own format.
    """

    version: Version
    sm: int | None
    architecture: str | None = None
    quant_algo: str | None = NVFP4.quant_algo
    whole_algo: str | None = NVFP4.quant_algo
    kv_cache_algo: str | None = kv_cache.FP8.quant_algo
    tp: int = 1
    pp: int = 1
    heads: int | None = None
    head_size: int | None = None
    dtype: str | None = None
    in_features: Mapping[str, int] = field(default_factory=dict)
    fmha_head_sizes: tuple[int, ...] = ()
    kv_reuse: bool | None = None
    chunked_context: bool | None = None

    @property
    def has_nvfp4(self) -> bool:
        """Whether any layer is NVFP4: with others in FP8 the checkpoint says MIXED_PRECISION."""
        return NVFP4.quant_algo in (self.quant_algo, self.whole_algo if self.quant_algo == MIXED else None)

    def is_one_of(self, rule: str) -> bool:
        """Whether the model is of one of the architectures that a rule names, by TensorRT-LLM's names."""
        return self.architecture in self.version.rules[rule]["only"]

    def source(self, rule: str) -> str:
        """The source of a rule."""
        return f"{self.version.rules[rule]['where']}, rule {rule}"


class Settings:
    """The flags while rules are applied. `put` changes one and records the reason."""

    def __init__(self, subject: Subject, flags: Mapping[str, Flag]) -> None:
        self.subject = subject
        self.flags = dict(flags)

    def value(self, name: str) -> str:
        """The value that is passed, or trtllm-build's default. A switch that is on has the value ""."""
        return self.flags[name].value if name in self.flags else str(self.subject.version.flags[name]["default"])

    def number(self, name: str) -> int:
        return int(self.value(name))

    def on(self, name: str) -> bool:
        return self.value(name) in ("enable", "")

    def asked(self, name: str) -> bool:
        """Whether the flag is passed with a value that enables it."""
        return name in self.flags and self.flags[name].value not in ("disable", "0")

    def put(self, name: str, value: str, reason: str, rule: str) -> None:
        if self.value(name) != value:
            self.flags[name] = Flag(name, value, reason, self.subject.source(rule))


def rewrite(subject: Subject, flags: Mapping[str, Flag]) -> dict[str, Flag]:
    """The flags as trtllm-build would rewrite them. Each change names its rule. Idempotent."""
    settings = Settings(subject, flags)
    _kv_cache_type(settings)
    _sizes(settings)
    _fusions(settings)
    _attention(settings)
    _plugins(settings)
    _logits(settings)
    return settings.flags


def _kv_cache_type(s: Settings) -> None:
    if "paged_kv_cache" in s.flags:  # R12: refuse() saw that the two agree
        del s.flags["paged_kv_cache"]
    if "kv_cache_type" not in s.flags:
        s.flags["kv_cache_type"] = Flag("kv_cache_type", "paged", "paged by default", s.subject.source("R13"))
    if s.asked("paged_state"):
        s.put("paged_state", "disable", "these models have no recurrent state", "R14")


def _sizes(s: Settings) -> None:
    if s.number("max_input_len") > s.number("max_seq_len"):
        s.put("max_input_len", s.value("max_seq_len"), "a prompt cannot be longer than max_seq_len", "R17")
    most = s.number("max_batch_size") * s.number("max_seq_len")
    if not s.on("remove_input_padding"):
        s.put("max_num_tokens", str(most), "with padding it is always max_batch_size x max_seq_len", "R19")
        return
    if s.number("max_num_tokens") > most:
        s.put("max_num_tokens", str(most), "capped at max_batch_size x max_seq_len", "R22")
    fmha = s.on("context_fmha")
    if not fmha and s.number("max_num_tokens") < s.number("max_input_len"):
        s.put("max_num_tokens", s.value("max_input_len"), "without FMHA a prompt cannot be split into chunks", "R20")
    if fmha and s.number("max_num_tokens") < s.number("tokens_per_block"):
        s.put("max_num_tokens", s.value("tokens_per_block"), "a chunk of a prompt is at least one KV block", "R21")
    if "opt_num_tokens" in s.flags and s.number("opt_num_tokens") > s.number("max_num_tokens"):
        s.put("opt_num_tokens", s.value("max_num_tokens"), "capped at max_num_tokens", "R25")


def _fusions(s: Settings) -> None:
    subject = s.subject
    if s.asked("reduce_fusion") and not (subject.tp > 1 and subject.is_one_of("R35")):
        s.put("reduce_fusion", "disable", "only Llama, Gemma 2 and Medusa with tensor parallelism support it", "R35")
    if s.asked("user_buffer") and not s.on("reduce_fusion"):
        s.put("user_buffer", "disable", "it needs reduce_fusion", "R36")
    fusable = subject.is_one_of("R34") and subject.quant_algo == "NVFP4"
    if s.asked("norm_quant_fusion") and (s.on("reduce_fusion") or not fusable):
        s.put("norm_quant_fusion", "disable", "only LlamaForCausalLM in NVFP4 without reduce_fusion supports it", "R34")
    if s.asked("use_fused_mlp") and subject.quant_algo not in (None, "FP8"):
        s.put("use_fused_mlp", "disable", f"no effect with {subject.quant_algo}", "R40")


def _attention(s: Settings) -> None:
    """How context FMHA, paged and FP8 context FMHA, and the KV cache constrain each other."""
    subject, paged, fp8 = s.subject, "use_paged_context_fmha", "use_fp8_context_fmha"
    fp8_kv = subject.kv_cache_algo == "FP8"
    if s.on("streamingllm"):
        s.put(paged, "disable", "StreamingLLM does not work with it", "R05")
    if s.value("speculative_decoding_mode") == "eagle":
        s.put(paged, "enable", "EAGLE needs it", "R38")
    if not s.on("context_fmha"):
        s.put(paged, "disable", "it needs context FMHA, which is off", "R26")
        s.put(fp8, "disable", "it needs context FMHA, which is off", "R26")
    elif subject.quant_algo not in FP8_FAMILY:
        s.put(fp8, "disable", "it needs FP8, W4A8_AWQ or NVFP4 weights", "R27")
        if fp8_kv:
            s.put(paged, "disable", "an FP8 KV cache needs FP8 context FMHA, which these weights don't have", "R27")
    elif subject.sm is not None and subject.sm < subject.version.rules["R28"]["sm_from"]:
        s.put(fp8, "disable", f"sm{subject.sm} has no FP8", "R28")
        if fp8_kv:
            s.put(paged, "disable", f"an FP8 KV cache needs FP8 context FMHA, and sm{subject.sm} has none", "R28")
    elif s.on(paged):
        if fp8_kv:
            s.put(fp8, "enable", "paged FMHA with an FP8 KV cache must be FP8 too", "R30")
        else:
            s.put(fp8, "disable", "paged FMHA can be FP8 only with an FP8 KV cache", "R29")
    if subject.kv_cache_algo == "INT8":
        s.put(paged, "disable", "it does not work with an INT8 KV cache", "R31")


def _plugins(s: Settings) -> None:
    world = s.subject.tp * s.subject.pp
    if s.subject.has_nvfp4 and s.value("gemm_plugin") != "disable":
        s.put("gemm_plugin", "nvfp4", "always used for NVFP4 layers, unless it is set to `disable`", "R33")
    dtype = s.subject.dtype or "auto"
    if world == 1 and s.asked("nccl_plugin"):
        s.put("nccl_plugin", "disable", "a single GPU needs no communication", "R37")
    elif world > 1 and s.value("nccl_plugin") not in (dtype, "auto"):
        s.put("nccl_plugin", dtype, "several GPUs always use NCCL, in the model's type", "R37")
    if "workers" in s.flags and s.number("workers") > world:
        s.put("workers", str(world), "one worker per rank; capped at the number of GPUs", "R08")


def _logits(s: Settings) -> None:
    """gather_all_token_logits is a shorthand that the engine does not store: the two flags behind it are passed."""
    asked = s.flags.pop("gather_all_token_logits", None)
    if asked is not None and asked.value not in ("disable", "0"):
        for name in ("gather_context_logits", "gather_generation_logits"):
            s.put(name, "", "set by gather_all_token_logits", "R49")


def refuse(subject: Subject, flags: Mapping[str, Flag]) -> None:
    """Rejects what trtllm-build would fail on, often late. UsageError for flags, UnsupportedError otherwise."""
    s = Settings(subject, flags)
    _refuse_ours(s)
    _refuse_combinations(s)
    _refuse_unserved(s)
    _refuse_model(s)
    _refuse_formats(s)
    _refuse_eagle(s)


def _usage(s: Settings, rule: str, what: str, hint: str) -> UsageError:
    return UsageError(what, why=_reason(s, rule), hint=hint)


def _unsupported(s: Settings, rule: str, what: str, hint: str) -> UnsupportedError:
    return UnsupportedError(what, why=_reason(s, rule), hint=hint)


def _reason(s: Settings, rule: str) -> str:
    """A rule's effect as a sentence for users: what would happen, without upstream's class names, and
    where; `builder explain` lists the rules by these ids."""
    entry = s.subject.version.rules[rule]
    effect = IN_WORDS.get(entry["effect"], entry["effect"])
    effect = re.sub(r"\b(an? )?[A-Z]\w*Error\b( \([^)]*\))?", "an error", effect)
    if effect.startswith("an error"):
        effect = f"trtllm-build would stop with {effect}"
    first = effect.split()[0]
    effect = effect.replace(first, first.capitalize(), 1) if first.isalpha() and first.islower() else effect
    return f"{effect} ({s.subject.source(rule)})."


def _refuse_ours(s: Settings) -> None:
    """Rejects flags that the builder sets itself: the stage's key and directory depend on them."""
    for name, rule in (("checkpoint_dir", "R01"), ("model_config", "R01"), ("build_config", "R09")):
        if name in s.flags:
            raise _usage(s, rule, f"--{name} is set by the builder.", "Remove it: the recipe has sizes and flags.")
    for name in ("output_dir", "input_timing_cache", "output_timing_cache", "dry_run"):
        if name in s.flags:
            raise UsageError(f"--{name} is set by the builder.", hint="Remove it: the engine has its own directory.")


def _refuse_combinations(s: Settings) -> None:
    if s.asked("max_draft_len") and (s.on("gather_context_logits") or s.on("gather_all_token_logits")):
        raise _usage(s, "R02", "Context logits can't be gathered with draft tokens.", "Leave out one of the two.")
    if s.on("multiple_profiles") and "opt_num_tokens" in s.flags:
        raise _usage(s, "R03", "multiple_profiles chooses opt_num_tokens itself.", "Leave out one of the two.")
    if "model_cls_file" in s.flags and "model_cls_name" not in s.flags:
        raise _usage(s, "R04", "--model_cls_file needs --model_cls_name.", "--set engine.flags.model_cls_name=CLASS")
    if "paged_kv_cache" in s.flags:
        kind = s.flags["kv_cache_type"].value if "kv_cache_type" in s.flags else "paged"
        if s.value("paged_kv_cache") != ("enable" if kind == "paged" else "disable"):
            raise _usage(
                s, "R12", f"paged_kv_cache={s.value('paged_kv_cache')} contradicts kv_cache_type={kind}.",
                "Leave paged_kv_cache out: it is the deprecated name.",
            )  # fmt: skip
    swiglu = [name for name in SWIGLU if s.asked(name)]
    if swiglu and not (s.on("use_fused_mlp") and s.subject.quant_algo == "FP8"):
        raise _usage(s, "R39", f"--{swiglu[0]} needs use_fused_mlp and an FP8 model.", f"Leave {swiglu[0]} out.")


def _refuse_unserved(s: Settings) -> None:
    """Rejects engines that would build, but that the C++ backend does not load or that generate nothing."""
    for name in ("remove_input_padding", "gpt_attention_plugin"):
        if s.value(name) == "disable":
            raise _usage(
                s, "R52", f"--{name} disable makes an engine that Triton's backend can't load.", f"Leave {name} out."
            )
    kind = s.value("kv_cache_type") if "kv_cache_type" in s.flags else "paged"
    if kind != "paged":
        what = "makes an engine that Triton's backend can't load" if kind == "continuous" else "generates no tokens"
        raise _usage(s, "R52", f"--kv_cache_type {kind} {what}.", "Leave kv_cache_type out: it is paged.")


def _refuse_model(s: Settings) -> None:
    subject = s.subject
    if s.on("streamingllm") and not subject.is_one_of("R05"):
        raise _usage(
            s, "R05", "streamingllm is not supported for this architecture.",
            "Remove it: it adds attention sinks. repository.decoupled, the default, streams responses.",
        )  # fmt: skip
    if s.on("pp_reduce_scatter") and not subject.is_one_of("R06"):
        raise _usage(s, "R06", "Only MixtralForCausalLM supports pp_reduce_scatter.", "Leave it out.")
    if subject.has_nvfp4:
        odd = {name: n for name, n in subject.in_features.items() if n % (NVFP4.group_size or 1)}
        if odd:
            found = ", ".join(f"{name} {n}" for name, n in odd.items())
            raise _unsupported(
                s, "R41", f"NVFP4 needs inputs that are a multiple of 16 on each GPU, and this model has {found}.",
                "Use another model or, if --tp is the cause, a smaller --tp.",
            )  # fmt: skip
        if s.asked("lora_plugin") or "lora_dir" in s.flags:
            hint = "--format fp8, or merge the LoRA into the model first."
            raise _unsupported(s, "R41", "NVFP4 layers do not support LoRA.", hint)
    if subject.quant_algo in WITHOUT_LORA and s.asked("lora_plugin"):
        raise _unsupported(
            s, "R53", f"Layers in {subject.quant_algo} do not support LoRA.",
            "--format fp8, or merge the LoRA into the model first.",
        )  # fmt: skip


def _refuse_formats(s: Settings) -> None:
    subject = s.subject
    blocked = [name for name in s.subject.version.rules["R11"]["flags"] if s.asked(name)]
    if subject.sm in subject.version.rules["R11"]["sms"] and blocked:
        raise _unsupported(s, "R11", f"sm{subject.sm} does not support --{blocked[0]}.", f"Leave {blocked[0]} out.")
    low, high = subject.version.rules["R32"]["sm_range"]
    if subject.sm is not None and low <= subject.sm < high:
        for what in (subject.quant_algo, subject.kv_cache_algo and f"{subject.kv_cache_algo} KV cache"):
            if what in (*INTEGER, "INT8 KV cache"):
                raise _unsupported(
                    s, "R32", f"sm{subject.sm} does not support {what}.", "--format nvfp4 --kv-cache-dtype fp8"
                )
    if subject.kv_cache_algo == "INT8" and "use_paged_context_fmha" in s.flags and s.on("use_paged_context_fmha"):
        raise _usage(
            s, "R31", "An INT8 KV cache does not work with paged context FMHA.",
            "--set engine.flags.use_paged_context_fmha=disable, or an fp8 KV cache.",
        )  # fmt: skip
    if subject.kv_cache_algo == "NVFP4" and subject.sm in (120, 121):
        raise _unsupported(
            s, "R45", f"sm{subject.sm} has no NVFP4 KV cache (NVIDIA/TensorRT-LLM #10241).", "--kv-cache-dtype fp8"
        )


def _refuse_eagle(s: Settings) -> None:
    if s.value("speculative_decoding_mode") != "eagle":
        return
    if not s.on("context_fmha"):
        raise _usage(s, "R38", "EAGLE needs paged context FMHA, and context FMHA is off.", FMHA_ON)
    for name in ("max_batch_size", "max_draft_len"):
        most = s.subject.version.rules["R38"][name]
        if s.number(name) > most:
            raise _usage(s, "R38", f"EAGLE supports {name} up to {most}, not {s.value(name)}.", f"{name}: {most}")


def check_kernels(subject: Subject, flags: Mapping[str, Flag]) -> None:
    """Checks the flags as the C++ side will. UnsupportedError where it would stop or fall back to slow kernels."""
    s = Settings(subject, flags)
    fmha, paged, fp8 = (s.on(n) for n in ("context_fmha", "use_paged_context_fmha", "use_fp8_context_fmha"))
    if fp8 and (not fmha or (subject.sm is not None and subject.sm not in subject.version.rules["R42"]["sms"])):
        raise _unsupported(
            s, "R42", f"FP8 context FMHA needs context FMHA and a card that has it; this is sm{subject.sm}.",
            "--set engine.flags.use_fp8_context_fmha=disable"
            + " --set engine.flags.use_paged_context_fmha=disable" * paged,  # it would turn it on again
        )  # fmt: skip
    sms = subject.version.rules["R43"]["sms"]
    if s.on("fuse_fp4_quant") and (not fmha or (subject.sm is not None and subject.sm not in sms)):
        raise _unsupported(
            s, "R43", f"fuse_fp4_quant needs context FMHA and one of {', '.join(f'sm{n}' for n in sms)}.",
            "Leave fuse_fp4_quant out.",
        )  # fmt: skip
    if fmha and subject.fmha_head_sizes and subject.head_size not in (None, *subject.fmha_head_sizes):
        raise _unsupported(
            s, "R44", f"sm{subject.sm} has no FP8 context FMHA kernel for heads of {subject.head_size}, only for "
            f"{', '.join(map(str, subject.fmha_head_sizes))} (NVIDIA/TensorRT-LLM #17911).",
            "Turn it off (the plan shows what that costs): --set engine.flags.context_fmha=disable",
        )  # fmt: skip
    if subject.kv_cache_algo == "NVFP4" and not fp8:
        raise _unsupported(s, "R45", "An NVFP4 KV cache needs FP8 context FMHA.", "--kv-cache-dtype fp8")
    if paged and fp8 != (subject.kv_cache_algo == "FP8"):
        raise _unsupported(
            s, "R46", "With paged context FMHA an FP8 KV cache and FP8 context FMHA go together.",
            "--kv-cache-dtype fp8, or use_paged_context_fmha=disable",
        )  # fmt: skip
    lost = [n for n, v in (("kv_cache_reuse", subject.kv_reuse), ("chunked_context", subject.chunked_context)) if v]
    if lost and not paged:
        raise _usage(
            s, "R47", f"repository.enable_{lost[0]} needs an engine with paged context FMHA, and this one has none.",
            f"Leave enable_{lost[0]} out. {FMHA_ON}",
        )  # fmt: skip
    if subject.kv_reuse and (s.on("gather_context_logits") or s.on("gather_all_token_logits")):
        raise _usage(s, "R47", "Gathering context logits turns KV cache reuse off.", "Leave out one of the two.")


def notes(subject: Subject, flags: Mapping[str, Flag]) -> list[Note]:
    """Notes on what trtllm-build would warn about or choose itself, and on what the flags cost."""
    s = Settings(subject, flags)
    found = _costs(s)
    if s.on("remove_input_padding") and s.on("context_fmha"):
        found.append(Note("R18", "max_input_len has no effect: with packed tokens and FMHA only max_seq_len does."))
    limit = subject.version.rules["R23"]["limit"]
    if s.number("max_num_tokens") > limit:
        found.append(Note("R23", f"max_num_tokens over {limit} rarely helps and may exceed TensorRT's limits."))
    if "opt_num_tokens" not in s.flags and not s.on("multiple_profiles") and s.on("remove_input_padding"):
        best = min(s.number("max_batch_size") * s.number("max_beam_width"), s.number("max_num_tokens"))
        found.append(Note("R24", f"kernels are tuned for {best} tokens (opt_num_tokens, chosen by trtllm-build)."))
    if "fast_build" in s.flags:
        text = "fast_build moves the weights into rank*_managed_weights.safetensors beside the engine (manage_weights)."
        found.append(Note("R50", f"{text} trtllm-build's help warns that performance may drop."))
    if "visualize_network" in s.flags:
        where = s.value("visualize_network")
        text = f"visualize_network writes the network as ONNX into {where} when the engine is built, and only then:"
        found.append(Note("R51", f"{text} a cached engine writes nothing, and its config.json does not record it."))
    found.append(Note("R10", "trtllm-build warns about gather_generation_logits in every run; ignore that warning."))
    return found


def _costs(s: Settings) -> list[Note]:
    """Which features are lost without context FMHA or paged context FMHA."""
    found = []
    if not s.on("context_fmha"):
        batch, longest, heads = s.number("max_batch_size"), s.number("max_input_len"), s.subject.heads
        # attentionOp.cpp, getWorkspaceSizeForContext: qk_buf in 2 bytes and qk_buf_float in 4, for each head and each
        # sequence of the batch (gptAttentionPlugin.cpp, max_num_seq).
        workspace = 6 * batch * (heads or 0) * longest**2 / 1e9
        size = f": {workspace:.1f} GB for {batch} prompts of {longest} tokens" if heads else ""
        found.append(Note("R26", "Context FMHA is off: no KV cache reuse between requests, no chunked context."))
        found.append(Note("R44", f"Attention over a prompt is unfused, with quadratic workspace{size}."))
        if s.subject.head_size in s.subject.fmha_head_sizes:
            how = "--gpu sm120-fmha" if s.subject.sm == 120 else "context_fmha=enable"
            found.append(Note("R44", f"{how} avoids both: heads of {s.subject.head_size} have FMHA kernels there."))
    elif not s.on("use_paged_context_fmha"):
        found.append(Note("R47", "Without paged context FMHA there is no KV cache reuse and no chunked context."))
    return found
