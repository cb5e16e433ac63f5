"""Content-addressed stage directories: one appears whole, under a lock, by rename, or not at all.

    <root>/<stage>/<key>/...             what the stage made, and manifest.json
    <root>/<stage>/.<key>.<pid>.tmp/     being made; trusted by nobody, removed by the next build of that key
    <root>/locks/, <root>/logs/          flock files; what child processes said

The key is a digest of everything that can change the output. The kernel drops a lock with its process, so a build
that was killed blocks nobody.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from builder.core import atomic
from builder.core import manifest as manifests
from builder.core.atomic import disk_error, make_directory, replace_file, replace_link
from builder.core.errors import IntegrityError, UsageError
from builder.core.manifest import FORMAT, KEY, MANIFEST, SMALL, Damaged, digest_of, key_of, sha256
from builder.core.output import Output, seconds

__all__ = ["MANIFEST", "digest_of", "disk_error", "key_of", "replace_file", "replace_link", "sha256"]

MARKER = ".trtllm-builder-store"  # in the root: `builder clean` touches no directory without it
STAGES = ("snapshot", "calibration", "checkpoint", "ranks", "engine", "repository", "smoke")
# Beside the chain: the texts of a data set, what one runner made of them, its answers to a task, and the tables of all
# of these; what each layer loses, and which are left in BF16 for it; a repository's benchmark; the quality check of a
# build, and whether it was accepted.
_MEASURED = ("scores", "tasks", "evaluation", "sensitivity", "selection", "proxy", "quality", "verdict")
EVALUATION = ("texts", "task_names", *_MEASURED, "benchmark", "load")
TESTS = ("smoke", "benchmark", "load")  # of a repository; "load" is the old name of "benchmark"
# Names that `log` gives, and the job file beside a log (process.job_file).
LOG = re.compile(r"\d{8}-\d{6}-[\w-]+-\d+\.(?:log|json)")
LOGS_KEPT, LOGS_YOUNG = 200, 24 * 3600.0  # files; seconds: a log of that age may be one that is being written


@dataclass(frozen=True)
class Artifact:
    """A finished stage directory. `digest` is its content: equal digests, equal bytes under equal names."""

    stage: str
    path: Path
    digest: str
    facts: Mapping[str, Any]
    cached: bool
    manifest: Mapping[str, Any] = field(repr=False)


class WouldRun(Exception):
    """Raised by a dry store at the first stage that a build would have to run, and under which key."""

    def __init__(self, stage: str, why: str, key: str = "") -> None:
        super().__init__(f"{stage}: {why}")
        self.stage, self.why, self.key = stage, why, key


class Store:
    """The artifacts under one root. `force` names the stages to make again; `dry` makes none."""

    def __init__(self, root: Path, out: Output, *, force: Sequence[str] = (), dry: bool = False) -> None:
        self.root = Path(root).absolute()
        self.out = out
        self.force = frozenset(force)
        self.dry = dry
        self.done: list[Artifact] = []
        self.assumed: list[str] = []

    def assume(self, text: str) -> None:
        """Notes once what a dry run took for granted."""
        if text not in self.assumed:
            self.assumed.append(text)

    def stage(self, name: str, ingredients: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]) -> Artifact:
        """Finds the artifact with these ingredients, or has `make` fill a temporary directory and publishes it.

        `make` returns the facts to remember. Whatever it raises, nothing of it stays. Files elsewhere that belong to
        the artifact are named by facts["external"] = {"root", "files": {name: {"size", "sha256"}}}; hard links whose
        sha256 is known already by facts["hashed"] = {name: sha256}, which is not kept.
        """
        key = key_of(name, ingredients)
        found = None if name in self.force else self.find(name, key)
        if found is None and self.dry:
            raise WouldRun(name, "forced" if name in self.force else "nothing with this key in the store", key)
        if found is None:
            with self.locked(name, key):
                atomic.restore_backup(self.root / name / key)
                found = None if name in self.force else self.find(name, key)
                if found is None:
                    found = self._make(name, key, ingredients, make)
        if found.cached:
            self.out.stage(name, f"found {key}, nothing to do")
            if not self.dry:
                with suppress(OSError):  # where the store can't be written, nothing is cleaned either
                    os.utime(found.path)  # when it was last used: `builder clean --older-than`
        self.done.append(found)
        return found

    def find(self, name: str, key: str) -> Artifact | None:
        """The artifact if it is there and nothing of it was changed, as far as `read` looks."""
        return read(self.root / name / key)

    def log(self, name: str) -> Path:
        """A new file for what a child process says. It is no part of the artifact: times would change its digest."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        directory = Path(tempfile.gettempdir()) if self.dry else self.root / "logs"
        make_directory(directory)
        if not self.dry:
            mark(self.root)
            for old in old_logs(directory, keep=LOGS_KEPT, older_than=LOGS_YOUNG):
                with suppress(OSError):
                    old.unlink()
        return directory / f"{stamp}-{name}-{os.getpid()}.log"

    @contextmanager
    def in_use(self, *, exclusive: bool = False) -> Iterator[None]:
        """Held by a build (shared) so that `clean` (exclusive) removes nothing under its feet."""
        with _lock_file(self.root / "locks" / "store.lock") as handle:
            if not _flock(handle, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, wait=False):
                if exclusive:
                    raise UsageError(f"A build is working in {self.root}.", hint="Let it end, then clean again.")
                _flock(handle, fcntl.LOCK_SH)
            yield

    @contextmanager
    def locked(self, name: str, key: str) -> Iterator[None]:
        """One process at a time makes `key`; the others wait, and say so."""
        path = self.root / "locks" / f"{name}-{key}.lock"
        while True:
            with _lock_file(path) as handle:
                if not _flock(handle, fcntl.LOCK_EX, wait=False):
                    self.out.stage(name, f"another build is making {key}; waiting for it")
                    _flock(handle, fcntl.LOCK_EX)
                if not _is_at(handle, path):  # `clean` removed the file before it was locked
                    continue
                yield
                return

    def _make(
        self, name: str, key: str, ingredients: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]
    ) -> Artifact:
        final = self.root / name / key
        tmp = final.parent / f".{key}.{os.getpid()}.tmp"
        mark(self.root)
        try:
            make_directory(final.parent)
            for stale in final.parent.glob(f".{key}.*.tmp"):
                atomic.remove(stale)
            tmp.mkdir()
            self.out.stage(name, f"making {key}")
            manifest = self._filled(name, key, ingredients, make, tmp)
            _publish(tmp, final, manifest)
        except OSError as error:
            _discard(tmp)
            raise disk_error(error, self.root) from error
        except BaseException:
            _discard(tmp)
            raise
        self.out.stage(name, f"done in {seconds(manifest['seconds'])}")
        return Artifact(name, final, manifest["digest"], manifest["facts"], False, manifest)

    def _filled(
        self, name: str, key: str, ingredients: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]], tmp: Path
    ) -> dict[str, Any]:
        """Has `make` fill the directory; returns the manifest of what it made."""
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


