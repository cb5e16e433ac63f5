"""The versions of a published model: which repositories models/NAME has linked to, in <output>/history/NAME.json.

A version is known by its repository's key. `builder rollback` returns to an earlier one; its files are still in the
store, so this takes no time. `builder clean` keeps the version before the one that is linked.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.core import manifest
from builder.core.errors import IntegrityError, UsageError
from builder.core.store import Store, replace_file
from builder.publish import build_record, links

DIRECTORY = "history"
MOST = 20  # versions that are remembered


@dataclass(frozen=True)
class Version:
    """A repository that the link named from `since` on (seconds since 1970). record: its build record, if it has one
    and is not the current version, whose record is in builds/."""

    key: str
    since: float
    record: Mapping[str, Any] | None = None

    def repository(self, root: Path) -> Path:
        """Its directory."""
        return root / "repository" / self.key


def read(root: Path, name: str) -> list[Version]:
    """All versions that are remembered, oldest first, with the current one. IntegrityError if the file was changed."""
    file = root / DIRECTORY / f"{name}.json"
    found: list[Version] = []
    if file.exists():
        try:
            content = manifest.read_object(file)
            manifest.check_seal(content)
        except manifest.Damaged as error:
            raise IntegrityError(
                f"{file} can't be read.", why=str(error), hint="Remove it: earlier versions are then forgotten."
            ) from None
        found = [Version(**entry) for entry in content["versions"]]
    key = current(root, name)
    if key and key not in [version.key for version in found]:
        found.append(Version(key, time.time()))
    return found


def current(root: Path, name: str) -> str | None:
    """The key of the repository that the link names; None if there is no link to one of this store."""
    with suppress(OSError):
        target = Path(os.readlink(root / links.MODELS / name))
        return target.name if target.parent.name == "repository" else None
    return None


def record(root: Path, repository: Path) -> Mapping[str, Any] | None:
    """The build record of a repository, also if no link names it any more but a history remembers it."""
    if (found := build_record.find(root, repository)) is not None:
        return found
    for file in sorted((root / DIRECTORY).glob("[!.]*.json")):
        with suppress(IntegrityError):  # reported by the commands that need this history
            for version in read(root, file.stem):
                if version.key == repository.name and version.record is not None:
                    return version.record
    return None


def stages(root: Path, repository: Path) -> list[Path]:
    """The directories of the stages that the record of this repository names: those of its build that its digest does
    not lead to, such as downloaded adapters, are only there."""
    found = record(root, repository) or {}
    return [root / stage["path"] for stage in found.get("stages", [])]


def before(root: Path, name: str) -> Version | None:
    """The version before the current one, if its repository is still there."""
    found = [version for version in read(root, name) if version.repository(root).is_dir()]
    index = next((i for i, version in enumerate(found) if version.key == current(root, name)), 0)
    return found[index - 1] if index else None


def remember(root: Path, link: Path, repository: Path) -> None:
    """Notes that the link is about to name this repository, and keeps the build record of the version that it names."""
    left = _left(root, link.name)
    if current(root, link.name) != repository.name:  # else nothing changes, also after a rollback
        left = [version for version in left if version.key != repository.name]
        left.append(Version(repository.name, time.time()))
    _write(root, link.name, left)


def stale(root: Path, gone: Collection[str]) -> list[Path]:
    """The histories of links that do not exist, or are in `gone` by name."""
    found = sorted((root / DIRECTORY).glob("[!.]*.json"))
    return [path for path in found if path.stem in gone or not os.path.lexists(root / links.MODELS / path.stem)]


def rollback(store: Store, name: str, key: str | None = None) -> tuple[str, Version]:
    """Links models/NAME to its previous version, or the one with this key (or its beginning). Returns the key that it
    had and the version that it has. UsageError if there is none."""
    root = store.root
    with store.in_use(), store.locked("publish", "models"):  # no `builder clean` removes the version meanwhile
        had = current(root, name)
        if had is None:
            raise UsageError(
                f"{root / links.MODELS} has no link {name!r} to a repository.",
                hint="Name one of its links: builder rollback NAME",
            )
        version = _chosen(root, name, key)
        left = _left(root, name)
        _write(root, name, left)
        if version.record is not None:
            text = json.dumps(version.record, indent=1)
            replace_file(root / build_record.DIRECTORY / f"{name}.json", text)
        links.move(root / links.MODELS / name, version.repository(root))
    return had, version


def _chosen(root: Path, name: str, key: str | None) -> Version:
    if key is None:
        if (found := before(root, name)) is None:
            raise UsageError(
                f"{name} has no earlier version.",
                why="It was built once, or `builder clean` removed what was built before.",
                hint=f"See its versions: builder rollback {name} --list",
            )
        return found
    matching = [version for version in read(root, name) if version.key.startswith(key)]
    if len(matching) != 1 or not matching[0].repository(root).is_dir():
        known = ", ".join(version.key for version in read(root, name) if version.repository(root).is_dir())
        what = "is removed" if len(matching) == 1 else "is not known" if not matching else "is ambiguous"
        raise UsageError(f"Version {key!r} of {name} {what}.", hint=f"Versions that are there: {known}.")
    return matching[0]


def _left(root: Path, name: str) -> list[Version]:
    """All versions, with the current one's build record, which is about to be replaced."""
    record = build_record.by_name(root).get(name, {})
    return [
        Version(version.key, version.since, record)
        if record.get("repository") == f"repository/{version.key}"
        else version
        for version in read(root, name)
    ]


def _write(root: Path, name: str, versions: Sequence[Version]) -> None:
    content = manifest.seal({"versions": [vars(version) for version in versions[-MOST:]]})
    replace_file(root / DIRECTORY / f"{name}.json", json.dumps(content))
