"""Does a model know the language of the texts? Without that no figure of it means anything. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from builder.core.errors import IntegrityError


def knows(checked: Mapping[str, Any]) -> bool:
    """Whether a model finds text likelier than the same tokens shuffled. False for NaN."""
    return bool(checked["shuffled_nll"] > checked["checked_nll"])


def check_known_language(checked: Mapping[str, Any], name: str, vocab_size: int) -> None:
    """IntegrityError where the unquantized model does not know the texts: no figure of it would mean anything."""
    text, other, chance = checked["checked_nll"], checked["shuffled_nll"], math.log(vocab_size)
    if knows(checked) and text < chance:
        return
    raise IntegrityError(
        f"The model and its tokenizer do not belong together, or the texts of {name} are in no language that it knows.",
        why=f"The texts' NLL is {text:.2f} nats a token, that of the same tokens shuffled {other:.2f}, and chance "
        f"(one of {vocab_size} tokens) {chance:.2f}: a model must find text likelier than both.",
        hint="Fetch model and tokenizer from the same place, or take other texts with --data.",
    )


def check_vocabulary(largest: int, vocab_size: int) -> None:
    """IntegrityError where the tokenizer makes tokens that the model has no embedding for."""
    if largest >= vocab_size:
        raise IntegrityError(
            "The model and its tokenizer do not belong together.",
            why=f"The tokenizer made token {largest} of a text, and the model knows 0 to {vocab_size - 1}.",
            hint="Fetch model and tokenizer from the same place.",
        )
