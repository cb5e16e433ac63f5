"""The special tokens that a tokenizer puts in front of a text, as <s>: never twice. Standard library only.

A chat template often writes the BOS token itself, and the tokenizer's post-processor adds one more. Calibration,
evaluation and the served models share one rule (triton_templates/*/1/model.py repeat it: they run without this
package): what a text begins with already is not added again. lm-eval does the same (`has_bos_prefix`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Encode = Callable[[str], Sequence[int]]


def prefix_ids(encode: Encode) -> list[int]:
    """The ids that `encode` puts in front of every text: what the encodings of "", "a" and "b" begin with alike."""
    common = []
    for ids in zip(encode(""), encode("a"), encode("b"), strict=False):
        if len(set(ids)) > 1:
            break
        common.append(ids[0])
    return common


def without_repeated_prefix(ids: Sequence[int], front: Sequence[int]) -> list[int]:
    """`ids` of a text, without the second of two equal fronts."""
    length = len(front)
    repeated = length and list(ids[length : 2 * length]) == list(front)
    return list(ids[length:] if repeated else ids)


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """How to encode a text with a tokenizer of transformers: with its special tokens, but none of them twice."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, verbose=False)["input_ids"])

    front = prefix_ids(encode)
    return lambda text: without_repeated_prefix(encode(text), front)
