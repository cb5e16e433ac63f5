"""The build record, <output>/builds/<name>.json: what a report needs and a repository's manifests do not hold.

It has every recipe value with its origin, the GPU profile, the flags with their reasons, the notes of the plan, and the
stages. Paths are relative to <output>, so that the directory can be moved.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from builder import __version__
from builder.core import manifest
from builder.core.safe_text import redact
from builder.core.store import Store, digest_of, replace_file
from builder.core.untrusted_text import parse_yaml
from builder.lora.source import STAGE as ADAPTER
from builder.preflight import memory as preflight_memory
from builder.preflight import suggestions
from builder.preflight.prepare import Prepared
from builder.recipe.schema import Resolved

FORMAT = 2  # 1 had no seal (manifest.py)
DIRECTORY = "builds"
_REPOSITORY = re.compile(r"repository/[0-9a-f]{16}")


def write(prepared: Prepared, *, link: Path, source: str, store: Store) -> Path:
    """Writes the record of the build that `link` names, whose stages are in `store.done`.

    source: the model's source (links.source_of). Only builds with the same source move a link.
    """
    stages = {done.stage: done for done in store.done}  # of a store that built twice, the last
    several = {done.path: done for done in store.done if done.stage == ADAPTER}
    listed = [*(done for done in stages.values() if done.stage != ADAPTER), *several.values()]
    resolved, host = prepared.resolved, preflight_memory.machine(store.root)
    memory = suggestions.judge(prepared.model, prepared.serving, resolved.gpu, host).cards
    record = {
        "format": FORMAT,
        "name": link.name,
        "repository": str(stages["repository"].path.relative_to(store.root)),
        "written": round(time.time(), 3),
        "versions": {"trtllm-builder": __version__, "python": platform.python_version()},
        "command": command(resolved, _commits(store)),
        "directory": os.getcwd(),
        "source": source,
        "source_digest": digest_of(source),
        "gpu": {"name": resolved.gpu.name, "title": resolved.gpu.title, "sm": resolved.gpu.sm},
        "values": [list(row) for row in resolved.explained()],
        "flags": [vars(setting) for setting in prepared.settings],
        "notes": [vars(note) for note in prepared.notes],
        "sizes": asdict(prepared.sizes),
        "memory": [{**asdict(card), "fits": card.fits} for card in memory],
        "stages": [
            {"stage": done.stage, "key": done.manifest["key"], "path": str(done.path.relative_to(store.root))}
            for done in listed
        ],
    }
    path = store.root / DIRECTORY / f"{link.name}.json"
    replace_file(path, json.dumps(manifest.seal(json.loads(redact(json.dumps(record)))), indent=1))
    return path


def find(root: Path, repository: Path) -> Mapping[str, Any] | None:
    """The newest record of this repository, or None. A record that was edited is ignored.

    The record of an earlier version is not here but in its history (versions.record).
    """
    records = [record for record in map(_read, sorted((root / DIRECTORY).glob("*.json"))) if record]
    found = [record for record in records if (root / record["repository"]).resolve() == repository]
    return max(found, key=lambda record: float(record["written"]), default=None)


def by_name(root: Path) -> dict[str, Mapping[str, Any]]:
    """The readable records by the name of their link."""
    found = {path.stem: _read(path) or _read_older(path) for path in sorted((root / DIRECTORY).glob("*.json"))}
    return {name: record for name, record in found.items() if record}


def unlinked(root: Path) -> dict[str, Path]:
    """{name: repository} of the records whose link in models/ was removed."""
    return {path.stem: repository for path, repository in _of(root) if not os.path.lexists(root / "models" / path.stem)}


def stale(root: Path, *, gone: Sequence[Path] = ()) -> list[Path]:
    """The records whose repository does not exist any more, or is in `gone`."""
    return [path for path, repository in _of(root) if repository in gone or not repository.is_dir()]


def _of(root: Path) -> Iterator[tuple[Path, Path]]:
    """Every record, of format 1 too, with its repository. A file that is none of ours is passed over."""
    for path in sorted((root / DIRECTORY).glob("*.json")):
        with suppress(manifest.Damaged):
            record = _read(path) or manifest.read_object(path)
            repository = record.get("repository")
            if isinstance(repository, str) and _REPOSITORY.fullmatch(repository):
                yield path, root / repository


def command(resolved: Resolved, commits: Mapping[str, str] | None = None) -> list[str]:
    """The command line that gives the same recipe without a recipe file or preset. Defaults are left out.

    commits: revisions to pin, by recipe key.
    """
    recipe, commits = resolved.recipe, commits or {}
    argv = ["builder", "build", "--model", recipe.model.id, "--gpu", resolved.gpu.name]
    said = {"model.id", "gpu", *(() if recipe.target != resolved.gpu.target else ("target",))}
    for key, value, origin in resolved.explained():
        asked = origin != "default" and not origin.startswith("GPU profile")
        if key not in said and (asked or key in commits):
            argv += ["--set", f"{key}={_plain(commits.get(key, value))}"]
    return argv


def _commits(store: Store) -> dict[str, str]:
    """The commits that the Hub's branches and tags resolved to in this build."""
    facts = {done.stage: done.facts for done in store.done}
    found = {
        "model.revision": facts.get("snapshot", {}).get("revision"),
        "calibration.revision": facts.get("calibration", {}).get("commit"),
    }
    return {key: commit for key, commit in found.items() if commit}


def _plain(value: Any) -> str:
    """A value as --set takes it: YAML on one line, and no quotes where none are needed."""
    if not isinstance(value, str):
        # A scalar of YAML on its own ends with a line of three dots.
        return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n...\n").strip()
    try:
        bare = parse_yaml(value) == value
    except ValueError:
        bare = False
    return value if bare else yaml.safe_dump(value, default_style='"', width=math.inf).strip()


def _read(path: Path) -> dict[str, Any] | None:
    """None for one that was changed or is of another format."""
    try:
        record = manifest.read_object(path)
        manifest.check_seal(record)
    except (manifest.Damaged, RecursionError):
        return None
    return record if record.get("format") == FORMAT else None


def _read_older(path: Path) -> dict[str, Any] | None:
    """A record of format 1, which still says whose link it is; None for anything else."""
    with suppress(manifest.Damaged):
        record = manifest.read_object(path)
        return record if record.get("format") == 1 else None
    return None
