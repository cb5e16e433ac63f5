"""The child process that talks to the Hugging Face Hub: python -m builder.hub.download '{"job": "resolve", ...}'

A process of its own because huggingface_hub reads HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE when it is
imported, because its download threads can't be interrupted, and because a stuck transfer can then be ended and begun
again. Works with huggingface_hub 0.36 and 1.x. It answers with events (`process.emit`): info, progress, result, error.
"""

from __future__ import annotations

import glob
import itertools
import json
import logging
import os
import re
import shutil
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

import huggingface_hub
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name

from builder.core.errors import BuilderError, IntegrityError, StageError
from builder.core.output import size as readable
from builder.core.process import emit, emit_error
from builder.core.untrusted_text import read_regular
from builder.hub import guard, remote_headers
from builder.hub.errors import redact_token, translate, with_retries
from builder.hub.guard import DEADLINE
from builder.model import files as model_files
from builder.model.hashed_files import times
from builder.tokenizer import files as tokenizer_files

STALLED = 75  # exit code: bytes stopped coming (EX_TEMPFAIL of sysexits.h)
# Partial files of huggingface_hub 1.x have names of their own and are never resumed; a live one is written all the
# time (its read timeout is 10 s), so an hour of silence means that its process is dead.
DEAD_AFTER = 3600.0
MOST_FILES = 100_000  # at the top of a repository; real ones have some 200
LARGEST_CONFIG = 256_000_000  # bytes: what is parsed before the download; the largest index known has some 30 MB
# A name that is one file in a directory on every system, and that a terminal shows as it is.
PLAIN = re.compile(r"(?!\.\.?\Z)[^/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,255}")


@dataclass(frozen=True)
class Listed:
    """What the Hub lists for a file: LFS files have a sha256, the others the sha1 of a git blob."""

    size: int
    sha256: str | None
    git_sha1: str | None

    @property
    def etag(self) -> str:
        return self.sha256 or self.git_sha1 or ""


@dataclass(frozen=True)
class Job:
    """What the parent asks. `waits`: seconds between repetitions; `stall`: seconds without a byte before giving up;
    `limit`: seconds for everything but the download itself."""

    job: str
    repo: str
    revision: str | None = None
    commit: str = ""
    kind: str = "model"
    trust_remote_code: bool = False
    waits: tuple[float, ...] = ()
    stall: float = 300.0
    limit: float = 600.0

    @property
    def storage(self) -> Path:
        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.repo, repo_type=self.kind)


def resolve(job: Job) -> dict[str, Any]:
    """The commit that a branch or tag is at; offline, the one that it was at when it was last downloaded."""
    if constants.HF_HUB_OFFLINE:
        ref = job.storage / "refs" / (job.revision or "main")
        if not ref.is_file():
            raise OfflineModeIsEnabled(str(ref))
        return {"commit": read_regular(ref, 1000).decode("utf-8", "replace").strip()}
    info = with_retries(lambda: HfApi().repo_info(job.repo, repo_type=job.kind, revision=job.revision), job.waits)
    return {"commit": info.sha}


def listing(job: Job) -> dict[str, Any]:
    """What a download would fetch: the parsed config.json, sizes by name, bytes still to come, bytes free and where."""
    chosen, config, _ = _choose(job)
    return {
        "config": config,
        "files": {name: entry.size for name, entry in chosen.items()},
        "missing": _missing(job, chosen),
        "free": shutil.disk_usage(_existing(Path(constants.HF_HUB_CACHE))).free,
        "cache": constants.HF_HUB_CACHE,
    }


def headers(job: Job) -> dict[str, Any]:
    """{"config", "index": {tensor: file} or None, "tensors": {file: {tensor: [dtype, shape]}}, "root": directory with
    the small files}: by ranged reads of the safetensors headers, no weight is downloaded."""
    chosen, config, root = _choose(job)
    shards = {name: entry.size for name, entry in chosen.items() if name.endswith(".safetensors")}
    if constants.HF_HUB_OFFLINE:
        found = remote_headers.cached(root, shards)
    else:
        found = remote_headers.remote(job.repo, job.commit, shards, job.waits)
    index = None
    if model_files.INDEX in chosen:
        index = model_files.index_of(read_regular(root / model_files.INDEX), job.repo)
    tensors = {file: {name: [info.dtype, list(info.shape)] for name, info in t.items()} for file, t in found.items()}
    return {"config": config, "index": index, "root": str(root), "tensors": tensors}


