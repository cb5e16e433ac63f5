"""Decides which finished stages of a store can be removed, like a garbage collector.

Stages are the nodes of a graph; a digest among a stage's ingredients is an edge to the stage with that digest. If two
stages have the same digest, the edge leads to both, because either may be the one that the current code looks for. A
stage is judged by its manifest, even if its files are damaged.
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
from builder.publish import build_record, versions

ANY_FORMAT = tuple(range(1, manifests.FORMAT + 1))
INPUTS = ("adapter", "texts", "task_names")  # stages of EVALUATION that are inputs, not measurements
MEASUREMENTS = frozenset((*EVALUATION, "smoke")) - set(INPUTS)


@dataclass(frozen=True)
class Request:
    """What to remove: links or stages by name, stages unused for `older_than` seconds, or everything."""

    names: tuple[str, ...] = ()
    older_than: float | None = None
    everything: bool = False


@dataclass(frozen=True)
class Link:
    """An entry of models/ and its repository. `ours`: it is a link into this store, so that it may be removed."""

    path: Path
    repository: Artifact
    ours: bool

    def is_requested(self, request: Request) -> bool:
        """Whether the request includes this link."""
        return self.ours and (request.everything or _is_named(self.repository, request.names, self.path.name))


@dataclass
class Graph:
    """A store's content: `nodes`, the stages that are provably its own, and `links`, the entries of models/.

    `dangling`: links to repositories that are gone. `alone`: entries that this program did not make. `stuck`: stages
    that can't be removed because of foreign files or mounts in them. All with reasons.
    """

    root: Path
    nodes: dict[Path, Artifact] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    dangling: list[Entry] = field(default_factory=list)
    alone: list[Entry] = field(default_factory=list)
    stuck: dict[Path, str] = field(default_factory=dict)

    @property
    def everything(self) -> list[Artifact]:
        """All stages of the graph."""
        return list(self.nodes.values())


def read_store(root: Path) -> Graph:
    """Reads the graph of a store. Accepts only stages whose manifest matches their place in the store."""
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
    graph.stuck = {path: reason for path, artifact in graph.nodes.items() if (reason := _stuck(artifact))}
    for path in children(root / "models"):
        if not path.name.startswith("."):
            _add_link(path, graph)
    return graph


def removable(graph: Graph, request: Request) -> tuple[dict[Path, str], dict[Path, str]]:
    """(stages to remove, stages to keep), each as {path: reason}. UsageError for an unknown name."""
    protected = _protected(graph, request)
    requested = _requested(graph, request, protected)
    removed = _consistent(graph, requested, protected)
    if request.older_than is not None:
        removed |= _unused_for(graph, request.older_than, removed, protected)
    kept = [artifact for artifact in graph.everything if artifact.path not in removed]
    users = {digest: artifact for artifact in kept for digest in strings(artifact.manifest["ingredients"])}
    reasons = {a.path: protected.get(a.path) or _why_kept(users.get(a.digest)) for a in kept}
    return removed, reasons


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
        return "it is a file that this program did not write"
    if (path / MANIFEST).is_file() and KEY.fullmatch(path.name):
        return f"its {MANIFEST} is damaged ({error}); remove it by hand, or build again"
    return "it is a directory that this program did not make"


def _add_link(path: Path, graph: Graph) -> None:
    """Adds an entry of models/. A directory in place of a link is a copy, which protects the copied stages."""
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
        Entry(
            path,
            "it links to something outside of this store"
            if path.is_symlink()
            else "it is not a link; the stages that it was copied from are kept",
        )
    )


def _protected(graph: Graph, request: Request) -> dict[Path, str]:
    """Stages that must stay, with reasons: what an entry of models/, a served repository or a stuck stage needs."""
    links = [link for link in graph.links if not link.is_requested(request)]
    roots = [(link.repository, f"models/{link.path.name} needs it") for link in links]
    for link in links:
        version = versions.before(graph.root, link.path.name) if link.ours else None
        if version and (path := version.repository(graph.root)) in graph.nodes:
            roots.append((graph.nodes[path], f"models/{link.path.name} can return to it (builder rollback)"))
    for path, repository in graph.nodes.items():
        if repository.stage == "repository":
            with suppress(OSError), lock_unless_served(path) as free:
                roots += [] if free else [(repository, f"repository/{path.name} is being served")]
    found: dict[Path, str] = {}
    for path in graph.stuck:
        roots.append((graph.nodes[path], f"{path.parent.name}/{path.name} can't be removed, and was made from it"))
    for repository, why in roots:
        chain = upstream([repository, *_recorded(repository, graph)], graph.everything)
        for artifact in _with_measurements(chain, graph.everything):
            named = artifact.stage in MEASUREMENTS and _is_named(artifact, request.names)
            if artifact.path in graph.nodes and not named:
                found.setdefault(artifact.path, why)
    return found


def _recorded(repository: Artifact, graph: Graph) -> list[Artifact]:
    """The stages in the build record of a repository and, if it has several models, in those of each of them."""
    chain = upstream([repository], graph.everything)
    paths = [path for one in chain if one.stage == "repository" for path in versions.stages(graph.root, one.path)]
    return [graph.nodes[path] for path in paths if path in graph.nodes]


def _with_measurements(chain: Sequence[Artifact], everything: Sequence[Artifact]) -> list[Artifact]:
    """The chain, and the tests and measurements that were made only on stages of the chain, with their inputs."""
    kept = {artifact.path: artifact for artifact in chain}
    while True:  # a measurement may itself be the subject of another one
        digests = {artifact.digest for artifact in kept.values()}
        found = [a for a in everything if a.path not in kept and subjects(a) and set(subjects(a)) <= digests]
        if not found:
            return list(kept.values())
        kept |= {artifact.path: artifact for artifact in upstream(found, everything)}


def subjects(artifact: Artifact) -> list[str]:
    """Digests of the artifacts that a test or measurement was made on; empty for other stages."""
    if artifact.stage not in MEASUREMENTS:
        return []
    ingredients = artifact.manifest["ingredients"]
    of = next((ingredients[name] for name in ("of", "repository", "checkpoint") if name in ingredients), None)
    return list(strings(of))


def _requested(graph: Graph, request: Request, protected: Collection[Path]) -> dict[Path, str]:
    """Stages named, included in --all, or whose link was removed by hand; with all stages upstream of them."""
    unlinked = build_record.unlinked(graph.root)
    _check_names(graph, request.names, {*unlinked, *(link.path.name for link in graph.links)})
    if request.everything:
        return {path: "--all" for path in graph.nodes if path not in protected}
    starts = [(link.repository, "named") for link in graph.links if link.is_requested(request)]
    starts += [(artifact, "named") for artifact in graph.everything if _is_named(artifact, request.names)]
    for name, path in unlinked.items():
        if path in graph.nodes:
            why = "named" if name in request.names else f"the link models/{name} was removed"
            starts.append((graph.nodes[path], why))
    found: dict[Path, str] = {}
    for start, why in starts:
        found[start.path] = why
        for artifact in upstream([start], graph.everything):
            found.setdefault(artifact.path, f"only {start.stage}/{start.path.name} was made from it")
    return {path: why for path, why in found.items() if path not in protected}


def _consistent(graph: Graph, requested: Mapping[Path, str], protected: Collection[Path]) -> dict[Path, str]:
    """The requested stages, except those that a kept stage was made from, plus measurements that lose their subject."""
    others = [a for a in graph.everything if a.path not in requested and a.stage not in MEASUREMENTS]
    needed = {a.path for a in upstream([*others, *(graph.nodes[path] for path in protected)], graph.everything)}
    removed = {path: why for path, why in requested.items() if path not in needed}
    while True:  # removing a measurement may orphan another one that was made on it
        existing = {a.digest for a in graph.everything}
        remaining = {a.digest for a in graph.everything if a.path not in removed}
        orphaned = [
            a.path
            for a in graph.everything
            if a.path not in removed and a.path not in protected and any(s in existing - remaining for s in subjects(a))
        ]
        if not orphaned:
            break
        removed |= dict.fromkeys(orphaned, "the stage that it was measured on is removed")
    measurements = [a for a in graph.everything if a.path not in removed and a.stage in MEASUREMENTS]
    needed = {a.path for a in upstream(measurements, graph.everything)}
    return {path: why for path, why in removed.items() if path not in needed}


def _unused_for(graph: Graph, limit: float, removed: Collection[Path], protected: Collection[Path]) -> dict[Path, str]:
    """Stages unused for `limit` seconds, except those that a younger one was made from or measured on."""
    unused = {a.path: _unused(a) for a in graph.everything if a.path not in removed}
    young = [graph.nodes[path] for path, seconds in unused.items() if seconds < limit or path in protected]
    kept = {a.path for a in upstream(young, graph.everything)}
    return {path: f"unused for {duration(seconds)}" for path, seconds in unused.items() if path not in kept}


def _unused(artifact: Artifact) -> float:
    """Seconds since a stage was made or last used by a build, which touches the directory (Store.stage)."""
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
            f"There is no link or stage {unknown[0]!a}.",
            why=f"Links in models/: {', '.join(sorted(links)) or 'none'}.",
            hint="Name a link in models/, or a stage such as repository/KEY.",
        )


def _why_kept(user: Artifact | None) -> str:
    if user is not None:
        return f"{user.stage}/{user.path.name} was made from it"
    return "no link needs it; to remove it, name it or give --older-than"


def _stuck(artifact: Artifact) -> str:
    """Why a stage can't be removed: foreign files or mounts in it. "" if it can."""
    path = artifact.path
    if reason := why_untouchable(path.parent):
        return f"{path.parent}: {reason}"
    if atomic.mounts_under(path):
        return "something is mounted there"
    if added := manifests.unexpected_files(path, artifact.manifest):
        return f"it contains added files: {', '.join(added[:3])}"
    return ""
