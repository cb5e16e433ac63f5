"""Worker process of one runner: python -m builder.evaluate.runners.worker JOB.json

Scores one data set after the other and stores each as its own stage, so an interrupted run resumes at the first
unfinished data set. Events go to the parent (builder.core.process.emit).
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

from builder.core.errors import BuilderError, IntegrityError, UnsupportedError
from builder.core.output import Output, size
from builder.core.process import emit, worker_main
from builder.core.store import Store
from builder.evaluate.datasets import Ids, Sequences, sequences, shuffled
from builder.evaluate.runners import scoring
from builder.evaluate.runners.language import check_known_language, check_vocabulary
from builder.evaluate.runners.scoring import ColumnFiles, Runner
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
        start = monotonic()
        check_vocabulary(max(int(ids.max()) for ids in texts.ids), runner.vocab_size)
        known = check_language(runner, texts.ids, job["seed"])
        if job["runner"] == "bf16":
            check_known_language(known, one["name"], runner.vocab_size)
            kept = size(8 * texts.starts[-1] * min(job["top"], runner.vocab_size))
            emit(info=f"{kept} on disk for the {job['top']} likeliest tokens of each position of {one['name']}")
        label = f"{job['label']}: {one['name']}"
        counts = score_set(
            runner,
            texts,
            directory,
            top=job["top"] if job["runner"] == "bf16" else 0,
            reference=Path(one["reference"]) if one["reference"] else None,
            progress=lambda done, total: emit(progress={"label": label, "done": done, "total": total}),
        )
        SourceFiles.of_job(job).check_unchanged()
        facts = {"texts": len(texts.ids), "read": texts.read, "dropped": texts.dropped, "cut": texts.cut}
        return {**facts, **counts, **known, "seconds": round(monotonic() - start, 3)}

    return make


def score_set(
    runner: Runner,
    texts: Sequences,
    directory: Path,
    *,
    top: int = 0,
    reference: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Scores the texts into `directory`: one column file per score (scoring.score), rows in the order of the texts, and
    starts.npy. Returns counts.

    top: how many likely tokens to store per position. reference: the directory of BF16's scores, to compute KL.
    """
    starts = texts.starts
    if reference is not None:
        _same_texts(reference, starts)
    columns = ColumnFiles(directory, starts[-1])
    held = ColumnFiles(reference) if reference else None
    lengths = [len(ids) for ids in texts.ids]
    done = 0
    progress(done, starts[-1])
    for batch in scoring.batches(lengths, runner.batch_tokens):

        def each(index: int, logits: Any, batch: list[int] = batch) -> None:
            text = batch[index]
            rows = lengths[text] - 1
            theirs = held.read(starts[text], rows, *scoring.REFERENCE) if held else None
            columns.write(starts[text], scoring.score(logits, texts.ids[text], top=top, reference=theirs))

        scoring.run(runner, [texts.ids[index] for index in batch], each)
        done += sum(lengths[index] - 1 for index in batch)
        progress(done, starts[-1])
    columns.close()
    if held:
        held.close()
    np.save(directory / "starts.npy", np.array(starts, dtype=np.int64))
    return {"tokens": starts[-1], "batch_tokens": runner.batch_tokens, "vocab_size": runner.vocab_size}


def check_language(runner: Runner, ids: Sequence[Ids], seed: int) -> dict[str, float]:
    """Mean NLL of the beginnings of a few texts, and of the same tokens shuffled, in nats per token."""
    step = max(1, len(ids) // CHECK_TEXTS)
    some = sorted((one[:CHECK_TOKENS] for one in ids[::step][:CHECK_TEXTS]), key=lambda one: -len(one))
    return {"checked_nll": mean_nll(runner, some), "shuffled_nll": mean_nll(runner, shuffled(some, seed))}


def mean_nll(runner: Runner, ids: Sequence[Ids]) -> float:
    """Mean negative log-likelihood of these texts, in nats per token."""
    found: dict[int, float] = {}
    ids = sorted(ids, key=lambda one: -len(one))  # scoring.run takes the longest first

    def each(index: int, logits: Any) -> None:
        found[index] = float(scoring.score(logits, ids[index])["nll"].sum(dtype=np.float64))

    scoring.run(runner, ids, each)
    return sum(found.values()) / sum(len(one) - 1 for one in ids)


def _same_texts(reference: Path, starts: Sequence[int]) -> None:
    theirs = np.load(reference / "starts.npy").tolist()
    if theirs != list(starts):
        raise IntegrityError("The texts were tokenized differently for BF16.", hint="Run the same command again.")


def known(error: BaseException, job: Mapping[str, Any]) -> BuilderError | None:
    """The error to show if memory ran out; None for any other."""
    if not scoring.out_of_memory(error):
        return None
    return UnsupportedError(
        "The model does not fit into this machine's memory.",
        why=(str(error).splitlines() or ["out of memory"])[0],
        hint="Use a machine with more memory, or measure fewer runners: --runner checkpoint",
    )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(worker_main(sys.argv, run, known))
