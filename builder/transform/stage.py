"""The transform stage: Snapshot -> Snapshot of a model with the same function and rotated weights.

It lies between the snapshot and what quantizes it. The result is a model directory like any other.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from builder.architectures import catalog
from builder.core.store import Artifact, Store, library_versions, sources_digest
from builder.hub.snapshot import Snapshot, Source
from builder.model.hashed_files import times
from builder.recipe.transform import Transform
from builder.transform import spinquant

STAGE = "transform"
LIBRARIES = ("numpy",)
SOURCES = (
    "builder/transform/stage.py",
    "builder/transform/writing.py",
    "builder/transform/folding.py",
    "builder/transform/spinquant.py",
    "builder/transform/rotation.py",
    "builder/transform/hadamard.py",
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
    config = spinquant.config(source.config, part.rotations)
    return replace(source, config=config, tensors={fold.name: (fold.dtype, fold.shape) for fold in folds})


def transformed(snapshot: Snapshot, part: Transform, *, store: Store) -> Snapshot:
    """The model as it is quantized: rotated, or as it is. Raises what `writing.write` raises."""
    if not part.rotates:
        return snapshot
    family = catalog.of(snapshot.config).rotation
    ingredients = {
        "snapshot": snapshot.digest,
        "part": part.model_dump(mode="json"),
        "family": family.model_dump(mode="json", exclude={"source"}) if family else None,
        "libraries": library_versions(*LIBRARIES),
        "sources": sources_digest(*SOURCES),
    }

    def make(tmp: Path) -> dict[str, Any]:
        from builder.transform import writing  # numpy: only for those who rotate

        started = time.monotonic()
        with snapshot.source.explain_failures():
            facts = writing.write(snapshot.path, snapshot.files, part, tmp, store.out)
        snapshot.source.check_unchanged()
        named = {"model_id": snapshot.model_id, "revision": snapshot.revision}
        return {**named, **facts, "seconds": {"write": round(time.monotonic() - started, 3)}}

    return _opened(snapshot, part, store.stage(STAGE, ingredients, make))


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
