"""The store: an output directory of content-addressed artifacts, each written atomically and under a lock.

    <root>/<stage>/<key>/...             a finished artifact: the stage's output and manifest.json
    <root>/<stage>/.<key>.<pid>.tmp/     an unfinished one; the next build of the same key removes it
    <root>/locks/, <root>/logs/          flock files; logs of worker processes
    <root>/pulled/                       what is being downloaded from a bucket (bucket.py)

The key is a digest of everything that can change the output, the ingredients. The kernel releases a lock when its
process dies, so a killed build does not block others.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from builder.core import atomic, bucket, interrupts, temporary
from builder.core import manifest as manifests
from builder.core.atomic import disk_error, make_directory, replace_file, replace_link
from builder.core.errors import IntegrityError, UsageError
from builder.core.locks import flock, is_at, lock_file
from builder.core.manifest import FORMAT, KEY, MANIFEST, SMALL, Damaged, digest_of, key_of, sha256
from builder.core.output import Output, seconds

__all__ = ["MANIFEST", "digest_of", "disk_error", "key_of", "replace_file", "replace_link", "sha256"]

MARKER = ".trtllm-builder-store"  # a file in the root; `builder clean` refuses to touch a directory without it
STAGES = ("snapshot", "transform", "calibration", "checkpoint", "layouts", "ranks", "engine", "repository", "smoke")
# Measurements beside the chain of stages: scores of one runner on a data set and on a task, and the tables of all
# scores; the loss of each layer and the layers selected by it, of one checkpoint or mixed from two; the quality check
# of a build and its verdict. Also LoRA adapters that were downloaded, which only some builds have.
_LAYERS = ("sensitivity", "selection", "proxy", "parts", "mixtures")
EVALUATION = (
    "adapter",
    "texts",
    "task_names",
    "scores",
    "tasks",
    "evaluation",
    *_LAYERS,
    "quality",
    "verdict",
    "benchmark",
    "load",
    "aiperf",
    "tuning",
)
# Stages that test a repository: `builder load` fills "benchmark", once named "load", `builder bench` "aiperf" and
# `builder tune` "tuning".
TESTS = ("smoke", "benchmark", "load", "aiperf", "tuning")
# Names of logs (Store.log) and of the job files beside them (process.job_file).
LOG = re.compile(r"\d{8}-\d{6}-[\w-]+-\d+\.(?:log|json)")
# Names a directory for logs that are kept, and for a list of the artifacts that were made or used.
LOGS = "BUILDER_LOGS"
USED = "artifacts.txt"  # the list: STAGE/KEY in each line
# Logs to keep, and the age in seconds below which none is removed: a younger log may still be written to.
LOGS_KEPT, LOGS_YOUNG = 200, 24 * 3600.0


@dataclass(frozen=True)
class Artifact:
    """A finished stage directory.

    `digest` identifies its content: equal digests mean the same file names with the same bytes. `facts` is what the
    stage recorded. `cached`: it was found in the store, not made by this run.
    """

    stage: str
    path: Path
    digest: str
    facts: Mapping[str, Any]
    cached: bool
    manifest: Mapping[str, Any] = field(repr=False)


class WouldRun(Exception):
    """Raised by a dry store at the first stage that a build would have to run. `key`: of the artifact it would make."""

    def __init__(self, stage: str, why: str, key: str = "") -> None:
        super().__init__(f"{stage}: {why}")
        self.stage, self.why, self.key = stage, why, key


class Store:
    """The artifacts under one root directory. `force`: stages to rebuild even if cached. `dry`: build nothing.

    `done` lists the artifacts of this run in order; `assumed` what a dry run assumed.
    """

    def __init__(self, root: Path, out: Output, *, force: Sequence[str] = (), dry: bool = False) -> None:
        self.root = Path(root).absolute()
        self.out = out
        self.force = frozenset(force)
        self.dry = dry
        self.bucket = bucket.named()
        self.done: list[Artifact] = []
        self.assumed: list[str] = []

    def assume(self, text: str) -> None:
        """Records an assumption of a dry run, once."""
        if text not in self.assumed:
            self.assumed.append(text)

    def stage(self, name: str, ingredients: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]) -> Artifact:
        """Returns the artifact with these ingredients: from the store, or made by `make` in a temporary directory.

        `make` gets the directory to fill and returns the facts to record; if it raises, the directory is removed.
        facts["external"] = {"root", "files": {name: {"size", "sha256"}}} lists files outside of the directory that
        belong to the artifact. facts["hashed"] = {name: sha256} gives known hashes, of hard links or of files
        that were hashed while others were made (Hashes), to save hashing them again; it is not recorded.

        WouldRun in a dry store if the artifact is not cached; BuilderError if the disk is full or not writable.
        """
        key = key_of(name, ingredients)
        found = None if name in self.force else self.find(name, key)
        if found is None and self.dry:
            raise WouldRun(name, "forced" if name in self.force else "not in the store", key)
        if found is None:
            with self.locked(name, key):  # another build may have made it while we waited: look again
                atomic.restore_backup(self.root / name / key)
                found = None if name in self.force else self._find(name, key, nullcontext())
                if found is None:
                    made = self._make(name, key, ingredients, make)
                    found = self._shared(made, nullcontext(), replace=name in self.force)
        if found.cached:
            self.out.stage(name, f"found {key}, nothing to do")
            if not self.dry:
                with suppress(OSError):  # a read-only store is not cleaned, so it needs no times
                    os.utime(found.path)  # the time of last use, for `builder clean --older-than`
        self.done.append(found)
        if not self.dry:
            _note_used(f"{name}/{key}")
        return found

    def find(self, name: str, key: str) -> Artifact | None:
        """The artifact with this key, or None if it is absent or was changed. Checks what `read` checks.

        With a bucket (bucket.py) also from there: whole, in a dry store without its large files.
        """
        return self._find(name, key, self.locked(name, key))

    def _find(self, name: str, key: str, lock: AbstractContextManager[object]) -> Artifact | None:
        """lock: taken where an artifact is replaced by the bucket's."""
        found = read(self.root / name / key)
        if self.bucket is None:
            return found
        if not self.dry:
            return self._shared(found, lock) if found else self._pulled(name, key, lock)
        seen = None if found else self.bucket.glimpse(name, key)
        return read(seen, check_files=False) if seen else found

    def _shared(self, found: Artifact, lock: AbstractContextManager[object], *, replace: bool = False) -> Artifact:
        """The artifact once it is in the bucket too: another machine's, if that one was first."""
        if self.bucket is None:
            return found
        held = self.bucket.push(found.path, found.manifest, replace=replace)
        return found if held.digest == found.digest else self._pulled(found.stage, found.path.name, lock) or found

    def _pulled(self, name: str, key: str, lock: AbstractContextManager[object]) -> Artifact | None:
        """The artifact from the bucket. None if it has none that is whole."""
        if self.bucket is None or (held := self.bucket.find(name, key)) is None:
            return None
        with lock:
            found = read(self.root / name / key)
            if found and found.digest == held.digest:  # another process of this machine was faster
                return found
            self.out.stage(name, f"{key} comes from {self.bucket.address}")
            place = self.bucket.pull(name, key, self.root)
            return read(place) if place else None

    def place(self, path: Path) -> Path:
        """Where a file of an artifact is in the store: `path`, but for those that a dry run looked at in a bucket."""
        return bucket.place_of(path, self.root) if self.dry and self.bucket else path

    def log(self, name: str) -> Path:
        """The path for a new log file; removes old ones. Logs are not part of artifacts, since no two are equal.

        A dry run logs to the system's temporary directory, a step of a sweep to the directory that BUILDER_LOGS names.
        """
        stamp = time.strftime("%Y%m%d-%H%M%S")
        named = os.environ.get(LOGS)
        directory = temporary.base() if self.dry else Path(named) if named else self.root / "logs"
        make_directory(directory)
        if not self.dry and not named:
            mark(self.root)
            for old in old_logs(directory, keep=LOGS_KEPT, older_than=LOGS_YOUNG):
                with suppress(OSError):
                    old.unlink()
        return directory / f"{stamp}-{name}-{os.getpid()}.log"

    @contextmanager
    def in_use(self, *, exclusive: bool = False) -> Iterator[None]:
        """Locks the store: builds share the lock, `builder clean` takes it exclusively.

        UsageError if an exclusive lock is not free; a shared one waits.
        """
        with lock_file(self.root / "locks" / "store.lock") as handle:
            if not flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, wait=False):
                if exclusive:
                    raise UsageError(f"A build is running in {self.root}.", hint="Run this again when it has ended.")
                flock(handle, fcntl.LOCK_SH)
            yield

    @contextmanager
    def locked(self, name: str, key: str, *, wait: bool = True) -> Iterator[bool]:
        """Locks one artifact for building, and yields True. Waits, with a message, while another process holds the
        lock; without `wait` it yields False instead."""
        path = self.root / "locks" / f"{name}-{key}.lock"
        while True:
            with lock_file(path) as handle:
                if not flock(handle, fcntl.LOCK_EX, wait=False):
                    if not wait:
                        yield False
                        return
                    self.out.stage(name, f"another build is making {key}; waiting for it")
                    flock(handle, fcntl.LOCK_EX)
                if not is_at(handle, path):  # `clean` removed the file before we locked it: lock the new one
                    continue
                yield True
                return

    def _make(
        self, name: str, key: str, ingredients: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]
    ) -> Artifact:
        final = self.root / name / key
        tmp = final.parent / f".{key}.{os.getpid()}.tmp"
        interrupts.check()
        mark(self.root)
        try:
            make_directory(final.parent)
            for stale in final.parent.glob(f".{key}.*.tmp"):
                atomic.remove(stale)
            tmp.mkdir()
            self.out.stage(name, f"making {key}")
            manifest = self._fill(name, key, ingredients, make, tmp)
            _publish(tmp, final, manifest)
        except OSError as error:
            _discard(tmp)
            raise disk_error(error, self.root) from error
        except BaseException:
            _discard(tmp)
            raise
        self.out.stage(name, f"done in {seconds(manifest['seconds'])}")
        return Artifact(name, final, manifest["digest"], manifest["facts"], False, manifest)

    def _fill(
        self, name: str, key: str, ingredients: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]], tmp: Path
    ) -> dict[str, Any]:
        """Calls `make` on the directory and returns the manifest of the result."""
        start, started = time.monotonic(), time.time()
        facts = dict(make(tmp))
        hashed = facts.pop("hashed", {})
        took = time.monotonic() - start
        manifest: dict[str, Any] = {
            "format": FORMAT,
            "stage": name,
            "key": key,
            "ingredients": ingredients,
            "files": _hash_files(tmp, hashed),
            "facts": facts,
            "started": started,
            "seconds": round(took, 3),
        }
        manifest["digest"] = manifests.content_digest(manifest)
        return manifests.seal(manifest)


