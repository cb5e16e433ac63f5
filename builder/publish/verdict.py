"""Whether a build was accepted: an artifact of its own beside the repository, which `serve` and the report read.

A repository that some build accepted may be served; one that was only ever rejected may not. One that nothing is known
of (made by an older version, or copied out of its store) may.
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
    """`reasons` say what failed, or why quality was not checked, or which limits were met; `by` what judged."""

    status: Status
    reasons: tuple[str, ...]
    by: str = "quality check"


def keep(verdict: BuildVerdict, of: Sequence[str], asked: Mapping[str, Any], *, store: Store) -> None:
    """Records the verdict on the artifacts with these digests, as judged by the limits in `asked`."""
    facts = {"status": verdict.status, "reasons": list(verdict.reasons), "by": verdict.by}
    store.stage(STAGE, {"of": list(of), "asked": dict(asked), **facts}, lambda directory: facts)


def latest(repository: str, chain: Sequence[str], everything: Sequence[Artifact]) -> BuildVerdict | None:
    """The newest verdict on a repository, or without one on what it was made from; all named by their digests."""
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
        hint="Build it with less loss, or serve it all the same: --ungated (UNGATED=1 with compose)",
    )


def _of(chain: Sequence[str], everything: Sequence[Artifact]) -> list[Artifact]:
    """Oldest first."""
    verdicts = sorted((a for a in everything if a.stage == STAGE), key=lambda a: float(a.manifest["started"]))
    return [one for one in verdicts if {*map(str, one.manifest["ingredients"].get("of", ()))} & set(chain)]


def _verdict(artifact: Artifact) -> BuildVerdict:
    return BuildVerdict(artifact.facts["status"], tuple(artifact.facts["reasons"]), artifact.facts["by"])
