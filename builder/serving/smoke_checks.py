"""The smoke test's checks. Each sends requests and returns what it saw, in words. Imports tritonclient.

A check raises CheckFailed for a fault of the repository or the model, and NotChecked if this model cannot show one.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder.recipe.target_facts import ENGINE, TargetFacts, target_facts
from builder.serving.client import Client, Endpoint, Raw, Request, Response, ServerError
from builder.serving.smoke_prompts import (
    BIAS_TO_UTF8,
    PROMPTS,
    UTF8_PROMPTS,
    CheckFailed,
    NotChecked,
    SmokeRequests,
    difference,
    short,
)
from builder.triton import adapter_files

# What an error message for clients must not contain: tracebacks, file names and paths, memory addresses.
LEAK = re.compile(r"Traceback|File \"|\.(?:py|cc|cpp|cu|so)\b|(?<![\w:/])/(?:[\w.+-]+/)+[\w.+-]+|\b0x[0-9a-f]{6,}")
REPLACEMENT = "\ufffd"
READY = "server and models ready"


@dataclass
class Checks:
    """The checks of one server. `facts` are the repository's.

    `first` is the first answer to the main prompt, which the last check compares with. `endpoints` are those that the
    repository has, by name. `answered` caches the main prompt's answers between two checks. `models` is the directory
    that Triton serves, None if it is not on this machine.
    """

    client: Client
    facts: Mapping[str, Any]
    models: Path | None = None
    first: str = ""
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
    answered: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.endpoints = {"HTTP generate": self.client.http_generate}
        if self.infers:
            self.endpoints = {
                "HTTP infer": self.client.http_infer, **self.endpoints, "gRPC infer": self.client.grpc_infer,
            }  # fmt: skip
        if self.streams:
            self.endpoints["gRPC stream"] = self.client.grpc_stream
        # The LLM API's model has no inputs for biases.
        biases = not self.target.python_model
        self.requests = SmokeRequests(self.reference, biases, self.facts.get("max_seq_len", 2**31 - 1))

    @property
    def target(self) -> TargetFacts:
        """What the repository's target can do. Repositories whose facts name no target serve an engine."""
        return target_facts(self.facts.get("target", ENGINE.name))

    @property
    def streams(self) -> bool:
        """Whether the repository streams."""
        return bool(self.facts["decoupled"])

    @property
    def infers(self) -> bool:
        """Whether the repository serves KServe v2 inference."""
        return "infer" in self.facts["models"]

    @property
    def sample(self) -> tuple[str, str] | None:
        """The main prompt and the model's own answer, or None if there was no answer or it needed a bias."""
        if not self.first or self.requests.options:
            return None
        return self.requests.prompt, self.requests.sample()

    def named(self) -> dict[str, Callable[[], str]]:
        """The checks by name, in the order in which they run."""
        named: dict[str, Callable[[], str]] = {READY: self.ready}
        for endpoint in self.endpoints:
            named[endpoint] = lambda endpoint=endpoint: self.answers(endpoint)  # type: ignore[misc]
        if self.streams:
            named["streamed chunks make up the whole answer"] = self.chunks
            named["streamed UTF-8 is never cut"] = self.utf8
            if "engine" in self.facts["models"]:
                named["the engine generates max_tokens tokens"] = self.engine_tokens
            if self.facts.get("adapter_files"):
                named["the engine takes each LoRA adapter"] = self.adapters
        return named | {
            "all endpoints give the same answer": self.same_everywhere,
            "max_tokens ends the answer": self.max_tokens,
            "a stop word ends the answer": self.stop_word,
            "concurrent requests": self.concurrent,
            "too long prompt": self.too_long,
            "invalid UTF-8": self.invalid_utf8,
            "missing input": self.missing_input,
            "still answers after all checks": self.alive,
        }

    def ready(self) -> str:
        """The server and every model that clients need report that they are ready."""
        if not self.client.ready():
            raise CheckFailed("the server is not ready")
        prefix = self.facts.get("prefix", "")
        steps = {f"{prefix}preprocessing", f"{prefix}postprocessing"} if "engine" in self.facts["models"] else set()
        names = sorted({*self.facts["models"].values(), *steps})
        missing = [name for name in names if not self.client.ready(name)]
        if missing:
            raise CheckFailed(f"not ready: {', '.join(missing)}")
        return ", ".join(names)

    def answers(self, endpoint: str) -> str:
        """This endpoint answers the main prompt with text."""
        answer = self.endpoints[endpoint](self.requests.request())
        if not answer.text:
            raise CheckFailed("the answer is empty")
        self.first = self.first or answer.text
        self.answered[endpoint] = answer.text
        return repr(answer.text)

    def reference(self, request: Request) -> Response:
        """The non-streamed response that every other endpoint is compared with."""
        return self.client.grpc_infer(request) if self.infers else self.client.http_generate(request)

    def same_everywhere(self) -> str:
        """Greedy answers are the same from every endpoint."""
        requests = self.requests
        prompts = [requests.prompt, *requests.fitting(PROMPTS[: min(requests.examples, 2)], requests.tokens)]
        for prompt in prompts:
            request = requests.request(prompt)
            answers = {name: send(request).text for name, send in self.endpoints.items() if name not in self.answered}
            if prompt == prompts[0]:
                answers |= self.answered
            if len(set(answers.values())) != 1:
                raise CheckFailed(f"greedy answers to {prompt!r} differ {difference(answers)}")
            self.answered = {}
        return f"{len(self.endpoints)} endpoints, {len(prompts)} prompts"

    def chunks(self) -> str:
        """Streamed chunks, joined, equal the non-streamed answer, and there is more than one.

        A model's own answer may consist of a single chunk. With a bias towards a word it has a chunk for each token.
        """
        requests = self.requests
        if requests.tokens < 2:
            raise NotChecked("this engine's max_seq_len does not allow an answer of two tokens")
        for options in (requests.options, *(bias for _, bias in requests.word_biases())):
            request = requests.full_length(requests.tokens, options)
            whole = requests.answer(request)
            if not whole:
                continue
            streamed = self.client.grpc_stream(request)
            _equal("the joined chunks", streamed.text, "the whole answer", whole)
            if sum(bool(chunk) for chunk in streamed.chunks) > 1:
                return f"{len(streamed.chunks)} chunks"
        if requests.biases:
            raise CheckFailed(f"the answer arrived in a single chunk: {short(whole)!r}")
        raise NotChecked(f"the model's answer is a single chunk: {short(whole)!r}")

    def engine_tokens(self) -> str:
        """The engine model, called with token ids, generates exactly max_tokens tokens."""
        ids = [1, 2, 3][: min(3, self.facts["max_input_len"], self.facts["max_seq_len"] - 1)]
        lengths = [n for n in (1, 5) if n + len(ids) <= self.facts["max_seq_len"]]
        for length in lengths:
            tokens = self.client.engine_tokens(ids, length)
            if len(tokens) != length:
                raise CheckFailed(f"max_tokens is {length}, and the engine generated {len(tokens)} tokens")
        return f"max_tokens {' and '.join(map(str, lengths))}"

    def adapters(self) -> str:
        """The engine generates with each adapter, which it gets first, and then knows by its number."""
        if self.models is None:
            raise NotChecked("the repository is not on this machine")
        for name, one in self.facts["adapter_files"].items():
            file = self.models / self.facts["models"]["engine"] / one["file"]
            number = Raw("lora_task_id", "UINT64", (1,), int(one["task_id"]).to_bytes(8, "little"))
            brought = [Raw(*tensor) for tensor in adapter_files.read(file)]
            found = [self.client.engine_tokens([1], 2, adapter) for adapter in ([number, *brought], [number])]
            if found[0] != found[1] or len(found[0]) != 2:
                raise CheckFailed(f"with {name} the engine generated {found[0]}, and then {found[1]}")
        return ", ".join(self.facts["adapter_files"])

    def max_tokens(self) -> str:
        """A larger max_tokens gives a longer answer, and every shorter answer is a prefix of it.

        The client sees text and cannot count tokens.
        """
        requests = self.requests
        lengths = sorted({n for n in (1, 4, requests.tokens) if n <= requests.tokens})
        if len(lengths) < 2:
            raise NotChecked("this engine's max_seq_len does not allow answers of different lengths")
        for options in (requests.options, *(bias for _, bias in requests.word_biases())):
            texts = [requests.answer(requests.full_length(n, options)).rstrip(REPLACEMENT) for n in lengths]
            for shorter, longer in itertools.pairwise(texts):
                if not longer.startswith(shorter):
                    raise CheckFailed(f"max_tokens {lengths}: {short(longer)!r} does not start with {short(shorter)!r}")
            if len(set(texts)) == len(texts):
                return f"{', '.join(str(len(text)) for text in texts)} characters for {lengths} tokens"
        if requests.biases:
            characters = ", ".join(str(len(text)) for text in texts)
            raise CheckFailed(f"max_tokens {lengths}: the answers have {characters} characters")
        raise NotChecked(f"the model's answers of {lengths} tokens have the same text")

    def stop_word(self) -> str:
        """A word of the unrestricted answer, given as a stop word, ends the answer there.

        A model may generate a word as other tokens than its tokenizer would encode it. No list of stop token ids
        matches then. A word that a bias makes the model generate is made of the tokenizer's own tokens.
        """
        requests = self.requests
        free = requests.answer(requests.request())
        # Most tokens are a word with its leading space, so the stop word needs the space too.
        for word in list(dict.fromkeys(re.findall(r" [^\W\d_]{2,}", free)))[: requests.examples]:
            if not self._not_stopped(word, free, requests.options):
                return f"{word!r} ended {short(free)!r}"
        for word, options in requests.word_biases():
            free = requests.answer(requests.request(**options))
            if 0 <= free.find(word) < len(free) - len(word):
                if found := self._not_stopped(word, free, options):
                    raise CheckFailed(f"{word!r} did not end {short(free)!r}: {found}")
                return f"{word!r} ended {short(free)!r}"
        raise NotChecked(f"no word of {short(free)!r} ended it: the model may generate other tokens for its words")

    def _not_stopped(self, word: str, free: str, options: Mapping[str, Any]) -> str:
        """ "" if every endpoint ends the answer at the word or with the token that contains its end; else the first
        one that does not, and its answer."""
        request, begin = self.requests.request(stop_words=[word], **options), free.index(word)
        for endpoint, send in self.endpoints.items():
            text = send(request).text
            ends_there = begin - 1 <= len(text) <= begin + len(word) + 2
            if not (free.startswith(text) and text != free and ends_there):
                return f"{endpoint}: {short(text)!r}"
        return ""

    def utf8(self) -> str:
        """A character of several tokens is streamed only when it is complete."""
        requests = self.requests
        answers: list[str] = []
        for request in self._utf8_requests():
            if not requests.fits(request):
                continue
            whole = requests.answer(request)
            if REPLACEMENT in whole or whole.isascii():
                continue  # max_tokens itself ended within a character, or there is no multi-byte character
            streamed = self.client.grpc_stream(request)
            cut = [chunk for chunk in streamed.chunks if REPLACEMENT in chunk]
            if cut:
                raise CheckFailed(f"a character of {short(whole)!r} was cut: {short(str(cut))}")
            _equal("the joined chunks", streamed.text, "the whole answer", whole)
            answers.append(whole)
            if len(answers) == requests.examples:
                break
        if not answers:
            raise NotChecked("no prompt elicited a multi-byte character")
        return f"{len(answers)} answers, {short(answers[0])!r}"

    def _utf8_requests(self) -> list[Request]:
        requests = self.requests
        biased = [Request(requests.prompt, min(8, requests.tokens), BIAS_TO_UTF8)] if requests.biases else []
        return [*biased, *(Request(prompt, requests.tokens) for prompt in UTF8_PROMPTS)]

    def concurrent(self) -> str:
        """Eight concurrent requests, over all endpoints, get the same answers as when sent one at a time."""
        requests = self.requests
        tokens = requests.tokens_of_many
        prompts = requests.fitting(PROMPTS, tokens) or [requests.prompt]
        prompts = [prompts[i % len(prompts)] for i in range(len(PROMPTS))]
        endpoints = [list(self.endpoints.values())[i % len(self.endpoints)] for i in range(len(prompts))]
        answers = self.send_all(
            [(send, requests.request(p, tokens)) for send, p in zip(endpoints, prompts, strict=True)]
        )
        for prompt, answer in zip(prompts, answers, strict=True):
            if isinstance(answer, Exception):
                raise CheckFailed(f"{prompt!r}: {type(answer).__name__}: {answer}")
            alone = requests.answer(requests.request(prompt, tokens))
            if not self.equal_enough(alone, answer.text):
                raise CheckFailed(f"{prompt!r}: {short(answer.text)!r} among others, {short(alone)!r} alone")
        return f"{len(prompts)} answers, the same as one at a time"

    def equal_enough(self, alone: str, among_others: str) -> bool:
        """Whether an answer among others equals the one alone; on a GPU, only its first word.

        A GPU's kernels depend on the batch, so near-ties between two tokens may flip. The reference executor computes
        each request separately.
        """
        if not self.target.float32:
            return alone.split()[:1] == among_others.split()[:1]
        return alone == among_others

    def send_all(self, pairs: Sequence[tuple[Endpoint, Request]]) -> list[Response | Exception]:
        """Sends all requests concurrently; returns each one's response or exception, in order."""

        def send(pair: tuple[Endpoint, Request]) -> Response | Exception:
            endpoint, request = pair
            try:
                return endpoint(request)
            except Exception as error:
                return error

        with ThreadPoolExecutor(len(pairs)) as pool:
            return list(pool.map(send, pairs))

    def too_long(self) -> str:
        """A prompt with more words than max_input_len is rejected with the limit."""
        limit = self.facts["max_input_len"]
        return self._rejected(Request("one two " * (limit // 2 + 1), 1), rf"\b{limit}\b|long|length|exceed")

    def invalid_utf8(self) -> str:
        """A prompt of invalid UTF-8 is rejected as such."""
        return self._rejected(Request(b"caf\xe9 \xff\xfe", 1), r"(?i)utf-?8")

    def missing_input(self) -> str:
        """A request without a required input is rejected with the input's name.

        No optional input is sent: Triton 24.10 (no fix is known) only counts inputs, and if an optional one takes the
        place of a required one, an ensemble does not respond at all.
        """
        bare = {"top_k": None}
        text = self._rejected(Request(None, 1, bare), "text_input")
        if "max_tokens" in self.facts.get("required", ("max_tokens",)):
            self._rejected(Request(self.requests.prompt, None, bare), "max_tokens")
        return text

    def _rejected(self, bad: Request, reason: str) -> str:
        """Sends `bad` to every endpoint, concurrently with good requests. Only the bad ones get an error.

        The error must match the regular expression `reason` and must not reveal the server's internals. Returns it.
        """
        good = self.requests.short_request()
        expected = self.requests.answer(good)
        answers = self.send_all([(send, request) for send in self.endpoints.values() for request in (good, bad)])
        for endpoint, answer in zip(self.endpoints, answers[::2], strict=True):
            if isinstance(answer, Exception) or not self.equal_enough(expected, answer.text):
                raise CheckFailed(f"{endpoint}: a concurrent good request got {short(str(answer), 200)!r}")
        for endpoint, answer in zip(self.endpoints, answers[1::2], strict=True):
            if not isinstance(answer, ServerError):
                raise CheckFailed(f"{endpoint}: the request was not rejected: {short(repr(answer), 200)}")
            text = short(str(answer), 300)
            if LEAK.search(str(answer)):
                raise CheckFailed(f"{endpoint}: the error reveals the server's internals: {text}")
            if not re.search(reason, str(answer)):
                raise CheckFailed(f"{endpoint}: the error does not state the reason: {text}")
        return str(answers[-1])

    def alive(self) -> str:
        """The server is still ready, and answers the main prompt as at the beginning."""
        self.ready()
        _equal("the answer", self.reference(self.requests.request()).text, "the first answer", self.first)
        return "ready, and the main prompt has the same answer as before"


def _equal(name: str, text: str, expected_name: str, expected: str) -> None:
    if text != expected:
        raise CheckFailed(f"they differ {difference({name: text, expected_name: expected})}")
