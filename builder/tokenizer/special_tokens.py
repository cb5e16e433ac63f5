"""Prevents duplicate special tokens at the beginning of a text, such as a second BOS token. Standard library only.

Many chat templates write the BOS token, and the tokenizer's post-processor adds another one. Calibration, evaluation
and the served models follow one rule: if a text already begins with these tokens, they are not added again. (The
triton_templates/*/1/model.py files repeat the rule because they run without this package.) lm-eval does the same
(`has_bos_prefix`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Encode = Callable[[str], Sequence[int]]


def prefix_ids(encode: Encode) -> list[int]:
    """The ids that `encode` adds before every text: the common beginning of the encodings of "", "a" and "b"."""
    common = []
    for ids in zip(encode(""), encode("a"), encode("b"), strict=False):
        if len(set(ids)) > 1:
            break
        common.append(ids[0])
    return common


def without_repeated_prefix(ids: Sequence[int], prefix: Sequence[int]) -> list[int]:
    """The ids of a text, with only one `prefix` if they begin with two."""
    length = len(prefix)
    repeated = length and list(ids[length : 2 * length]) == list(prefix)
    return list(ids[length:] if repeated else ids)


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """A function that encodes text with a transformers tokenizer, adding special tokens but never a second prefix."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, verbose=False)["input_ids"])

    prefix = prefix_ids(encode)
    return lambda text: without_repeated_prefix(encode(text), prefix)
