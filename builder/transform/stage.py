"""The transform stage: Snapshot -> Snapshot of a model with the same function and rotated weights.

It lies between the snapshot and what quantizes it. The result is a model directory like any other.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.architectures import catalog
from builder.core.partial_results import PartialResults
from builder.core.store import Artifact, Store, key_of, library_versions, sources_digest
from builder.hub.snapshot import Snapshot, Source
from builder.model.hashed_files import times
from builder.recipe.transform import Transform
from builder.transform import spinquant

if TYPE_CHECKING:
    from builder.transform.learned import Rows
    from builder.transform.rotations import Rotations

STAGE = "transform"
LIBRARIES = ("numpy",)
SOURCES = (
    "builder/transform/stage.py",
    "builder/transform/writing.py",
    "builder/transform/folding.py",
    "builder/transform/spinquant.py",
    "builder/transform/rotations.py",
    "builder/transform/rotation.py",
    "builder/transform/hadamard.py",
    "builder/transform/goethals_seidel.py",
    "builder/transform/paley.py",
    "builder/architectures",
    "builder/checkpoint/layouts.py",
    "builder/checkpoint/shards.py",
    "builder/core/safetensors_io.py",
    "builder/formats",
    "builder/model/dtypes.py",
    "builder/model/files.py",
    "builder/model/hashed_files.py",
    "builder/model/imports.py",
    "builder/model/loading.py",
    "builder/model/multimodal.py",
    "builder/model/source_tensors.py",
    "builder/quantize/source_weights.py",
)


def expected(source: Source, part: Transform) -> Source:
    """The source as it will be once it is transformed: its config.json and tensors. Its directory and files are still
    those of the model as it is. UnsupportedError, which says why, if it can't be rotated."""
    if not part.rotates:
        return source
    folds = spinquant.plan(source.config, source.tensors, part.rotations, source.model.id)
    if part.learns:
        spinquant.check_learnable(source.config, source.model.id)
    config = spinquant.config(source.config, part.rotations)
    return replace(source, config=config, tensors={fold.name: (fold.dtype, fold.shape) for fold in folds})


def transformed(snapshot: Snapshot, part: Transform, rows: Rows | None = None, *, store: Store) -> Snapshot:
    """The model as it is quantized: rotated, or as it is. A killed run that learns leaves a state in `partial/`, from
    which the next one continues.

    rows: what rotations are learned from, if they are. Raises what `writing.write` raises."""
    if not part.rotates:
        return snapshot
    family = catalog.of(snapshot.config).rotation
    ingredients = {
        "snapshot": snapshot.digest,
        "part": part.model_dump(mode="json"),
        **({"rows": rows.ingredients()} if rows else {}),
        "family": family.model_dump(mode="json", exclude={"source"}) if family else None,
        "libraries": library_versions(*LIBRARIES),
        "sources": sources_digest(*SOURCES),
    }

    partial = PartialResults(store, STAGE, key_of(STAGE, ingredients))

    def make(tmp: Path) -> dict[str, Any]:
        from builder.transform import writing  # numpy: only for those who rotate

        with snapshot.source.explain_failures():
            rotations, learned = _rotations(snapshot, part, rows, partial)
            started = time.monotonic()
            facts = writing.write(snapshot.path, snapshot.files, rotations, tmp, store.out)
        snapshot.source.check_unchanged()
        named = {"model_id": snapshot.model_id, "revision": snapshot.revision}
        return {**named, **facts, **learned, "seconds": {"write": round(time.monotonic() - started, 3)}}

    artifact = store.stage(STAGE, ingredients, make)
    if rows is not None:
        partial.end()
    return _opened(snapshot, part, artifact)


def _rotations(
    snapshot: Snapshot, part: Transform, rows: Rows | None, partial: PartialResults
) -> tuple[Rotations, dict[str, Any]]:
    """The rotations, and facts about how they were learned."""
    from builder.transform import rotations

    if rows is None:
        return rotations.random_rotations(snapshot.config, part), {}
    from builder.transform import learned

    partial.begin()
    matrices, facts = learned.learn(snapshot, part, rows, partial)
    return rotations.learned_rotations(matrices, part), {"learned": facts}


def _opened(snapshot: Snapshot, part: Transform, artifact: Artifact) -> Snapshot:
    """The artifact as a model. Its files belong to it as those of a snapshot do, so that a change is noticed."""
    files = artifact.manifest["files"]
    known = {"external": {"root": str(artifact.path), "files": files}, "times": times(artifact.path, list(files))}
    return replace(
        snapshot,
        path=artifact.path,
        digest=artifact.digest,
        config=spinquant.config(snapshot.config, part.rotations),
        artifact=replace(artifact, facts={**artifact.facts, **known}),
    )
