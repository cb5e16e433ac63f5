"""What a served repository must answer: a check asks, and returns what it saw. Imports tritonclient.

It raises Wrong for a fault of the product or the model, and NotChecked where this model shows neither.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from builder.recipe.target_facts import ENGINE, TargetFacts, target_facts
from builder.serving.client import Client, Endpoint, Request, Response, ServerError
from builder.serving.smoke_prompts import (
    PROMPTS,
    PUSHED_UTF8,
    UTF8_PROMPTS,
    NotChecked,
    Questions,
    Wrong,
    differing,
    short,
)

# Tracebacks, file names and paths, addresses: what an error for a client must not hold.
LEAK = re.compile(r"Traceback|File \"|\.(?:py|cc|cpp|cu|so)\b|(?<![\w:/])/(?:[\w.+-]+/)+[\w.+-]+|\b0x[0-9a-f]{6,}")
REPLACEMENT = "\ufffd"
READY = "server and models ready"


@dataclass
class Checks:
    """Over one client. `first` is the first answer to the main prompt, with which the last check compares."""

    client: Client
    facts: Mapping[str, Any]
    first: str = ""
    ways: dict[str, Endpoint] = field(default_factory=dict)
    answered: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ways = {"HTTP generate": self.client.http_generate}
        if self.infers:
            self.ways = {"HTTP infer": self.client.http_infer, **self.ways, "gRPC infer": self.client.grpc_infer}
        if self.streams:
            self.ways["gRPC stream"] = self.client.grpc_stream
        # A word can be pushed where there is an input for it: the LLM API's model has none.
        biases = not self.target.python_model
        self.asks = Questions(self.whole, biases, self.facts.get("max_seq_len", 2**31 - 1))

    @property
    def target(self) -> TargetFacts:
        """Of a repository whose facts name none, which is one of an engine."""
        return target_facts(self.facts.get("target", ENGINE.name))

    @property
    def streams(self) -> bool:
        return bool(self.facts["decoupled"])

    @property
    def infers(self) -> bool:
        return "infer" in self.facts["models"]

    @property
    def sample(self) -> tuple[str, str] | None:
        """The main prompt and the model's own answer to it, as far as one came."""
        if not self.first or self.asks.options:
            return None
        return self.asks.prompt, self.asks.sample()

    def named(self) -> dict[str, Callable[[], str]]:
        """By name, in the order in which they run."""
        named: dict[str, Callable[[], str]] = {READY: self.ready}
        for way in self.ways:
            named[way] = lambda way=way: self.answers(way)  # type: ignore[misc]
        if self.streams:
            named["streamed pieces are the whole answer"] = self.pieces
            named["streamed UTF-8 is never cut"] = self.utf8
            if "engine" in self.facts["models"]:
                named["the engine makes max_tokens tokens"] = self.engine_tokens
        return named | {
            "the same answer every way": self.same_everywhere,
            "max_tokens ends the answer": self.max_tokens,
            "a stop word ends the answer": self.stop_word,
            "concurrent requests": self.concurrent,
            "too long prompt": self.too_long,
            "invalid UTF-8": self.invalid_utf8,
            "missing input": self.missing_input,
            "alive after all this": self.alive,
        }

    def ready(self) -> str:
        if not self.client.ready():
            raise Wrong("the server is not ready")
        steps = {"preprocessing", "postprocessing"} if "engine" in self.facts["models"] else set()
        names = sorted({*self.facts["models"].values(), *steps})
        missing = [name for name in names if not self.client.ready(name)]
        if missing:
            raise Wrong(f"not ready: {', '.join(missing)}")
        return ", ".join(names)

    def answers(self, way: str) -> str:
        ask = self.asks.ask()
        answer = self.ways[way](ask)
        if not answer.text:
            raise Wrong("an empty answer")
        self.first = self.first or answer.text
        self.answered[way] = answer.text
        return repr(answer.text)

    def whole(self, ask: Request) -> Response:
        """The answer in one piece: what every other way is compared with."""
        return self.client.grpc_infer(ask) if self.infers else self.client.http_generate(ask)

    def same_everywhere(self) -> str:
        prompts = [self.asks.prompt, *self.asks.fitting(PROMPTS[: min(self.asks.examples, 2)], self.asks.tokens)]
        for prompt in prompts:
            found = {way: ask(self.asks.ask(prompt)).text for way, ask in self.ways.items() if way not in self.answered}
            if prompt == prompts[0]:
                found |= self.answered
            if len(set(found.values())) != 1:
                raise Wrong(f"greedy answers to {prompt!r} differ, {differing(found)}")
            self.answered = {}
        return f"{len(self.ways)} ways, {len(prompts)} prompts"

    def pieces(self) -> str:
        """A model's own answer may have one piece of text only; that of a pushed word has as many as tokens."""
        if self.asks.tokens < 2:
            raise NotChecked("this engine has no room for an answer of two tokens (max_seq_len)")
        for options in (self.asks.options, *(pushed for _, pushed in self.asks.pushed())):
            ask = self.asks.long(self.asks.tokens, options)
            whole = self.asks.answer(ask)
            if not whole:
                continue
            streamed = self.client.grpc_stream(ask)
            _equal("the pieces together", streamed.text, "the whole answer", whole)
            if sum(bool(piece) for piece in streamed.chunks) > 1:
                return f"{len(streamed.chunks)} pieces"
        if self.asks.biases:
            raise Wrong(f"one piece only: {short(whole)!r}")
        raise NotChecked(f"the model's answer has one piece of text only: {short(whole)!r}")

    def engine_tokens(self) -> str:
        ids = [1, 2, 3][: min(3, self.facts["max_input_len"], self.facts["max_seq_len"] - 1)]
        lengths = [n for n in (1, 5) if n + len(ids) <= self.facts["max_seq_len"]]
        for wanted in lengths:
            tokens = self.client.engine_tokens(ids, wanted)
            if len(tokens) != wanted:
                raise Wrong(f"max_tokens {wanted}: {len(tokens)} tokens came")
        return f"{' and '.join(map(str, lengths))} tokens when asked for"

    def max_tokens(self) -> str:
        """Text can't be counted in tokens here, but a shorter answer must be the beginning of a longer one."""
        lengths = sorted({n for n in (1, 4, self.asks.tokens) if n <= self.asks.tokens})
        if len(lengths) < 2:
            raise NotChecked("this engine has no room for answers of different lengths (max_seq_len)")
        for options in (self.asks.options, *(pushed for _, pushed in self.asks.pushed())):
            texts = [self.asks.answer(self.asks.long(tokens, options)).rstrip(REPLACEMENT) for tokens in lengths]
            for shorter, longer in itertools.pairwise(texts):
                if not longer.startswith(shorter):
                    raise Wrong(f"max_tokens {lengths}: {short(longer)!r} does not begin with {short(shorter)!r}")
            if len(set(texts)) == len(texts):
                return f"{', '.join(str(len(text)) for text in texts)} characters for {lengths} tokens"
        if self.asks.biases:
            raise Wrong(f"max_tokens {lengths}: answers of {', '.join(str(len(text)) for text in texts)} characters")
        raise NotChecked(f"the model's answers of {lengths} tokens have the same text")

    def stop_word(self) -> str:
        """A word of the free answer, given as a stop word, must be the last thing that comes (or not come at all).

        A model may write a word of its own answer in other tokens than its tokenizer would, and then no list of token
        ids finds it (README). A word that is pushed comes in the tokenizer's own.
        """
        free = self.asks.answer(self.asks.ask())
        # A word is a token together with the space before it, most often: as a stop word it needs it too.
        for word in list(dict.fromkeys(re.findall(r" [^\W\d_]{2,}", free)))[: self.asks.examples]:
            if not self.unstopped(word, free, self.asks.options):
                return f"{word!r} ended {short(free)!r}"
        for word, options in self.asks.pushed():
            free = self.asks.answer(self.asks.ask(**options))
            if 0 <= free.find(word) < len(free) - len(word):
                if found := self.unstopped(word, free, options):
                    raise Wrong(f"{word!r} did not end {short(free)!r}: {found}")
                return f"{word!r} ended {short(free)!r}"
        raise NotChecked(f"no word of the answer {short(free)!r} ends it: it may stand there in other tokens")

    def unstopped(self, word: str, free: str, options: Mapping[str, Any]) -> str:
        """ "" if every way ends the answer at the word, or right after the token that holds its end."""
        ask, begin = self.asks.ask(stop_words=[word], **options), free.index(word)
        for way, call in self.ways.items():
            text = call(ask).text
            ends_there = begin - 1 <= len(text) <= begin + len(word) + 2
            if not (free.startswith(text) and text != free and ends_there):
                return f"{way}: {short(text)!r}"
        return ""

    def utf8(self) -> str:
        """Characters of several tokens must wait until they are complete."""
        seen: list[str] = []
        for ask in self.utf8_asks():
            if not self.asks.fits(ask):
                continue
            whole = self.asks.answer(ask)
            if REPLACEMENT in whole or whole.isascii():
                continue  # the answer itself ends within a character, or shows nothing
            streamed = self.client.grpc_stream(ask)
            cut = [piece for piece in streamed.chunks if REPLACEMENT in piece]
            if cut:
                raise Wrong(f"a character of {short(whole)!r} was cut: {short(str(cut))}")
            _equal("the pieces together", streamed.text, "the whole answer", whole)
            seen.append(whole)
            if len(seen) == self.asks.examples:
                break
        if not seen:
            raise NotChecked("no prompt drew an answer with a multi-byte character")
        return f"{len(seen)} answers, {short(seen[0])!r}"

    def utf8_asks(self) -> list[Request]:
        pushed = [Request(self.asks.prompt, min(8, self.asks.tokens), PUSHED_UTF8)] if self.asks.biases else []
        return [*pushed, *(Request(prompt, self.asks.tokens) for prompt in UTF8_PROMPTS)]

    def concurrent(self) -> str:
        """Eight at once, over all ways; each must get its own answer."""
        tokens = self.asks.tokens_of_many
        prompts = self.asks.fitting(PROMPTS, tokens) or [self.asks.prompt]
        prompts = [prompts[i % len(prompts)] for i in range(len(PROMPTS))]
        ways = [list(self.ways.values())[i % len(self.ways)] for i in range(len(prompts))]
        together = self.at_once([(way, self.asks.ask(p, tokens)) for way, p in zip(ways, prompts, strict=True)])
        for prompt, answer in zip(prompts, together, strict=True):
            if isinstance(answer, Exception):
                raise Wrong(f"{prompt!r}: {type(answer).__name__}: {answer}")
            alone = self.asks.answer(self.asks.ask(prompt, tokens))
            if not self.equal_enough(alone, answer.text):
                raise Wrong(f"{prompt!r}: {short(answer.text)!r} among others, {short(alone)!r} alone")
        return f"{len(prompts)} answers as when asked alone"

    def equal_enough(self, alone: str, among_others: str) -> bool:
        """A GPU's kernels depend on the batch, so a near tie may turn; the reference executor computes each alone."""
        if not self.target.float32:
            return alone.split()[:1] == among_others.split()[:1]
        return alone == among_others

    def at_once(self, asked: Sequence[tuple[Endpoint, Request]]) -> list[Response | Exception]:
        def one(way: Endpoint, ask: Request) -> Response | Exception:
            try:
                return way(ask)
            except Exception as error:
                return error

        with ThreadPoolExecutor(len(asked)) as pool:
            return list(pool.map(lambda pair: one(*pair), asked))

    def too_long(self) -> str:
        """A prompt of one word more than the engine takes tokens can't fit."""
        limit = self.facts["max_input_len"]
        return self.refused(Request("one two " * (limit // 2 + 1), 1), rf"\b{limit}\b|long|length|exceed")

    def invalid_utf8(self) -> str:
        return self.refused(Request(b"caf\xe9 \xff\xfe", 1), r"(?i)utf-?8")

    def missing_input(self) -> str:
        """Without options: Triton 24.10 counts inputs only; with one too many, an ensemble answers nothing at all."""
        bare = {"top_k": None}
        text = self.refused(Request(None, 1, bare), "text_input")
        if "max_tokens" in self.facts.get("required", ("max_tokens",)):
            self.refused(Request(self.asks.prompt, None, bare), "max_tokens")
        return text

    def refused(self, bad: Request, reason: str) -> str:
        """Sent every way, between good ones: it gets an error of its own that tells the reason, they their answers."""
        good = self.asks.few()
        expected = self.asks.answer(good)
        asked = [pair for way in self.ways.values() for pair in ((way, good), (way, bad))]
        answers = self.at_once(asked)
        for way, answer in zip(self.ways, answers[::2], strict=True):
            if isinstance(answer, Exception) or not self.equal_enough(expected, answer.text):
                raise Wrong(f"{way}: a good request beside it got {short(str(answer), 200)!r}")
        for way, answer in zip(self.ways, answers[1::2], strict=True):
            if not isinstance(answer, ServerError):
                raise Wrong(f"{way}: it was not refused: {short(repr(answer), 200)}")
            if LEAK.search(str(answer)) or not re.search(reason, str(answer)):
                said = short(str(answer), 300)
                raise Wrong(f"{way}: the error does not tell the reason, or tells of the server's insides: {said}")
        return str(answers[-1])

    def alive(self) -> str:
        self.ready()
        _equal("the answer", self.whole(self.asks.ask()).text, "the first one", self.first)
        return "ready, and the first answer again"


def _equal(what: str, found: str, than: str, wanted: str) -> None:
    if found != wanted:
        raise Wrong(f"they differ, {differing({what: found, than: wanted})}")