def download(job: Job) -> dict[str, Any]:
    """Brings the model's files into the Hub's cache and verifies every one: {"root", "files": {name: size, sha256},
    "times": {name: [size and times]}}."""
    chosen, _, root = _choose(job)
    DEADLINE.end()  # a download has a watch of its own
    if not constants.HF_HUB_OFFLINE:
        _drop_dead_partials(job, chosen)
        _check_space(job, chosen)
        root = _download(job, chosen)
    before = times(root, list(chosen))  # what changes from here on shows when the model is loaded
    hashes = _hash(root, chosen)
    if damaged := _drop_damaged(job, root, chosen, hashes, repairable=not constants.HF_HUB_OFFLINE):
        _download(job, damaged)
        before |= times(root, list(damaged))
        hashes |= _hash(root, damaged)
        _drop_damaged(job, root, damaged, hashes, repairable=False)
    return {
        "root": str(root),
        "files": {name: {"size": found.size, "sha256": found.sha256} for name, found in hashes.items()},
        "times": before,
    }


def _choose(job: Job) -> tuple[dict[str, Listed], dict[str, Any], Path]:
    """The model's files as the Hub (offline: the cache) lists them. Checked before any weight is downloaded."""
    listed = _cached(job) if constants.HF_HUB_OFFLINE else _tree(job)
    model_files.check_names(listed, job.repo)
    config_path = _small(job, model_files.CONFIG, listed)
    config = model_files.parse_config(config_path.read_bytes(), job.repo)
    model_files.check_config(config, job.repo, trust_remote_code=job.trust_remote_code)
    shards = None
    if model_files.INDEX in listed:
        shards = model_files.shards_of(_small(job, model_files.INDEX, listed).read_bytes(), listed, job.repo)
    names = model_files.wanted(listed, shards, remote_code=job.trust_remote_code)
    chosen = {name: listed[name] for name in names}
    _check_tokenizer(job, config_path.parent, chosen, config)
    return chosen, config, config_path.parent


def _check_tokenizer(job: Job, root: Path, chosen: Mapping[str, Listed], config: Mapping[str, Any]) -> None:
    """Fetches the tokenizer's files, which are small, and checks that they make one for this model."""
    names = model_files.tokenizer_names(chosen)
    small = {name: chosen[name] for name in (*names, model_files.GENERATION) if name in chosen}
    if not constants.HF_HUB_OFFLINE:
        for name in small:
            _small(job, name, chosen)
    tokenizer_files.check(root, config, job.repo)


def _tree(job: Job) -> dict[str, Listed]:
    """The files at the top of the repository. Names that are no plain ones belong to no model, and are left out."""

    def listed() -> list[Any]:
        entries = HfApi().list_repo_tree(job.repo, recursive=False, revision=job.commit)
        return list(itertools.islice(entries, MOST_FILES + 1))

    entries = with_retries(listed, job.waits)
    if len(entries) > MOST_FILES:
        raise IntegrityError(f"The Hub lists more than {MOST_FILES} files of {job.repo}.", hint=guard.HINT)
    return {
        entry.path: _listed(entry)
        for entry in entries
        if isinstance(entry, huggingface_hub.hf_api.RepoFile) and _is_plain(entry.path)
    }


def _is_plain(name: object) -> bool:
    return isinstance(name, str) and bool(PLAIN.fullmatch(name)) and len(name.encode()) <= 255


def _listed(entry: Any) -> Listed:
    """An entry of a listing, whose hashes become names of files."""
    sha256 = entry.lfs.sha256 if entry.lfs else None
    for found in (sha256, entry.blob_id):
        if found is not None:
            guard.check_hash(found, "the hash")
    if type(entry.size) is not int or not 0 <= entry.size < 1 << 60:
        raise IntegrityError(f"The Hub lists a size of {str(entry.size)[:40]} for a file.", hint=guard.HINT)
    return Listed(entry.size, sha256, entry.blob_id)


def _cached(job: Job) -> dict[str, Listed]:
    """The files of a cached commit. Blobs are named by their hash, so they can be verified without the Hub."""
    root = job.storage / "snapshots" / job.commit
    if not root.is_dir():
        raise OfflineModeIsEnabled(str(root))
    listed = {}
    for path in sorted(root.iterdir()):
        if path.is_file() and _is_plain(path.name):
            etag = Path(os.readlink(path)).name if path.is_symlink() else ""
            sha256 = etag if re.fullmatch(r"[0-9a-f]{64}", etag) else None
            git_sha1 = etag if re.fullmatch(r"[0-9a-f]{40}", etag) else None
            listed[path.name] = Listed(path.stat().st_size, sha256, git_sha1)
    return listed


