"""What a served repository must answer: a check asks, and returns what it saw or raises Wrong. Imports tritonclient."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from builder.client import Answer, Ask, Client, Refused, Way

PROMPT = "Return the number of"  # its answer is the sample that a build shows
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
PUSHED_WORD = {"embedding_bias_words": [" the"], "embedding_bias_weights": [300.0]}
TOKENS = 16
# Tracebacks, file names and paths, addresses: what an error for a client must not hold.
LEAK = re.compile(r"Traceback|File \"|\.(?:py|cc|cpp|cu|so)\b|(?<![\w:/])/(?:[\w.+-]+/)+[\w.+-]+|\b0x[0-9a-f]{6,}")
REPLACEMENT = "\ufffd"
READY = "server and models ready"


class Wrong(Exception):
    """What a check found."""


@dataclass
class Checks:
    """Over one client. `first` is the first answer to PROMPT, with which the last check compares."""

    client: Client
    facts: Mapping[str, Any]
    first: str = ""
    ways: dict[str, Way] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ways = {"HTTP generate": self.client.http_generate}
        if self.infers:
            self.ways = {"HTTP infer": self.client.http_infer, **self.ways, "gRPC infer": self.client.grpc_infer}
        if self.streams:
            self.ways["gRPC stream"] = self.client.grpc_stream

    @property
    def streams(self) -> bool:
        return bool(self.facts["decoupled"])

    @property
    def infers(self) -> bool:
        return "infer" in self.facts["models"]

    @property
    def biases(self) -> bool:
        """Whether a word can be pushed: the LLM API's model has no such input."""
        return self.facts.get("target") != "llmapi"

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
        answer = self.ways[way](Ask(PROMPT, TOKENS))
        if not answer.text:
            raise Wrong("an empty answer")
        self.first = self.first or answer.text
        return repr(answer.text)

    def whole(self, ask: Ask) -> Answer:
        """The answer in one piece: what every other way is compared with."""
        return self.client.grpc_infer(ask) if self.infers else self.client.http_generate(ask)

    def same_everywhere(self) -> str:
        for prompt in (PROMPT, *PROMPTS[:2]):
            found = {way: ask(Ask(prompt, TOKENS)).text for way, ask in self.ways.items()}
            if len(set(found.values())) != 1:
                raise Wrong(f"greedy answers to {prompt!r} differ: {found}")
        return f"{len(self.ways)} ways, 3 prompts"

    def pieces(self) -> str:
        streamed = self.client.grpc_stream(self.long(TOKENS))
        _equal("the pieces together", streamed.text, "the whole answer", self.whole(self.long(TOKENS)).text)
        if sum(bool(piece) for piece in streamed.pieces) < 2:
            raise Wrong(f"one piece only: {streamed.pieces}")
        return f"{len(streamed.pieces)} pieces"

    def long(self, tokens: int) -> Ask:
        """An ask whose answer does not end before max_tokens: min_tokens forbids the end token until then."""
        return Ask(PROMPT, tokens, {"min_tokens": tokens})

    def engine_tokens(self) -> str:
        for wanted in (1, 5):
            tokens = self.client.engine([1, 2, 3], wanted)
            if len(tokens) != wanted:
                raise Wrong(f"max_tokens {wanted}: {len(tokens)} tokens came")
        return "1 and 5 tokens when asked for"

    def max_tokens(self) -> str:
        """Text can't be counted in tokens here, but a shorter answer must be the beginning of a longer one."""
        lengths = (1, 4, TOKENS)
        texts = [self.whole(self.long(tokens)).text.rstrip(REPLACEMENT) for tokens in lengths]
        for shorter, longer in itertools.pairwise(texts):
            if not longer.startswith(shorter) or shorter == longer:
                raise Wrong(f"max_tokens {lengths}: {texts}")
        return f"{len(texts[0])}, {len(texts[1])} and {len(texts[2])} characters for {lengths} tokens"

    def stop_word(self) -> str:
        """A word of the free answer, given as a stop word, must be the last thing that comes (or not come at all)."""
        tried = {}
        for options in ({}, PUSHED_WORD) if self.biases else ({},):
            free = self.whole(Ask(PROMPT, TOKENS, options)).text
            # A word is a token together with the space before it, most often: as a stop word it needs it too.
            for word in list(dict.fromkeys(re.findall(r" [^\W\d_]{2,}", free)))[:3]:
                begin = free.index(word)
                allowed = (free[:begin], free[: begin + len(word)])
                stops = Ask(PROMPT, TOKENS, {**options, "stop_words": [word]})
                tried[word] = [ask(stops).text for ask in self.ways.values()]
                if all(text in allowed for text in tried[word]) and free not in allowed:
                    return f"{word!r} ended {free!r}"
        raise Wrong(f"no word ended the answer {free!r}: {tried}")

    def utf8(self) -> str:
        """Characters of several tokens must wait until they are complete."""
        seen = []
        for ask in self.utf8_asks():
            whole = self.whole(ask).text
            if REPLACEMENT in whole or whole.isascii():
                continue  # the answer itself ends within a character, or shows nothing
            streamed = self.client.grpc_stream(ask)
            cut = [piece for piece in streamed.pieces if REPLACEMENT in piece]
            if cut:
                raise Wrong(f"a character of {whole!r} was cut: {cut}")
            _equal("the pieces together", streamed.text, "the whole answer", whole)
            seen.append(whole)
            if len(seen) == 3:
                break
        if not seen:
            raise Wrong("no prompt drew an answer with a multi-byte character")
        return f"{len(seen)} answers, {seen[0]!r}"

    def utf8_asks(self) -> list[Ask]:
        pushed = [Ask(PROMPT, 8, PUSHED_UTF8)] if self.biases else []
        return [*pushed, *(Ask(prompt, TOKENS) for prompt in UTF8_PROMPTS)]

    def concurrent(self) -> str:
        """Eight at once, over all ways; each must get its own answer."""
        alone = [self.whole(Ask(prompt, TOKENS)).text for prompt in PROMPTS]
        ways = [list(self.ways.values())[i % len(self.ways)] for i in range(len(PROMPTS))]
        together = self.at_once([(way, Ask(p, TOKENS)) for way, p in zip(ways, PROMPTS, strict=True)])
        for prompt, one, answer in zip(PROMPTS, alone, together, strict=True):
            if isinstance(answer, Exception):
                raise Wrong(f"{prompt!r}: {type(answer).__name__}: {answer}")
            if not self.equal_enough(one, answer.text):
                raise Wrong(f"{prompt!r}: {answer.text!r} among others, {one!r} alone")
        return f"{len(PROMPTS)} answers as when asked alone"

    def equal_enough(self, alone: str, among_others: str) -> bool:
        """A GPU's kernels depend on the batch, so a near tie may turn; the reference executor computes each alone."""
        if self.facts.get("target") != "reference":
            return alone.split()[:1] == among_others.split()[:1]
        return alone == among_others

    def at_once(self, asked: Sequence[tuple[Way, Ask]]) -> list[Answer | Exception]:
        def one(way: Way, ask: Ask) -> Answer | Exception:
            try:
                return way(ask)
            except Exception as error:
                return error

        with ThreadPoolExecutor(len(asked)) as pool:
            return list(pool.map(lambda pair: one(*pair), asked))

    def too_long(self) -> str:
        """A prompt of one word more than the engine takes tokens can't fit."""
        limit = self.facts["max_input_len"]
        return self.refused(Ask("one two " * (limit // 2 + 1), 1), rf"\b{limit}\b|long|length|exceed")

    def invalid_utf8(self) -> str:
        return self.refused(Ask(b"caf\xe9 \xff\xfe", TOKENS), r"(?i)utf-?8")

    def missing_input(self) -> str:
        """Without options: Triton 24.10 counts inputs only; with one too many, an ensemble answers nothing at all."""
        bare = {"top_k": None}
        text = self.refused(Ask(None, TOKENS, bare), "text_input")
        if "max_tokens" in self.facts.get("required", ("max_tokens",)):
            self.refused(Ask(PROMPT, None, bare), "max_tokens")
        return text

    def refused(self, bad: Ask, reason: str) -> str:
        """Sent every way, between good ones: it gets an error of its own that tells the reason, they their answers."""
        good = Ask(PROMPT, TOKENS)
        expected = self.whole(good).text
        asked = [pair for way in self.ways.values() for pair in ((way, good), (way, bad))]
        answers = self.at_once(asked)
        for way, answer in zip(self.ways, answers[::2], strict=True):
            if isinstance(answer, Exception) or not self.equal_enough(expected, answer.text):
                raise Wrong(f"{way}: a good request beside it got {answer!r}")
        for way, answer in zip(self.ways, answers[1::2], strict=True):
            if not isinstance(answer, Refused):
                raise Wrong(f"{way}: it was not refused: {answer!r}")
            if LEAK.search(str(answer)) or not re.search(reason, str(answer)):
                raise Wrong(f"{way}: the error does not tell the reason, or tells of the server's insides: {answer}")
        return str(answers[-1])

    def alive(self) -> str:
        self.ready()
        _equal("the answer", self.whole(Ask(PROMPT, TOKENS)).text, "the first one", self.first)
        return "ready, and the first answer again"


def _equal(what: str, found: str, than: str, wanted: str) -> None:
    if found != wanted:
        raise Wrong(f"{what}: {found!r}; {than}: {wanted!r}")
