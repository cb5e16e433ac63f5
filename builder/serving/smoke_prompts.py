"""What the smoke test asks: prompts and answer lengths that fit the engine's limits and its speed, each answer kept.

Greedy answers repeat, so that an answer in one piece is asked for once and compared with often.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from builder.serving.client import Endpoint, Request, ServerError

PROMPT = "Return the number of"  # its answer is the sample that a build shows
SHORTER_PROMPTS = ("Return", "a")  # where that one does not fit
PROMPTS = ("The user can", "A list is", "If the file", "Python has", "In this case", "The first", "When a", "Note that")
# Prompts that draw answers with multi-byte characters from models of different size and language.
UTF8_PROMPTS = (
    "He said: “yes”, “no” and “",
    "“Hello",
    "The user doesn’t know",
    "Écrivez : l’été, la forêt, le château, la",
    "请用中文介绍一下北京。",
    "😀 😃 😄 😁 😀 😃 😄 😁 😀 😃",
)
# Pushes any model of a byte-level vocabulary to say ȸȸȸȸ (C8 B8 each), which no vocabulary holds as one token. C8 is
# in both words and gets both weights; the penalty on what was said makes the two bytes take turns.
PUSHED_UTF8 = {
    "embedding_bias_words": ["ȸ", "ȹ"],
    "embedding_bias_weights": [3000.0, 300.0],
    "frequency_penalty": 600.0,
}
PUSHED_WORDS = (" the", "the", "a", "e", "1", ".")  # a vocabulary has one of them as one token
TOKENS, FEWER_TOKENS, FEW_TOKENS = 16, 8, 4
SLOW_SECONDS = 0.02  # a token: from then on FEWER_TOKENS are asked for, and one example where there could be three
DOES_NOT_FIT = re.compile(r"max_tokens can be (-?\d+)|\(max_input_len\)|too many for the")
NOT_KNOWN = "which this model does not know"


class Wrong(Exception):
    """What a check found."""


class NotChecked(Exception):
    """Why a check could not be made. No fault was seen."""


@dataclass
class Questions:
    """`whole` answers in one piece; `biases` says whether there is an input that pushes a word."""

    whole: Endpoint
    biases: bool
    max_seq_len: int
    _known: dict[str, str] = field(default_factory=dict)

    @cached_property
    def _size(self) -> tuple[str, int, bool]:
        """The main prompt, the room for its answer up to TOKENS tokens, and whether the server is slow."""
        for prompt in (PROMPT, *SHORTER_PROMPTS):
            room = self._room(prompt)
            if room < 1:
                continue
            few = min(room, FEW_TOKENS)
            self.answer(Request(prompt, few))
            start = time.monotonic()
            self.whole(Request(prompt, few))  # again: the first one waits for what a server prepares once
            slow = (time.monotonic() - start) / few > SLOW_SECONDS
            return prompt, room, slow
        raise NotChecked("no prompt fits this engine (max_input_len, max_seq_len)")

    def _room(self, prompt: str) -> int:
        """How many of TOKENS tokens an answer can have; 0 where the prompt alone is too long."""
        try:
            self.whole(Request(prompt, self.max_seq_len))  # rejected by preprocessing with the number that fits
        except ServerError as refused:
            found = DOES_NOT_FIT.search(str(refused))
            if found is None:
                raise Wrong(f"{prompt!r} was refused: {short(str(refused))}") from None
            return min(int(found[1] or 0), TOKENS)
        return TOKENS

    @property
    def prompt(self) -> str:
        return self._size[0]

    @property
    def tokens(self) -> int:
        """Of an answer."""
        return min(self._size[1], FEWER_TOKENS if self._size[2] else TOKENS)

    @property
    def tokens_of_many(self) -> int:
        """Of an answer where many are needed."""
        return min(self.tokens, FEW_TOKENS) if self._size[2] else self.tokens

    def sample(self) -> str:
        """The model's own answer, as long on a slow server as on a fast one."""
        return self.answer(Request(self.prompt, self._size[1]))

    @property
    def examples(self) -> int:
        """How many examples a check needs that could use any number of them."""
        return 1 if self._size[2] else 3

    @cached_property
    def options(self) -> Mapping[str, Any]:
        """What every question has beside its prompt: nothing, or the push towards a word that a model needs whose own
        answers hold no text (an untrained one says special tokens). Wrong where a pushed word does not come either."""
        if self.answer(Request(self.prompt, self.tokens)):
            return {}
        if not self.biases:
            raise NotChecked("the model's answers hold no text")
        for _, pushed in self.pushed():
            if self.answer(Request(self.prompt, self.tokens, pushed)):
                return pushed
        raise Wrong("an empty answer, and an empty one where a word is pushed")

    def ask(self, prompt: str | None = None, tokens: int | None = None, **more: Any) -> Request:
        """Of the main prompt and the usual length, if no other is given."""
        return Request(prompt or self.prompt, tokens or self.tokens, {**self.options, **more})

    def few(self) -> Request:
        """As short as an answer can be that is told from another."""
        return self.ask(tokens=min(self.tokens, FEW_TOKENS))

    def long(self, tokens: int, options: Mapping[str, Any] | None = None) -> Request:
        """Whose answer does not end before max_tokens: min_tokens forbids the end token until then."""
        return Request(self.prompt, tokens, {**(self.options if options is None else options), "min_tokens": tokens})

    def pushed(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Words, and the options that push a model to say each; none where nothing can be pushed."""
        for word in PUSHED_WORDS if self.biases else ():
            yield word, {"embedding_bias_words": [word], "embedding_bias_weights": [300.0]}

    def answer(self, ask: Request) -> str:
        """The text in one piece, asked for once. "" where a pushed word is none of this model's."""
        key = json.dumps([ask.text, ask.max_tokens, ask.options], sort_keys=True, default=str)
        if key not in self._known:
            try:
                self._known[key] = self.whole(ask).text
            except ServerError as refused:
                if NOT_KNOWN not in str(refused):
                    raise
                self._known[key] = ""
        return self._known[key]

    def fitting(self, prompts: Sequence[str], tokens: int) -> list[str]:
        """Those whose answers of so many tokens fit."""
        return [prompt for prompt in prompts if self.fits(self.ask(prompt, tokens))]

    def fits(self, ask: Request) -> bool:
        try:
            self.answer(ask)
        except ServerError as refused:
            if DOES_NOT_FIT.search(str(refused)):
                return False
            raise
        return True


def short(text: str, limit: int = 80) -> str:
    """For a message: the beginning of a long text."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def differing(found: Mapping[str, str]) -> str:
    """Which ways gave which answer, each answer from a little before the place where they part."""
    texts = list(found.values())
    part = next((i for i, c in enumerate(zip(*texts, strict=False)) if len(set(c)) > 1), min(map(len, texts)))
    start = max(0, part - 10)
    by_text: dict[str, list[str]] = {}
    for way, text in found.items():
        by_text.setdefault(text, []).append(way)
    said = (f"{', '.join(ways)}: {short(text[start:], 40)!r}" for text, ways in by_text.items())
    return f"from character {start}: {'; '.join(said)}"
