"""Whether a build is accepted: by the recipe's accuracy gate or, without one, by the quality check. The verdict is
kept in the store."""

from __future__ import annotations

from typing import Any

from builder.core.store import Store, read
from builder.evaluate.stage import Evaluation
from builder.evaluate.variants import Models
from builder.preflight import memory
from builder.preflight.prepare import Prepared
from builder.publish import verdict
from builder.publish.verdict import BuildVerdict
from builder.quality.check import Quality, check_quality
from builder.recipe.schema import Recipe
from builder.triton.repository import Repository


def check_checkpoint(prepared: Prepared, models: Models, store: Store) -> tuple[Quality, BuildVerdict | None]:
    """The quality of a checkpoint and, only where it is too low, the verdict on every repository made from it."""
    recipe, host = prepared.recipe, memory.machine(store.root)
    quality = check_quality(models, prepared.model, recipe, host, store=store)
    limit = recipe.quality.min_score
    if not (failed := quality.failure(limit)):
        return quality, None
    assert models.checkpoint is not None
    found = BuildVerdict("failed", (failed,))
    verdict.keep(found, [models.checkpoint.digest], {"min_score": limit, "quality": quality.digest}, store=store)
    return quality, found


def judge(
    recipe: Recipe,
    repository: Repository,
    evaluation: Evaluation | None,
    quality: Quality | None,
    *,
    store: Store,
    unchecked: str = "--no-quality-check",
) -> BuildVerdict:
    """The verdict on a repository: of the accuracy gate, or else of the quality check.

    unchecked: why there was no quality check."""
    if evaluation and evaluation.verdict:
        limits = ", ".join(f"{metric} {limit:g}" for metric, limit in evaluation.verdict.limits.items())
        passed = evaluation.verdict.passed
        reasons = (f"the gate: {limits}",) if passed else tuple(evaluation.verdict.failed)
        found = BuildVerdict("passed" if passed else "failed", reasons, "accuracy gate")
        measured = read(evaluation.path)
        asked: dict[str, Any] = {
            "limits": recipe.evaluation.limits,
            "evaluation": measured.digest if measured else None,
        }
    elif quality and not quality.unmeasured:
        limit = recipe.quality.min_score
        found = BuildVerdict("passed", (f"a score of {quality.score:.2f}, at least {limit:g} was asked",))
        asked = {"min_score": limit, "quality": quality.digest}
    else:
        found = BuildVerdict("not checked", (quality.unmeasured if quality else unchecked,))
        asked = {}
    verdict.keep(found, [repository.digest], asked, store=store)
    return found
