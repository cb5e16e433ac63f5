"""Parameters of the C++ backend that contradict the engine's build_config or each other.

Each rule says what the backend would do: model_instance_state.cc@c8c6df08, getExecutorConfigFromParams, unless another
source is named. max_beam_width and what needs paged context FMHA are in compatibility.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from builder.recipe.triton_parameters import kinds, wrong
from builder.trtllm.mismatch import Mismatch

ON = ("True", "true", "TRUE", "1")  # what the backend takes for true (GetParameter<bool>, model_state.cc@5cdd6921)
# decoding_mode -> SpeculativeDecodingMode of the engine (tensorrt_llm/models/modeling_utils.py, 1.2).
MODES = {"medusa": 4, "lookahead": 8, "redrafter": 16, "eagle": 32}
LOOKAHEAD = ("lookahead_window_size", "lookahead_ngram_size", "lookahead_verification_set_size")
ONLY_WITH = {"medusa_choices": "medusa", "eagle_choices": "eagle", **dict.fromkeys(LOOKAHEAD, "lookahead")}
LORA = "lora_"


def contradictions(values: Mapping[str, str], build: Mapping[str, Any], world_size: int = 1) -> Iterator[Mismatch]:
    """All of them. values: the parameters that have a value; build: the engine's build_config.

    A value of another kind is left out: the backend takes its default instead.
    """
    known = kinds("tensorrt_llm")
    values = {name: value for name, value in values.items() if not wrong(known.get(name, "text"), value)}
    yield from _cache(values, build)
    yield from _decoding(values, build)
    yield from _features(values, build)
    devices = values.get("gpu_device_ids", "")
    if devices and len(devices.partition(";")[0].split(",")) != world_size:
        yield Mismatch(
            f"gpu_device_ids is {devices}, and the engine has {world_size} rank{'s' * (world_size > 1)}.",
            "The C++ backend would not load the engine: each rank needs one GPU.",
            "Name one GPU for each rank, or omit gpu_device_ids.",
        )


def _cache(values: Mapping[str, str], build: Mapping[str, Any]) -> Iterator[Mismatch]:
    reuses = values.get("enable_kv_cache_reuse", "true") in ON
    if not reuses and _number(values, "kv_cache_host_memory_bytes"):
        yield Mismatch(
            "kv_cache_host_memory_bytes needs enable_kv_cache_reuse.",
            "Only blocks that are kept for reuse are moved to host memory.",
            "Omit kv_cache_host_memory_bytes, or set enable_kv_cache_reuse to true.",
        )
    if values.get("enable_kv_cache_reuse") in ON and build.get("gather_context_logits"):
        yield Mismatch(
            "enable_kv_cache_reuse is true, and the engine was built with gather_context_logits.",
            "Tokens whose keys and values are reused are not computed, so they have no logits.",
            "Set enable_kv_cache_reuse to false, or build without gather_context_logits.",
        )
    tokens, longest = _number(values, "max_tokens_in_paged_kv_cache"), build.get("max_seq_len") or 0
    if tokens and tokens < longest and "max_attention_window_size" not in values:
        yield Mismatch(
            f"max_tokens_in_paged_kv_cache is {tokens}, and the engine takes sequences of {longest}.",
            "The longest request would never fit into the KV cache.",
            f"Set max_tokens_in_paged_kv_cache to {longest} or more, or build with --max-seq-len {tokens}.",
        )
    plugins = build.get("plugin_config") or {}
    if _number(values, "sink_token_length") and plugins.get("streamingllm") is False:
        yield Mismatch(
            f"sink_token_length is {values['sink_token_length']}, and the engine was built without streamingllm.",
            "Its attention kernels have no sink tokens.",
            "Omit sink_token_length, or build with --set engine.flags.streamingllm=enable.",
        )


def _decoding(values: Mapping[str, str], build: Mapping[str, Any]) -> Iterator[Mismatch]:
    mode, built = values.get("decoding_mode", ""), build.get("speculative_decoding_mode")
    if mode == "explicit_draft_tokens":
        yield Mismatch(
            "decoding_mode is explicit_draft_tokens.",
            "The C++ backend knows it as redrafter, and would use its default instead.",
            "Set decoding_mode to redrafter.",
        )
    if mode in MODES and isinstance(built, int) and not built & MODES[mode]:
        yield Mismatch(
            f"decoding_mode is {mode}, and the engine was not built for it.",
            "The C++ backend would not load the engine.",
            f"Omit decoding_mode, or build an engine for {mode}.",
        )
    if mode == "beam_search" and (build.get("max_beam_width") or 1) == 1:
        yield Mismatch(
            "decoding_mode is beam_search, and the engine was built for one beam.",
            "The C++ backend would not load the engine.",
            "Omit decoding_mode, or build with --set engine.flags.max_beam_width=4.",
        )
    missing = [name for name in LOOKAHEAD if name not in values]
    if mode == "lookahead" and missing:
        yield Mismatch(
            f"decoding_mode is lookahead, and {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not set.",
            "The C++ backend would not load the engine.",
            f"Set {' and '.join(missing)}.",
        )
    for name, needed in ONLY_WITH.items():
        if name in values and mode != needed:
            yield Mismatch(
                f"{name} needs decoding_mode {needed}.",
                "The C++ backend would not use it.",
                f"Omit {name}, or set decoding_mode to {needed}.",
            )


def _features(values: Mapping[str, str], build: Mapping[str, Any]) -> Iterator[Mismatch]:
    plugins = build.get("plugin_config") or {}
    adapters = [name for name in values if name.startswith(LORA)]
    if adapters and plugins.get("lora_plugin", "auto") in (None, False, "disable"):
        yield Mismatch(
            f"{' and '.join(adapters)} {'need' if len(adapters) > 1 else 'needs'} an engine with LoRA.",
            "This one was built without lora_plugin, so the C++ backend makes no cache of adapters.",
            f"Omit {' and '.join(adapters)}, or build with --set engine.flags.lora_plugin=auto.",
        )
    share = values.get("gpu_weights_percent", "1")
    if float(share) < 1 and build.get("weight_streaming") is False:
        yield Mismatch(
            f"gpu_weights_percent is {share}, and the engine was built without weight_streaming.",
            "Its weights can't be kept in host memory, so the C++ backend would not load the engine.",
            "Omit gpu_weights_percent, or build with --set engine.flags.weight_streaming=true.",
        )
    if _number(values, "cuda_graph_cache_size") and values.get("cuda_graph_mode") not in ON:
        yield Mismatch(
            "cuda_graph_cache_size needs cuda_graph_mode.",
            "The C++ backend would record no graphs.",
            "Omit cuda_graph_cache_size, or set cuda_graph_mode to true.",
        )


def _number(values: Mapping[str, str], name: str) -> int:
    return int(values.get(name, "").lstrip("0") or 0)  # Python reads no number of thousands of digits
