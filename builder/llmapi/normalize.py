"""Normalizes LLM arguments as the LLM class would: what it rewrites, filters, ignores or rejects late. Pure.

Each change has its reason and source, which the plan shows. Files named in sources are in NVIDIA/TensorRT-LLM.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from builder.core.errors import UnsupportedError, UsageError
from builder.formats import kv_cache
from builder.formats.base import NumberFormat
from builder.formats.kv_cache import KvCacheFormat
from builder.formats.registry import NVFP4
from builder.llmapi.versions import Facts

ASKED = "asked for"
ARGS = "tensorrt_llm/llmapi/llm_args.py"
EXECUTOR = "tensorrt_llm/_torch/pyexecutor"
CREATOR = f"{EXECUTOR}/py_executor_creator.py@000429d5"
# What torch.compile and prefill CUDA graphs capture where nothing is said (_DEFAULT_PREFILL_CAPTURE_NUM_TOKENS).
CAPTURED = [*(2**n for n in range(8)), *range(256, 3073, 256)]
SM100_FAMILY = (100, 103)  # is_sm_100f


@dataclass(frozen=True)
class Argument:
    """One LLM argument: its dotted name, its value as in YAML, the reason, and the source."""

    name: str
    value: Any
    reason: str
    source: str


@dataclass(frozen=True)
class Subject:
    """What the rules depend on besides the arguments."""

    facts: Facts
    sm: int | None
    experts: int = 0
    number_format: NumberFormat = NVFP4
    cache: KvCacheFormat = kv_cache.FP8
    head_size: int | None = None
    fmha_head_sizes: tuple[int, ...] = field(default=())


def settle(subject: Subject, arguments: Mapping[str, Argument]) -> dict[str, Argument]:
    """The arguments as the LLM class would normalize them, each change with its source. Idempotent.

    UsageError or UnsupportedError for what the class would reject late, or would accept and ignore.
    """
    settled = dict(arguments)
    _refuse(subject, settled)
    _graphs(settled)
    _compiled(subject, settled)
    _sizes(settled)
    _attention(settled)
    _speculation(subject, settled)
    _scheduler(settled)
    _statistics(settled)
    _parallel(subject, settled)
    return settled


def put(settled: dict[str, Argument], name: str, value: Any, reason: str, source: str) -> None:
    """Changes an argument and records the reason; one that has this value already is not changed."""
    if name not in settled or settled[name].value != value:
        settled[name] = Argument(name, value, reason, source)


def _values(settled: Mapping[str, Argument]) -> dict[str, Any]:
    return {name: argument.value for name, argument in settled.items()}


def _asked(settled: Mapping[str, Argument], name: str) -> bool:
    return name in settled and settled[name].reason == ASKED


def _refuse(subject: Subject, settled: Mapping[str, Argument]) -> None:
    values = _values(settled)
    if values["max_batch_size"] > values["max_num_tokens"]:
        raise UsageError(
            f"max_batch_size {values['max_batch_size']} is more than max_num_tokens {values['max_num_tokens']}: each "
            "sequence takes a token of an iteration.",
            why=f"Upstream only warns ({ARGS}, validate_runtime_args).",
            hint=f"--max-batch-size {values['max_num_tokens']}, or a larger --max-num-tokens.",
        )
    cache = values.get("kv_cache_config.max_tokens")
    if cache is not None and cache < values["max_seq_len"]:
        raise UsageError(
            f"kv_cache_config.max_tokens {cache} has no room for one sequence of max_seq_len {values['max_seq_len']}.",
            hint=f"--max-seq-len {cache}, or a larger cache.",
        )
    graphs = values.get("cuda_graph_config.batch_sizes"), settled.get("cuda_graph_config.max_batch_size")
    if graphs[0] and graphs[1] and graphs[1].reason == ASKED and graphs[1].value != max(graphs[0]):
        raise UsageError(
            "cuda_graph_config.batch_sizes and max_batch_size contradict each other.",
            why=f"{ARGS}, CudaGraphConfig: given both, they must agree.",
            hint="Leave out one of the two.",
        )
    _refuse_without_effect(subject, values)
    _refuse_moe(subject, values)
    _refuse_compiled(values)
    _refuse_speculation(values)
    if any(name.startswith(("lora_config.", "peft_cache_config.")) for name in values):
        _refuse_lora(values)


def _refuse_without_effect(subject: Subject, values: Mapping[str, Any]) -> None:
    """Rejects arguments that have an effect only together with another one."""
    for name, value in values.items():
        spec = subject.facts.arguments.get(name, {})
        needed = spec.get("needs")
        if needed and value != spec["default"] and values.get(needed) is not True:
            raise UsageError(
                f"llmapi.args.{name} has no effect unless {needed} is true.",
                why=f"{ARGS}, KvCacheConfig: only KV cache manager v2 heeds it.",
                hint=f"--set llmapi.args.{needed}=true, or leave {name} out.",
            )
    size, path = (values.get(f"kv_cache_config.disk_cache_{what}") for what in ("size", "path"))
    if (size or 0) > 0 and not path:
        raise UsageError(
            "kv_cache_config.disk_cache_size needs a directory on the machine that serves.",
            why=f"{ARGS}, validate_disk_cache_config.",
            hint="--set llmapi.args.kv_cache_config.disk_cache_path=DIRECTORY",
        )


def _refuse_moe(subject: Subject, values: Mapping[str, Any]) -> None:
    asked = [name for name in values if name.startswith(("moe_config.", "moe_"))]
    if asked and not subject.experts:
        raise UsageError(
            f"{asked[0]} is for models with experts, and this one has none.", hint=f"Leave {asked[0]} out."
        )
    backend = values.get("moe_config.backend")
    nvfp4 = subject.number_format is NVFP4  # what `moe_sms` is about
    if nvfp4 and backend is not None and subject.sm is not None and subject.sm not in subject.facts.moe_sms[backend]:
        runs = subject.facts.moe_sms[backend]
        on = f"it runs them on {', '.join(f'sm{n}' for n in runs)}" if runs else "it runs them on none"
        raise UnsupportedError(
            f"The {backend} backend for experts does not run NVFP4 experts on sm{subject.sm}.",
            why=f"{on[0].upper()}{on[1:]} (tensorrt_llm/_torch/modules/fused_moe/MOE_DEVELOPER_GUIDE.md"
            + ("; NVIDIA/TensorRT-LLM #8474)." if backend == "TRTLLM" else ")."),
            hint="Leave moe_config.backend out: CUTLASS.",
        )
    parts = [values.get(f"moe_{kind}_parallel_size") for kind in ("tensor", "expert")]
    given = [part for part in parts if part]
    whole = values["tensor_parallel_size"]
    if given and (whole % math.prod(given) if len(given) == 1 else math.prod(given) != whole):
        raise UsageError(
            f"moe_tensor_parallel_size times moe_expert_parallel_size must be {whole}, the tensor parallel size.",
            why="tensorrt_llm/mapping.py refuses any other product.",
            hint="Leave out one of the two.",
        )


def _refuse_compiled(values: Mapping[str, Any]) -> None:
    """Rejects prefill CUDA graphs that contradict torch.compile's settings (normalize_prefill_cuda_graph_config)."""
    backend = values.get("prefill_cuda_graph_backend")
    compiled = [name for name in values if name.startswith("torch_compile_config.")]
    old = values.get("torch_compile_config.enable_piecewise_cuda_graph")
    if backend == "breakable" and (compiled or any(name.startswith("lora_config.") for name in values)):
        other = compiled[0] if compiled else "lora_config"
        raise UsageError(
            f"prefill_cuda_graph_backend=breakable does not work with {other}.",
            why=f"{ARGS}, normalize_prefill_cuda_graph_config.",
            hint="--set llmapi.args.prefill_cuda_graph_backend=piecewise, or leave out one of the two.",
        )
    if old and backend not in (None, "piecewise"):
        raise UsageError(
            f"torch_compile_config.enable_piecewise_cuda_graph contradicts prefill_cuda_graph_backend={backend}.",
            why=f"{ARGS}, normalize_prefill_cuda_graph_config: the first is the deprecated name of piecewise.",
            hint="Leave torch_compile_config.enable_piecewise_cuda_graph out.",
        )
    sizes = [values.get(name) for name in ("torch_compile_config.capture_num_tokens", "prefill_capture_num_tokens")]
    if backend is not None and sizes[0] and sizes[1] and set(sizes[0]) != set(sizes[1]):
        raise UsageError(
            "torch_compile_config.capture_num_tokens contradicts prefill_capture_num_tokens.",
            why=f"{ARGS}, normalize_prefill_cuda_graph_config: the first is the deprecated name.",
            hint="Leave torch_compile_config.capture_num_tokens out.",
        )


