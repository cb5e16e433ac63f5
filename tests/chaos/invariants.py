"""What must hold after every trial. Each function returns what is wrong, in words; nothing means that it holds.

None of this uses the product's own code: a store that misjudges itself would be believed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.chaos.running import Finished

# Their bytes, and the key of the second, hold times and ports, so two runs differ.
_TIMED = ("smoke", "benchmark")
# Directories of the store whose files are named by time and process, or made anew at each command.
_UNCOMPARED = ("logs", "locks", "reports", "builds", "history")
_TRACEBACK = re.compile(r"^(Traceback \(most recent call last\)|Exception ignored |Fatal Python error)", re.MULTILINE)
ERRORS = frozenset(range(1, 7))  # the exit codes of BuilderError and its kinds


def no_traceback(ended: Finished) -> list[str]:
    """A message that was meant is printed as `error: ...`; a traceback was not meant.

    Only Python itself can answer a signal before `main` has begun or after it has returned.
    """
    found = _TRACEBACK.search(ended.stderr)
    return [f"{found.group(1)} on stderr"] if found and ended.hit not in ("starting", "ending") else []


def exit_code(ended: Finished, allowed: Iterable[int], signal: int = 0) -> list[str]:
    """The command ended in time, with an allowed exit code. Outside of `main` the signal itself may have ended it."""
    if ended.hung:
        return [f"hung for {ended.seconds:.0f} s"]
    allowed = {*allowed, -signal} if ended.hit in ("starting", "ending") else set(allowed)
    return [] if ended.code in allowed else [f"exit code {ended.code}, expected one of {sorted(allowed)}"]


def contents(output: Path) -> dict[str, Any]:
    """What a store holds, without times: artifacts by stage/key with their files' hashes, links with their targets."""
    found: dict[str, Any] = {}
    for manifest in sorted(output.glob("*/*/manifest.json")):
        directory, stage = manifest.parent, manifest.parent.parent.name
        if directory.is_symlink() or directory.name.startswith("."):
            continue
        if stage in _TIMED:
            found.setdefault(stage, []).append(sorted(path.name for path in directory.iterdir()))
        else:
            found[f"{stage}/{directory.name}"] = _hashes(directory, manifest)
    for link in sorted((output / "models").glob("*")):
        if link.is_symlink():
            found[f"models/{link.name}"] = str(link.readlink())
    return found


def _hashes(directory: Path, manifest: Path) -> dict[str, str]:
    """Of an artifact's files, and of those elsewhere that its manifest names."""
    elsewhere = json.loads(manifest.read_text())["facts"].get("external", {"files": {}})["files"]
    found = {name: entry["sha256"] for name, entry in elsewhere.items()}
    for path in directory.rglob("*"):
        if path.is_file() and path != manifest:
            found[path.relative_to(directory).as_posix()] = _timeless(path) if path.suffix == ".json" else sha256(path)
    return found


def _timeless(path: Path) -> str:
    """The hash of a JSON file without its `seconds`, which some tables hold."""
    told = json.loads(path.read_text(), object_hook=lambda found: {k: v for k, v in found.items() if k != "seconds"})
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def listing(output: Path) -> set[str]:
    """Names in a store, two levels deep, without those that every run makes anew."""
    found = {path.relative_to(output).as_posix() for pattern in ("*", "*/*") for path in output.glob(pattern)}
    return {name for name in found if name.partition("/")[0] not in (*_UNCOMPARED, *_TIMED)}


def same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Two `contents` are equal."""
    wrong = [f"{name} is missing" for name in expected.keys() - found.keys()]
    wrong += [f"{name} was not there in the undisturbed run" for name in found.keys() - expected.keys()]
    return wrong + same_where_both(found, expected)


def same_where_both(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What both `contents` hold has equal bytes."""
    both = found.keys() & expected.keys()
    return [f"{name} differs from the undisturbed run" for name in sorted(both) if found[name] != expected[name]]


def links_are_whole(output: Path) -> list[str]:
    """Each link in models/ leads to a repository with all files of its manifest and with the engine that it names."""
    wrong = []
    for link in sorted((output / "models").glob("*")):
        if link.is_symlink():
            wrong += [f"models/{link.name}: {what}" for what in _damage(link.resolve())]
    return wrong


def _damage(repository: Path) -> list[str]:
    try:
        files = json.loads((repository / "manifest.json").read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        return [f"no readable manifest: {error}"]
    wrong = []
    for name, entry in files.items():
        path = repository / name
        if not path.is_file() or sha256(path) != entry["sha256"]:
            wrong.append(f"{name} is missing or damaged")
    for config in repository.glob("models/*/config.pbtxt"):
        for engine in re.findall(r'key: "gpt_model_path" value: \{ string_value: "([^"]+)"', config.read_text()):
            wrong += [] if (config.parent / engine / "manifest.json").is_file() else [f"its engine {engine} is missing"]
    return wrong


def half_made(directory: Path) -> list[str]:
    """Temporary names that a finished run has left in a directory: half-written files, half-deleted directories."""
    found = [path for path in directory.rglob("*") if re.search(r"\.tmp$|\.old$|^\.tmp|\.trash", path.name)]
    return [f"left in {directory.name}: {path.relative_to(directory)}" for path in found]


def half_made_backends(cache: Path) -> list[str]:
    """Copies of Triton's backends in XDG_CACHE_HOME that were never finished: their names begin with a dot."""
    found = [path for path in (cache / "trtllm-builder").rglob(".*")]
    return [f"left in the cache: {path.relative_to(cache)}" for path in found]


def temporary_files(directory: Path, *, failed: bool) -> list[str]:
    """What finished runs have left in TMPDIR. The log of a server that failed may stay; caches have fixed names."""
    found = []
    for path in sorted(directory.iterdir()):
        inside = [p.name for p in path.rglob("*") if not p.is_dir()] if path.is_dir() else [path.name]
        logs = {"server.log", "gateway.log"}
        log_of_a_failure = failed and not logs.isdisjoint(inside) and (logs | {"failed", "lock"}).issuperset(inside)
        if not log_of_a_failure and not path.name.startswith("torchinductor_"):
            found.append(f"left in TMPDIR: {path.name} ({', '.join(inside[:3]) or 'empty'})")
    return found


def names_the_disk(ended: Finished, place: Path) -> list[str]:
    """The message of a command that a disk stopped: which directory, and that it is full or read-only."""
    reason = re.search(r"full|No space|space left|inode| free|[Rr]ead-only|[Cc]an't write|writable", ended.stderr)
    named = str(place) in ended.stderr or "disk of the output directory" in ended.stderr
    wrong = [] if named else [f"the message does not name {place}"]
    return wrong if reason else [*wrong, "the message does not say that a disk is full or read-only"]


def unchanged(planted: Mapping[Path, str | None]) -> list[str]:
    """The user's own files: {path: sha256, or None for a link}."""
    wrong = []
    for path, digest in planted.items():
        whole = path.is_symlink() if digest is None else path.is_file() and sha256(path) == digest
        if not whole:
            wrong.append(f"the user's own {path} was changed or removed")
    return wrong


def sha256(path: Path) -> str:
    """Of a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
