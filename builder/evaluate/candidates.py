"""Checkpoints that a recipe's own one is compared with: `builder eval --against`.

A candidate is any checkpoint that a build can take in, a finished build, or the recipe without calibration. Each is
opened and checked before any work; what is not in the store yet is taken over as a checkpoint stage. Nothing heavy is
imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from builder.checkpoint import conversion, quantized_source
from builder.checkpoint.description import Description, describe_directory
from builder.checkpoint.layouts import Checkpoint
from builder.core.errors import UsageError
from builder.core.store import MANIFEST, Artifact, Store, artifacts, read, upstream
from builder.evaluate.comparison import Candidate, formats_of
from builder.evaluate.same_model import check_same_model
from builder.evaluate.variants import KV_AUTO
from builder.hub.snapshot import Source, fetch, open_source
from builder.preflight.quantized import opened
from builder.quantize.data_free import write_data_free
from builder.quantize.imported import ImportRequest, import_checkpoint
from builder.quantize.pseudo_stage import DIRECTORY as PSEUDO
from builder.recipe.evaluation import RUNNERS
from builder.recipe.schema import Model, Recipe

if TYPE_CHECKING:
    from builder.hub.snapshot import Snapshot
    from builder.quantize.modelopt import QuantizeRequest

DATA_FREE = "data-free"  # the word for the recipe's own formats without calibration
MADE_OF_CHECKPOINT = ("repository", "engine", "ranks", "layouts")  # stages that name the same weights


@dataclass(frozen=True)
class Request:
    """A candidate that was opened and checked. take: returns its checkpoint, from the store or taken over now."""

    label: str
    place: str
    found: Description
    take: Callable[[Store], Checkpoint]

    def candidate(self, store: Store) -> Candidate:
        """The candidate, with its checkpoint in the store."""
        found = self.found
        made = self.take(store)
        return Candidate(self.label, self.place, made, found.served_cache, str(found.producer), formats_of(found))


def base_of(model: Model, *, store: Store) -> Source:
    """The unquantized model that candidates must have been made from; of a quantized model without an original, that
    model itself."""
    source = open_source(model, store=store)
    if source.quantized and model.original:
        return open_source(Model(id=model.original), store=store)
    if source.quantized:
        return replace(source, tensors=quantized_source.unquantized(opened(source), model.id))
    return source


def open_directories(places: Sequence[str], base: Source, *, store: Store) -> list[Request]:
    """Opens each directory and checks that it holds a quantized checkpoint of the model `base`.

    UsageError for another model or directory; otherwise what opening a quantized model raises.
    """
    if unreadable := next((place for place in places if not _is_text(place)), None):
        raise UsageError(
            f"The name of the directory {unreadable} is not UTF-8 text, so no table can show it.",
            hint="Rename the directory, or give a link to it that has another name.",
        )
    labels = _labels(places)
    return [_open(label, place, base, store) for label, place in zip(labels, places, strict=True)]


def data_free(snapshot: Snapshot, asked: QuantizeRequest, *, store: Store) -> Candidate:
    """The recipe's formats, with scales from a rule instead of calibration."""
    made = write_data_free(snapshot, asked, store=store)
    found = describe_directory(made.unified)
    return Candidate(DATA_FREE, "", made, found.served_cache, "this recipe, data-free", formats_of(found))


def check_data_free(recipe: Recipe, *, quantized: bool) -> None:
    """UsageError if the recipe has no data-free variant to compare with."""
    why = "Nothing would be different"
    if quantized:
        why = f"{recipe.model.id} is quantized already"
    elif recipe.quantization.as_it_is:
        why = "The recipe quantizes nothing"
    elif not recipe.calibration.data_free:
        return
    raise UsageError(
        f"There is no {DATA_FREE} checkpoint to compare with.",
        why=f"{why}: --against {DATA_FREE} quantizes the model of the recipe once more, without calibration.",
        hint=f"Leave --against {DATA_FREE} out. A directory of this name is --against ./{DATA_FREE}",
    )


