"""Content-addressed stage directories: one appears whole, under a lock, by rename, or not at all.

    <root>/<stage>/<key>/...             what the stage made, and manifest.json
    <root>/<stage>/.<key>.<pid>.tmp/     being made; trusted by nobody, removed by the next build of that key
    <root>/locks/, <root>/logs/          flock files; what child processes said

The key is a digest of everything that can change the output. The kernel drops a lock with its process, so a build
that was killed blocks nobody.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from builder.errors import BuilderError, IntegrityError, StageError, UsageError
from builder.output import Output, seconds, size

FORMAT = 1  # of the manifest; a change makes every older stage unknown
MANIFEST = "manifest.json"
STAGES = ("snapshot", "calibration", "checkpoint", "ranks", "engine", "repository", "smoke")
# Beside the chain: the texts of a data set, what one runner made of them, its answers to a task, and the tables of all
# of these; what each layer loses, and which are left in BF16 for it; a repository under load; the quality check of a
# build, and whether it was accepted.
_MEASURED = ("scores", "tasks", "evaluation", "sensitivity", "selection", "proxy", "quality", "verdict")
EVALUATION = ("texts", "task_names", *_MEASURED, "load")
TESTS = ("smoke", "load")  # of a repository
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Artefact:
    """A finished stage directory. `digest` is its content: equal digests, equal bytes under equal names."""

    stage: str
    path: Path
    digest: str
    facts: Mapping[str, Any]
    cached: bool
    manifest: Mapping[str, Any] = field(repr=False)


class WouldRun(Exception):
    """Raised by a dry store at the first stage that a build would have to run."""

    def __init__(self, stage: str, why: str) -> None:
        super().__init__(f"{stage}: {why}")
        self.stage, self.why = stage, why


class Store:
    """The artefacts under one root. `force` names the stages to make again; `dry` makes none."""

    def __init__(self, root: Path, out: Output, *, force: Sequence[str] = (), dry: bool = False) -> None:
        self.root = Path(root).absolute()
        self.out = out
        self.force = frozenset(force)
        self.dry = dry
        self.done: list[Artefact] = []

    def stage(self, name: str, ingredients: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]) -> Artefact:
        """Finds the artefact with these ingredients, or has `make` fill a temporary directory and publishes it.

        `make` returns the facts to remember. Whatever it raises, nothing of it stays. Files elsewhere that belong to
        the artefact are named by facts["external"] = {"root", "files": {name: {"size", "sha256"}}}; hard links whose
        sha256 is known already by facts["hashed"] = {name: sha256}, which is not kept.
        """
        key = key_of(name, ingredients)
        found = None if name in self.force else self.find(name, key)
        if found is None and self.dry:
            raise WouldRun(name, "forced" if name in self.force else "nothing with this key in the store")
        if found is None:
            with self.locked(name, key):
                found = None if name in self.force else self.find(name, key)
                if found is None:
                    found = self._make(name, key, ingredients, make)
        if found.cached:
            self.out.stage(name, f"found {key}, nothing to do")
        self.done.append(found)
        return found

    def find(self, name: str, key: str) -> Artefact | None:
        """The artefact if it is there and every file has the size that its manifest says."""
        return read(self.root / name / key)

    def log(self, name: str) -> Path:
        """A new file for what a child process says. It is no part of the artefact: times would change its digest."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = (Path(tempfile.gettempdir()) if self.dry else self.root / "logs") / f"{stamp}-{name}-{os.getpid()}.log"
        _make_directory(path.parent)
        return path

    @contextmanager
    def in_use(self, *, exclusive: bool = False) -> Iterator[None]:
        """Held by a build (shared) so that `clean` (exclusive) removes nothing under its feet."""
        lock = self.root / "locks" / "store.lock"
        _make_directory(lock.parent)
        with open(lock, "ab") as handle:
            try:
                fcntl.flock(handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            except BlockingIOError:
                if exclusive:
                    raise UsageError(
                        f"A build is working in {self.root}.", cure="Let it end, then clean again."
                    ) from None
                fcntl.flock(handle, fcntl.LOCK_SH)
            yield

    @contextmanager
    def locked(self, name: str, key: str) -> Iterator[None]:
        """One process at a time makes `key`; the others wait, and say so."""
        lock = self.root / "locks" / f"{name}-{key}.lock"
        _make_directory(lock.parent)
        with open(lock, "ab") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.out.stage(name, f"another build is making {key}; waiting for it")
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _make(
        self, name: str, key: str, ingredients: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]
    ) -> Artefact:
        final = self.root / name / key
        tmp = final.parent / f".{key}.{os.getpid()}.tmp"
        _make_directory(final.parent)
        for stale in final.parent.glob(f".{key}.*.tmp"):
            shutil.rmtree(stale)
        tmp.mkdir()
        self.out.stage(name, f"making {key}")
        start, started = time.monotonic(), time.time()
        try:
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
            manifest["digest"] = _content_digest(manifest)
            _publish(tmp, final, manifest)
        except OSError as error:
            shutil.rmtree(tmp, ignore_errors=True)
            raise disk_error(error, self.root) from error
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            raise
        self.out.stage(name, f"done in {seconds(took)}")
        return Artefact(name, final, manifest["digest"], manifest["facts"], False, manifest)


