"""The worker process that talks to the Hugging Face Hub: python -m builder.hub.download '{"job": "resolve", ...}'

It is a separate process because huggingface_hub reads HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE at import,
because its download threads can't be interrupted, and so that a stuck transfer can be killed and started again. Works
with huggingface_hub 0.36 and 1.x. Answers with events (`worker.emit`): info, progress, stalled, result, error.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled

from builder.core.errors import BuilderError
from builder.core.output import size as readable
from builder.core.untrusted_text import read_regular
from builder.core.worker import emit, emit_error
from builder.hub import cache, guard, remote_headers
from builder.hub.cache import HubFile, Job
from builder.hub.errors import redact_token, translate, with_retries
from builder.hub.guard import DEADLINE
from builder.hub.listing import select
from builder.model import files as model_files
from builder.model.hashed_files import times

STALLED = 75  # exit code of a transfer that got no bytes any more (EX_TEMPFAIL of sysexits.h)


@dataclass(frozen=True)
class Verified:
    """A file whose hash is the listed one. times: see model.hashed_files, from before it was hashed."""

    times: list[int]
    hashes: model_files.Hashed


def resolve(job: Job) -> dict[str, Any]:
    """{"commit"} that a branch or tag points to; offline, the commit when it was last downloaded."""
    if constants.HF_HUB_OFFLINE:
        ref = job.storage / "refs" / (job.revision or "main")
        if not ref.is_file():
            raise OfflineModeIsEnabled(str(ref))
        return {"commit": read_regular(ref, 1000).decode("utf-8", "replace").strip()}
    info = with_retries(lambda: HfApi().repo_info(job.repo, repo_type=job.kind, revision=job.revision), job.waits)
    return {"commit": info.sha}


def listing(job: Job) -> dict[str, Any]:
    """What a download would transfer, without downloading weights.

    {"config": parsed config.json, "files": {name: bytes}, "missing": bytes to download, "free": bytes free,
    "cache": directory}
    """
    selected = select(job)
    return {
        "config": selected.config,
        "files": {name: entry.size for name, entry in selected.files.items()},
        "missing": cache.bytes_to_download(job, selected.files),
        "free": cache.bytes_free(),
        "cache": constants.HF_HUB_CACHE,
    }


def headers(job: Job) -> dict[str, Any]:
    """The model's tensors, from ranged reads of the safetensors headers: no weight is downloaded.

    {"config", "files": names, "index": {tensor: file} or None, "tensors": {file: {tensor: [dtype, shape, begin, end]}},
    "root": directory with the small files}. In TensorRT-LLM's layout, the tensors are those of the first rank.
    """
    selected = select(job)
    weights = model_files.split_ranks(selected.files)[:1] or [n for n in selected.files if n.endswith(".safetensors")]
    shards = {name: selected.files[name].size for name in weights}
    if constants.HF_HUB_OFFLINE:
        found = remote_headers.cached(selected.root, shards)
    else:
        found = remote_headers.remote(job.repo, job.commit, shards, job.waits)
    index = None
    if model_files.INDEX in selected.files:
        index = model_files.index_of(read_regular(selected.root / model_files.INDEX), job.repo)
    tensors = {
        file: {name: [info.dtype, list(info.shape), info.begin, info.end] for name, info in header.items()}
        for file, header in found.items()
    }
    files = sorted(selected.files)
    return {
        "config": selected.config, "files": files, "index": index, "root": str(selected.root), "tensors": tensors,
    }  # fmt: skip


def download(job: Job) -> dict[str, Any]:
    """Downloads the model's files into the Hub's cache and verifies each one: weights while others are transferred.

    Emits {"complete": name} for each file of weights as soon as it is there and verified.
    {"root", "files": {name: {"size", "sha256"}}, "times": {name: size and times, see model.hashed_files}}
    """
    selected = select(job)
    files, root = selected.files, selected.root
    DEADLINE.end()  # from here on the limit is `job.stall`, checked by _watched
    verified: dict[str, Verified] = {}
    if not constants.HF_HUB_OFFLINE:
        cache.drop_dead_partials(job, files)
        cache.check_space(job, files)
        with _verified_meanwhile(root, files) as verified:
            root = _download(job, files)
    rest = {name: entry for name, entry in files.items() if name not in verified}
    before = times(root, list(rest))  # before hashing, so that a change during or after it is noticed at loading
    hashes = _hash(root, rest)
    for name in verified:
        before[name], hashes[name] = verified[name].times, verified[name].hashes
    if damaged := cache.drop_damaged(job, root, files, hashes, repairable=not constants.HF_HUB_OFFLINE):
        _download(job, damaged)
        before |= times(root, list(damaged))
        hashes |= _hash(root, damaged)
        cache.drop_damaged(job, root, damaged, hashes, repairable=False)
    return {
        "root": str(root),
        "files": {name: {"size": found.size, "sha256": found.sha256} for name, found in hashes.items()},
        "times": before,
    }


def _download(job: Job, files: Mapping[str, HubFile]) -> Path:
    """Downloads what the cache lacks. Returns the snapshot's directory."""
    names = [glob.escape(name) for name in files]

    def transfer() -> Path:
        # huggingface_hub 1.33 caches listings; a wrong one would be used again by every run.
        (job.storage / "trees" / f"{job.commit}.json").unlink(missing_ok=True)
        root = Path(snapshot_download(job.repo, revision=job.commit, allow_patterns=names, max_workers=job.at_once))
        absent = [name for name in files if not (root / name).is_file()]
        if absent:
            # If the Hub answers with an error, 0.36 returns the directory as it is, complete or not.
            raise ConnectionError(f"{len(absent)} files are missing after the download, for example {absent[0]}")
        return root

    missing, total = cache.bytes_to_download(job, files), cache.total_bytes(files)
    emit(info=f"downloading {readable(missing)} of {readable(total)} to {job.storage}")
    with _watched(job, files) as done:
        root = with_retries(transfer, job.waits, progress=done)
    if job.revision != job.commit:
        # huggingface_hub writes this file only when it is asked for a branch. An offline run finds the commit by it.
        ref = job.storage / "refs" / (job.revision or "main")
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(job.commit)
    return root