def _refuse_speculation(values: Mapping[str, Any]) -> None:
    config = {name.removeprefix("speculative_config."): v for name, v in values.items() if name.startswith("specul")}
    if not config:
        return
    kind = config.get("decoding_type")
    if kind is None:
        raise UsageError(
            "speculative_config.decoding_type is missing.",
            hint="--set llmapi.args.speculative_config.decoding_type=NGram",
        )
    _refuse_of_the_other_kind(kind, config)
    most = config.get("max_matching_ngram_size")
    if most is not None and (most == 0 or (most < 0 and kind == "NGram") or most < -1):
        takes = "1 or more" if kind == "NGram" else "1 or more, or -1 for the longest match"
        raise UsageError(f"speculative_config.max_matching_ngram_size is {most}, and {kind} takes {takes}.")
    if config.get("enable_global_pool") and (most or -1) > 64:
        raise UsageError(f"With enable_global_pool max_matching_ngram_size is 64 at most, not {most} ({ARGS}).")
    pool = config.get("global_pool_size")
    if pool is not None and not config.get("enable_global_pool"):
        raise UsageError("speculative_config.global_pool_size needs enable_global_pool.", hint="Leave it out.")
    if pool is not None and pool < values["max_batch_size"]:
        raise UsageError(
            f"speculative_config.global_pool_size {pool} is less than max_batch_size {values['max_batch_size']}.",
            why=f"{ARGS}, validate_speculative_config.",
            hint=f"--set llmapi.args.speculative_config.global_pool_size={values['max_batch_size']}",
        )