def read(path: Path, *, check_files: bool = True) -> Artifact | None:
    """A stage directory as an artifact, or None if it is absent, changed, or of another format.

    Hashes files up to manifest.SMALL bytes and checks the size of larger ones, which only `verify` hashes. Without
    `check_files`, reads only the manifest, whose seal covers everything but the files' content.
    """
    try:
        manifest = manifests.load(path)
    except Damaged:
        return None
    if check_files and next(manifests.file_problems(path, manifest, hashed_up_to=SMALL), None):
        return None
    return Artifact(manifest["stage"], path, manifest["digest"], manifest["facts"], True, manifest)


def artifacts(root: Path, *, check_files: bool = True) -> list[Artifact]:
    """Every finished artifact under a store's root, in stage order. `check_files`: see `read`."""
    found = (read(directory, check_files=check_files) for directory in _directories(root))
    return [artifact for artifact in found if artifact is not None]


def _directories(root: Path) -> list[Path]:
    """All published stage directories, damaged ones too. Hidden ones are unfinished, even with a manifest."""
    found = (path for stage in (*STAGES, *EVALUATION) for path in sorted((root / stage).glob("[!.]*")))
    return [path for path in found if path.is_dir() and (KEY.fullmatch(path.name) or (path / MANIFEST).is_file())]