def read(path: Path) -> Artifact | None:
    """A stage directory as an artifact, or None if it is absent, changed, or of another format.

    Small files are hashed, of large ones the size must be right: `verify` hashes them too.
    """
    try:
        manifest = manifests.load(path)
    except Damaged:
        return None
    if next(manifests.file_problems(path, manifest, hashed_up_to=SMALL), None):
        return None
    return Artifact(manifest["stage"], path, manifest["digest"], manifest["facts"], True, manifest)


def artifacts(root: Path) -> list[Artifact]:
    """Every finished artifact under a store's root, in the order of the stages."""
    found = (read(directory) for directory in _directories(root))
    return [artifact for artifact in found if artifact is not None]


def _directories(root: Path) -> list[Path]:
    """The published ones, whole or not. A hidden directory is half-made, even if it holds a manifest already."""
    found = (path for stage in (*STAGES, *EVALUATION) for path in sorted((root / stage).glob("[!.]*")))
    return [path for path in found if path.is_dir() and (KEY.fullmatch(path.name) or (path / MANIFEST).is_file())]


def verify(root: Path, out: Output) -> dict[str, list[str]]:
    """Re-hashes every file of every artifact: {"stage/key": [what is wrong]}, empty lists where all is well."""
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
    """`start` and all that it was made from, as far as the digests among the ingredients lead."""
    by_digest: dict[str, list[Artifact]] = {}
    for one in everything:  # the code changed and its output did not: two keys, one digest, and either may be needed
        by_digest.setdefault(one.digest, []).append(one)
    found: dict[Path, Artifact] = {}
    queue = list(start)
    while queue:
        artifact = queue.pop()
        if artifact.path not in found:
            found[artifact.path] = artifact
            queue.extend(a for d in strings(artifact.manifest["ingredients"]) for a in by_digest.get(d, ()))
    return list(found.values())


