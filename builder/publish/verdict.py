"""The verdict on a build, kept as an artifact that `serve` and the report read.

A repository may be served if at least one build accepted it, or if there is no verdict on it (it was made by an older
version, or copied out of its store). A repository that every build rejected is not served.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from builder.core.errors import EvaluationError
from builder.core.store import Artifact, Store, artifacts, read, root_of, upstream

STAGE = "verdict"
Status = Literal["passed", "failed", "not checked"]


@dataclass(frozen=True)
class BuildVerdict:
    """reasons: what failed, which limits were met, or why quality was not checked. by: the check that decided."""

    status: Status
    reasons: tuple[str, ...]
    by: str = "quality check"


def keep(verdict: BuildVerdict, of: Sequence[str], asked: Mapping[str, Any], *, store: Store) -> None:
    """Stores a verdict. of: digests of the artifacts that it is about. asked: the limits that it was judged by."""
    facts = {"status": verdict.status, "reasons": list(verdict.reasons), "by": verdict.by}
    store.stage(STAGE, {"of": list(of), "asked": dict(asked), **facts}, lambda directory: facts)


def latest(repository: str, chain: Sequence[str], everything: Sequence[Artifact]) -> BuildVerdict | None:
    """The newest verdict on a repository or, if there is none, on the artifacts it was made from. Both by digest."""
    found = _of([repository], everything) or _of(chain, everything)
    newest = max(found, key=lambda one: float(one.manifest["started"]), default=None)
    return _verdict(newest) if newest else None


def check(repository: Path) -> None:
    """EvaluationError if every build of this repository was rejected."""
    directory = Path(repository).resolve()
    artifact, root = read(directory), root_of(directory)
    if artifact is None or root is None:
        return
    everything = artifacts(root, check_files=False)  # verdicts are in the manifests, so no file needs to be hashed
    chain = [one.digest for one in upstream([artifact], everything)]
    found = [_verdict(one) for one in _of(chain, everything)]
    rejected = [one for one in found if one.status == "failed"]
    if len(rejected) < len(found) or not found:
        return
    raise EvaluationError(
        f"{repository} failed the {rejected[-1].by} of its build: {rejected[-1].reasons[0]}.",
        why="\n".join(rejected[-1].reasons[1:]),
        hint="Build it with less loss, or serve it anyway: --ungated (UNGATED=1 with compose)",
    )


def _of(chain: Sequence[str], everything: Sequence[Artifact]) -> list[Artifact]:
    """The verdicts on these digests, oldest first."""
    verdicts = sorted((a for a in everything if a.stage == STAGE), key=lambda a: float(a.manifest["started"]))
    return [one for one in verdicts if {*map(str, one.manifest["ingredients"].get("of", ()))} & set(chain)]


def _verdict(artifact: Artifact) -> BuildVerdict:
    return BuildVerdict(artifact.facts["status"], tuple(artifact.facts["reasons"]), artifact.facts["by"])
