"""Asks the Hub from the builder's own process: starts Hub workers, shows their progress, raises their errors.

Imports no huggingface_hub; see hub.download for why that has a process of its own.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from builder.core import process, workers
from builder.core.errors import IntegrityError, StageError, UsageError
from builder.core.output import Progress
from builder.core.safe_text import quoted
from builder.core.store import Store
from builder.hub import stored_commits

# The Hub's rule for names (huggingface_hub/utils/_validators.py): owner/name of letters, digits, "-", "_" and ".".
HUB_ID = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")
# Seconds before each retry in a row, while the Hub is down or the connection breaks.
RETRY_DELAYS: tuple[float, ...] = (1, 2, 4, 8, 15)
# Seconds without a byte after which a transfer counts as stuck. Plain HTTP times out by itself after 10; Xet doesn't.
STALL_SECONDS = 300.0
# Seconds for all requests before the download: listings, config.json, headers.
TIME_LIMIT = 600.0


def resolve(
    repo: str,
    revision: str | None,
    *,
    store: Store,
    kind: str = "model",
    planned: tuple[str, Mapping[str, Any]] | None = None,
) -> str:
    """The commit of a branch or tag on the Hub. A commit is returned as it is, without a request.

    `planned`: the stage that needs the commit, and its other ingredients. If the Hub can't be reached, a dry store
    assumes the newest commit among its artifacts with these ingredients.
    """
    if revision and COMMIT.fullmatch(revision):
        return revision
    if revision is not None and (not re.fullmatch(r"\w[\w./+-]{0,200}", revision) or ".." in revision):
        raise UsageError(f"{quoted(revision)} is not a revision.", hint="Give a branch, a tag or a commit.")
    known, waits = None, list(RETRY_DELAYS)
    if store.dry and planned:
        known = stored_commits.newest_artifact(store, *planned) if revision is None else None
        waits = [] if known or planned[0] != "snapshot" else waits  # no retries where there is a fallback
    try:
        answer = run_hub_job(store, job="resolve", repo=repo, revision=revision, kind=kind, waits=waits)
    except (StageError, UsageError) as error:
        unreachable = isinstance(error, StageError) or offline()
        if not (store.dry and planned and unreachable):
            raise
        return stored_commits.fallback_commit(error, known, repo, store=store, stage=planned[0])
    commit = str(answer["commit"])
    if not COMMIT.fullmatch(commit):
        raise IntegrityError(
            f"{repo} at {revision or 'main'} resolves to {quoted(commit)}, which is not a commit.",
            why="That comes from the Hub (HF_ENDPOINT), or offline from refs/ in its cache.",
            hint="Check HF_ENDPOINT, or remove that file from the cache.",
        )
    store.out.info(f"{repo} at {revision or 'main'} is commit {commit}")
    return commit


def offline() -> bool:
    """Whether huggingface_hub uses only its cache (huggingface_hub/constants.py, HF_HUB_OFFLINE)."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in ("1", "ON", "YES", "TRUE")


def endpoint() -> str:
    """HF_ENDPOINT without user name and password; "" if it is not set, which means the Hub itself."""
    return re.sub(r"//[^/]*@", "//", os.environ.get("HF_ENDPOINT", "")).rstrip("/")


@dataclass(frozen=True)
class Worker:
    """A Hub worker's module, the unit of its progress, and what is called with the name of each complete file."""

    module: str
    unit: str
    on_complete: Callable[[str], None]


def run_hub_job(
    store: Store,
    *,
    module: str = workers.HUB_DOWNLOAD,
    unit: str = "MB",
    on_complete: Callable[[str], None] = lambda name: None,
    **job: Any,
) -> dict[str, Any]:
    """Runs a job in a Hub worker and returns its result. If a transfer is stuck, retries once over plain HTTP.

    `job`: the fields of hub.cache.Job, or of another `module`'s job; retry delays and limits are added.
    `unit`: what progress counts; "MB" scales from bytes. `on_complete`: called, in another thread, with the name of
    each file of weights that is there and verified; after a retry perhaps again.
    Raises the worker's error, StageError if stuck twice.
    """
    job = {"waits": list(RETRY_DELAYS), "stall": STALL_SECONDS, "limit": TIME_LIMIT, **job}
    for environment in ({}, {"HF_HUB_DISABLE_XET": "1"}):
        answer = _run_once(store, Worker(module, unit, on_complete), job, environment)
        if "stalled" not in answer:
            result: dict[str, Any] = answer["result"]
            return result
        store.out.warn(f"no data for {STALL_SECONDS:.0f} s; restarting the transfer over plain HTTP")
    raise StageError(
        f"The transfer of {job['repo']} is stuck.",
        why=f"Twice, no data arrived for {STALL_SECONDS:.0f} s.",
        hint="Check the network and HF_ENDPOINT, then run the same command: complete files are kept.",
    )


def _run_once(store: Store, worker: Worker, job: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """{"result": ...} or {"stalled": bytes} of one worker. Prints its messages and progress, raises its error."""
    answer: dict[str, Any] = {}
    argv = [process.python(), "-m", worker.module, json.dumps(job)]
    log = store.log(str(job["job"]))
    with ExitStack() as bars:
        bar: Progress | None = None
        label = ""

        def receive(event: dict[str, Any]) -> None:
            nonlocal bar, label
            if "progress" in event:
                now, scale = event["progress"], 1e6 if worker.unit == "MB" else 1  # workers count bytes
                if bar is None or label != now["label"]:
                    bars.close()
                    label = now["label"]
                    bar = bars.enter_context(store.out.progress(label, now["total"] / scale, worker.unit))
                bar.update(now["done"] / scale)
            elif "info" in event:
                store.out.info(event["info"])
            elif "complete" in event:
                worker.on_complete(event["complete"])
            else:
                answer.update(event)

        try:
            environment = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
            process.run(process.Command(argv, env=environment, kind="hub"), log=log, on_event=receive)
        except StageError:
            if "stalled" not in answer:
                raise
    log.unlink(missing_ok=True)
    return answer