def key_of(name: str, ingredients: Mapping[str, Any]) -> str:
    """The name of a stage's directory."""
    return digest_of({"format": FORMAT, "stage": name, "ingredients": ingredients})[:16]


def read(path: Path) -> Artefact | None:
    """A stage directory as an artefact, or None if it is absent, damaged, or of another format."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return None
        for file, entry in _located(path, manifest):
            if file.stat().st_size != entry["size"]:
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Artefact(manifest["stage"], path, manifest["digest"], manifest["facts"], True, manifest)


def artefacts(root: Path) -> list[Artefact]:
    """Every finished artefact under a store's root, in the order of the stages."""
    found = (read(directory) for directory in _directories(root))
    return [artefact for artefact in found if artefact is not None]


def _directories(root: Path) -> list[Path]:
    """The published ones: a hidden directory is half-made, even if it holds a manifest already."""
    found = (path.parent for stage in (*STAGES, *EVALUATION) for path in sorted((root / stage).glob(f"*/{MANIFEST}")))
    return [directory for directory in found if not directory.name.startswith(".")]


def verify(root: Path, out: Output) -> dict[str, list[str]]:
    """Re-hashes every file of every artefact: {"stage/key": [what is wrong]}, empty lists where all is well."""
    found: dict[str, list[str]] = {}
    for directory in _directories(root):
        name = f"{directory.parent.name}/{directory.name}"
        out.stage("verify", name)
        found[name] = _wrong_files(directory)
    return found


def _wrong_files(directory: Path) -> list[str]:
    try:
        manifest = json.loads((directory / MANIFEST).read_text())
        located = _located(directory, manifest)
    except (ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST} can't be read: {error}"]
    wrong = []
    for file, entry in located:
        if not file.is_file():
            wrong.append(f"{file} is missing")
        elif (found := file.stat().st_size) != entry["size"]:
            wrong.append(f"{file} has {found} bytes instead of {entry['size']}")
        elif sha256(file) != entry["sha256"]:
            wrong.append(f"{file} has another content than when it was made")
    if _content_digest(manifest) != manifest.get("digest"):
        wrong.append(f"{MANIFEST} was changed")
    return wrong


def prune(root: Path, keep: set[Path], *, dry: bool = False) -> tuple[list[Path], int]:
    """Removes every artefact that no directory in `keep` was made from, and all leftovers: (removed, bytes).

    What was measured on a kept model stays with it, and the tests of a kept repository.
    """
    everything = artefacts(root)
    kept = upstream([artefact for artefact in everything if artefact.path in keep], everything)
    for stage in _MEASURED:
        models = {artefact.digest for artefact in kept}
        measured = [a for a in everything if a.stage == stage and models.issuperset(a.manifest["ingredients"]["of"])]
        kept = upstream([*kept, *measured], everything)
    needed = {artefact.path for artefact in [*kept, *tests_of(kept, everything, TESTS)]}
    removed, freed = [], 0
    for stage in (*STAGES, *EVALUATION):
        for path in sorted((root / stage).glob("*")):
            if path not in needed:
                freed += sum(f.lstat().st_size for f in path.rglob("*") if f.is_file())
                removed.append(path)
                if not dry:
                    shutil.rmtree(path)
    for path in sorted((root / "partial").glob("*")):  # results of runs that were killed (sensitivity.py)
        freed += path.lstat().st_size
        removed.append(path)
        if not dry:
            path.unlink()
    return removed, freed