def _open(label: str, place: str, base: Source, store: Store) -> Request:
    path = Path(place).expanduser()
    artifact = _stored(path)
    if artifact is not None:
        checkpoint = Checkpoint(artifact.path, artifact.digest, artifact.facts)
        found = describe_directory(checkpoint.unified)
        check_same_model(found, base, place, checkpoint.unified)
        return Request(label, place, found, lambda store: checkpoint)
    directory = conversion.source_directory(path)
    source = open_source(Model(id=str(directory)), store=store)
    if not source.quantized:
        raise UsageError(
            f"{place} is not quantized.",
            why="--against compares with quantized checkpoints; BF16 is measured as the model that --model names.",
            hint="Give a directory that `builder quantize`, ModelOpt or llm-compressor wrote.",
        )
    found = opened(source)
    check_same_model(found, base, place, directory)
    return Request(label, place, found, lambda store: _imported(source, found, base, store))


def _stored(path: Path) -> Artifact | None:
    """The checkpoint stage at this path, in it, or that a later stage was made from; None for any other directory.
    UsageError for another stage, and for one that was changed or removed."""
    directory = path.resolve()
    in_layout = directory.name in conversion.LAYOUTS.values() and (directory.parent / MANIFEST).is_file()
    if in_layout:
        directory = directory.parent
    if not (directory / MANIFEST).is_file():
        return None
    artifact = read(directory)
    if artifact is None:
        raise _not_measurable(path, "Its files were changed.")
    if artifact.stage == "checkpoint":
        return artifact
    if in_layout and artifact.stage == "layouts":
        return None  # a checkpoint in another layout, which is opened like anybody's
    if artifact.stage not in MADE_OF_CHECKPOINT or (artifact.path / PSEUDO).is_dir():
        raise _not_measurable(path, f"It is the stage {artifact.stage} of a build.")
    in_store = directory.parent.name == artifact.stage
    chain = upstream([artifact], artifacts(directory.parent.parent)) if in_store else []
    checkpoint = next((one for one in chain if one.stage == "checkpoint"), None)
    if checkpoint is None:
        why = "The checkpoint that it was made from was removed." if in_store else "It is a copy outside the store."
        raise _not_measurable(path, why)
    return checkpoint


def _not_measurable(path: Path, why: str) -> UsageError:
    return UsageError(
        f"{path} is no checkpoint or build that can be measured.",
        why=why,
        hint="Give a directory of checkpoint/ in the store, or a link in models/; or build it again.",
    )


def _is_text(name: str) -> bool:
    """Whether a name from the command line was valid UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _imported(source: Source, found: Description, base: Source, store: Store) -> Checkpoint:
    """The checkpoint as a stage of the store, in the layout that is measured."""
    if found.layout == "tensorrt_llm":
        formats = quantized_source.formats_of_engine_layout(found, base.tensors, base.config)
        asked = ImportRequest(found, found.served_cache, formats, ("unified",), base)
    else:
        asked = ImportRequest(found, found.served_cache, quantized_source.formats(found), ("unified",))
    return import_checkpoint(fetch(source.model, store=store, source=source), asked, store=store)


def _labels(places: Sequence[str]) -> list[str]:
    """A short name for each directory: its last part, or more where that says nothing or another one has it."""
    taken = {*RUNNERS, KV_AUTO, DATA_FREE}
    found: list[str] = []
    resolved = [Path(place).expanduser().resolve() for place in places]
    for number, place in enumerate(places):
        if resolved[number] in resolved[:number]:
            raise UsageError(f"--against names {place} twice.", hint="Name each directory once.")
        parts = [part for part in Path(place).expanduser().absolute().parts if part != "/"]
        dull = parts[-1:] and parts[-1] in conversion.LAYOUTS.values()
        names = ["/".join(parts[-count:]) for count in range(1 + bool(dull), len(parts) + 1)]
        label = next((name for name in names if name not in taken), place)
        taken.add(label)
        found.append(label)
    return found
