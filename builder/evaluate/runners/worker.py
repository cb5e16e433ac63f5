"""Worker process of one runner: python -m builder.evaluate.runners.worker JOB.json

Scores one data set after the other and stores each as its own stage, so an interrupted run resumes at the first
unfinished data set. Events go to the parent (builder.core.worker.emit).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from builder.core.errors import BuilderError, IntegrityError, UnsupportedError, out_of_memory
from builder.core.output import Output, size
from builder.core.store import Store
from builder.core.worker import emit, worker_main
from builder.evaluate.datasets import Ids, Sequences, sequences, shuffled
from builder.evaluate.runners import scoring
from builder.evaluate.runners.language import check_known_language, check_vocabulary
from builder.evaluate.runners.scoring import ColumnFiles, Runner, Together, Work
from builder.model.hashed_files import SourceFiles
from builder.quantize.device import check_device
from builder.tokenizer import loading as tokenizer_loading

# The language check (check_language): number of texts, and tokens of each.
CHECK_TEXTS, CHECK_TOKENS = 8, 256


def run(job: Mapping[str, Any]) -> None:
    """Opens the runner and scores the data sets of the job that are not in the store."""
    import torch

    emit(progress={"label": f"{job['label']}: loading", "done": 0, "total": None})
    tokenizer = tokenizer_loading.load(Path(job["model"]), trust_remote_code=job["trust_remote_code"])
    check_device(job.get("gpus", ()))
    store = Store(Path(job["root"]), Output("quiet"), force=job["force"])
    sets = [(one, sequences(Path(one["rows"]), tokenizer, name=one["name"], **job["lengths"])) for one in job["sets"]]
    with torch.inference_mode(), opener(job["runner"])(job) as runner:
        for one, texts in sets:
            store.stage("scores", one["ingredients"], _maker(job, one, texts, runner))


def opener(name: str) -> Callable[[Mapping[str, Any]], AbstractContextManager[Runner]]:
    """The context manager that opens a runner, by its name. Each runner's imports happen only when it is opened."""
    if name == "reference":
        from builder.evaluate.runners import executor

        return executor.reference
    if name == "served":
        from builder.evaluate.runners import triton

        return triton.served
    from builder.evaluate.runners import local

    return {"bf16": local.bf16, "simulated": local.simulated, "checkpoint": local.checkpoint}[name]


def _maker(
    job: Mapping[str, Any], one: Mapping[str, Any], texts: Sequences, runner: Runner
) -> Callable[[Path], dict[str, Any]]:
    def make(directory: Path) -> dict[str, Any]:
        start, bf16 = monotonic(), job["runner"] == "bf16"
        check_vocabulary(max(int(ids.max()) for ids in texts.ids), runner.vocab_size)
        language = Language(texts.ids, job["seed"])
        reference = Path(one["reference"]) if one["reference"] else None
        scores = Scores(texts, directory, top=job["top"] if bf16 else 0, reference=reference)
        tell = told(f"{job['label']}: {one['name']}")
        # Weights that are read for each measurement are read once for both.
        both = isinstance(runner, Together)
        scoring.measure(runner, [*language.works, *([scores.work] if both else [])], tell if both else scoring.untold)
        known = language.means()
        if bf16:
            check_known_language(known, one["name"], runner.vocab_size)
            kept = size(8 * texts.starts[-1] * min(job["top"], runner.vocab_size))
            emit(info=f"{kept} on disk for the {job['top']} likeliest tokens of each position of {one['name']}")
        if not both:
            scoring.measure(runner, [scores.work], tell)
        counts = scores.finish(runner)
        SourceFiles.of_job(job).check_unchanged()
        facts = {"texts": len(texts.ids), "read": texts.read, "dropped": texts.dropped, "cut": texts.cut}
        return {**facts, **counts, **known, "seconds": round(monotonic() - start, 3)}

    return make


def told(label: str) -> scoring.Tell:
    """Reports progress to the parent."""

    def tell(done: int, total: int, where: str) -> None:
        emit(progress={"label": f"{label}, {where}" if where else label, "done": done, "total": total})

    return tell


