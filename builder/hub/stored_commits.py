"""Lets a plan work offline: if the Hub can't be reached, it assumes the newest commit in the store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.core.errors import BuilderError
from builder.core.store import Artifact, Store, WouldRun, read


def newest_artifact(store: Store, stage: str, same: Mapping[str, Any]) -> Artifact | None:
    """The newest artifact of a stage whose ingredients include all of `same`."""
    found = [read(path) for path in (store.root / stage).glob("[!.]*")]
    matching = [a for a in found if a and all(a.manifest["ingredients"].get(key) == same[key] for key in same)]
    return max(matching, key=lambda artifact: float(artifact.manifest["started"]), default=None)


def fallback_commit(error: BuilderError, known: Artifact | None, repo: str, *, store: Store, stage: str) -> str:
    """The commit of `known`, recorded in the store as an assumption of the plan.

    If `known` is None: raises `error` for the "snapshot" stage, because a plan needs the model's config.json, and
    WouldRun for other stages.
    """
    if known is None:
        if stage == "snapshot":
            raise error
        raise WouldRun(stage, f"the commit of {repo} is unknown: {error.what}") from error
    commit = str(known.manifest["ingredients"]["commit"])
    store.assume(f"{error.what} This plan assumes commit {commit} of {repo}, the newest in the store.")
    return commit
