"""Scores texts with one decoder layer of a model in memory at a time, for models that do not fit (model/streamed.py).

The hidden states of all texts are carried from layer to layer in memory. Where they need more than a share of it, the
texts are divided, and each part is a pass over the whole model. To carry them on disk instead would cost more: a pass
reads each layer once, W bytes, while states of H bytes on disk are read and written at each layer, 2 H bytes; and
states that fit into memory beside a layer are about as large as it. Imports torch.
"""

from __future__ import annotations

import gc
import inspect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from builder.core.errors import NotMeasurable, UnsupportedError, out_of_memory
from builder.evaluate.datasets import Ids
from builder.evaluate.runners import scoring
from builder.evaluate.runners.scoring import Tell, Work
from builder.machine.host_memory import host_memory
from builder.model.streamed import State, StreamedModel

STATES_SHARE, STATES_LEAST = 0.25, 64 << 20  # of the memory that is free, for the states of a pass; bytes at least


@dataclass
class Batch:
    """Texts of one work (their indexes) on their way through the model."""

    work: Work
    texts: Sequence[int]

    @property
    def ids(self) -> list[Ids]:
        """Their tokens."""
        return [self.work.ids[index] for index in self.texts]

    @property
    def tokens(self) -> int:
        """How many of them are scored."""
        return sum(len(one) - 1 for one in self.ids)


class Layered:
    """A runner that reads the weights layer by layer, once for all works that are measured together."""

    def __init__(self, model: StreamedModel, batch_tokens: int, *, states: int | None = None) -> None:
        """states: bytes of hidden states in one pass; by default a share of the free memory."""
        self._model, self._states = model, states
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.batch_tokens = scoring.tokens_on(model.device, batch_tokens, self.vocab_size)
        self._in_pieces = "logits_to_keep" in inspect.signature(model.model.forward).parameters

    def logits(self, batch: Sequence[Ids]) -> Iterator[Tensor]:
        """The logits of each sequence, in one pass over the model."""
        found: dict[int, list[Tensor]] = {}
        self.together([Work(batch, lambda text, _, logits: found.setdefault(text, []).append(logits.clone()))])
        yield from (torch.cat(found[index]) for index in range(len(batch)))

    def together(self, works: Sequence[Work], tell: Tell = scoring.untold) -> None:
        """Does all works. If memory runs out, halves `batch_tokens` and starts again: it runs out in the first layer,
        which has the largest batch first. UnsupportedError if a single text does not fit."""
        while True:
            if (error := self._attempt(works, tell)) is None:
                return
            texts = max((batch.ids for batch in self._batches(works)), key=lambda ids: len(ids) * len(ids[0]))
            if len(texts) == 1:
                raise scoring.too_long(texts[0], error)
            self.batch_tokens = len(texts) * len(texts[0]) // 2
            del error
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _attempt(self, works: Sequence[Work], tell: Tell) -> BaseException | None:
        """Does all works; the error if memory runs out."""
        waiting, done = deque(self._batches(works)), 0
        total = sum(work.tokens for work in works)
        try:
            while waiting:
                done += self._pass(waiting, lambda share, where, done=done: tell(done + share, total, where))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return error.with_traceback(None)  # the frames hold tensors
        return None

    def _batches(self, works: Iterable[Work]) -> Iterator[Batch]:
        for work in works:
            for texts in scoring.batches([len(one) for one in work.ids], self.batch_tokens):
                yield Batch(work, texts)

    def _pass(self, waiting: deque[Batch], tell: Any) -> int:
        """Takes as many batches as fit through the model, at least one. Returns the number of scored tokens."""
        model, depth = self._model, self._model.depth
        tell(0, "embedding")
        states = self._begun(waiting)
        tokens, after = sum(batch.tokens for batch, _ in states), 0
        for index in range(depth):
            where, before = f"layer {index + 1} of {depth}", 0
            with model.layer(index):
                for batch, state in states:
                    tell((tokens * index + before) // depth, where)
                    state.hidden = model.advance(index, state, state.hidden)
                    before += batch.tokens
        with model.head() as logits_of:
            while states:
                batch, state = states.popleft()
                tell(tokens, f"logits, {after} of {tokens} tokens")
                for text, position, logits in self._logits(batch, state, logits_of):
                    batch.work.each(text, position, logits)
                after += batch.tokens
        return tokens

    def _begun(self, waiting: deque[Batch]) -> deque[tuple[Batch, State]]:
        """Takes batches from those that wait, with their states before the first layer, until these fill the room."""
        room, seen = self._room(), set[int]()
        begun: deque[tuple[Batch, State]] = deque()
        with self._model.prelude() as begin:
            while waiting and (room > 0 or not begun):
                state = begin(scoring.padded(waiting[0].ids))
                begun.append((waiting.popleft(), state))
                room -= sum(_nbytes([state.hidden, [[call.args, call.named] for call in state.calls]], seen))
        return begun

    def _room(self) -> int:
        """Bytes for the states of a pass."""
        if self._states is not None:
            return self._states
        return max(STATES_LEAST, int(STATES_SHARE * _free(self._model.device)))

    def _logits(
        self, batch: Batch, state: State, logits_of: Callable[..., Tensor]
    ) -> Iterator[tuple[int, int, Tensor]]:
        """(text, position, logits from there on) of each text. A text that is longer than a batch comes in pieces, so
        that its logits are never in memory together."""
        ids = batch.ids
        if len(ids) == 1 and len(ids[0]) > self.batch_tokens and self._in_pieces:
            for start in range(0, len(ids[0]), self.batch_tokens):
                some = torch.arange(start, min(start + self.batch_tokens, len(ids[0])), device=state.hidden.device)
                yield batch.texts[0], start, logits_of(state, logits_to_keep=some)[0]
            return
        for text, one, row in zip(batch.texts, ids, logits_of(state), strict=True):
            yield text, 0, row[: len(one)]


def _nbytes(value: Any, seen: set[int]) -> Iterator[int]:
    """The bytes of each tensor in nested values that is not among those `seen`, by its address."""
    if isinstance(value, Tensor):
        if value.untyped_storage().data_ptr() not in seen:
            seen.add(value.untyped_storage().data_ptr())
            yield value.untyped_storage().nbytes()
    elif isinstance(value, Mapping):
        yield from (size for one in value.values() for size in _nbytes(one, seen))
    elif isinstance(value, list | tuple):
        yield from (size for one in value for size in _nbytes(one, seen))


def _free(device: torch.device) -> int:
    """Bytes of free memory on the device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return host_memory().available


@contextmanager
def layered() -> Iterator[None]:
    """NotMeasurable for a model that can't be computed layer by layer."""
    try:
        yield
    except UnsupportedError as error:
        raise NotMeasurable(error.what, why=error.why, hint=error.hint) from error
