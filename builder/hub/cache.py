"""The Hub's cache on disk: what it contains, what is missing, and removing what is damaged or dead.

Layout of the cache: huggingface_hub's documentation, "Understand caching". A repository's files are links in
snapshots/<commit>/ to blobs/<etag>, where the ETag is the sha256 of an LFS file or the sha1 of a git blob.
Imported only in processes that talk to the Hub.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.file_download import repo_folder_name

from builder.core.errors import IntegrityError, StageError
from builder.core.output import size as readable
from builder.core.worker import emit
from builder.hub import guard
from builder.model import files as model_files

# Seconds. huggingface_hub 1.x never resumes its partial files. A live one is written all the time (its read timeout is
# 10 s), so an hour without a write means that its process is dead.
DEAD_AFTER = 3600.0
MOST_FILES = 100_000  # at the top level of a repository; real ones have about 200
# One file name on every system, without control characters.
PLAIN = re.compile(r"(?!\.\.?\Z)[^/\\\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,255}")


@dataclass(frozen=True)
class HubFile:
    """A file as the Hub lists it: size in bytes, and a sha256 for LFS files or the sha1 of a git blob for others."""

    size: int
    sha256: str | None
    git_sha1: str | None

    @property
    def etag(self) -> str:
        """The name of the file's blob in the cache; "" if it is not known."""
        return self.sha256 or self.git_sha1 or ""

    def matches(self, found: model_files.Hashed) -> bool:
        """Whether a file on disk has the size and hash that the Hub lists."""
        if found.size != self.size:
            return False
        if self.sha256:
            return found.sha256 == self.sha256
        return self.git_sha1 is None or found.git_sha1 == self.git_sha1


@dataclass(frozen=True)
class Job:
    """What the parent process asks the Hub process to do with a repository.

    `waits`: seconds before each retry in a row. `stall`: seconds without a byte after which a download is given up.
    `limit`: seconds for everything except the download itself. `at_once`: files that are downloaded at the same time.
    `adapter`: the repository holds a LoRA adapter instead of a model.
    """

    job: str
    repo: str
    revision: str | None = None
    commit: str = ""
    kind: str = "model"
    trust_remote_code: bool = False
    waits: tuple[float, ...] = ()
    stall: float = 300.0
    limit: float = 600.0
    at_once: int = 8
    adapter: bool = False

    @property
    def storage(self) -> Path:
        """The repository's directory in the cache."""
        return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.repo, repo_type=self.kind)


def is_plain(name: object) -> bool:
    """Whether a name is safe as a file name; also limits it to 255 bytes of UTF-8, as file systems do."""
    return isinstance(name, str) and bool(PLAIN.fullmatch(name)) and len(name.encode()) <= 255


def cached_files(job: Job) -> dict[str, HubFile]:
    """The files of a cached commit, which can be verified offline since blobs are named by their hash.

    OfflineModeIsEnabled if the commit is not in the cache.
    """
    root = job.storage / "snapshots" / job.commit
    if not root.is_dir():
        raise OfflineModeIsEnabled(str(root))
    listed = {}
    for path in sorted(root.iterdir()):
        if path.is_file() and is_plain(path.name):
            etag = Path(os.readlink(path)).name if path.is_symlink() else ""
            sha256 = etag if re.fullmatch(r"[0-9a-f]{64}", etag) else None
            git_sha1 = etag if re.fullmatch(r"[0-9a-f]{40}", etag) else None
            listed[path.name] = HubFile(path.stat().st_size, sha256, git_sha1)
    return listed


def total_bytes(files: Mapping[str, HubFile]) -> int:
    """The size of all files together."""
    return sum(entry.size for entry in files.values())


def bytes_on_disk(job: Job, files: Iterable[HubFile]) -> int:
    """Bytes of these files in the cache, including partial files."""
    return sum(min(entry.size, _on_disk(job, entry)) for entry in files)


def _on_disk(job: Job, entry: HubFile) -> int:
    """Bytes of one file in the cache, complete or partial. Of a sparse file only the blocks that were written count."""
    if not entry.etag:
        return 0
    found = 0
    for path in [job.storage / "blobs" / entry.etag, *(job.storage / "blobs").glob(f"{entry.etag}*.incomplete")]:
        try:
            status = path.stat()
        except FileNotFoundError:  # not begun, or renamed since it was listed; then its other name counts
            continue
        found = max(found, min(status.st_size, status.st_blocks * 512))
    return found


