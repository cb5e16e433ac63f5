"""Reads and validates the tensors of a request to the `tensorrtllm` backend. Does not depend on Triton.

Names, defaults and limits are those of TensorRT-LLM 1.2's C++ backend (inflight_batcher_llm/src/utils.cc@19290813,
batch_manager/llmRequest.cpp@119c6e60, trtGptModel.h@2e2327b9). Imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from builder.grammar.guides import KINDS, Guide
from builder.reference.sampling import RequestError, Sampling, Words

Tensors = Mapping[str, "np.ndarray[Any, Any]"]

# Inputs that would change the output and that the reference executor does not support, with the feature.
_UNSUPPORTED = {
    "encoder_input_features": "encoder-decoder models",
    "draft_input_ids": "speculative decoding",
    "draft_logits": "speculative decoding",
    "draft_acceptance_threshold": "speculative decoding",
    "lookahead_window_size": "lookahead decoding",
    "lookahead_ngram_size": "lookahead decoding",
    "lookahead_verification_set_size": "lookahead decoding",
    "prompt_embedding_table": "prompt embedding tables",
    "prompt_vocab_size": "prompt embedding tables",
    "mrope_rotary_cos_sin": "multimodal input",
    "mrope_position_deltas": "multimodal input",
    "cross_attention_mask": "encoder-decoder models",
    "skip_cross_attn_blocks": "encoder-decoder models",
    "context_phase_params": "disaggregated serving",
    "runtime_top_p_min": "top-p decay",
    "runtime_top_p_decay": "top-p decay",
    "runtime_top_p_reset_ids": "top-p decay",
}


@dataclass(frozen=True)
class Limits:
    """The limits that an engine was built with. A checkpoint has no build_config; its limits are those of the model."""

    vocab_size: int
    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    context_logits: bool = True

    @classmethod
    def read(cls, config: Mapping[str, Any], *, chunked_context: bool = False) -> Limits:
        """From the config.json of an engine or a checkpoint; max_input_len as TRTGptModel's constructor computes it."""
        pretrained = config.get("pretrained_config", config)
        build = config.get("build_config")
        vocab_size, positions = pretrained["vocab_size"], pretrained["max_position_embeddings"]
        if build is None:
            return cls(vocab_size, 8, positions - 1, positions)
        max_seq_len = build.get("max_seq_len") or positions
        plugins = build.get("plugin_config", {})
        if chunked_context:
            max_input_len = max_seq_len - 1
        elif plugins.get("context_fmha") and plugins.get("remove_input_padding"):
            max_input_len = min(max_seq_len - 1, build["max_num_tokens"])
        else:
            max_input_len = build["max_input_len"]
        context_logits = bool(build.get("gather_context_logits", False))
        return cls(vocab_size, build["max_batch_size"], max_input_len, max_seq_len, context_logits)


@dataclass(frozen=True)
class Request:
    """One row of a request, validated: the prompt, its sampling parameters, and which outputs to return.

    end_id: None if the request has none. exclude_input: whether output_ids leave the prompt out. log_probs, logits and
    counts are returned if the field is true. guide: the grammar of the answer.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    end_id: int | None
    stop_words: Words
    streaming: bool
    exclude_input: bool
    log_probs: bool
    context_logits: bool
    generation_logits: bool
    count_input: bool
    count_output: bool
    guide: Guide | None = None


def is_stop(tensors: Tensors) -> bool:
    """Whether the request cancels the one with the same request id instead of generating tokens."""
    return bool(_scalar(tensors, "stop", 0, False))


def read(tensors: Tensors, limits: Limits, *, exclude_input: bool, normalize_log_probs: bool) -> list[Request]:
    """The rows of a request. RequestError, whose text goes to the client, if it is invalid.

    exclude_input: if the request does not say. normalize_log_probs: a parameter of the model.
    """
    if "input_ids" not in tensors or tensors["input_ids"].size == 0:
        raise RequestError("input_ids is missing or empty.")
    if "request_output_len" not in tensors:
        raise RequestError("request_output_len is missing.")
    _reject_unsupported(tensors)
    rows = np.atleast_2d(tensors["input_ids"])
    return [
        _row(tensors, index, _prompt(tensors, rows, index, limits), limits, exclude_input, normalize_log_probs)
        for index in range(len(rows))
    ]


def _reject_unsupported(tensors: Tensors) -> None:
    for name, feature in _UNSUPPORTED.items():
        if name in tensors and tensors[name].size:
            raise RequestError(f"The reference executor does not support {feature}; leave {name} out.")
    for name in ("beam_width", "num_return_sequences"):
        if _scalar(tensors, name, 0, 1) != 1:
            raise RequestError(f"The reference executor does not support beam search; {name} must be 1.")
    if _scalar(tensors, "return_perf_metrics", 0, False):
        raise RequestError("The reference executor has no performance metrics; return_perf_metrics must be false.")


def _prompt(tensors: Tensors, rows: Any, index: int, limits: Limits) -> list[int]:
    row = rows[index]
    if len(rows) > 1:  # a single row is not padded, and the C++ backend ignores input_lengths then
        row = row[: int(_scalar(tensors, "input_lengths", index, len(row)))]
    prompt = [int(token) for token in row]
    if not prompt:
        raise RequestError("input_ids is empty.")
    if len(prompt) > limits.max_input_len:
        raise RequestError(
            f"Prompt length ({len(prompt)}) exceeds maximum input length ({limits.max_input_len}).",
        )
    if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
        raise RequestError(f"input_ids must be within [0, {limits.vocab_size}).")
    return prompt


def _row(
    tensors: Tensors, row: int, prompt: list[int], limits: Limits, exclude_input: bool, normalize_log_probs: bool
) -> Request:
    def get(name: str, default: Any) -> Any:
        return _scalar(tensors, name, row, default)

    max_tokens = int(get("request_output_len", 0))
    if max_tokens < 1:
        raise RequestError(f"request_output_len must be at least 1 (got {max_tokens}).")
    end_id = int(get("end_id", -1))
    if not -1 <= end_id < limits.vocab_size:
        raise RequestError(f"end_id ({end_id}) is not within [-1, {limits.vocab_size}).")
    if get("return_context_logits", False) and not limits.context_logits:
        raise RequestError("return_context_logits needs an engine built with gather_context_logits.")
    sampling = _sampling(tensors, row, limits.vocab_size)
    return Request(
        prompt=prompt,
        max_tokens=min(max_tokens, limits.max_seq_len - len(prompt)),
        sampling=replace(sampling, normalize_log_probs=normalize_log_probs),
        end_id=end_id if end_id >= 0 else None,
        stop_words=words(_matrix(tensors, "stop_words_list", row), "stop_words_list"),
        streaming=bool(get("streaming", False)),
        exclude_input=bool(get("exclude_input_in_output", exclude_input)),
        log_probs=bool(get("return_log_probs", False)),
        context_logits=bool(get("return_context_logits", False)),
        generation_logits=bool(get("return_generation_logits", False)),
        count_input=bool(get("return_num_input_tokens", False)),
        count_output=bool(get("return_num_output_tokens", False)),
        guide=_guide(tensors, row, sampling),
    )


def _guide(tensors: Tensors, row: int, sampling: Sampling) -> Guide | None:
    """The grammar of a row's answer. The C++ backend ignores a kind that it does not know."""
    kind, text = (_text(tensors, f"guided_decoding_guide{suffix}", row) for suffix in ("_type", ""))
    if kind is None and text is None:
        return None
    if kind not in KINDS:
        raise RequestError(f"guided_decoding_guide_type must be one of {', '.join(KINDS)}.")
    if kind != "json" and not text:
        raise RequestError(f"guided_decoding_guide is missing; the type {kind} needs one.")
    if sampling.min_tokens:
        raise RequestError("min_tokens can't be used with a guide: a complete answer has nothing else to follow.")
    return Guide(kind, text or "")