def verify(root: Path, out: Output) -> dict[str, list[str]]:
    """Hashes every file of every artifact. Returns {"stage/key": problems}, with an empty list for intact ones."""
    found: dict[str, list[str]] = {}
    for directory in _directories(root):
        name = f"{directory.parent.name}/{directory.name}"
        out.stage("verify", name)
        try:
            found[name] = list(manifests.file_problems(directory, manifests.load(directory)))
        except Damaged as error:
            found[name] = [f"{MANIFEST} is damaged: {error}"]
    return found


def upstream(start: Sequence[Artifact], everything: Sequence[Artifact]) -> list[Artifact]:
    """`start` and all artifacts that they were made from, followed by the digests among the ingredients."""
    # Lists, since two keys may have one digest: when code changed and its output did not. Either may be needed.
    by_digest: dict[str, list[Artifact]] = {}
    for artifact in everything:
        by_digest.setdefault(artifact.digest, []).append(artifact)
    found: dict[Path, Artifact] = {}
    queue = list(start)
    while queue:
        artifact = queue.pop()
        if artifact.path not in found:
            found[artifact.path] = artifact
            queue.extend(a for d in strings(artifact.manifest["ingredients"]) for a in by_digest.get(d, ()))
    return list(found.values())


def root_of(repository: Path) -> Path | None:
    """The root of the store that contains this repository directory; None if it is not in a store."""
    return repository.parent.parent if repository.parent.name == "repository" else None