def _small(job: Job, name: str, listed: Mapping[str, Listed]) -> Path:
    """A file that is parsed before the download: hashed when it has come, and fetched once more if it is damaged."""
    chosen = {name: listed[name]}
    if listed[name].size > LARGEST_CONFIG:
        raise IntegrityError(
            f"{name} of {job.repo} has {readable(listed[name].size)}, and at most {readable(LARGEST_CONFIG)} are read.",
            hint="Do not use this model.",
        )
    for repairable in (not constants.HF_HUB_OFFLINE, False):
        path = Path(with_retries(lambda: hf_hub_download(job.repo, name, revision=job.commit), job.waits))
        found = model_files.hash_files(path.parent, [name], lambda _: None)
        if not _drop_damaged(job, path.parent, chosen, found, repairable=repairable):
            break
    return path


def _download(job: Job, chosen: Mapping[str, Listed]) -> Path:
    names = [glob.escape(name) for name in chosen]

    def transfer() -> Path:
        # huggingface_hub 1.33 keeps listings: a wrong one would come back at every run.
        (job.storage / "trees" / f"{job.commit}.json").unlink(missing_ok=True)
        root = Path(snapshot_download(job.repo, revision=job.commit, allow_patterns=names))
        absent = [name for name in chosen if not (root / name).is_file()]
        if absent:
            # When the Hub answers with an error, 0.36 returns the directory as it is, whole or not.
            raise ConnectionError(f"{len(absent)} files have not come, {absent[0]} among them")
        return root

    emit(info=f"downloading {readable(_missing(job, chosen))} of {readable(_total(chosen))} to {job.storage}")
    with _watched(job, chosen) as done:
        root = with_retries(transfer, job.waits, progress=done)
    if job.revision != job.commit:
        # As hub itself does for a branch: an offline run finds the commit by this file.
        ref = job.storage / "refs" / (job.revision or "main")
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(job.commit)
    return root


@contextmanager
def _watched(job: Job, chosen: Mapping[str, Listed]) -> Iterator[Callable[[], int]]:
    """Reports the bytes on the disk twice a second, and ends this process when none comes for `job.stall` seconds."""
    stop = threading.Event()

    def done() -> int:
        return sum(min(entry.size, _on_disk(job, entry)) for entry in chosen.values())

    def watch() -> None:
        last, since = -1, time.monotonic()
        while not stop.wait(0.5):
            now = done()
            if now != last:
                last, since = now, time.monotonic()
            emit(progress={"label": "download", "done": now, "total": _total(chosen)})
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


def _on_disk(job: Job, entry: Listed) -> int:
    """Bytes of a file in the cache, whole or partial. Sparse files count what is written."""
    if not entry.etag:
        return 0
    found = 0
    for path in [job.storage / "blobs" / entry.etag, *(job.storage / "blobs").glob(f"{entry.etag}*.incomplete")]:
        try:
            status = path.stat()
        except FileNotFoundError:  # not begun, or finished since it was listed: then its other name counts
            continue
        found = max(found, min(status.st_size, status.st_blocks * 512))
    return found


def _missing(job: Job, chosen: Mapping[str, Listed]) -> int:
    """Bytes still to download. Of partial files only those count that huggingface_hub resumes."""
    missing = 0
    for entry in chosen.values():
        whole, partial = (job.storage / "blobs" / f"{entry.etag}{suffix}" for suffix in ("", ".incomplete"))
        if not whole.is_file():
            missing += entry.size - (partial.stat().st_size if partial.is_file() else 0)
    return missing


def _check_space(job: Job, chosen: Mapping[str, Listed]) -> None:
    """Before the first byte of a weight. huggingface_hub only warns, file by file."""
    needed, cache = _missing(job, chosen), Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(_existing(cache)).free
    if needed > free:
        raise StageError(
            f"{job.repo} needs {readable(needed)} more on the disk, and {readable(free)} are free.",
            why=f"The Hub's cache is {cache}.",
            hint="Free some space (`hf cache` shows what lies there), or export HF_HOME=/a/larger/disk",
        )


def _hash(root: Path, chosen: Mapping[str, Listed]) -> dict[str, model_files.Hashed]:
    total = _total(chosen)
    return model_files.hash_files(
        root, list(chosen), lambda done: emit(progress={"label": "verify", "done": done, "total": total})
    )