def _refuse_of_the_other_kind(kind: str, config: Mapping[str, Any]) -> None:
    theirs = {"NGram": ("enable_global_pool", "global_pool_size")}.get(
        kind, ("is_keep_all", "is_use_oldest", "is_public_pool")
    )
    wrong = [name for name in theirs if name in config]
    if wrong:
        raise UsageError(f"speculative_config.{wrong[0]} is not a field of {kind}.", hint=f"Leave {wrong[0]} out.")


def _refuse_lora(values: Mapping[str, Any]) -> None:
    if not values.get("lora_config.lora_dir"):
        raise UsageError(
            "LoRA needs the adapters' directories: requests name one of them.",
            why=f"{ARGS}, validate_lora_config_consistency: without them room for every module is reserved.",
            hint="--set llmapi.args.lora_config.lora_dir=[DIRECTORY]",
        )


def _graphs(settled: dict[str, Argument]) -> None:
    """cuda_graph_config: null disables CUDA graphs; upstream silently drops sizes above the largest batch."""
    if "cuda_graph_config" in settled:
        for name in [name for name in settled if name.startswith("cuda_graph_config.")]:
            del settled[name]
        return
    source = f"{EXECUTOR}/model_engine.py, _filter_cuda_graph_batch_sizes"
    most = settled["max_batch_size"].value
    sizes, largest = "cuda_graph_config.batch_sizes", "cuda_graph_config.max_batch_size"
    if settled.get(sizes) and settled[sizes].value:
        settled.pop(largest, None)
        kept = sorted({n for n in settled[sizes].value if n <= most}) or [most]
        put(settled, sizes, kept, f"sorted; no batch is larger than {most}", source)
    elif not 0 < settled[largest].value <= most:
        put(settled, largest, most, "every batch that can come, and none is larger", source)


def _compiled(subject: Subject, settled: dict[str, Argument]) -> None:
    """Sorts the sizes that torch.compile captures, and replaces deprecated names by prefill_cuda_graph_backend."""
    old, new = "torch_compile_config.capture_num_tokens", "prefill_capture_num_tokens"
    if old in settled and settled[old].value:
        ordered = sorted(set(settled[old].value), reverse=True)
        put(settled, old, ordered, "sorted, the largest first", f"{ARGS}, validate_capture_num_tokens")
    backend = "prefill_cuda_graph_backend"
    if not subject.facts.takes(backend):
        return
    source = f"{ARGS}, normalize_prefill_cuda_graph_config"
    if settled.get("torch_compile_config.enable_piecewise_cuda_graph", _NONE).value:
        put(settled, backend, "piecewise", "torch_compile_config.enable_piecewise_cuda_graph is its old name", source)
    given = settled.get(old, _NONE).value
    if given and new not in settled:
        put(settled, new, given, f"{old} is its old name", source)
    if settled.get(backend, _NONE).value not in (None, "disabled") and not settled.get(new, _NONE).value:
        put(settled, new, CAPTURED, "what the class captures by itself", source)


