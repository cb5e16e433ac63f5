"""The link to a repository, <output>/models/<name>: how its name is chosen, and which build may move it.

A name is model, GPU profile and format. If another build has that name already (of another directory, organization or
revision, or with another KV cache type or other sizes), the new build adds what distinguishes it and keeps that name.
Only a build of the same model with the same recipe moves a link; calibration data and measurements may differ. `name`
in the recipe (--name) overrides all of this.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from builder.core.errors import UsageError
from builder.core.file_names import sanitized, truncated
from builder.core.store import Store, digest_of, read, replace_link
from builder.hub.snapshot import local_directory
from builder.publish import build_record
from builder.recipe.schema import Model, Recipe, Resolved
from builder.recipe.target_facts import target_facts

MODELS = "models"
# Parts of a recipe that make another model to serve of the same source. Calibration and measurements do not: a model
# calibrated anew replaces the former one.
IDENTITY = (
    "name", "target", "gpu", "model.revision", "transform.", "quantization.", "engine.", "llmapi.", "repository.",
)  # fmt: skip
FREE = ("engine.flags", "llmapi.args")  # parts whose keys the recipe does not know
SOURCE = "source"
# How a difference is written in a name; a difference in anything else is written as a digest.
WORDS = {
    "quantization.kv_cache_dtype": "kv-{}",
    "engine.max_batch_size": "batch{}",
    "engine.max_input_len": "input{}",
    "engine.max_seq_len": "seq{}",
    "engine.max_num_tokens": "tokens{}",
    "engine.tensorrt_llm": "trtllm{}",
}


def link(resolved: Resolved, repository: Path, store: Store) -> Path:
    """The path of this build's link, which `move` creates."""
    models = store.root / MODELS
    if resolved.recipe.name:
        return models / resolved.recipe.name
    mine = identity(resolved)
    target = os.path.relpath(repository, models)
    read = {name: _identity_of(found) for name, found in build_record.by_name(store.root).items()}
    records = {name: theirs for name, theirs in read.items() if theirs}
    for name, theirs in records.items():  # the name that it got last time
        if not _differing(mine, theirs) and (models / name).is_symlink():
            return models / name
    name = ""
    for name in _candidates(resolved, mine, records):
        if _is_free(models / name, target) or (name in records and not _differing(mine, records[name])):
            break
    return models / name  # the last one ends with a digest of this identity


def move(name: Path, repository: Path) -> None:
    """Points the link to the repository atomically. UsageError if something other than a link has that name."""
    target = os.path.relpath(repository, name.parent)
    if os.path.lexists(name) and not name.is_symlink():
        raise UsageError(
            f"{name} is not a link, so it was not replaced.", hint="Move it away, or choose another --name."
        )
    replace_link(name, target)


def check_free(name: str | None, root: Path) -> None:
    """UsageError if a build may not have this name (--name), because a repository of several models has it."""
    link = root / MODELS / (name or "")
    artifact = read(link.resolve(), check_files=False) if name and link.is_symlink() else None
    if artifact and "members" in artifact.facts:
        raise UsageError(
            f"{link} has several models.",
            why=f"They are {', '.join(artifact.facts['members'])}.",
            hint=f"Build by another --name, and add it: builder combine {name} --add {root / MODELS}/OTHER",
        )


def base_name(recipe: Recipe, gpu: str, prefix: str = "") -> str:
    """<model>-<gpu>-<format>, with -spinquant, -keep-bf16, -keep-fp8, -tp2, -pp2, -llmapi where they apply."""
    part = recipe.quantization
    directory = local_directory(recipe.model)
    model = truncated(sanitized(prefix + (directory.name if directory else recipe.model.id.split("/")[-1])), 100)
    parallel = "".join(f"-{name}{n}" for name, n in (("tp", recipe.engine.tp), ("pp", recipe.engine.pp)) if n > 1)
    other = f"-{recipe.transform.name}" * recipe.transform.rotates
    other += "-keep-bf16" * bool(part.keep_bf16) + "-keep-fp8" * bool(part.keep_fp8)
    other += parallel + ("" if target_facts(recipe.target).has_engine else f"-{recipe.target}")
    return f"{model}-{gpu}-{part.format}{other}"


def source_of(model: Model) -> str:
    """The model's source: a Hub id, or a directory's absolute path."""
    directory = local_directory(model)
    return str(directory) if directory else model.id


def identity(resolved: Resolved) -> dict[str, Any]:
    """The recipe values that distinguish one served model from another, and a digest of the model's source."""
    return _select(digest_of(source_of(resolved.recipe.model)), {key: value for key, value, _ in resolved.explained()})


def _identity_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """The same of a build record; empty for one that is damaged. Older ones have no `source`; their relative paths
    began in `directory`."""
    try:
        values = {str(key): value for key, value, _ in found.get("values", [])}
        local = Path(found.get("directory", "/")) / str(values.get("model.id", ""))
    except (TypeError, ValueError):
        return {}
    older = digest_of(str(local.resolve()) if local.is_dir() else values.get("model.id"))
    return _select(found.get("source_digest") or older, values)


def _select(source: str, values: Mapping[str, Any]) -> dict[str, Any]:
    chosen = {key: value for key, value in values.items() if key.startswith(IDENTITY)}
    for part in FREE:  # a value for each entry, or one for none
        chosen[part] = {key: chosen.pop(key) for key in list(chosen) if key.startswith(f"{part}.")}
    found: dict[str, Any] = json.loads(json.dumps({**chosen, SOURCE: source}))
    return found


def _differing(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> set[str]:
    """The keys that both recipes have and that differ. An older record lacks keys that are new."""
    return {key for key in mine.keys() & theirs.keys() if mine[key] != theirs[key]}


def _candidates(resolved: Resolved, mine: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The short name; then one with what distinguishes this build from the one that has it; then one with a digest."""
    short = base_name(resolved.recipe, resolved.gpu.name)
    yield short
    differing = _differing(mine, records.get(short, {}))
    prefix = _parent(resolved.recipe.model) if SOURCE in differing else ""
    named = base_name(resolved.recipe, resolved.gpu.name, prefix)
    words = [WORDS[key].format(sanitized(str(mine[key]))) for key in WORDS if key in differing]
    if "model.revision" in differing:
        words.insert(0, _revision(mine["model.revision"]))
    if differing and differing <= {SOURCE, "model.revision", *WORDS}:
        yield truncated("-".join([named, *words]))
    yield f"{truncated('-'.join([named, *words]), 160)}-{digest_of(mine)[:8]}"


def _parent(model: Model) -> str:
    """The organization on the Hub, or the directory that the model's directory lies in."""
    directory = local_directory(model)
    parent = directory.parent.name if directory else model.id.rpartition("/")[0]
    return f"{truncated(sanitized(parent), 60)}-" if parent else ""


def _revision(revision: Any) -> str:
    text = str(revision or "main")
    return text[:7] if re.fullmatch(r"[0-9a-f]{40}", text) else truncated(sanitized(text), 40)


def _is_free(path: Path, target: str) -> bool:
    """Whether the path does not exist, is a broken link, or is this build's own link."""
    if not os.path.lexists(path):
        return True
    return path.is_symlink() and (os.readlink(path) == target or not path.exists())