def root_of(repository: Path) -> Path | None:
    """The output directory that a repository's directory lies in; None if it lies in no store."""
    return repository.parent.parent if repository.parent.name == "repository" else None


def tests_of(repositories: Sequence[Artifact], everything: Sequence[Artifact], stages: Sequence[str]) -> list[Artifact]:
    """The smoke tests and benchmarks of these repositories."""
    digests = {artifact.digest for artifact in repositories}
    return [a for a in everything if a.stage in stages and a.manifest["ingredients"].get("repository") in digests]


def library_versions(*names: str) -> dict[str, str]:
    """Installed versions by distribution name, without importing any; an absent one is "absent"."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def sources_digest(*sources: str | Path) -> str:
    """Digest of our own files, "builder/core/store.py" or a directory to walk: editing one makes a new key."""
    package = Path(__file__).resolve().parents[2]
    paths = [package / source for source in sources]
    files = [f for path in paths for f in (sorted(path.rglob("*")) if path.is_dir() else [path]) if not f.is_dir()]
    named = [
        (f.relative_to(package) if f.is_relative_to(package) else f.name, f) for f in files
    ]  # users' tasks: no path
    return digest_of([[str(name), sha256(f)] for name, f in named if "__pycache__" not in f.parts])


def _hash_files(directory: Path, hashed: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    files = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return {
        name: {"size": path.stat().st_size, "sha256": hashed.get(name) or sha256(path)} for name, path in files.items()
    }


def mark(root: Path) -> None:
    """Says that this directory is a store, for `builder clean`."""
    if not (root / MARKER).is_file():
        replace_file(root / MARKER, "An output directory of trtllm-builder: `builder clean` may remove stages here.\n")


@contextmanager
def serving_lock(directory: Path) -> Iterator[None]:
    """Held while a repository is served, so that `clean` does not remove it. It works in a read-only store, too.

    The lock is on the directory itself: no file is needed, and a container that mounts it shares the lock.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks on directories, as NFS
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        if not directory.is_dir() or directory.stat().st_ino != os.fstat(descriptor).st_ino:
            raise UsageError(f"{directory} was just removed or made again.", hint="Run the same command again.")
        yield
    finally:
        os.close(descriptor)


@contextmanager
def lock_unless_served(directory: Path) -> Iterator[bool]:
    """Whether nobody serves this repository; nobody begins to until the block ends."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        yield False
    except OSError:
        yield True
    else:
        yield True
    finally:
        os.close(descriptor)


def old_logs(directory: Path, *, keep: int, older_than: float) -> list[Path]:
    """Log and job files of ours, oldest first: all but the `keep` newest, if they are older than so many seconds."""
    found = []
    with suppress(OSError):
        for path in directory.iterdir():
            if LOG.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                found.append((path.stat().st_mtime, path))
    found.sort()
    return [path for written, path in found[: max(0, len(found) - keep)] if time.time() - written >= older_than]


@contextmanager
def _lock_file(path: Path) -> Iterator[int]:
    make_directory(path.parent)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise disk_error(error, path.parent) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _flock(descriptor: int, how: int, *, wait: bool = True) -> bool:
    try:
        fcntl.flock(descriptor, how if wait else how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _publish(tmp: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    """Bytes reach the disk before the name does: a power cut leaves the old state or the new one."""
    (tmp / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for path in [*tmp.rglob("*"), tmp]:
        if path.is_file() or path.is_dir():
            atomic.fsync(path)
    atomic.replace_directory(tmp, final)


def _discard(tmp: Path) -> None:
    with suppress(OSError):
        atomic.remove(tmp)


def strings(value: Any) -> Iterator[str]:
    """All strings in a value of JSON, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from strings(item)


def check_integrity(found: Mapping[str, list[str]]) -> None:
    """Raises IntegrityError that lists what `verify` found, if it found anything."""
    wrong = [f"{name}: {what}" for name, problems in found.items() for what in problems]
    if wrong:
        raise IntegrityError(
            f"{len(wrong)} of the store's files are not what was made.",
            why="\n".join(wrong[:20]),
            hint="Build again with --from STAGE of the first one named; what is whole is reused.",
        )
