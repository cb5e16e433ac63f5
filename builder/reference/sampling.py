"""Samples a token from the logits of one position: bias, temperature, penalties, bad words, top-k, top-p.

Order and arithmetic are those of TensorRT-LLM's decoder (kernels/penaltyKernels.cu@249d93d5, banBadWords.cu@23bc5b7c,
samplingTopKKernels.cu@03961722). Imports torch: only the process of the executor imports this module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from builder.core.errors import UsageError

Words = tuple[tuple[int, ...], ...]  # several words, each a row of token ids


class RequestError(UsageError):
    """A request is invalid. Its client gets this text; other requests are not affected."""


@dataclass(frozen=True)
class Sampling:
    """The sampling parameters of a request. top_k 0 and top_p 0 mean "not given"; both: greedy, as in TensorRT-LLM."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    bad_words: Words = ()
    bias: Tensor | None = None  # [vocab]
    normalize_log_probs: bool = True  # within the top-k, so 0 for greedy: TensorRT-LLM's default

    def __post_init__(self) -> None:
        for name, valid, rule in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("runtime_top_k", self.top_k >= 0, "at least 0"),
            ("runtime_top_p", self.top_p <= 1, "at most 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "more than 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a finite number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number"),
            ("min_tokens", self.min_tokens >= 0, "at least 0"),
        ):
            if not valid:
                raise RequestError(f"{name} must be {rule}.")
        if not math.isfinite(self.temperature) or not math.isfinite(self.repetition_penalty):
            raise RequestError("temperature and repetition_penalty must be finite numbers.")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is chosen. Temperature 0 is always greedy; in TensorRT-LLM it is not if only
        top_p is set."""
        return self.temperature == 0 or self.top_k == 1 or (self.top_k == 0 and self.top_p <= 0)


@dataclass(frozen=True)
class Choice:
    """A token with its log-probability over the whole vocabulary, and as TensorRT-LLM reports it per token."""

    token: int
    log_prob: float
    reported_log_prob: float


def adjust(logits: Tensor, ids: Sequence[int], generated: int, end_id: int | None, how: Sampling) -> Tensor:
    """The logits [vocab] float32 after bias, temperature, penalties and banned tokens.

    ids: prompt and generated tokens. generated: the number of generated tokens, for min_tokens.
    """
    logits = logits.to(torch.float32)
    if how.bias is not None:
        logits = logits + how.bias
    if how.temperature not in (0.0, 1.0):
        logits = logits / (how.temperature + 1e-6)
    logits = _penalize(logits, ids, how)
    banned = [token for token in (_banned(word, ids) for word in how.bad_words) if token is not None]
    if end_id is not None and generated < how.min_tokens:
        banned.append(end_id)
    if banned:
        logits = logits.clone()
        logits[torch.tensor(banned)] = -torch.inf
    return logits


def _penalize(logits: Tensor, ids: Sequence[int], how: Sampling) -> Tensor:
    if (how.repetition_penalty, how.presence_penalty, how.frequency_penalty) == (1.0, 0.0, 0.0):
        return logits
    counts = torch.bincount(torch.tensor(ids), minlength=logits.shape[0])
    r = how.repetition_penalty
    penalized = torch.where(logits < 0, logits * r, logits / r) - how.presence_penalty - how.frequency_penalty * counts
    return torch.where(counts > 0, penalized, logits)


def _banned(word: Sequence[int], ids: Sequence[int]) -> int | None:
    """The token that would complete this bad word; None if its beginning is not at the end of `ids`."""
    start = len(word) - 1
    return word[-1] if start == 0 or tuple(ids[-start:]) == tuple(word[:-1]) else None


def choose(logits: Tensor, how: Sampling, generator: torch.Generator) -> Choice:
    """Samples one token from adjusted logits [vocab]. Of equal logits the lower id ranks first."""
    log_probs = torch.log_softmax(logits, dim=-1)
    if how.greedy:
        token = int(torch.argmax(logits))
        log_prob = float(log_probs[token])
        return Choice(token, log_prob, 0.0 if how.normalize_log_probs else log_prob)
    # Top-p applies within the top-k: u is in (0, p], and the first token whose cumulative share reaches it is chosen.
    k = min(how.top_k, logits.shape[0]) if how.top_k else logits.shape[0]
    ranked, order = torch.sort(log_probs, descending=True, stable=True)
    share = torch.softmax(ranked[:k], dim=-1).cumsum(dim=-1)
    u = (1 - float(torch.rand((), generator=generator))) * (how.top_p if how.top_p > 0 else 1.0)
    rank = min(int(torch.searchsorted(share, u)), k - 1)
    log_prob = float(ranked[rank])
    mass = float(torch.logsumexp(ranked[:k], dim=-1)) if how.top_k and how.normalize_log_probs else 0.0
    return Choice(int(order[rank]), log_prob, log_prob - mass)


def ends_with(ids: Sequence[int], words: Words) -> bool:
    """Whether prompt and generated tokens end with one of the stop words."""
    return any(tuple(ids[-len(word) :]) == word for word in words)
