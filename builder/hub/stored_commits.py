"""What a plan takes in place of the Hub's answer where the Hub can't be reached: the newest commit in the store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from builder.core.errors import BuilderError
from builder.core.store import Artifact, Store, WouldRun, read


def newest_artifact(store: Store, stage: str, same: Mapping[str, Any]) -> Artifact | None:
    """The newest artifact of a stage with these ingredients, whatever its others are."""
    found = [read(path) for path in (store.root / stage).glob("[!.]*")]
    alike = [a for a in found if a and all(a.manifest["ingredients"].get(key) == same[key] for key in same)]
    return max(alike, key=lambda artifact: float(artifact.manifest["started"]), default=None)


def fallback_commit(error: BuilderError, known: Artifact | None, repo: str, *, store: Store, stage: str) -> str:
    """The commit of `known`, noted as an assumption of the plan.

    Without it: WouldRun for a stage that the plan does not look into; for a model the error itself, because a plan
    needs its config.json.
    """
    if known is None:
        if stage == "snapshot":
            raise error
        raise WouldRun(stage, f"the commit of {repo} is not known here: {error.what}") from error
    commit = str(known.manifest["ingredients"]["commit"])
    store.assume(f"{error.what} So this plan takes commit {commit} of {repo}, the newest in the store.")
    return commit
