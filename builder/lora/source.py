"""Where a recipe's adapters are: a directory, or a repository of the Hub at a pinned commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from builder.core.errors import IntegrityError, UsageError
from builder.core.safe_text import quoted
from builder.core.safetensors_io import TensorInfo, Tensors
from builder.core.store import Store, key_of
from builder.hub.client import HUB_ID, endpoint, resolve, run_hub_job
from builder.lora.adapter import WEIGHTS, Adapter, checked, open_adapter

STAGE = "adapter"


def open_adapters(places: Mapping[str, str], *, store: Store) -> tuple[Adapter, ...]:
    """The adapters {name: directory or Hub id}. From the Hub only the configuration and the header of the weights are
    read. Errors as for `open_adapter`, and those of the Hub."""
    return tuple(_open(name, place, store) for name, place in places.items())


def fetched(adapters: Sequence[Adapter], *, store: Store) -> list[Adapter]:
    """The same adapters with their files on this machine, as these are now. IntegrityError for one that has become
    another since it was opened: the engine may have been built for the one before."""
    found = []
    for adapter in adapters:
        now = _download(adapter, store) if adapter.repository else open_adapter(adapter.name, adapter.directory)
        if now.pairs != adapter.pairs:
            raise IntegrityError(
                f"The adapter {adapter.name} in {adapter.directory} changed during the build.",
                why="The engine was built for its earlier ranks and layers.",
                hint="Wait until nothing writes to it, then run the same command again.",
            )
        found.append(now)
    return found


def _open(name: str, place: str, store: Store) -> Adapter:
    directory = Path(place).expanduser()
    if directory.is_dir():
        return open_adapter(name, directory.resolve())
    repository, _, revision = place.partition("@")
    if place.startswith((".", "/", "~")) or not HUB_ID.fullmatch(repository) or "/" not in repository:
        raise UsageError(
            f"The adapter {name} is {quoted(place)}, which is no directory.",
            hint=f"--lora {name}=DIRECTORY, or a repository on the Hub: --lora {name}=OWNER/NAME",
        )
    planned = (STAGE, {"repository": repository, "endpoint": endpoint()})
    commit = resolve(repository, revision or None, store=store, planned=planned)
    known = store.find(STAGE, key_of(STAGE, _ingredients(repository, commit)))
    if known is not None:
        return replace(open_adapter(name, Path(known.facts["external"]["root"])), repository=repository, commit=commit)
    answer = run_hub_job(store, job="headers", repo=repository, revision=revision or None, commit=commit, adapter=True)
    infos = {
        tensor: TensorInfo(dtype, tuple(shape), begin, end)
        for tensor, (dtype, shape, begin, end) in answer["tensors"][WEIGHTS].items()
    }
    root = Path(answer["root"])
    made = checked(name, root, answer["config"], Tensors.of({root / WEIGHTS: infos}))
    return replace(made, repository=repository, commit=commit)


def _ingredients(repository: str, commit: str) -> dict[str, Any]:
    return {"repository": repository, "endpoint": endpoint(), "commit": commit}


def _download(adapter: Adapter, store: Store) -> Adapter:
    def make(_: Path) -> dict[str, Any]:
        found = run_hub_job(store, job="download", repo=adapter.repository, commit=adapter.commit, adapter=True)
        return {"external": {"root": found["root"], "files": found["files"]}, "times": found["times"]}

    artifact = store.stage(STAGE, _ingredients(adapter.repository, adapter.commit), make)
    opened = open_adapter(adapter.name, Path(artifact.facts["external"]["root"]))
    return replace(opened, repository=adapter.repository, commit=adapter.commit)
