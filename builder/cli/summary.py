"""What a build prints at its end: the artifact, its quality, and the next command."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from builder.core.output import Output
from builder.core.store import Artifact, Store
from builder.pipeline import Built
from builder.quantize.pseudo_stage import DIRECTORY
from builder.recipe.schema import Resolved


def show(built: Built, resolved: Resolved, store: Store, until: str, out: Output) -> None:
    """Prints the result of a build that ran up to the stage `until`; with --json as one object."""
    last = _last(store)
    out.result(_as_object(built, store))
    if all(done.cached for done in store.done):
        out.info("nothing to do: every stage is cached")
    if built.quality:
        from builder.report.quality_summary import show as show_quality

        show_quality(built.quality, resolved.recipe.quality.min_score, out)
    if built.evaluation:
        from builder.evaluate.stage import show_tables

        show_tables(built.evaluation, out)
    if built.smoke and built.smoke.sample:
        out.text(f"prompt     {built.smoke.sample.prompt!r}")
        out.text(f"answer     {built.smoke.sample.answer!r}")
    if built.layouts:
        out.text(f"layouts    {built.layouts.path / 'compressed_tensors'}")
    if built.pseudo:
        out.text(f"pseudo     {built.pseudo.path / DIRECTORY}")
    if built.link is None:
        made = built.repository.path if built.repository else last.path
        out.text(f"{made}  (not published: it failed the {built.verdict.by})" if built.verdict else str(last.path))
        return
    out.text(f"repository {built.link}" + ("" if until == "smoke" else "  (not served, not tested)"))
    if built.verdict and built.verdict.status == "not checked":
        if not built.quality:
            out.text(f"quality    not checked: {built.verdict.reasons[0]}")
        out.warn(f"quality not checked: {built.verdict.reasons[0]}")
    out.text(f"next       builder serve {built.link}")


def _built_here(store: Store) -> list[Artifact]:
    """The artifacts of the chain, without the judgements on them."""
    return [done for done in store.done if done.stage not in ("quality", "verdict")]


def _last(store: Store) -> Artifact:
    """The artifact that the chain ended with; layouts that were requested lie beside it."""
    return [done for done in _built_here(store) if done.stage != "layouts"][-1]


def _as_object(built: Built, store: Store) -> dict[str, Any]:
    """The result for --json."""
    done_here = _built_here(store)
    return {
        "path": str(_last(store).path),
        "repository": str(built.link) if built.link else None,
        "unpublished": str(built.repository.path) if built.repository and not built.link else None,
        "stages": [
            {
                "stage": done.stage,
                "key": done.manifest["key"],
                "path": str(done.path),
                "cached": done.cached,
                "seconds": done.manifest["seconds"],
            }
            for done in done_here
        ],
        "quality": built.quality.as_dict() if built.quality else None,
        "verdict": asdict(built.verdict) if built.verdict else None,
        "smoke": built.smoke.as_dict() if built.smoke else None,
        "evaluation": built.evaluation.as_dict() if built.evaluation else None,
    }
