"""The questions of the quality check, and what a quantized model's answers lack that the BF16 model's have."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Questions for models with a chat template, and texts to continue for models without. fact: what an answer must name,
# in any of these words.
PROMPTS: Sequence[Mapping[str, str | Sequence[str]]] = (
    {"ask": "What is the capital of France?", "continue": "The capital of France is", "fact": ("Paris",)},
    {
        "ask": "Name three primary colors.",
        "continue": "The three primary colors are",
        "fact": ("red", "blue", "yellow", "green"),
    },
    {
        "ask": "What does len() return in Python?",
        "continue": "Return the number of",
        "fact": ("length", "number", "items", "elements"),
    },
)
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Answer:
    """Greedy answers to one prompt. lost: the fact that BF16's answer names and the quantized model's does not, or "".

    Words are compared rather than tokens: where two beginnings are nearly as likely, rounding decides between them, and
    both may lead to the right answer."""

    prompt: str
    bf16: str
    quantized: str
    lost: str = ""


def lost(fact: Sequence[str], bf16: str, quantized: str) -> str:
    """The first word of a fact that BF16's answer names and the quantized model's does not; "" if there is none."""
    return fact[0] if _names(bf16, fact) and not _names(quantized, fact) else ""


def _names(answer: str, fact: Sequence[str]) -> bool:
    return any(re.search(rf"\b{re.escape(word)}", answer, re.IGNORECASE) for word in fact)
