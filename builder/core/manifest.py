"""manifest.json: what a stage directory must hold. Everything that reads one reads it here.

A manifest is sealed with a hash of itself, so that whoever opens a stage needs to check no single value again: an
edited or damaged one is refused as a whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from builder.core.untrusted_text import parse_json, read_regular

FORMAT = 2  # a change makes every older stage unknown. 1 had no seal
MANIFEST = "manifest.json"
SEAL = "sealed"
KEY = re.compile(r"[0-9a-f]{16}")
# Files up to this size are hashed whenever a stage is opened, larger ones by `builder verify`: code, configurations and
# the largest tokenizers (17 MB, Llama 3) at some 15 ms each.
SMALL = 32 << 20
_LARGEST = 256 << 20  # bytes of a manifest; one with 100,000 files has 15 MB
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20
_NFS = ".nfs"  # what NFS calls a removed file that is still open


class Damaged(ValueError):
    """A manifest or a record that can't be what was written."""


def load(directory: Path, *, formats: tuple[int, ...] = (FORMAT,)) -> dict[str, Any]:
    """The manifest of a stage directory, every value of the type that it was written with. Damaged says what is wrong.

    In a store the directory must have the name that the manifest says; a copy elsewhere may have any.
    """
    try:
        return _checked(directory, read_object(directory / MANIFEST), formats)
    except RecursionError:
        raise Damaged("it is nested too deep") from None


def _checked(directory: Path, manifest: dict[str, Any], formats: tuple[int, ...]) -> dict[str, Any]:
    if manifest.get("format") not in formats or isinstance(manifest["format"], bool):
        raise Damaged(f"it has format {str(manifest.get('format'))[:40]}, not {FORMAT}")
    if manifest["format"] >= 2:
        check_seal(manifest)
    _check_types(manifest)
    stage, key = manifest["stage"], manifest["key"]
    if key != key_of(stage, manifest["ingredients"], manifest["format"]):
        raise Damaged("its key does not follow from its ingredients")
    if manifest["digest"] != content_digest(manifest):
        raise Damaged("its digest does not follow from its files")
    if directory.parent.name == stage and directory.name != key:
        raise Damaged(f"it belongs to {stage}/{key}")
    return manifest


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Damaged for anything else, and for a file that can't be read."""
    try:
        found = parse_json(read_regular(path, _LARGEST))
    except (OSError, ValueError) as error:
        raise Damaged(str(error)) from None
    if not isinstance(found, dict):
        raise Damaged(f"it holds a {type(found).__name__}, not an object")
    return found


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the hash of all else that it holds. Keys and numbers become what JSON makes of them."""
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return {**plain, SEAL: digest_of(plain)}


def check_seal(value: Mapping[str, Any]) -> None:
    """Damaged unless the object is as `sealed` made it."""
    if value.get(SEAL) != digest_of({key: item for key, item in value.items() if key != SEAL}):
        raise Damaged("it was changed")


def key_of(stage: str, ingredients: Mapping[str, Any], version: int = FORMAT) -> str:
    """The name of a stage's directory."""
    return digest_of({"format": version, "stage": stage, "ingredients": ingredients})[:16]


def digest_of(value: Any) -> str:
    """sha256 of a value's canonical JSON: sorted keys, no spaces. A value that JSON can't hold is an error."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def content_digest(manifest: Mapping[str, Any]) -> str:
    """Of all files, names and content: equal digests, equal bytes under equal names."""
    external = manifest["facts"].get("external", {"files": {}})["files"]
    return digest_of([[name, entry["sha256"]] for name, entry in sorted({**external, **manifest["files"]}.items())])


def all_files(directory: Path, manifest: Mapping[str, Any]) -> list[tuple[Path, Mapping[str, Any]]]:
    """Every file of an artifact, those elsewhere too, with its entry in the manifest."""
    own = [(directory / name, entry) for name, entry in manifest["files"].items()]
    external = manifest["facts"].get("external", {"root": "", "files": {}})
    return own + [(Path(external["root"]) / name, entry) for name, entry in external["files"].items()]


def file_problems(directory: Path, manifest: Mapping[str, Any], *, hashed_up_to: float = math.inf) -> Iterator[str]:
    """What is wrong with an artifact's files; those of more bytes than `hashed_up_to` are judged by size alone."""
    for file, entry in all_files(directory, manifest):
        try:
            found = file.stat()
            if not stat.S_ISREG(found.st_mode):
                yield f"{file} is no file"
            elif found.st_size != entry["size"]:
                yield f"{file} has {found.st_size} bytes instead of {entry['size']}"
            elif found.st_size <= hashed_up_to and sha256(file) != entry["sha256"]:
                yield f"{file} has another content than when it was made"
        except FileNotFoundError:
            yield f"{file} is missing"
        except (OSError, ValueError) as error:
            yield f"{file} can't be read: {error}"
    for name in unexpected_files(directory, manifest):
        yield f"{directory / name} was added"


def unexpected_files(directory: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Names of what lies in a stage directory and does not belong to it. Python's bytecode is no change."""
    known, found = {*manifest["files"], MANIFEST}, []
    for parent, directories, files in os.walk(directory):
        directories[:] = [name for name in directories if name != "__pycache__"]
        linked = [name for name in directories if os.path.islink(os.path.join(parent, name))]
        names = (os.path.relpath(os.path.join(parent, name), directory) for name in (*files, *linked))
        found += [name for name in names if name not in known and not name.startswith(_NFS)]
    return sorted(found)


def sha256(path: Path) -> str:
    """Of a file's content, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _check_types(manifest: Mapping[str, Any]) -> None:
    for name, kind in (("stage", str), ("key", str), ("digest", str), ("ingredients", dict), ("facts", dict)):
        if not isinstance(manifest.get(name), kind):
            raise Damaged(f"its {name} is {_shown(manifest.get(name))}")
    for name in ("started", "seconds"):
        value = manifest.get(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e12:
            raise Damaged(f"its {name} is {_shown(value)}")
    _check_files(manifest.get("files"))
    if "external" in manifest["facts"]:
        external = manifest["facts"]["external"]
        if not isinstance(external, dict) or not isinstance(external.get("root"), str) or "\0" in external["root"]:
            raise Damaged(f"its external files are {_shown(external)}")
        _check_files(external.get("files"))


def _check_files(files: Any) -> None:
    """{name: {"size": bytes, "sha256": hex}} with names that stay inside of their directory."""
    if not isinstance(files, dict):
        raise Damaged(f"its files are {_shown(files)}")
    for name, entry in files.items():
        if not name or "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
            raise Damaged(f"it names a file {_shown(name)}")
        size, digest = (entry.get("size"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or not 0 <= size < 1 << 63:
            raise Damaged(f"the size of {_shown(name)} is {_shown(size)}")
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise Damaged(f"the sha256 of {_shown(name)} is {_shown(digest)}")


def _shown(value: Any) -> str:
    return ascii(value)[:80]