class Scores:
    """The scores of a data set's texts, in `directory`: one column file per score (scoring.score), rows in the order of
    the texts, and starts.npy.

    top: how many likely tokens to store per position. reference: the directory of BF16's scores, to compute KL.
    """

    def __init__(self, texts: Sequences, directory: Path, *, top: int = 0, reference: Path | None = None) -> None:
        self._texts, self._directory, self._top, self._starts = texts, directory, top, texts.starts
        if reference is not None:
            _same_texts(reference, self._starts)
        self._columns = ColumnFiles(directory, self._starts[-1])
        self._reference = ColumnFiles(reference) if reference else None
        self.work = Work(texts.ids, self._write)

    def _write(self, text: int, position: int, logits: Any) -> None:
        ids = self._texts.ids[text][position : position + len(logits) + 1]
        start = self._starts[text] + position
        if len(ids) > 1:  # the last position predicts nothing
            theirs = self._reference.read(start, len(ids) - 1, *scoring.REFERENCE) if self._reference else None
            self._columns.write(start, scoring.score(logits, ids, top=self._top, reference=theirs))

    def finish(self, runner: Runner) -> dict[str, Any]:
        """Closes the files, once the work is done. Returns counts."""
        self._columns.close()
        if self._reference:
            self._reference.close()
        np.save(self._directory / "starts.npy", np.array(self._starts, dtype=np.int64))
        return {"tokens": self._starts[-1], "batch_tokens": runner.batch_tokens, "vocab_size": runner.vocab_size}


def score_set(
    runner: Runner,
    texts: Sequences,
    directory: Path,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> dict[str, Any]:
    """Writes `Scores` of the texts into `directory`. options: of Scores. Returns counts."""
    scores = Scores(texts, directory, **options)
    scoring.measure(runner, [scores.work], lambda done, total, _: progress(done, total))
    return scores.finish(runner)


class MeanNll:
    """The mean negative log-likelihood of texts, in nats per token, once its work is done."""

    def __init__(self, ids: Sequence[Ids]) -> None:
        self._found: dict[int, float] = {}
        self.work = Work(ids, self._add)

    def _add(self, text: int, position: int, logits: Any) -> None:
        ids = self.work.ids[text][position : position + len(logits) + 1]
        before = self._found.get(text, 0.0) if position else 0.0  # a text may be done again, in smaller pieces
        nll = scoring.score(logits, ids)["nll"].sum(dtype=np.float64) if len(ids) > 1 else 0.0
        self._found[text] = before + float(nll)

    def value(self) -> float:
        """The mean over all tokens of all texts."""
        return sum(self._found.values()) / self.work.tokens


class Language:
    """Whether a model knows the language of texts: how likely the beginnings of a few of them are, and the same tokens
    shuffled."""

    def __init__(self, ids: Sequence[Ids], seed: int) -> None:
        step = max(1, len(ids) // CHECK_TEXTS)
        some = sorted((one[:CHECK_TOKENS] for one in ids[::step][:CHECK_TEXTS]), key=lambda one: -len(one))
        self._checked, self._shuffled = MeanNll(some), MeanNll(shuffled(some, seed))
        self.works = [self._checked.work, self._shuffled.work]

    def means(self) -> dict[str, float]:
        """Both means in nats per token, once the works are done."""
        return {"checked_nll": self._checked.value(), "shuffled_nll": self._shuffled.value()}


def check_language(runner: Runner, ids: Sequence[Ids], seed: int) -> dict[str, float]:
    """Mean NLL of the beginnings of a few texts, and of the same tokens shuffled, in nats per token."""
    language = Language(ids, seed)
    scoring.measure(runner, language.works)
    return language.means()


def mean_nll(runner: Runner, ids: Sequence[Ids]) -> float:
    """Mean negative log-likelihood of these texts, in nats per token."""
    mean = MeanNll(ids)
    scoring.measure(runner, [mean.work])
    return mean.value()


def _same_texts(reference: Path, starts: Sequence[int]) -> None:
    theirs = np.load(reference / "starts.npy").tolist()
    if theirs != list(starts):
        raise IntegrityError("The texts were tokenized differently for BF16.", hint="Run the same command again.")


def known(error: BaseException, job: Mapping[str, Any]) -> BuilderError | None:
    """The error to show if memory ran out; None for any other."""
    if not out_of_memory(error):
        return None
    return UnsupportedError(
        "The model does not fit into this machine's memory.",
        why=(str(error).splitlines() or ["out of memory"])[0],
        hint="Use a machine with more memory, or measure fewer runners: --runner checkpoint",
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(worker_main(sys.argv, run, known))
