"""The error for what can't become a grammar."""

from __future__ import annotations

LONGEST_PATH = 300  # characters of a pointer in a message


class GrammarError(ValueError):
    """A schema or pattern can't become a grammar.

    text: why. path: where in the schema, as a JSON pointer. invalid: it is wrong, not only unsupported.
    """

    def __init__(self, text: str, path: str = "#", *, invalid: bool = False) -> None:
        shown = f"{path[-LONGEST_PATH:]}: {text}"  # both quote the client, who may have sent half of a surrogate pair
        super().__init__(shown.encode("utf-8", "backslashreplace").decode())
        self.text, self.path, self.invalid = text, path, invalid