@contextmanager
def _watched(job: Job, files: Mapping[str, HubFile]) -> Iterator[Callable[[], int]]:
    """Reports progress twice a second, and ends this process if no byte arrives for `job.stall` seconds.

    Yields a function that returns the bytes on disk.
    """
    stop = threading.Event()

    def done() -> int:
        return cache.bytes_on_disk(job, files.values())

    def watch() -> None:
        last, since = -1, time.monotonic()
        while not stop.wait(0.5):
            now = done()
            if now != last:
                last, since = now, time.monotonic()
            emit(progress={"label": "download", "done": now, "total": cache.total_bytes(files)})
            if time.monotonic() - since > job.stall:
                emit(stalled=now)
                _end(STALLED)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()


@contextmanager
def _verified_meanwhile(root: Path, files: Mapping[str, HubFile]) -> Iterator[dict[str, Verified]]:
    """During the block, hashes each file of weights once it is in the snapshot, where only complete files are linked.

    Yields what was verified. A file that is damaged is left to those who hash the rest.
    """
    stop, verified = threading.Event(), dict[str, Verified]()
    waiting = {name for name in files if name.endswith(".safetensors")}

    def verify() -> None:
        while not stop.wait(0.1):
            for name in sorted(name for name in waiting if (root / name).is_file()):
                waiting.discard(name)
                if stop.is_set():
                    return
                with suppress(OSError):  # removed since; the rest of the job notices
                    before = times(root, [name])[name]
                    found = model_files.hash_files(root, [name], lambda _: None)[name]
                    if files[name].matches(found):
                        verified[name] = Verified(before, found)
                        emit(complete=name)

    thread = threading.Thread(target=verify, daemon=True)  # a failed download does not wait for it
    thread.start()
    try:
        yield verified
    finally:
        stop.set()
    thread.join()


def _hash(root: Path, files: Mapping[str, HubFile]) -> dict[str, model_files.Hashed]:
    total = cache.total_bytes(files)
    return model_files.hash_files(
        root, list(files), lambda done: emit(progress={"label": "verify", "done": done, "total": total})
    )


def _end(code: int) -> None:
    """Ends this process during a download, and removes its open partial files, which nothing would resume."""
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:  # closed since it was listed, such as the descriptor of the listing itself
            continue
        if re.search(r"\.[0-9a-f]{8}\.incomplete$", path):
            Path(path).unlink(missing_ok=True)
    os._exit(code)


def _redact_logs() -> None:
    """Redacts secrets in all log records: libraries log URLs, and a mirror's URL may contain a password."""
    make = logging.getLogRecordFactory()

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        made = make(*args, **kwargs)
        made.msg, made.args = redact_token(made.getMessage()), None
        return made

    logging.setLogRecordFactory(record)


JOBS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "resolve": resolve,
    "listing": listing,
    "headers": headers,
    "download": download,
}


def main(arguments: str) -> int:
    """Runs one job, the fields of `Job` as JSON. Returns the exit code; errors are sent to the parent, too."""
    fields = json.loads(arguments)
    job = Job(**{**fields, "waits": tuple(fields.get("waits", ()))})
    # huggingface_hub's threads can't be stopped, so an interrupt ends the process at once.
    signal.signal(signal.SIGINT, lambda *_: _end(130))
    return report(lambda: JOBS[job.job](job), job.kind, job.repo, job.revision, job.limit)


def report(
    work: Callable[[], dict[str, Any]], kind: str, repo: str, revision: str | None, limit: float = Job.limit
) -> int:
    """Emits the result of `work`, or its error translated to a BuilderError. Returns the exit code.

    `limit`: seconds that `work` may take unless it controls DEADLINE itself. The traceback goes to the log, redacted.
    """
    _redact_logs()
    guard.install()
    DEADLINE.begin(limit, stop=_end)
    try:
        emit(result=work())
        return 0
    except Exception as error:
        DEADLINE.begin(limit)  # translating may ask the Hub again, for similar names
        with suppress(OSError):  # the disk with the log may be full
            print(redact_token(traceback.format_exc()), file=sys.stderr)
        found: BuilderError = translate(error, kind, repo, revision)
        emit_error(type(found)(redact_token(found.what), why=redact_token(found.why), hint=redact_token(found.hint)))
        return found.exit_code
    finally:
        DEADLINE.end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
