"""Which finished stages of a store may go: a graph of manifests, in which a digest among the ingredients is an edge.

Where two keys have the same content, an edge leads to both: which one the current code looks for is not known here.
Stages count by their manifests, whether their files are whole or not.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from builder.clean.leftovers import HALF_MADE, WAITING, Entry, children, duration, why_untouchable
from builder.core import atomic
from builder.core import manifest as manifests
from builder.core.errors import UsageError
from builder.core.locks import lock_unless_served
from builder.core.manifest import KEY, MANIFEST, Damaged
from builder.core.store import EVALUATION, STAGES, Artifact, strings, upstream
from builder.publish import build_record

ANY_FORMAT = tuple(range(1, manifests.FORMAT + 1))
INPUTS = ("texts", "task_names")  # of EVALUATION what is measured with, not what was measured
MEASUREMENTS = frozenset((*EVALUATION, "smoke")) - set(INPUTS)


@dataclass(frozen=True)
class Request:
    """What was asked to go: names of links or stages, stages unused for so many seconds, or everything."""

    names: tuple[str, ...] = ()
    older_than: float | None = None
    everything: bool = False


@dataclass(frozen=True)
class Link:
    """A name in models/ and the repository that it leads to. `ours`: a link into this store, which may be removed."""

    path: Path
    repository: Artifact
    ours: bool

    def is_asked(self, request: Request) -> bool:
        """Whether it goes with its repository."""
        return self.ours and (request.everything or _is_named(self.repository, request.names, self.path.name))


@dataclass
class Graph:
    """The stages that are provably this store's, the names in models/, and what lies beside them, with reasons.

    `stuck`: stages that can't be removed, for somebody put something there.
    """

    root: Path
    nodes: dict[Path, Artifact] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    dangling: list[Entry] = field(default_factory=list)
    alone: list[Entry] = field(default_factory=list)
    stuck: dict[Path, str] = field(default_factory=dict)

    @property
    def everything(self) -> list[Artifact]:
        return list(self.nodes.values())


def read_store(root: Path) -> Graph:
    """The graph of a store. Nothing in it is trusted but manifests that say what their place says."""
    graph = Graph(root)
    for stage in (*STAGES, *EVALUATION):
        directory = root / stage
        reason = why_untouchable(directory) if os.path.lexists(directory) else ""
        if reason:
            graph.alone.append(Entry(directory, reason))
        for path in children(directory):
            if HALF_MADE.fullmatch(path.name) or WAITING.fullmatch(path.name):
                continue
            try:
                graph.nodes[path] = _node(path, stage)
            except Damaged as error:
                graph.alone += [] if reason else [Entry(path, _why_not_ours(path, str(error)))]
    graph.stuck = {path: reason for path, one in graph.nodes.items() if (reason := _stuck(one))}
    for path in children(root / "models"):
        if not path.name.startswith("."):
            _add_link(path, graph)
    return graph


def removable(graph: Graph, request: Request) -> tuple[dict[Path, str], dict[Path, str]]:
    """(stages to remove, stages to keep), with the reason for each. UsageError for a name that is not known."""
    protected = _protected(graph, request)
    forced = _forced(graph, request, protected)
    gone = _closed(graph, forced, protected)
    if request.older_than is not None:
        gone |= _old(graph, request.older_than, gone, protected)
    stays = [one for one in graph.everything if one.path not in gone]
    users = {digest: one for one in stays for digest in strings(one.manifest["ingredients"])}
    return gone, {one.path: protected.get(one.path) or _why_kept(users.get(one.digest)) for one in stays}


def _node(path: Path, stage: str) -> Artifact:
    if path.is_symlink():
        raise Damaged("it is a symbolic link")
    found = manifests.load(path, formats=ANY_FORMAT)
    if (found["stage"], found["key"]) != (stage, path.name):
        raise Damaged(f"it is not {stage}/{path.name}")
    return Artifact(stage, path, found["digest"], found["facts"], True, found)


def _why_not_ours(path: Path, error: str) -> str:
    if reason := why_untouchable(path):
        return reason
    if not path.is_dir():
        return "a file that this program did not write"
    if (path / MANIFEST).is_file() and KEY.fullmatch(path.name):
        return f"its {MANIFEST} is damaged ({error}); remove it by hand, or build again"
    return "a directory that this program did not make"


def _add_link(path: Path, graph: Graph) -> None:
    """A directory that took a link's place is a copy: it keeps what it was made from."""
    target = path.resolve()
    if target in graph.nodes:
        graph.links.append(Link(path, graph.nodes[target], path.is_symlink()))
        return
    if path.is_symlink() and target.parent == graph.root / "repository" and not os.path.lexists(target):
        graph.dangling.append(Entry(path, "a link to a repository that is gone"))
        return
    with suppress(Damaged):
        found = manifests.load(path, formats=ANY_FORMAT)
        copied = Artifact(found["stage"], path, found["digest"], found["facts"], True, found)
        graph.links.append(Link(path, copied, ours=False))
    graph.alone.append(
        Entry(path, "it leads out of this store" if path.is_symlink() else "not a link; what it was made from stays")
    )


def _protected(graph: Graph, request: Request) -> dict[Path, str]:
    """Stages that stay whatever is asked, and why: all that a name in models/ or a served repository needs."""
    roots = [(one.repository, f"models/{one.path.name} needs it") for one in graph.links if not one.is_asked(request)]
    for path, repository in graph.nodes.items():
        if repository.stage == "repository":
            with suppress(OSError), lock_unless_served(path) as free:
                roots += [] if free else [(repository, f"repository/{path.name} is being served")]
    found: dict[Path, str] = {}
    for path in graph.stuck:
        roots.append((graph.nodes[path], f"{path.parent.name}/{path.name} can't be removed, and was made from it"))
    for repository, why in roots:
        recorded = [
            graph.nodes[path] for path in build_record.stages(graph.root, repository.path) if path in graph.nodes
        ]
        chain = upstream([repository, *recorded], graph.everything)
        for one in _measured(chain, graph.everything):
            if one.path in graph.nodes and not (one.stage in MEASUREMENTS and _is_named(one, request.names)):
                found.setdefault(one.path, why)
    return found


