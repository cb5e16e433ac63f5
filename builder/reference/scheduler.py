"""Iteration-level scheduling: one thread steps all active sequences in turn, one token each.

Each sequence has its own KV cache and is computed alone, so its greedy output does not depend on other sequences. An
error in a sequence ends only that one. Does not depend on Triton.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from builder.grammar.matching import Match
from builder.reference.sampling import Choice, Sampling, Words, adjust, choose, ends_with

# Asking Triton whether a request was cancelled is a message to another process, so not for every token. TensorRT-LLM's
# backend has the same period (model_instance_state.cc: cancellation_check_period_ms).
CANCELLATION_CHECK_SECONDS = 0.1

FinishReason = Literal["", "end_id", "stop_word", "length", "cancelled"]


class Model(Protocol):
    """What the scheduler needs of a model, such as builder.reference.model.ReferenceModel."""

    def new_cache(self) -> Any: ...

    def forward(self, ids: Tensor, cache: Any, adapter: Any = None) -> Tensor: ...


class Listener(Protocol):
    """Receives the progress of a sequence. All methods are called from the scheduler's thread."""

    def advanced(self, sequence: Sequence) -> None:
        """The sequence has a new token, or has finished (`sequence.finish_reason`)."""

    def failed(self, sequence: Sequence, error: Exception) -> None:
        """The sequence failed."""

    def cancelled(self) -> bool:
        """Whether the client no longer waits for the sequence."""


@dataclass(eq=False)
class Sequence:
    """A prompt, its sampling parameters, and the tokens generated so far, without the end token.

    row: which prompt of a request with several this is. keep_context_logits, keep_generation_logits: whether the logits
    of prompt and generated tokens are kept. match: the place in the grammar that guides the answer. adapter: the LoRA
    adapter that the model runs with.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    listener: Listener
    end_id: int | None = None
    stop_words: Words = ()
    keep_context_logits: bool = False
    keep_generation_logits: bool = False
    request_id: str = ""
    row: int = 0
    match: Match | None = None
    adapter: Any = None

    generated: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    cumulative_log_prob: float = 0.0
    context_logits: Tensor | None = None  # [prompt, vocab]
    generation_logits: list[Tensor] = field(default_factory=list)  # each [vocab]
    finish_reason: FinishReason = ""

    def __post_init__(self) -> None:
        self._cache: Any = None
        self._generator = torch.Generator().manual_seed(self.sampling.seed)

    def step(self, model: Model) -> None:
        """Generates one token, or finishes. The first step runs the whole prompt."""
        if self.max_tokens < 1:
            self.finish_reason = "length"
            return
        if self._cache is None:
            self._cache = model.new_cache()
            logits = self._forward(model, self.prompt)
            if self.keep_context_logits:
                self.context_logits = logits
        else:
            logits = self._forward(model, self.generated[-1:])
        ids = self.prompt + self.generated
        allowed = self.match.masked(logits[-1]) if self.match else logits[-1]
        adjusted = adjust(allowed, ids, len(self.generated), self.end_id, self.sampling)
        self._accept(choose(adjusted, self.sampling, self._generator), logits[-1])

    def _forward(self, model: Model, ids: list[int]) -> Tensor:
        return model.forward(torch.tensor(ids, dtype=torch.int64), self._cache, self.adapter)

    def _accept(self, choice: Choice, logits: Tensor) -> None:
        if choice.token == self.end_id:
            self.finish_reason = "end_id"
            return
        self.generated.append(choice.token)
        if self.match:
            self.match.accept(choice.token)
        self.log_probs.append(choice.reported_log_prob)
        self.cumulative_log_prob += choice.log_prob
        if self.keep_generation_logits:
            self.generation_logits.append(logits)
        if (self.match and self.match.ended) or ends_with(self.prompt + self.generated, self.stop_words):
            self.finish_reason = "stop_word"
        elif len(self.generated) >= self.max_tokens:
            self.finish_reason = "length"

    def cancel(self) -> None:
        """Ends the sequence without another token."""
        self.finish_reason = "cancelled"
        self._cache = None


class Scheduler:
    """Runs up to `max_active` sequences in turn; others wait in order of arrival. `log` receives internal errors."""

    def __init__(self, model: Model, max_active: int, log: Callable[[str], None] = lambda text: None) -> None:
        self._model, self._max_active, self._log = model, max_active, log
        self._wake = threading.Condition()
        self._waiting: deque[Sequence] = deque()
        self._stopped_ids: set[str] = set()
        self._closed = False
        self._active: list[Sequence] = []  # used by the thread only
        self._checked = 0.0
        self._thread = threading.Thread(target=self._run, name="reference-executor", daemon=True)
        self._thread.start()

    def submit(self, sequences: Iterable[Sequence]) -> None:
        """Queues sequences. RuntimeError after `close`."""
        with self._wake:
            if self._closed:
                raise RuntimeError("the reference executor is shutting down")
            self._waiting.extend(sequences)
            self._wake.notify()

    def stop(self, request_id: str) -> None:
        """Cancels every sequence with this request id. An unknown id is ignored: its request may have just finished."""
        with self._wake:
            self._stopped_ids.add(request_id)
            self._wake.notify()

    def close(self, timeout: float = 10.0) -> None:
        """Ends the thread and cancels all active and waiting sequences. timeout: seconds to wait for the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        with torch.inference_mode():
            while self._admit():
                for sequence in self._active:
                    self._step(sequence)
                self._active = [sequence for sequence in self._active if not sequence.finish_reason]
        for sequence in (*self._active, *self._waiting):
            sequence.cancel()
            self._notify(sequence)

    def _admit(self) -> bool:
        """Waits for work, cancels sequences, and activates waiting ones. False if the scheduler was closed."""
        with self._wake:
            while not (self._waiting or self._active or self._stopped_ids or self._closed):
                self._wake.wait()
            if self._closed:
                return False
            cancelled = self._cancelled()
            self._active = [sequence for sequence in self._active if sequence not in cancelled]
            self._waiting = deque(sequence for sequence in self._waiting if sequence not in cancelled)
            while self._waiting and len(self._active) < self._max_active:
                self._active.append(self._waiting.popleft())
        for sequence in cancelled:
            sequence.cancel()
            self._notify(sequence)
        return True

    def _cancelled(self) -> list[Sequence]:
        stopped, self._stopped_ids = self._stopped_ids, set()
        everyone = (*self._active, *self._waiting)
        found = [sequence for sequence in everyone if sequence.request_id and sequence.request_id in stopped]
        if time.monotonic() - self._checked >= CANCELLATION_CHECK_SECONDS:
            self._checked = time.monotonic()
            found += [sequence for sequence in everyone if sequence not in found and sequence.listener.cancelled()]
        return found

    def _step(self, sequence: Sequence) -> None:
        try:
            sequence.step(self._model)
        except Exception as error:  # other sequences go on
            self._fail(sequence, error)
        else:
            self._notify(sequence)

    def _notify(self, sequence: Sequence) -> None:
        try:
            sequence.listener.advanced(sequence)
        except Exception as error:
            self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """Reports an error to the listener and drops the sequence; the thread goes on."""
        sequence.cancel()
        try:
            sequence.listener.failed(sequence, error)
        except Exception as second:
            self._log(f"a request failed ({error!r}), and so did its error response: {second!r}")
