"""Reads and checks manifest.json, which lists the content of a stage directory.

A manifest contains a hash of itself, the seal. An edited or damaged manifest is rejected as a whole, so code that opens
a stage does not have to check each value again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from builder.core.safe_text import quoted
from builder.core.untrusted_text import parse_json, read_regular

FORMAT = 2  # stages of another format are not found. 1 had no seal
MANIFEST = "manifest.json"
SEAL = "sealed"
KEY = re.compile(r"[0-9a-f]{16}")
# Bytes. Files up to this size are hashed whenever a stage is opened, larger ones only by `builder verify`. The limit
# covers code, configurations and the largest tokenizers (17 MB, Llama 3), at about 15 ms each.
SMALL = 32 << 20
LARGEST = 256 << 20  # bytes of a manifest; one with 100,000 files has 15 MB
# Seconds for which the hash of a changed file is not remembered: a change soon after may leave it the same times, whose
# steps are up to 10 ms on a local disk and 1 s or 2 s on others.
YOUNG = 3.0
_KNOWN: dict[str, tuple[tuple[int, ...], str]] = {}  # {path: (state of the file, its sha256)}
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Hashed at a time, in one buffer. A new one for each chunk costs page faults, and with small chunks a thread often
# waits for Python's lock while another one computes.
_CHUNK = 4 << 20
_NFS = ".nfs"  # prefix of the name that NFS gives a removed file that is still open


class Damaged(ValueError):
    """A manifest or record that was changed or damaged. The message is a clause whose subject is "it"."""


def load(directory: Path, *, formats: tuple[int, ...] = (FORMAT,)) -> dict[str, Any]:
    """Reads the manifest of a stage directory and checks seal, types, key and digest. Damaged says what is wrong.

    A directory in a store must be named after the manifest's key. A copy outside of a store may have any name.
    """
    try:
        return _validated(directory, read_object(directory / MANIFEST), formats)
    except RecursionError:
        raise Damaged("it is nested too deeply") from None


def parsed(text: str) -> dict[str, Any]:
    """The text of a manifest, checked as `load` does. Damaged or ValueError says what is wrong."""
    try:
        found = parse_json(text.encode())
        if not isinstance(found, dict):
            raise Damaged(f"it contains a {type(found).__name__}, not an object")
        return _checked(found, (FORMAT,))
    except RecursionError:
        raise Damaged("it is nested too deeply") from None


def _validated(directory: Path, manifest: dict[str, Any], formats: tuple[int, ...]) -> dict[str, Any]:
    stage, key = _checked(manifest, formats)["stage"], manifest["key"]
    if directory.parent.name == stage and directory.name != key:
        raise Damaged(f"it belongs to {stage}/{key}")
    return manifest


def _checked(manifest: dict[str, Any], formats: tuple[int, ...]) -> dict[str, Any]:
    if manifest.get("format") not in formats or isinstance(manifest["format"], bool):
        raise Damaged(f"it has format {str(manifest.get('format'))[:40]}, not {FORMAT}")
    if manifest["format"] >= 2:
        check_seal(manifest)
    _check_types(manifest)
    stage, key = manifest["stage"], manifest["key"]
    if key != key_of(stage, manifest["ingredients"], manifest["format"]):
        raise Damaged("its key does not match its ingredients")
    if manifest["digest"] != content_digest(manifest):
        raise Damaged("its digest does not match its files")
    return manifest


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file. Damaged if the file can't be read or holds anything else."""
    try:
        found = parse_json(read_regular(path, LARGEST))
    except (OSError, ValueError) as error:
        raise Damaged(str(error)) from None
    if not isinstance(found, dict):
        raise Damaged(f"it contains a {type(found).__name__}, not an object")
    return found


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the seal: the hash of all other entries. Values are normalized to JSON first (tuples to lists, for one)."""
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return {**plain, SEAL: digest_of(plain)}


def check_seal(value: Mapping[str, Any]) -> None:
    """Damaged unless the object's seal matches its entries."""
    if value.get(SEAL) != digest_of({key: item for key, item in value.items() if key != SEAL}):
        raise Damaged("it was changed")


def key_of(stage: str, ingredients: Mapping[str, Any], version: int = FORMAT) -> str:
    """The key of an artifact, which names its directory: 16 hex digits of a hash over stage and ingredients."""
    return digest_of({"format": version, "stage": stage, "ingredients": ingredients})[:16]