def upstream(start: Sequence[Artefact], everything: Sequence[Artefact]) -> list[Artefact]:
    """`start` and all that it was made from, as far as the digests among the ingredients lead."""
    by_digest = {artefact.digest: artefact for artefact in everything}
    found: dict[Path, Artefact] = {}
    queue = list(start)
    while queue:
        artefact = queue.pop()
        if artefact.path not in found:
            found[artefact.path] = artefact
            queue.extend(by_digest[d] for d in _strings(artefact.manifest["ingredients"]) if d in by_digest)
    return list(found.values())


def root_of(repository: Path) -> Path | None:
    """The output directory that a repository's directory lies in; None if it lies in no store."""
    return repository.parent.parent if repository.parent.name == "repository" else None


def tests_of(repositories: Sequence[Artefact], everything: Sequence[Artefact], stages: Sequence[str]) -> list[Artefact]:
    """The smoke tests that these repositories passed, or what they did under load."""
    digests = {artefact.digest for artefact in repositories}
    return [a for a in everything if a.stage in stages and a.manifest["ingredients"].get("repository") in digests]


def replace_file(path: Path, text: str) -> None:
    """Writes a file whole or not at all: readers see the old text or the new one."""
    _make_directory(path.parent)
    fresh = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        fresh.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
        _fsync(fresh)
        fresh.replace(path)
    except OSError as error:
        raise disk_error(error, path.parent) from error
    finally:
        fresh.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def digest_of(value: Any) -> str:
    """sha256 of a value's canonical JSON: sorted keys, no spaces. A value that JSON can't hold is an error."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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
    """Of our own files that do the work, "builder/nvfp4.py" or a directory to walk: editing one makes a new key."""
    package = Path(__file__).resolve().parent.parent
    paths = [package / source for source in sources]
    files = [f for path in paths for f in (sorted(path.rglob("*")) if path.is_dir() else [path]) if not f.is_dir()]
    return digest_of([[f.name, sha256(f)] for f in files if "__pycache__" not in f.parts])


def _hash_files(directory: Path, hashed: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    files = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    return {
        name: {"size": path.stat().st_size, "sha256": hashed.get(name) or sha256(path)} for name, path in files.items()
    }


def _located(directory: Path, manifest: Mapping[str, Any]) -> list[tuple[Path, Mapping[str, Any]]]:
    """Every file of an artefact, those elsewhere too, with its entry in the manifest."""
    own = [(directory / name, entry) for name, entry in manifest["files"].items()]
    external = manifest["facts"].get("external", {"files": {}})
    return own + [(Path(external["root"]) / name, entry) for name, entry in external["files"].items()]


def _content_digest(manifest: Mapping[str, Any]) -> str:
    external = manifest["facts"].get("external", {"files": {}})["files"]
    return digest_of([[name, entry["sha256"]] for name, entry in sorted({**external, **manifest["files"]}.items())])


def _publish(tmp: Path, final: Path, manifest: Mapping[str, Any]) -> None:
    """Bytes reach the disk before the name does: a power cut leaves the old state or the new one."""
    (tmp / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*tmp.rglob("*"), tmp]:
        if path.is_file() or path.is_dir():
            _fsync(path)
    old = final.parent / f".{final.name}.old.tmp"
    if final.exists():
        final.rename(old)
    tmp.rename(final)
    _fsync(final.parent)
    if old.exists():
        shutil.rmtree(old)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, path) from error


def disk_error(error: OSError, path: Path) -> BuilderError:
    """A disk's refusal as a message: full, read-only and not ours are things that a user can mend."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = size(shutil.disk_usage(_existing(path)).free)
        return StageError(
            f"The disk that holds {path} is full ({free} free).",
            why="Nothing half-made was kept.",
            cure="Free some space (`builder clean` removes what no repository needs) or choose another --output.",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return UsageError(
            f"Can't write to {path}.",
            why=str(error),
            cure="Choose a writable --output, or change its owner: chown -R $(id -u):$(id -g) DIRECTORY",
        )
    return StageError(f"The operating system refused: {error}.", cure=f"It happened in {path}.")


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def check_integrity(found: Mapping[str, list[str]]) -> None:
    """Raises IntegrityError that lists what `verify` found, if it found anything."""
    wrong = [f"{name}: {what}" for name, problems in found.items() for what in problems]
    if wrong:
        raise IntegrityError(
            f"{len(wrong)} of the store's files are not what was made.",
            why="\n".join(wrong[:20]),
            cure="Build again with --from STAGE of the first one named; what is whole is reused.",
        )
