"""The smoke test's requests: prompts and answer lengths that suit the engine's limits and speed. Answers are cached.

Greedy decoding is deterministic, so the non-streamed answer to a request is fetched once and reused as the reference.
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

PROMPT = "Return the number of"  # its answer is the sample that a build prints
SHORTER_PROMPTS = ("Return", "a")  # fallbacks for engines with a small max_input_len
PROMPTS = ("The user can", "A list is", "If the file", "Python has", "In this case", "The first", "When a", "Note that")
# Prompts that elicit multi-byte characters from models of different sizes and languages.
UTF8_PROMPTS = (
    "He said: “yes”, “no” and “",
    "“Hello",
    "The user doesn’t know",
    "Écrivez : l’été, la forêt, le château, la",
    "请用中文介绍一下北京。",
    "😀 😃 😄 😁 😀 😃 😄 😁 😀 😃",
)
# Makes any model with a byte-level vocabulary generate ȸȸȸȸ. Each ȸ is the bytes C8 B8, which no vocabulary has as one
# token. The byte C8 is in both words and gets both weights; the frequency penalty makes the two bytes alternate.
BIAS_TO_UTF8 = {
    "embedding_bias_words": ["ȸ", "ȹ"],
    "embedding_bias_weights": [3000.0, 300.0],
    "frequency_penalty": 600.0,
}
BIAS_WORDS = (" the", "the", "a", "e", "1", ".")  # every vocabulary has one of these as a single token
TOKENS, TOKENS_IF_SLOW, FEW_TOKENS = 16, 8, 4
SLOW_SECONDS = 0.02  # per token: a slower server gets requests of TOKENS_IF_SLOW, and one example instead of three
TOO_LONG = re.compile(r"max_tokens can be (-?\d+)|\(max_input_len\)|too many for the")
UNKNOWN_WORD = "which this model does not know"


class CheckFailed(Exception):
    """A check found a fault. The message says what is wrong."""


class NotChecked(Exception):
    """A check could not be made, and no fault was seen. The message says why."""


@dataclass
class SmokeRequests:
    """Makes requests that suit a server.

    `reference` is the endpoint that answers without streaming. `biases` says whether the repository has inputs that
    bias the model towards a word. `max_seq_len` is the engine's limit in tokens.
    """

    reference: Endpoint
    biases: bool
    max_seq_len: int
    _answers: dict[str, str] = field(default_factory=dict)

    @cached_property
    def _size(self) -> tuple[str, int, bool]:
        """The main prompt, the maximum length of its answer (at most TOKENS tokens), and whether the server is slow."""
        for prompt in (PROMPT, *SHORTER_PROMPTS):
            longest = self._longest_answer(prompt)
            if longest < 1:
                continue
            few = min(longest, FEW_TOKENS)
            self.answer(Request(prompt, few))
            start = time.monotonic()
            self.reference(Request(prompt, few))  # a second time: the first request includes the server's warm-up
            slow = (time.monotonic() - start) / few > SLOW_SECONDS
            return prompt, longest, slow
        raise NotChecked("no prompt fits this engine's max_input_len and max_seq_len")

    def _longest_answer(self, prompt: str) -> int:
        """The maximum max_tokens for a prompt, at most TOKENS; 0 if the prompt alone is too long."""
        try:
            self.reference(Request(prompt, self.max_seq_len))  # always too long: the error names the number that fits
        except ServerError as error:
            found = TOO_LONG.search(str(error))
            if found is None:
                raise CheckFailed(f"{prompt!r} was rejected: {short(str(error))}") from None
            return min(int(found[1] or 0), TOKENS)
        return TOKENS

    @property
    def prompt(self) -> str:
        """The main prompt."""
        return self._size[0]

    @property
    def tokens(self) -> int:
        """max_tokens of most requests."""
        return min(self._size[1], TOKENS_IF_SLOW if self._size[2] else TOKENS)

    @property
    def tokens_of_many(self) -> int:
        """max_tokens for checks that send many requests."""
        return min(self.tokens, FEW_TOKENS) if self._size[2] else self.tokens

    def sample(self) -> str:
        """The model's answer to the main prompt, of the same length whether the server is slow or fast."""
        return self.answer(Request(self.prompt, self._size[1]))

    @property
    def examples(self) -> int:
        """How many examples to use in checks that could use any number."""
        return 1 if self._size[2] else 3

    @cached_property
    def options(self) -> Mapping[str, Any]:
        """Inputs to add to every request: none, or a bias towards a word.

        A model needs the bias if its own answers have no text: untrained models generate only special tokens.
        CheckFailed if the bias has no effect either.
        """
        if self.answer(Request(self.prompt, self.tokens)):
            return {}
        if not self.biases:
            raise NotChecked("the model's answers have no text")
        for _, bias in self.word_biases():
            if self.answer(Request(self.prompt, self.tokens, bias)):
                return bias
        raise CheckFailed("the answer is empty, also with a bias towards a word")

    def request(self, prompt: str | None = None, tokens: int | None = None, **options: Any) -> Request:
        """A request with the main prompt and the usual max_tokens, unless others are given."""
        return Request(prompt or self.prompt, tokens or self.tokens, {**self.options, **options})

    def short_request(self) -> Request:
        """A request for the shortest answer that can still be told apart from another."""
        return self.request(tokens=min(self.tokens, FEW_TOKENS))

    def full_length(self, tokens: int, options: Mapping[str, Any] | None = None) -> Request:
        """A request whose answer has exactly `tokens` tokens: min_tokens forbids the end token until then."""
        return Request(self.prompt, tokens, {**(self.options if options is None else options), "min_tokens": tokens})

    def word_biases(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Words, each with the options that make a model generate it. Empty if the repository takes no biases."""
        for word in BIAS_WORDS if self.biases else ():
            yield word, {"embedding_bias_words": [word], "embedding_bias_weights": [300.0]}

    def answer(self, request: Request) -> str:
        """The non-streamed answer, cached; "" if the request's bias names a word that is not in the vocabulary."""
        key = json.dumps([request.text, request.max_tokens, request.options], sort_keys=True, default=str)
        if key not in self._answers:
            try:
                self._answers[key] = self.reference(request).text
            except ServerError as error:
                if UNKNOWN_WORD not in str(error):
                    raise
                self._answers[key] = ""
        return self._answers[key]

    def fitting(self, prompts: Sequence[str], tokens: int) -> list[str]:
        """The prompts that fit the engine's limits with answers of `tokens` tokens."""
        return [prompt for prompt in prompts if self.fits(self.request(prompt, tokens))]

    def fits(self, request: Request) -> bool:
        """Whether a request fits the engine's limits."""
        try:
            self.answer(request)
        except ServerError as error:
            if TOO_LONG.search(str(error)):
                return False
            raise
        return True


def short(text: str, limit: int = 80) -> str:
    """The first `limit` characters of a text, for a message."""
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def difference(answers: Mapping[str, str]) -> str:
    """Describes answers (endpoint -> text) that differ: the first differing position, and each text from there on."""
    texts = list(answers.values())
    first = next((i for i, c in enumerate(zip(*texts, strict=False)) if len(set(c)) > 1), min(map(len, texts)))
    start = max(0, first - 10)
    by_text: dict[str, list[str]] = {}
    for endpoint, text in answers.items():
        by_text.setdefault(text, []).append(endpoint)
    parts = (f"{', '.join(endpoints)}: {short(text[start:], 40)!r}" for text, endpoints in by_text.items())
    return f"from character {start}: {'; '.join(parts)}"
