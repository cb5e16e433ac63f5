"""The error for what can't become a grammar."""

from __future__ import annotations


class GrammarError(ValueError):
    """A schema or pattern can't become a grammar.

    text: why. path: where in the schema, as a JSON pointer. invalid: it is wrong, not only unsupported.
    """

    def __init__(self, text: str, path: str = "#", *, invalid: bool = False) -> None:
        super().__init__(f"{path}: {text}")
        self.text, self.invalid = text, invalid