def bytes_to_download(job: Job, files: Mapping[str, HubFile]) -> int:
    """Bytes that a download still has to transfer. Counts only partial files that huggingface_hub resumes."""
    missing = 0
    for entry in files.values():
        whole, partial = (job.storage / "blobs" / f"{entry.etag}{suffix}" for suffix in ("", ".incomplete"))
        if not whole.is_file():
            missing += entry.size - (partial.stat().st_size if partial.is_file() else 0)
    return missing


def bytes_free() -> int:
    """Free bytes on the disk that holds the cache, which need not exist yet."""
    cache = Path(constants.HF_HUB_CACHE)
    return shutil.disk_usage(next(parent for parent in (cache, *cache.parents) if parent.exists())).free


def check_space(job: Job, files: Mapping[str, HubFile]) -> None:
    """StageError if the disk is too small for what is still to download. huggingface_hub only warns, file by file."""
    needed, free = bytes_to_download(job, files), bytes_free()
    if needed > free:
        raise StageError(
            f"{job.repo} needs {readable(needed)} more on the disk, and {readable(free)} are free.",
            why=f"The Hub's cache is {constants.HF_HUB_CACHE}.",
            hint="Free some space (`hf cache` lists what is cached), or export HF_HOME=/a/larger/disk",
        )


def drop_damaged(
    job: Job,
    root: Path,
    files: Mapping[str, HubFile],
    hashes: Mapping[str, model_files.Hashed],
    *,
    repairable: bool,
) -> dict[str, HubFile]:
    """Removes files from the cache whose size or hash is not the listed one.

    With `repairable`, and if all of them are small, returns them for the caller to download again at once. Otherwise
    raises IntegrityError if there are any: weights are downloaded again only by the next run.
    """
    damaged = {name: entry for name, entry in files.items() if not entry.matches(hashes[name])}
    for name in damaged:
        remove(job, root / name)
    if repairable and all(entry.size <= model_files.LARGEST_BLOB for entry in damaged.values()):
        for name in damaged:
            emit(info=f"{name} was damaged; downloading it again")
        return damaged
    if damaged:
        raise IntegrityError(
            f"{', '.join(list(damaged)[:5])} of {job.repo} did not have the size or hash that the Hub lists.",
            why="It was damaged in transfer or on disk, and was removed from the cache.",
            hint="Run the same command again: only damaged files are downloaded again.",
        )
    return {}


def drop_damaged_cached(job: Job) -> None:
    """Removes small files of a cached commit that don't match the hash in their blob's name.

    For libraries that read from the cache without verifying: `datasets` reads a dataset's card and metadata.
    """
    links = (path for path in (job.storage / "snapshots" / job.commit).rglob("*") if path.is_symlink())
    for path in itertools.islice(links, MOST_FILES):
        etag = Path(os.readlink(path)).name
        if path.is_file() and path.stat().st_size <= model_files.LARGEST_BLOB and guard.HASH.fullmatch(etag):
            hashed = model_files.hash_files(path.parent, [path.name], lambda _: None)[path.name]
            if etag not in (hashed.sha256, hashed.git_sha1):
                remove(job, path)


def remove(job: Job, path: Path) -> None:
    """Removes a file of a snapshot, the blob that it links to, and so on; never anything outside of the cache."""
    inside = (Path(constants.HF_HUB_CACHE).resolve(), job.storage.resolve())
    following: Path | None = path
    while following is not None:
        place = following.parent.resolve() / following.name
        if not any(place.is_relative_to(directory) for directory in inside):
            return
        following = place.parent / os.readlink(place) if place.is_symlink() else None
        place.unlink(missing_ok=True)


def drop_dead_partials(job: Job, files: Mapping[str, HubFile]) -> None:
    """Removes partial files of killed downloads that huggingface_hub 1.x never resumes: `<etag>.<8 hex>.incomplete`.

    huggingface_hub 0.36 writes `<etag>.incomplete` and resumes it; those are kept.
    """
    for etag in {entry.etag for entry in files.values()} - {""}:
        for path in (job.storage / "blobs").glob(f"{etag}.{'[0-9a-f]' * 8}.incomplete"):
            with suppress(FileNotFoundError):  # another download of these files may remove it at the same time
                if time.time() - path.stat().st_mtime > DEAD_AFTER:
                    path.unlink()
