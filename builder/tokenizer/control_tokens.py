"""Control tokens that a user's text contains, such as <|im_end|>, as text: they must not end a turn or begin one.

A conversation is rendered with a mark inside each of them, which no tokenizer takes for a token. Where a mark is found
in the rendered text, the text between the template's own control tokens is tokenized again, without the mark and
without a look at added tokens. All other ids are those of the whole text, so nothing changes for texts without them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from tokenizers import Tokenizer

MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # Unicode's noncharacters, which no text should contain


class ControlTokens:
    """The special tokens of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().items()
        self._special = {id: token.content for id, token in added if token.special}
        texts = {text for text in self._special.values() if len(text) > 1}
        self._pattern = re.compile(_any_of(texts)) if texts else None
        # Metaspace writes a space before the first word of a text, but not after a control token ("first").
        self._first_only = b'"prepend_scheme":"first"' in tokenizer.to_str().encode()

    def protect(self, value: Any) -> tuple[Any, str]:
        """The value, in whose texts a mark breaks each control token, and the mark; "" if it has no such text.

        Texts with every possible mark do not exist in practice: ValueError.
        """
        texts = list(_texts(value))
        if self._pattern is None or not any(self._pattern.search(text) for text in texts):
            return value, ""
        mark = next((mark for mark in MARKS if not any(mark in text for text in texts)), "")
        if not mark:
            raise ValueError("the texts contain all noncharacters of Unicode")
        return self._marked(value, mark, self._pattern), mark

    def encode(self, text: str, mark: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of a text that was rendered from protected values."""
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        found: list[int] = []
        piece: list[int] = []  # the ids since the last control token
        start = 0
        for id, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            own = self._special.get(id)
            if own is None or (begin < end and text[begin:end].strip() != own.strip()):  # not the unknown token
                piece.append(id)
                continue
            stop = begin if begin < end else len(text) if piece else start  # a token that was added to the text
            found += self._piece(piece, text[start:stop], mark, start)
            piece, start = [], max(end, stop)
            found.append(id)
        return found + self._piece(piece, text[start:], mark, start)

    def _piece(self, ids: list[int], text: str, mark: str, start: int) -> list[int]:
        return self._plain(text.replace(mark, ""), start) if mark in text else ids

    def _plain(self, text: str, start: int) -> list[int]:
        """The ids of a text without added tokens."""
        tokenizer = self._tokenizer
        if tokenizer.normalizer is not None:
            text = tokenizer.normalizer.normalize_str(text)
        if tokenizer.pre_tokenizer is None:
            words = [text]
        else:
            words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        if self._first_only and start and words and not text.startswith((" ", "▁")):
            words[0] = words[0].removeprefix("▁")
        return [token.id for word in words if word for token in tokenizer.model.tokenize(word)]

    def _marked(self, value: Any, mark: str, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda found: found[0][0] + mark + found[0][1:], value)
        if isinstance(value, dict):
            return {self._marked(key, mark, pattern): self._marked(one, mark, pattern) for key, one in value.items()}
        return [self._marked(one, mark, pattern) for one in value] if isinstance(value, list) else value


def _any_of(texts: Collection[str]) -> str:
    """A regular expression for these texts, of several the longest.

    Their common beginnings are tried once: a user's text of many "<|" would otherwise take time for each token.
    """
    common = os.path.commonprefix(list(texts))  # noqa: RUF071 -- of characters, not of paths
    rest: dict[str, list[str]] = {}
    for text in texts:
        rest.setdefault(text[len(common) : len(common) + 1], []).append(text[len(common) :])
    optional = rest.pop("", None) is not None
    branches = "|".join(_any_of(some) for some in rest.values())
    group = f"(?:{branches})" if len(rest) > 1 or (optional and branches) else branches
    return re.escape(common) + group + ("?" if optional and branches else "")


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value made of JSON's types."""
    waiting: list[Any] = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            waiting += [*one, *one.values()]
        elif isinstance(one, Sequence):
            waiting += one