def _measured(chain: Sequence[Artifact], everything: Sequence[Artifact]) -> list[Artifact]:
    """The chain, the tests of its repository, and what was measured on its models and no others."""
    kept = {artifact.path: artifact for artifact in chain}
    while True:
        digests = {artifact.digest for artifact in kept.values()}
        more = [a for a in everything if a.path not in kept and subjects(a) and set(subjects(a)) <= digests]
        if not more:
            return list(kept.values())
        kept |= {artifact.path: artifact for artifact in upstream(more, everything)}


def subjects(artifact: Artifact) -> list[str]:
    """Digests of what a test or a measurement is of; none for other stages."""
    if artifact.stage not in MEASUREMENTS:
        return []
    ingredients = artifact.manifest["ingredients"]
    of = next((ingredients[name] for name in ("of", "repository", "checkpoint") if name in ingredients), None)
    return list(strings(of))


def _forced(graph: Graph, request: Request, protected: Collection[Path]) -> dict[Path, str]:
    """What goes by name or --all, or because its link was removed by hand, with all that it was made from."""
    unlinked = build_record.unlinked(graph.root)
    _check_names(graph, request.names, {*unlinked, *(link.path.name for link in graph.links)})
    if request.everything:
        return {path: "--all" for path in graph.nodes if path not in protected}
    starts = [(link.repository, "named") for link in graph.links if link.is_asked(request)]
    starts += [(one, "named") for one in graph.everything if _is_named(one, request.names)]
    for name, path in unlinked.items():
        if path in graph.nodes:
            why = "named" if name in request.names else f"the link models/{name} was removed"
            starts.append((graph.nodes[path], why))
    forced: dict[Path, str] = {}
    for start, why in starts:
        forced[start.path] = why
        for one in upstream([start], graph.everything):
            forced.setdefault(one.path, f"{start.stage}/{start.path.name} was made from it, and nothing else")
    return {path: why for path, why in forced.items() if path not in protected}


def _closed(graph: Graph, forced: Mapping[Path, str], protected: Collection[Path]) -> dict[Path, str]:
    """Without what a stage that stays was made from, and with the measurements whose subject goes."""
    stays = [a for a in graph.everything if a.path not in forced and a.stage not in MEASUREMENTS]
    kept = {a.path for a in upstream([*stays, *(graph.nodes[path] for path in protected)], graph.everything)}
    gone = {path: why for path, why in forced.items() if path not in kept}
    while True:
        there = {a.digest for a in graph.everything}
        left = {a.digest for a in graph.everything if a.path not in gone}
        lost = [
            a.path
            for a in graph.everything
            if a.path not in gone and a.path not in protected and any(s in there - left for s in subjects(a))
        ]
        if not lost:
            break
        gone |= dict.fromkeys(lost, "what it was measured on goes")
    measured = [a for a in graph.everything if a.path not in gone and a.stage in MEASUREMENTS]
    kept = {a.path for a in upstream(measured, graph.everything)}
    return {path: why for path, why in gone.items() if path not in kept}


def _old(graph: Graph, limit: float, gone: Collection[Path], protected: Collection[Path]) -> dict[Path, str]:
    """Stages unused for so long that nothing younger was made from or measured on."""
    unused = {a.path: _unused(a) for a in graph.everything if a.path not in gone}
    young = [graph.nodes[path] for path, seconds in unused.items() if seconds < limit or path in protected]
    kept = {a.path for a in upstream(young, graph.everything)}
    return {path: f"unused for {duration(seconds)}" for path, seconds in unused.items() if path not in kept}


def _unused(artifact: Artifact) -> float:
    """Seconds since a stage was made, or last found by a build, which touches its directory (Store.stage)."""
    used = float(artifact.manifest["started"])
    with suppress(OSError):
        used = max(used, artifact.path.stat().st_mtime)
    return max(0.0, time.time() - used)


def _is_named(artifact: Artifact, names: Sequence[str], link: str = "") -> bool:
    key = artifact.manifest["key"]
    return any(name in (key, f"{artifact.stage}/{key}", link) for name in names)


def _check_names(graph: Graph, names: Sequence[str], links: Collection[str]) -> None:
    known = {*links, *(a.path.name for a in graph.everything)}
    known |= {f"{a.stage}/{a.path.name}" for a in graph.everything}
    if unknown := [name for name in names if name not in known]:
        raise UsageError(
            f"There is no {unknown[0]!a} to remove.",
            why=f"In models/: {', '.join(sorted(links)) or 'nothing'}.",
            hint="Name a link in models/, or a stage as repository/KEY.",
        )


def _why_kept(user: Artifact | None) -> str:
    if user is not None:
        return f"{user.stage}/{user.path.name} was made from it"
    return "no link needs it; name it to remove it, or give --older-than"


def _stuck(artifact: Artifact) -> str:
    """Why a stage can't be removed: somebody put something there."""
    path = artifact.path
    if reason := why_untouchable(path.parent):
        return f"{path.parent}: {reason}"
    if atomic.mounts_under(path):
        return "something is mounted there"
    if added := manifests.unexpected_files(path, artifact.manifest):
        return f"it holds files that were added: {', '.join(added[:3])}"
    return ""
