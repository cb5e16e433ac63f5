"""Logits -> scores of each token: negative log-likelihood, top token, KL to BF16. Imports torch.

The negative log-likelihood is that of the text's own token. That of the model's top token would only measure the
model's confidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from builder.core.errors import UnsupportedError, out_of_memory
from builder.evaluate.datasets import Ids

Columns = dict[str, np.ndarray[Any, Any]]
_NPY: Any = np.lib.format  # its functions have no types
REFERENCE = ("top_ids", "top_logp", "rest_logp")  # BF16's columns that KL is computed from
_STEP = 512  # positions at a time: bounds the float32 copies of the logits
# A batch on a CPU: with 8192 tokens the fixture takes 25 % more CPU time than with 2048, for its caches; and too many
# bytes of logits are answered by the kernel's killer, not by an error one could catch.
_CPU_TOKENS, _CPU_LOGITS = 2048, 1 << 30


class Runner(Protocol):
    """A variant of a model that can be scored. `batch_tokens`: tokens of a batch, with padding, at most."""

    vocab_size: int
    batch_tokens: int

    def logits(self, batch: Sequence[Ids]) -> Iterator[Tensor]:
        """The logits of each sequence, [tokens, vocab], in any float dtype and on any device."""


@dataclass(frozen=True)
class Work:
    """Texts whose logits are wanted. each: called with a text's index, a position, and the logits of the positions from
    there on; once for each text, or for each piece of a long one."""

    ids: Sequence[Ids]
    each: Callable[[int, int, Tensor], None]

    @property
    def tokens(self) -> int:
        """The number of tokens that are scored: all but the first of each text."""
        return sum(len(one) - 1 for one in self.ids)


Tell = Callable[[int, int, str], None]  # progress: tokens done, tokens in all, and where in the model


def untold(done: int, total: int, where: str) -> None:
    """Reports no progress."""


@runtime_checkable
class Together(Protocol):
    """A runner that reads the model's weights once for everything that is measured in one call."""

    def together(self, works: Sequence[Work], tell: Tell) -> None:
        """Does all works in batches of at most `batch_tokens` tokens, fewer if memory runs out."""


def score(logits: Tensor, ids: Ids, *, top: int = 0, reference: Columns | None = None) -> Columns:
    """Scores one text of n tokens from its logits [n, vocab]: columns of n - 1 rows.

    nll: negative log-likelihood of the next token, in nats. best: the top token. right: whether it is the text's token.
    top > 0: also top_ids and top_logp [n - 1, top], the likeliest tokens in any order, and rest_logp, the
    log-probability of all others. reference: these three columns of BF16, from which kl is computed.
    """
    parts = []
    targets = torch.from_numpy(ids[1:].astype(np.int64)).to(logits.device)
    for start in range(0, len(targets), _STEP):
        rows = slice(start, min(start + _STEP, len(targets)))
        held = None if reference is None else {name: column[rows] for name, column in reference.items()}
        parts.append(_score(logits[rows].float(), targets[rows], top, held))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _score(logits: Tensor, targets: Tensor, top: int, reference: Columns | None) -> Columns:
    whole = logits.logsumexp(-1, keepdim=True)
    best = logits.argmax(-1)
    found = {
        "nll": (whole - logits.gather(-1, targets[:, None]))[:, 0],
        "best": best.int(),
        "right": best == targets,
    }
    if top:
        likeliest = logits.topk(min(top, logits.shape[-1]), dim=-1, sorted=False)
        found |= {"top_ids": likeliest.indices.int(), "top_logp": likeliest.values - whole}
        found["rest_logp"] = _rest(logits, likeliest.indices, whole)
    if reference is not None:
        p = {name: torch.from_numpy(column).to(logits.device) for name, column in reference.items()}
        ids = p["top_ids"].long()
        found["kl"] = divergence(
            p["top_logp"], p["rest_logp"], logits.gather(-1, ids) - whole, _rest(logits, ids, whole)
        )
    return {name: column.cpu().numpy() for name, column in found.items()}


def _rest(logits: Tensor, ids: Tensor, whole: Tensor) -> Tensor:
    """Log-probability [n] of all tokens but these; -inf if there are no others. Summed directly: 1 minus the sum of the
    others would be rounding error where little is left."""
    return logits.scatter(-1, ids, -torch.inf).logsumexp(-1) - whole[:, 0]


def divergence(p: Tensor, rest_p: Tensor, q: Tensor, rest_q: Tensor) -> Tensor:
    """KL(P || Q) [n] in nats, from log-probabilities [n, k] of P's k likeliest tokens under P and Q, and of the rest.

    All other tokens are merged into one, which can only reduce the divergence (the log sum inequality; Cover and
    Thomas, Elements of Information Theory, theorem 2.7.1). So this is a lower bound, exact if k is the vocabulary.
    """
    p, rest_p, q, rest_q = (x.double() for x in (p, rest_p, q, rest_q))
    rest = torch.where(rest_p > -torch.inf, rest_p.exp() * (rest_p - rest_q), 0.0)
    return ((p.exp() * (p - q)).sum(-1) + rest).clamp(min=0).float()