def _text(tensors: Tensors, name: str, row: int) -> str | None:
    value = _scalar(tensors, name, row, None)
    if value is None:
        return None
    try:
        return value.decode("utf-8") if isinstance(value, bytes) else str(value)
    except UnicodeDecodeError:
        raise RequestError(f"{name} is not valid UTF-8.") from None


def _sampling(tensors: Tensors, row: int, vocab_size: int) -> Sampling:
    def get(name: str, default: Any) -> Any:
        return _scalar(tensors, name, row, default)

    return Sampling(
        temperature=float(get("temperature", 1.0)),
        top_k=int(get("runtime_top_k", 0)),
        top_p=max(float(get("runtime_top_p", 0.0)), 0.0),
        seed=int(get("seed", 0)),
        repetition_penalty=float(get("repetition_penalty", 1.0)),
        presence_penalty=float(get("presence_penalty", 0.0)),
        frequency_penalty=float(get("frequency_penalty", 0.0)),
        min_tokens=int(get("min_tokens", 0)),
        bad_words=words(_matrix(tensors, "bad_words_list", row), "bad_words_list", vocab_size),
        bias=_bias(tensors, row, vocab_size),
    )


def _bias(tensors: Tensors, row: int, vocab_size: int) -> torch.Tensor | None:
    array = tensors.get("embedding_bias")
    if array is None or array.size == 0:
        return None
    array = np.atleast_2d(array)[row]
    if array.shape != (vocab_size,):
        raise RequestError(f"embedding_bias must have {vocab_size} values (got {array.size}).")
    return torch.from_numpy(array.astype(np.float32))


def words(matrix: np.ndarray[Any, Any] | None, name: str, vocab_size: int | None = None) -> Words:
    """The words in a [2, n] tensor: token ids, and the offset where each word ends, padded with -1.

    [[5, 6, 9], [2, 3, -1]] -> ((5, 6), (9,)). name: of the tensor, for messages. vocab_size: rejects ids outside of it.
    """
    if matrix is None or matrix.size == 0:
        return ()
    if matrix.ndim != 2 or matrix.shape[0] != 2:
        raise RequestError(f"{name} must have the shape [2, n].")
    ids, ends = ([int(value) for value in line] for line in matrix)
    used = ends[: ends.index(-1)] if -1 in ends else ends
    starts = [0, *used[:-1]]
    if any(value != -1 for value in ends[len(used) :]) or any(
        not start < end <= len(ids) for start, end in zip(starts, used, strict=False)
    ):
        raise RequestError(f"{name}: the second row must be increasing offsets up to {len(ids)}, then -1.")
    found = tuple(tuple(ids[start:end]) for start, end in zip(starts, used, strict=False))
    if vocab_size is not None and any(not 0 <= token < vocab_size for word in found for token in word):
        raise RequestError(f"{name}: token ids must be within [0, {vocab_size}).")
    return found


def _scalar(tensors: Tensors, name: str, row: int, default: Any) -> Any:
    """The value of a tensor for one row. Tensors with one value per row have the shape [rows] or [rows, 1]."""
    array = tensors.get(name)
    if array is None or array.size == 0:
        return default
    flat = array.reshape(-1)
    return flat[row if row < flat.size else 0].item() if isinstance(flat[0], np.generic) else flat[0]


def _matrix(tensors: Tensors, name: str, row: int) -> np.ndarray[Any, Any] | None:
    array = tensors.get(name)
    if array is None or array.size == 0:
        return None
    return array[row if row < len(array) else 0] if array.ndim == 3 else array