_NONE = Argument("", None, "", "")


def _sizes(settled: dict[str, Argument]) -> None:
    prompt = settled["max_input_len"].value
    if not settled["enable_chunked_prefill"].value and settled["max_num_tokens"].value < prompt:
        source = "tensorrt_llm/llmapi/llm.py: a longer prompt is refused when it comes"
        put(settled, "max_num_tokens", prompt, "without chunked prefill a prompt goes in at once", source)


def _attention(settled: dict[str, Argument]) -> None:
    backend, reuse = settled["attn_backend"].value, "kv_cache_config.enable_block_reuse"
    if backend == "FLASHINFER" and settled[reuse].value:
        if settled[reuse].reason == ASKED:
            raise UsageError(
                "The FLASHINFER backend reuses no KV cache blocks, and repository.enable_kv_cache_reuse asks for it.",
                why=f"{CREATOR} turns it off with a warning.",
                hint="Leave out one of the two.",
            )
        put(settled, reuse, False, "the FLASHINFER backend turns it off, with a warning in the log", CREATOR)
    if backend == "VANILLA":
        tokens = settled["max_num_tokens"].value
        reason = "the VANILLA backend keeps an iteration's tokens in one block"
        put(settled, "kv_cache_config.tokens_per_block", tokens, reason, CREATOR)


def _speculation(subject: Subject, settled: dict[str, Argument]) -> None:
    """Writes the defaults of speculation explicitly, as versions differ; n-grams need the overlap scheduler off."""
    kind = settled.get("speculative_config.decoding_type", _NONE).value
    if kind is None:
        return
    if "guided_decoding_backend" in settled:
        raise UsageError(
            "repository.guided_decoding and llmapi.args.speculative_config can't be combined here.",
            why="Drafted tokens are checked against a grammar by code that differs between versions "
            f"({EXECUTOR}/guided_decoder.py@07dacbbc).",
            hint="Leave out one of the two.",
        )
    source = f"{ARGS}, {kind}DecodingConfig"
    if "speculative_config.max_draft_len" not in settled:
        put(settled, "speculative_config.max_draft_len", 4, "it must be said; a few tokens cost little", source)
    if "speculative_config.max_matching_ngram_size" not in settled:
        most, reason = (2, "the default of 2026") if kind == "NGram" else (-1, "the default: the longest match")
        put(settled, "speculative_config.max_matching_ngram_size", most, reason, source)
    if kind == "NGram":
        reason = "drafts of n-grams are made on the CPU between steps"
        source = f"{CREATOR}; tensorrt_llm/_torch/speculative/interface.py, support_overlap_scheduler"
        put(settled, "disable_overlap_scheduler", True, reason, source)
    elif settled.get("speculative_config.max_concurrency", _NONE).value and "cuda_graph_config" not in settled:
        reason = "max_concurrency becomes a schedule of draft lengths, which needs it"
        put(settled, "cuda_graph_config.enable_padding", True, reason, f"{ARGS}, validate_speculative_config")


def _scheduler(settled: dict[str, Argument]) -> None:
    if settled["pipeline_parallel_size"].value > 1:
        reason = "pipeline stages have a loop of their own, whatever is asked"
        put(settled, "disable_overlap_scheduler", True, reason, f"{EXECUTOR}/py_executor.py, _executor_loop_pp")
    early = "enable_early_first_token_response"
    if settled.get(early, _NONE).value and settled["disable_overlap_scheduler"].value:
        reason = "only the overlap scheduler has it, and it is off"
        put(settled, early, False, reason, f"{ARGS}, validate_early_first_token_response")


def _statistics(settled: dict[str, Argument]) -> None:
    if settled.get("max_stats_len", _NONE).value == 0:
        put(settled, "max_stats_len", 1, "the smallest buffer", f"{ARGS}, normalize_max_stats_len")


def _parallel(subject: Subject, settled: dict[str, Argument]) -> None:
    """Both parallel sizes, if one of them is set."""
    names = ("use_cute_dsl_bf16_bmm", "use_cute_dsl_bf16_gemm")
    if not subject.facts.takes(names[0]) or subject.sm not in SM100_FAMILY:
        return
    if settled["pipeline_parallel_size"].value > 1:
        for name in names:
            reason = f"the class turns it on by itself for pipeline stages on sm{subject.sm}"
            put(settled, name, True, reason, f"{ARGS}, validate_cute_dsl_bf16")
