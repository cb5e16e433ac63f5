"""Reads configs/architectures/*.yaml and finds the architecture of a model. Pure, but for reading those files."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from builder.architectures.facts import Architecture, Conventions, Engine, Facts, Target
from builder.core import paths
from builder.core.errors import IntegrityError
from builder.core.release import reaches
from builder.core.untrusted_text import parse_yaml

CONVENTIONS = "conventions.yaml"
UNKNOWN = Architecture(name="unknown", title="unknown", model_types=(), source="none")
_Part = TypeVar("_Part", bound=Facts)


def directory() -> Path:
    """Where the files are."""
    return paths.data("configs", "architectures")


@functools.cache
def read(folder: Path) -> Mapping[str, Architecture]:
    """{name: architecture} of a folder, by name.

    IntegrityError for an unknown key, a missing one, or a name that two files have.
    """
    found = [_load(path, Architecture) for path in sorted(folder.glob("*.yaml")) if path.name != CONVENTIONS]
    named = {architecture.name: architecture for architecture in sorted(found, key=lambda one: one.name)}
    if len(named) < len(found):
        raise IntegrityError(f"{folder} describes an architecture twice.", hint="One file for each name.")
    return named


@functools.cache
def conventions() -> Conventions:
    """The names that decoders without a table of tensors usually have."""
    return _load(paths.data("configs", "architectures", CONVENTIONS), Conventions)


def _load(path: Path, kind: type[_Part]) -> _Part:
    try:
        return kind.model_validate(parse_yaml(path.read_text(encoding="utf-8"), own=True))
    except (ValueError, ValidationError) as error:
        raise IntegrityError(f"{path} does not describe a model architecture.", why=str(error)) from None


def every() -> Sequence[Architecture]:
    """All known architectures, by name."""
    return list(read(directory()).values())


def name_of(config: Mapping[str, Any]) -> str:
    """The architecture that a config.json names, a model's or a TensorRT-LLM checkpoint's; "unknown" without one."""
    names = config.get("architectures")
    listed = names[0] if isinstance(names, Sequence) and names else None
    return str(listed or config.get("architecture") or "unknown")


def find(config: Mapping[str, Any]) -> Architecture | None:
    """The architecture of a model by its config.json; None if nothing is known about it."""
    name = name_of(config)
    return read(directory()).get(name) or next((one for one in every() if name in one.also), None)


def of(config: Mapping[str, Any]) -> Architecture:
    """As `find`; for an unknown architecture one of which only the name is known, so that conventions apply."""
    return find(config) or UNKNOWN.model_copy(update={"name": name_of(config)})


def by_model_type(config: Mapping[str, Any]) -> Architecture:
    """As `of`, by `model_type` where config.json names no known architecture."""
    kind = config.get("model_type")
    return find(config) or next((one for one in every() if kind in one.model_types), None) or of(config)


def language_model_of(name: str) -> Architecture | None:
    """The architecture of the language model inside a multimodal one; None if it is not known."""
    return next((one for one in every() if name in [part.name for part in one.language_model_of]), None)


def engine_architecture(config: Mapping[str, Any]) -> str:
    """What TensorRT-LLM's engine path calls the architecture of a model; the model's own name if it has no engine."""
    found = of(config)
    return found.engine.architecture if found.engine else found.name


def engine_of(config: Mapping[str, Any]) -> Engine | None:
    """The engine facts by the config.json of a TensorRT-LLM checkpoint, whose `architecture` is TensorRT-LLM's name."""
    name = name_of(config)
    return next((one.engine for one in every() if one.engine and one.engine.architecture == name), None)


def ingredients(architecture: Architecture) -> dict[str, Any]:
    """What can change a checkpoint that is made of a model of this architecture, for keys: no sources, no titles."""
    parts = {"name", "config", "biases", "tensors", "engine", "never_quantized", "renamed", "float32", "not_loaded"}
    found = architecture.model_dump(mode="json", include={*parts, "same_input", "experts"})
    for part in ("tensors", "engine", "experts"):
        found[part] = {key: value for key, value in (found[part] or {}).items() if key not in ("source", "since")}
    return found if architecture.tensors else {**found, **conventions().model_dump(mode="json", exclude={"source"})}


def served_by(target: Target, version: str | None = None) -> list[str]:
    """The architectures that a target serves, by name; only those that it serves in this version, if one is given."""
    parts = {one.name: getattr(one, target) for one in every()}
    return [name for name, part in parts.items() if part is not None and reaches(version, part.since)]


def with_common_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with the common keys added for those that the family spells otherwise, such as n_embd."""
    keys = {key: own for key, own in of(config).config.keys.items() if config.get(key) is None and own in config}
    found = {key: config[own] for key, own in keys.items()}
    return {**config, **{key: len(value) if isinstance(value, list) else value for key, value in found.items()}}