class ColumnFiles:
    """Columns on disk, `<name>.npy`, written and read in pieces, so memory does not grow with the number of texts.

    Not memory maps: their pages count as this process's memory once touched.
    """

    def __init__(self, directory: Path, rows: int | None = None) -> None:
        self._directory, self._rows = directory, rows
        self._files: dict[str, tuple[Any, int, np.dtype[Any], tuple[int, ...]]] = {}

    def write(self, start: int, columns: Columns) -> None:
        """Writes rows from `start` on; a column's file is created by its first write."""
        for name, column in columns.items():
            if name not in self._files:
                self._files[name] = self._create(name, column)
            file, offset, dtype, shape = self._files[name]
            file.seek(offset + start * dtype.itemsize * int(np.prod(shape[1:])))
            file.write(np.ascontiguousarray(column).data)

    def read(self, start: int, rows: int, *names: str) -> Columns:
        """Reads `rows` rows of the named columns."""
        found = {}
        for name in names:
            if name not in self._files:
                self._files[name] = self._open(name)
            file, offset, dtype, shape = self._files[name]
            width = int(np.prod(shape[1:]))
            file.seek(offset + start * dtype.itemsize * width)
            raw = file.read(rows * width * dtype.itemsize)
            found[name] = np.frombuffer(bytearray(raw), dtype).reshape(rows, *shape[1:])
        return found

    def close(self) -> None:
        """Closes all files."""
        for file, *_ in self._files.values():
            file.close()
        self._files.clear()

    def _create(self, name: str, column: np.ndarray[Any, Any]) -> tuple[Any, int, np.dtype[Any], tuple[int, ...]]:
        file = open(self._directory / f"{name}.npy", "wb")  # noqa: SIM115
        shape = (self._rows or len(column), *column.shape[1:])
        header = {"descr": column.dtype.str, "fortran_order": False, "shape": shape}
        _NPY.write_array_header_1_0(file, header)
        return file, file.tell(), column.dtype, shape

    def _open(self, name: str) -> tuple[Any, int, np.dtype[Any], tuple[int, ...]]:
        file = open(self._directory / f"{name}.npy", "rb")  # noqa: SIM115
        _NPY.read_magic(file)
        shape, _, dtype = _NPY.read_array_header_1_0(file)
        return file, file.tell(), dtype, shape


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Batches of text indexes, similar lengths together, longest first; at most `tokens` tokens with padding, unless a
    single text has more."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        count = max(1, tokens // lengths[order[start]])
        yield order[start : start + count]
        start += count


def padded(batch: Sequence[Ids]) -> Tensor:
    """Texts as one tensor [texts, tokens] of int64, padded on the right, which no earlier token sees."""
    rows = np.zeros((len(batch), max(map(len, batch))), dtype=np.int64)
    for row, ids in zip(rows, batch, strict=True):
        row[: len(ids)] = ids
    return torch.from_numpy(rows)


def tokens_on(device: torch.device, batch_tokens: int, vocab_size: int) -> int:
    """Tokens of a batch: `batch_tokens`, fewer on a CPU."""
    if device.type != "cpu":
        return batch_tokens
    return max(1, min(batch_tokens, _CPU_TOKENS, _CPU_LOGITS // (4 * vocab_size)))


def measure(runner: Runner, works: Sequence[Work], tell: Tell = untold) -> None:
    """Does all works, in batches of texts of similar length."""
    if isinstance(runner, Together):
        runner.together(works, tell)
        return
    done, total = 0, sum(work.tokens for work in works)
    tell(done, total, "")
    for work in works:
        for batch in batches([len(one) for one in work.ids], runner.batch_tokens):
            texts = [work.ids[index] for index in batch]

            def each(index: int, logits: Tensor, work: Work = work, batch: list[int] = batch) -> None:
                work.each(batch[index], 0, logits)

            run(runner, texts, each)
            done += sum(len(one) - 1 for one in texts)
            tell(done, total, "")


def run(runner: Runner, batch: Sequence[Ids], each: Callable[[int, Tensor], None]) -> None:
    """Calls `each(index in the batch, logits)` for every text of a batch, longest first.

    If memory runs out, in the model or in `each`, halves `runner.batch_tokens` and retries that part. UnsupportedError
    if a single text does not fit.
    """
    done = 0
    while done < len(batch):
        part = batch[done : done + max(1, runner.batch_tokens // len(batch[done]))]
        try:
            for index, logits in enumerate(runner.logits(part)):
                each(done + index, logits)
            done += len(part)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(part) == 1:
                raise too_long(part[0], error) from None
            runner.batch_tokens = max(1, len(part) // 2) * len(part[0])
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def too_long(ids: Ids, error: BaseException) -> UnsupportedError:
    """The error for a text with which memory runs out even if it is the only one."""
    return UnsupportedError(
        f"A text of {len(ids)} tokens does not fit into memory.",
        why=(str(error).splitlines() or [type(error).__name__])[0],
        hint=f"Cut the texts: --set evaluation.max_tokens={max(2, len(ids) // 2)}",
    )