def _drop_damaged(
    job: Job,
    root: Path,
    chosen: Mapping[str, Listed],
    hashes: Mapping[str, model_files.Hashed],
    *,
    repairable: bool,
) -> dict[str, Listed]:
    """Removes from the cache what is not what was listed. Returns it, or raises IntegrityError.

    With `repairable`, small files are returned, to be fetched again at once; weights are left to the next run.
    """
    damaged = {name: entry for name, entry in chosen.items() if not _as_listed(entry, hashes[name])}
    for name in damaged:
        _remove(job, root / name)
    if repairable and all(entry.size <= model_files.LARGEST_BLOB for entry in damaged.values()):
        for name in damaged:
            emit(info=f"{name} was damaged and is fetched again")
        return damaged
    if damaged:
        raise IntegrityError(
            f"{', '.join(list(damaged)[:5])} of {job.repo} did not have the size or hash that the Hub lists.",
            why="It was damaged on the way or on the disk, and was removed from the cache.",
            hint="Run the same command again: it is downloaded anew, the rest is kept.",
        )
    return {}


def _as_listed(entry: Listed, found: model_files.Hashed) -> bool:
    if found.size != entry.size:
        return False
    if entry.sha256:
        return found.sha256 == entry.sha256
    return entry.git_sha1 is None or found.git_sha1 == entry.git_sha1


def _remove(job: Job, path: Path) -> None:
    """A name in the snapshot, the blob that it points to, and so on; nothing that lies outside the cache."""
    inside = (Path(constants.HF_HUB_CACHE).resolve(), job.storage.resolve())
    following: Path | None = path
    while following is not None:
        place = following.parent.resolve() / following.name
        if not any(place.is_relative_to(directory) for directory in inside):
            return
        following = place.parent / os.readlink(place) if place.is_symlink() else None
        place.unlink(missing_ok=True)


def drop_damaged_cached(job: Job) -> None:
    """Removes the small files of a cached commit that are no longer what their blob's name says.

    For what other libraries read from the cache without looking: the card and the metadata of a dataset.
    """
    found = (path for path in (job.storage / "snapshots" / job.commit).rglob("*") if path.is_symlink())
    for path in itertools.islice(found, MOST_FILES):
        etag = Path(os.readlink(path)).name
        if path.is_file() and path.stat().st_size <= model_files.LARGEST_BLOB and guard.HASH.fullmatch(etag):
            hashed = model_files.hash_files(path.parent, [path.name], lambda _: None)[path.name]
            if etag not in (hashed.sha256, hashed.git_sha1):
                _remove(job, path)


def _drop_dead_partials(job: Job, chosen: Mapping[str, Listed]) -> None:
    """Removes what a killed huggingface_hub 1.x left and never resumes: `<etag>.<8 hex>.incomplete`.
    (0.36 writes `<etag>.incomplete` and resumes it: that one stays.)"""
    for etag in {entry.etag for entry in chosen.values()} - {""}:
        for path in (job.storage / "blobs").glob(f"{etag}.{'[0-9a-f]' * 8}.incomplete"):
            with suppress(FileNotFoundError):  # another download of these files removes the same
                if time.time() - path.stat().st_mtime > DEAD_AFTER:
                    path.unlink()


def _end(code: int) -> None:
    """Ends this process in the middle of a download, without the partial files that nobody would resume."""
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:  # closed since it was listed, as the list's own descriptor is
            continue
        if re.search(r"\.[0-9a-f]{8}\.incomplete$", path):
            Path(path).unlink(missing_ok=True)
    os._exit(code)


def _total(chosen: Mapping[str, Listed]) -> int:
    return sum(entry.size for entry in chosen.values())


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _clean_logs() -> None:
    """Libraries log addresses, and a mirror's address may hold a password."""
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
    """Runs one job. Errors are events too; the exit code is theirs."""
    asked = json.loads(arguments)
    job = Job(**{**asked, "waits": tuple(asked.get("waits", ()))})
    # Threads of huggingface_hub can't be stopped, so an interrupt ends the process at once.
    signal.signal(signal.SIGINT, lambda *_: _end(130))
    return report(lambda: JOBS[job.job](job), job.kind, job.repo, job.revision, job.limit)


def report(
    work: Callable[[], dict[str, Any]], kind: str, repo: str, revision: str | None, limit: float = Job.limit
) -> int:
    """Emits the result of `work` or its error, translated. The traceback goes to the log, without secrets.

    `limit`: seconds that `work` may take as long as it does not begin or end the deadline itself.
    """
    _clean_logs()
    guard.install()
    DEADLINE.begin(limit, stop=_end)
    try:
        emit(result=work())
        return 0
    except Exception as error:
        DEADLINE.begin(limit)  # for the questions that a good message needs
        with suppress(OSError):  # a disk that is full
            print(redact_token(traceback.format_exc()), file=sys.stderr)
        told: BuilderError = translate(error, kind, repo, revision)
        emit_error(type(told)(redact_token(told.what), why=redact_token(told.why), hint=redact_token(told.hint)))
        return told.exit_code
    finally:
        DEADLINE.end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
