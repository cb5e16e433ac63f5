"""`builder export`: a repository with all that it serves, in an output directory of its own that can be moved anywhere.

A repository refers to its engine or checkpoint by a relative path, so both go along in the places that they have.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from builder.core import atomic
from builder.core.errors import UsageError
from builder.core.store import Store, mark
from builder.triton.repository import Repository
from builder.trtllm import references

SERVED = ("engine", "checkpoint")  # facts of a repository that are paths


def export(repository: Repository, name: str, destination: Path, store: Store) -> Path:
    """Writes it; returns the link models/NAME in `destination`. What is there already stays, so models can be added.

    Files are hard links where both places are on one file system: nothing changes a file of the store. UsageError if
    the engine is not in the output directory of the repository; a BuilderError if the disk refuses.
    """
    root = repository.path.parents[1]
    directories = [repository.path, *_served(repository, root)]
    if destination.resolve().is_relative_to(root):
        raise UsageError(
            f"{destination} is in {root}, the output directory of {name}.", hint="Name a directory outside of it."
        )
    try:
        with Store(destination, store.out).in_use():  # so that `builder clean` removes no half of a copy
            for directory in dict.fromkeys(directories):
                _copy(directory, destination / directory.relative_to(root), store)
            mark(destination)
            link = destination / "models" / name
            link.parent.mkdir(exist_ok=True)
            atomic.replace_link(link, f"../{repository.path.relative_to(root)}")
    except OSError as error:
        raise atomic.disk_error(error, destination) from error
    _warn_of_adapters(repository, store)
    return link


def _warn_of_adapters(repository: Repository, store: Store) -> None:
    """The LLM class takes adapters by absolute paths only. Those of an engine are files of the repository."""
    for facts in repository.members.values():
        if facts.get("adapters") and "adapter_files" not in facts:
            names = ", ".join(facts["adapters"])
            store.out.warn(f"not copied: the LoRA adapters {names}; they must be at the same paths where it is served")


def _served(repository: Repository, root: Path) -> list[Path]:
    """The stages that the models refer to."""
    found = []
    for facts in repository.members.values():
        for fact in SERVED:
            if fact in facts:
                path = references.resolved(str(facts[fact]), repository.path)
                if not path.is_relative_to(root):
                    raise UsageError(
                        f"{path} is not in {root}, so it can't be exported with the repository.",
                        hint="Render the repository for an engine of this output directory.",
                    )
                found.append(root.joinpath(*path.relative_to(root).parts[:2]))
    return found


def _copy(source: Path, target: Path, store: Store) -> None:
    """Whole or not at all: `builder clean` removes what a kill leaves."""
    if target.exists():
        return
    store.out.info(f"{source.parent.name}/{source.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    made = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        shutil.copytree(source, made, symlinks=True, copy_function=_link_or_copy)
        made.rename(target)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