def tests_of(repositories: Sequence[Artifact], everything: Sequence[Artifact], stages: Sequence[str]) -> list[Artifact]:
    """The artifacts of the given test stages (see TESTS) that were made on these repositories."""
    digests = {artifact.digest for artifact in repositories}
    return [a for a in everything if a.stage in stages and a.manifest["ingredients"].get("repository") in digests]


def library_versions(*names: str) -> dict[str, str]:
    """{distribution name: installed version}, "absent" if it is not installed. Imports none of them."""
    return {name: _version(name, tuple(sys.path)) for name in names}


@functools.cache
def _version(name: str, path: tuple[str, ...]) -> str:
    """Remembered for a `path` of modules: metadata.version parses the whole description, which takes milliseconds."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def sources_digest(*sources: str | Path) -> str:
    """Digest of our own source files, as an ingredient: editing one changes the key.

    `sources`: files or directories, relative to the project, such as "builder/core/store.py". Of a compiled extension
    its source counts, not what a compiler made of it. Files of the project (str) are read once in a process, which
    doesn't see later edits of its own code either; a user's (Path) each time.
    """
    return _own_digest(sources) if all(isinstance(one, str) for one in sources) else _digest(sources)


@functools.cache
def _own_digest(sources: tuple[str | Path, ...]) -> str:
    return _digest(sources)


def _digest(sources: Sequence[str | Path]) -> str:
    root = Path(__file__).resolve().parents[2]
    paths = [root / source for source in sources]
    found = {f for path in paths for f in (path.rglob("*") if path.is_dir() else [path]) if not f.is_dir()}
    files = [f for f in found if "__pycache__" not in f.parts and f.suffix != ".so"]
    # A user's task file is known by its name, so that moving it does not change the key.
    named = sorted((str(f.relative_to(root)) if f.is_relative_to(root) else f.name, f) for f in files)
    return digest_of([[name, sha256(f)] for name, f in named])


def _hash_files(directory: Path, hashed: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Sizes and hashes of all files, which are flushed to the disk meanwhile."""
    from builder.core.hashes import Hashes  # imports logging, which commands that make nothing don't need

    with Hashes(directory, hashed) as hashes:
        hashes.add(directory)
        found = hashes.finish()
    return {name: {"size": (directory / name).stat().st_size, "sha256": digest} for name, digest in found.items()}


def mark(root: Path) -> None:
    """Marks a directory as a store, so that `builder clean` accepts it."""
    if not (root / MARKER).is_file():
        replace_file(root / MARKER, "An output directory of trtllm-builder: `builder clean` may remove stages here.\n")


def _note_used(name: str) -> None:
    """Adds an artifact to the list beside the logs of a step."""
    if named := os.environ.get(LOGS):
        make_directory(Path(named))
        with open(Path(named) / USED, "a", encoding="utf-8") as file:
            file.write(f"{name}\n")


def old_logs(directory: Path, *, keep: int, older_than: float) -> list[Path]:
    """Log and job files of ours to remove, oldest first: beyond the `keep` newest, and `older_than` seconds or more."""
    found = []
    with suppress(OSError):
        for path in directory.iterdir():
            if LOG.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                found.append((path.stat().st_mtime, path))
    found.sort()
    return [path for written, path in found[: max(0, len(found) - keep)] if time.time() - written >= older_than]


def _publish(tmp: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    """Renames a filled directory into place. What `_hash_files` has not flushed to the disk is flushed first, so that a
    power cut can't leave it incomplete."""
    (tmp / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [tmp / MANIFEST, *(path for path in tmp.rglob("*") if path.is_dir()), tmp]:
        atomic.fsync(path)
    atomic.replace_directory(tmp, final)


def _discard(tmp: Path) -> None:
    with suppress(OSError):
        atomic.remove(tmp)


def strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, at any depth, without object keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from strings(item)


def check_integrity(found: Mapping[str, list[str]]) -> None:
    """IntegrityError with the problems that `verify` found, if there are any."""
    wrong = [f"{name}: {what}" for name, problems in found.items() for what in problems]
    if wrong:
        raise IntegrityError(
            f"{len(wrong)} files of the store are damaged.",
            why="\n".join(wrong[:20]),
            hint="Build again with --from STAGE, the first stage listed. Intact stages are reused.",
        )
