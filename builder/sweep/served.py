"""What a point's build and its server left in the store: the quality check's verdict, and the figures under load."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from builder import pipeline
from builder.core.store import Artifact, Store, WouldRun, artifacts
from builder.publish import verdict
from builder.publish.links import MODELS
from builder.publish.verdict import BuildVerdict
from builder.recipe.schema import Recipe
from builder.serving import benchmark
from builder.serving.benchmark import BenchmarkReport, Level, Workload
from builder.sweep.points import Load, Point


@dataclass(frozen=True)
class Served:
    """The verdict on a point's build, and what its server did at each concurrency. link: None if it was rejected, or
    built on a machine whose disk can't be seen. repository: its digest."""

    verdict: BuildVerdict
    link: Path | None = None
    levels: tuple[Level, ...] = ()
    repository: str = ""

    @property
    def rejected(self) -> bool:
        """Whether it failed its quality check or its gate, so that nothing serves it."""
        return self.verdict.status == "failed"

    @property
    def tokens_per_second(self) -> float | None:
        """Of the concurrency with the most."""
        return max((level.tokens_per_second for level in self.levels), default=None)


def read(point: Point, dry: Store) -> Served:
    """What the store has. WouldRun if the build or, unless it was rejected, its measurement is missing."""
    return with_levels(read_build(point, dry), point, dry)


def with_levels(found: Served, point: Point, store: Store) -> Served:
    """The verdict with the figures under load. WouldRun if they are missing and it was not rejected."""
    if found.rejected or point.load is None:
        return found
    levels = _levels(found.repository, point.load, artifacts(store.root, check_files=False))
    if not levels:
        raise WouldRun(benchmark.STAGE, "not in the store")
    return replace(found, levels=levels)


def read_build(point: Point, dry: Store) -> Served:
    """The verdict alone. WouldRun if nothing was built. dry: as in measured.read."""
    assert point.served is not None
    recipe = point.served.recipe
    try:
        built = pipeline.build(point.served, dry, until="repository")
    except WouldRun:
        rejected = _rejection(dry.done, recipe, dry.root)
        if rejected is None:
            raise
        return Served(rejected)
    assert built.repository is not None
    repository = built.repository
    found = verdict.latest(repository.digest, [], artifacts(dry.root, check_files=False))
    link = dry.root / MODELS / (recipe.name or "")
    is_here = repository.path.is_relative_to(dry.root)  # or else in the bucket, for another machine
    linked = found is not None and found.status != "failed" and is_here
    if found is None or (linked and link.resolve() != repository.path.resolve()):
        raise WouldRun(verdict.STAGE, "not in the store")
    return Served(found, link if linked else None, repository=repository.digest)


def _rejection(done: Sequence[Artifact], recipe: Recipe, root: Path) -> BuildVerdict | None:
    """Why the quality check of this recipe rejected the checkpoint; None if it has not."""
    checkpoint = next((one.digest for one in done if one.stage == "checkpoint"), None)
    rejections = [
        one
        for one in artifacts(root, check_files=False)
        if one.stage == verdict.STAGE
        and checkpoint in one.manifest["ingredients"]["of"]
        and one.manifest["ingredients"]["asked"].get("min_score") == recipe.quality.min_score
    ]
    found = verdict.latest(checkpoint or "", [], rejections)
    return found if found and found.status == "failed" else None


def _levels(repository: str, load: Load, everything: Sequence[Artifact]) -> tuple[Level, ...]:
    """The newest measurement of this repository, by its digest, under this load."""
    asked = asdict(Workload(load.concurrency, load.requests, load.input_tokens, load.output_tokens))
    kept = [
        one
        for one in everything
        if one.stage == benchmark.STAGE
        and one.manifest["ingredients"].get("repository") == repository
        and one.manifest["ingredients"].get("workload") == {**asked, "concurrency": [*load.concurrency]}
    ]
    newest = max(kept, key=lambda one: float(one.manifest["started"]), default=None)
    return BenchmarkReport.from_dict(newest.facts).levels if newest else ()
