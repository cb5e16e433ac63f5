"""The part of a recipe that names LoRA adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, field_validator

from builder.recipe.base import Part

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
MOST_RANK = 1024


class Lora(Part):
    """LoRA adapters that are served with the model, each as a model of its own: NAME:ADAPTER."""

    adapters: dict[str, str] = Field(
        default={},
        description="PEFT adapters, {name: directory, or Hub id with an optional @revision}; as a list NAME=ADAPTER",
    )
    max_rank: Annotated[
        int | None,
        Field(ge=1, le=MOST_RANK, description="largest rank that the engine takes; default: of these adapters"),
    ] = None

    @field_validator("adapters", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """{name: place}, also of a list of NAME=PLACE as the command line gives it."""
        if isinstance(value, str) or not isinstance(value, Sequence | Mapping):
            raise ValueError("adapters are a mapping of names to places, or a list of NAME=PLACE")
        entries = list(value.items()) if isinstance(value, Mapping) else [_entry(one) for one in value]
        if len({name for name, _ in entries}) < len(entries):
            raise ValueError("two adapters have the same name")
        for name, place in entries:
            if not isinstance(name, str) or not NAME.fullmatch(name):
                raise ValueError(
                    f"{str(name)[:80]!r} can't name an adapter: use up to 64 letters, digits, '-' and '_'; "
                    "'sql=artifacts/adapters/sql' names one"
                )
            if not isinstance(place, str) or not place.strip():
                raise ValueError(f"the adapter {name} has no directory")
        return dict(entries)


def named(layer: dict[str, Any]) -> dict[str, Any]:
    """A source of settings with its list of adapters as a mapping, so that sources merge adapter by adapter. What is
    wrong with it is left to the validation."""
    part = layer.get("lora")
    found = part.get("adapters") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(found, list | tuple):
        return layer
    entries = [one.partition("=") for one in found if isinstance(one, str)]
    names = {name for name, _, _ in entries}
    if len(names) < len(found) or not all(NAME.fullmatch(name) and equals for name, equals, _ in entries):
        return layer
    return {**layer, "lora": {**part, "adapters": {name: place for name, _, place in entries}}}


def _entry(one: Any) -> tuple[str, str]:
    name, equals, place = one.partition("=") if isinstance(one, str) else ("", "", "")
    if not equals:
        raise ValueError(f"{str(one)[:80]!r} is not NAME=PLACE, for example sql=artifacts/adapters/sql")
    return name, place