def digest_of(value: Any) -> str:
    """sha256 of a value's canonical JSON (sorted keys, no spaces). TypeError for a value that JSON can't represent."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def content_digest(manifest: Mapping[str, Any]) -> str:
    """sha256 over names and hashes of all files: equal digests mean the same names with the same bytes."""
    external = manifest["facts"].get("external", {"files": {}})["files"]
    return digest_of([[name, entry["sha256"]] for name, entry in sorted({**external, **manifest["files"]}.items())])


def all_files(directory: Path, manifest: Mapping[str, Any]) -> list[tuple[Path, Mapping[str, Any]]]:
    """(path, manifest entry) of every file of an artifact, including external ones, such as the Hub's cache."""
    own = [(directory / name, entry) for name, entry in manifest["files"].items()]
    external = manifest["facts"].get("external", {"root": "", "files": {}})
    return own + [(Path(external["root"]) / name, entry) for name, entry in external["files"].items()]


def file_problems(directory: Path, manifest: Mapping[str, Any], *, hashed_up_to: float = math.inf) -> Iterator[str]:
    """Yields a sentence for each missing, changed or added file. With `hashed_up_to`, larger files are not hashed, and
    the others only once in a process unless they change."""
    hashed = sha256 if hashed_up_to == math.inf else _known_sha256
    for file, entry in all_files(directory, manifest):
        try:
            found = file.stat()
            if not stat.S_ISREG(found.st_mode):
                yield f"{file} is not a regular file"
            elif found.st_size != entry["size"]:
                yield f"{file} has {found.st_size} bytes instead of {entry['size']}"
            elif found.st_size <= hashed_up_to and hashed(file) != entry["sha256"]:
                yield f"{file} has changed since the stage was made"
        except FileNotFoundError:
            yield f"{file} is missing"
        except (OSError, ValueError) as error:
            yield f"{file} can't be read: {error}"
    for name in unexpected_files(directory, manifest):
        yield f"{directory / name} was added"


def unexpected_files(directory: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Names of files in a stage directory that its manifest does not list. Python's bytecode is ignored."""
    known, found = {*manifest["files"], MANIFEST}, []
    for parent, directories, files in os.walk(directory):
        directories[:] = [name for name in directories if name != "__pycache__"]
        linked = [name for name in directories if os.path.islink(os.path.join(parent, name))]
        names = (os.path.relpath(os.path.join(parent, name), directory) for name in (*files, *linked))
        found += [name for name in names if name not in known and not name.startswith(_NFS)]
    return sorted(found)


def sha256(path: Path, stop: threading.Event | None = None) -> str:
    """The sha256 of a file, as hex, read in chunks. stop: set to give up, with a hash that is of no use."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        for chunk in chunks(file):
            if stop and stop.is_set():
                break
            digest.update(chunk)
    return digest.hexdigest()


def _known_sha256(path: Path) -> str:
    """The sha256 of a file, which is hashed again if its inode, size or times have changed since it was hashed."""
    found = os.stat(path)
    state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    known = _KNOWN.get(str(path))
    if known and known[0] == state:
        return known[1]
    settled = time.time() - max(found.st_mtime, found.st_ctime) > YOUNG
    digest = sha256(path)
    if settled:
        _KNOWN[str(path)] = (state, digest)
    return digest


def chunks(file: FileIO, nbytes: int | None = None) -> Iterator[memoryview]:
    """The next bytes of a file, by default to its end, in one buffer: each piece is valid until the next is read."""
    left = os.fstat(file.fileno()).st_size if nbytes is None else nbytes
    buffer = memoryview(bytearray(max(1, min(_CHUNK, left))))
    while count := file.readinto(buffer if nbytes is None else buffer[:left]):
        yield buffer[:count]
        left -= count


def _check_types(manifest: Mapping[str, Any]) -> None:
    """Damaged for a value of the wrong type: a seal proves only that nothing changed after sealing."""
    for name, kind in (("stage", str), ("key", str), ("digest", str), ("ingredients", dict), ("facts", dict)):
        if not isinstance(manifest.get(name), kind):
            raise Damaged(f"its {name} is {quoted(manifest.get(name))}")
    for name in ("started", "seconds"):
        value = manifest.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e12:
            raise Damaged(f"its {name} is {quoted(value)}")
    _check_files(manifest.get("files"))
    if "external" in manifest["facts"]:
        external = manifest["facts"]["external"]
        if not isinstance(external, dict) or not isinstance(external.get("root"), str) or "\0" in external["root"]:
            raise Damaged(f"its external files are {quoted(external)}")
        _check_files(external.get("files"))


def _check_files(files: Any) -> None:
    """Damaged unless `files` is {name: {"size": bytes, "sha256": hex}} and no name leads out of the directory."""
    if not isinstance(files, dict):
        raise Damaged(f"its files are {quoted(files)}")
    for name, entry in files.items():
        if not name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise Damaged(f"it lists a file named {quoted(name)}")
        size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or not 0 <= size < 1 << 63:
            raise Damaged(f"the size of {quoted(name)} is {quoted(size)}")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise Damaged(f"the sha256 of {quoted(name)} is {quoted(digest)}")
