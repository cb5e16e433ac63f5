"""Iteration-level scheduling: one thread steps all running sequences in turn, one token each.

A sequence keeps its own KV cache and is computed alone, so its greedy answer does not depend on its neighbours.
An error in one sequence ends that one. Knows nothing of Triton.
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

from builder.reference.sampling import Choice, Sampling, Words, adjust, choose, ends_with

# Asking Triton whether a client is gone is a message to another process: not for every token. TensorRT-LLM's backend
# asks as often (model_instance_state.cc: cancellation_check_period_ms).
CANCELLATION_CHECK_SECONDS = 0.1

Ending = Literal["", "end_id", "stop_word", "length", "cancelled"]


class Model(Protocol):
    """What the scheduler needs of a model: builder.reference.model.ReferenceModel has it."""

    def new_cache(self) -> Any: ...

    def forward(self, ids: Tensor, cache: Any) -> Tensor: ...


class Listener(Protocol):
    """Who asked for a sequence. All but `gone` are called from the scheduler's thread."""

    def advanced(self, sequence: Sequence) -> None:
        """A token more, or the end (`sequence.ending` tells)."""

    def failed(self, sequence: Sequence, error: Exception) -> None:
        """It ended with an error."""

    def gone(self) -> bool:
        """The client does not wait any more."""


@dataclass(eq=False)
class Sequence:
    """One prompt, how to continue it, and the continuation so far. The end token is never part of `generated`."""

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

    generated: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    cumulative_log_prob: float = 0.0
    context_logits: Tensor | None = None  # [prompt, vocab]
    generation_logits: list[Tensor] = field(default_factory=list)  # each [vocab]
    ending: Ending = ""

    def __post_init__(self) -> None:
        self._cache: Any = None
        self._generator = torch.Generator().manual_seed(self.sampling.seed)

    def step(self, model: Model) -> None:
        """One token more, or the end. The first step reads the whole prompt."""
        if self.max_tokens < 1:
            self.ending = "length"
            return
        if self._cache is None:
            self._cache = model.new_cache()
            logits = model.forward(torch.tensor(self.prompt, dtype=torch.int64), self._cache)
            if self.keep_context_logits:
                self.context_logits = logits
        else:
            logits = model.forward(torch.tensor(self.generated[-1:], dtype=torch.int64), self._cache)
        ids = self.prompt + self.generated
        adjusted = adjust(logits[-1], ids, len(self.generated), self.end_id, self.sampling)
        self._accept(choose(adjusted, self.sampling, self._generator), logits[-1])

    def _accept(self, choice: Choice, logits: Tensor) -> None:
        if choice.token == self.end_id:
            self.ending = "end_id"
            return
        self.generated.append(choice.token)
        self.log_probs.append(choice.reported_log_prob)
        self.cumulative_log_prob += choice.log_prob
        if self.keep_generation_logits:
            self.generation_logits.append(logits)
        if ends_with(self.prompt + self.generated, self.stop_words):
            self.ending = "stop_word"
        elif len(self.generated) >= self.max_tokens:
            self.ending = "length"

    def cancel(self) -> None:
        """Ends it without a token more."""
        self.ending = "cancelled"
        self._cache = None


class Scheduler:
    """`max_active` sequences take turns, the others wait in order of arrival."""

    def __init__(self, model: Model, max_active: int, log: Callable[[str], None] = lambda text: None) -> None:
        self._model, self._max_active, self._log = model, max_active, log
        self._wake = threading.Condition()
        self._waiting: deque[Sequence] = deque()
        self._stopped_ids: set[str] = set()
        self._closed = False
        self._active: list[Sequence] = []  # touched by the worker alone
        self._checked = 0.0
        self._worker = threading.Thread(target=self._run, name="reference-executor", daemon=True)
        self._worker.start()

    def submit(self, sequences: Iterable[Sequence]) -> None:
        with self._wake:
            if self._closed:
                raise RuntimeError("the reference executor is shutting down")
            self._waiting.extend(sequences)
            self._wake.notify()

    def stop(self, request_id: str) -> None:
        """Ends every sequence with this request id. An unknown one is no error: it may have just finished."""
        with self._wake:
            self._stopped_ids.add(request_id)
            self._wake.notify()

    def close(self, timeout: float = 10.0) -> None:
        """Ends the worker; what still runs or waits is told that it was cancelled."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._worker.join(timeout)

    def _run(self) -> None:
        with torch.inference_mode():
            while self._admit():
                for sequence in self._active:
                    self._step(sequence)
                self._active = [sequence for sequence in self._active if not sequence.ending]
        for sequence in (*self._active, *self._waiting):
            sequence.cancel()
            self._tell(sequence)

    def _admit(self) -> bool:
        """Waits for work, cancels what is to be cancelled, fills the free places. False: the end."""
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
            self._tell(sequence)
        return True

    def _cancelled(self) -> list[Sequence]:
        stopped, self._stopped_ids = self._stopped_ids, set()
        everyone = (*self._active, *self._waiting)
        found = [sequence for sequence in everyone if sequence.request_id and sequence.request_id in stopped]
        if time.monotonic() - self._checked >= CANCELLATION_CHECK_SECONDS:
            self._checked = time.monotonic()
            found += [sequence for sequence in everyone if sequence not in found and sequence.listener.gone()]
        return found

    def _step(self, sequence: Sequence) -> None:
        try:
            sequence.step(self._model)
        except Exception as error:  # one sequence's error is no other's
            self._fail(sequence, error)
        else:
            self._tell(sequence)

    def _tell(self, sequence: Sequence) -> None:
        try:
            sequence.listener.advanced(sequence)
        except Exception as error:
            self._fail(sequence, error)

    def _fail(self, sequence: Sequence, error: Exception) -> None:
        """The worker outlives every error: the sequence is answered and forgotten."""
        sequence.cancel()
        try:
            sequence.listener.failed(sequence, error)
        except Exception as second:
            self._log(f"a request failed ({error!r}) and could not be told so: {second!r}")
