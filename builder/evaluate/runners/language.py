"""Checks that a model knows the language of the texts; otherwise its figures mean nothing. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from builder.core.errors import IntegrityError


def knows(checked: Mapping[str, Any]) -> bool:
    """Whether a model finds text likelier than the same tokens shuffled. False for NaN."""
    return bool(checked["shuffled_nll"] > checked["checked_nll"])


def check_known_language(checked: Mapping[str, Any], name: str, vocab_size: int) -> None:
    """IntegrityError if the unquantized model does not know the language of the texts."""
    text, other, chance = checked["checked_nll"], checked["shuffled_nll"], math.log(vocab_size)
    if knows(checked) and text < chance:
        return
    raise IntegrityError(
        f"The model does not know the language of the texts {name}, or its tokenizer belongs to another model.",
        why=f"The NLL of the texts is {text:.2f} nats per token, of the same tokens shuffled {other:.2f}, of guessing "
        f"(one of {vocab_size} tokens) {chance:.2f}. A model must find text likelier than both.",
        hint="Fetch model and tokenizer from the same place, or use other texts: --data.",
    )


def check_vocabulary(largest: int, vocab_size: int) -> None:
    """IntegrityError if the tokenizer produces tokens that the model has no embedding for. largest: a token id."""
    if largest >= vocab_size:
        raise IntegrityError(
            "The tokenizer does not belong to this model.",
            why=f"It produced token {largest}, and the model's vocabulary is 0 to {vocab_size - 1}.",
            hint="Fetch model and tokenizer from the same place.",
        )
