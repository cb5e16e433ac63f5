"""`builder clean`: makes a plan of what to remove and why, prints it, and carries it out unchanged.

Removes only what is provably the store's own: stage directories with a valid manifest and no other files, links to
them, and names that only this program creates. Removes finished stages only on request: by name, by age, by --all, or
after their link in models/ was removed. Everything else is kept and reported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from builder.aiperf.environment import cache
from builder.clean import leftovers, reachability
from builder.clean.leftovers import DAY, Entry, bytes_of
from builder.clean.reachability import Graph, Request
from builder.core import atomic
from builder.core.errors import StageError, UsageError
from builder.core.locks import lock_unless_served
from builder.core.manifest import KEY
from builder.core.output import Output, size
from builder.core.store import EVALUATION, MARKER, STAGES
from builder.publish import build_record, versions

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY, "w": 7 * DAY}
SHOWN = 20  # how many entries that were left alone to print


@dataclass
class Plan:
    """`remove`: entries in the order of removal; `keep`: finished stages that stay; `alone`: entries of others."""

    root: Path
    remove: list[Entry] = field(default_factory=list)
    keep: list[Entry] = field(default_factory=list)
    alone: list[Entry] = field(default_factory=list)


def age(text: str) -> float:
    """Parses an age to seconds: `7d`, `12h`, `30m`, `2w`, or plain seconds. UsageError for anything else."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhdw]?)", text.strip())
    if not found:
        raise UsageError(f"{text[:40]!a} is not an age.", hint="Give a number and a unit: --older-than 7d, or 12h")
    return float(found[1]) * UNITS[found[2]]


def check_root(root: Path) -> Path:
    """The store's directory, resolved. UsageError unless it is a store."""
    if not root.is_dir():
        raise UsageError(f"There is no directory {root}.", hint="Name the output directory of a build: --output DIR")
    resolved = root.resolve()
    if resolved in (Path("/"), Path.home().resolve()):
        raise UsageError(
            f"{resolved} is never cleaned, because it should not be an output directory.",
            hint="Name the output directory of a build: --output DIR",
        )
    if not (resolved / MARKER).is_file() and not reachability.read_store(resolved).nodes:
        raise UsageError(
            f"{resolved} is not an output directory of this program; nothing was removed.",
            why=f"It contains neither {MARKER}, which every build writes, nor a stage with a manifest.",
            hint="Name the output directory of a build: --output DIR",
        )
    return resolved


def plan(root: Path, request: Request) -> Plan:
    """Plans the cleaning of a store. The caller holds the store's exclusive lock, so no build is running.

    UsageError for a name in the request that is neither a link nor a stage.
    """
    graph = reachability.read_store(root)
    removed, kept = reachability.removable(graph, request)
    made = Plan(root, alone=list(graph.alone))
    for path, why in kept.items():
        where = made.alone if path in graph.stuck else made.keep
        where.append(Entry(path, graph.stuck.get(path, why), bytes_of(path)))
    _add_links(graph, request, removed, made)
    stages = [Entry(path, why, bytes_of(path)) for path, why in removed.items()]
    made.remove += sorted(stages, key=_downstream_first)
    for path in build_record.stale(root, gone=[entry.path for entry in stages]):
        made.remove.append(Entry(path, "the record of a repository that is gone", bytes_of(path)))
    gone = {entry.path.name for entry in made.remove if entry.path.parent == root / "models"}
    for path in versions.stale(root, gone):
        made.remove.append(Entry(path, "the versions of a link that is gone", bytes_of(path)))
    known = {entry.path for entry in made.remove}
    lists = {"remove": made.remove, "keep": made.keep, "alone": made.alone}
    older_than = 0.0 if request.everything else request.older_than
    for what, entry in leftovers.find_leftovers(root, older_than):
        lists[what] += [] if entry.path in known else [entry]
    return made


def carry_out(made: Plan) -> list[Entry]:
    """Carries out a plan. Returns the entries that could not be removed, with reasons.

    Each directory is renamed first, so that a kill leaves no stage that looks finished but lacks files. If a stage
    can't be removed, stages after it are kept: it may need them.
    """
    trash: list[tuple[Entry, Path]] = []
    failed: list[Entry] = []
    stopped = ""
    with ExitStack() as held:
        for entry in made.remove:
            is_stage = KEY.fullmatch(entry.path.name) is not None
            if is_stage and stopped:
                failed.append(Entry(entry.path, f"not tried, because {stopped} could not be removed and may need it"))
                continue
            try:
                if entry.path.parent.name == "repository" and not held.enter_context(lock_unless_served(entry.path)):
                    raise BlockingIOError("it is being served")
                if entry.path.is_dir() and not entry.path.is_symlink():
                    trash.append((entry, _put_aside(entry.path)))
                else:
                    entry.path.unlink(missing_ok=True)
            except OSError as error:
                failed.append(Entry(entry.path, str(error)))
                stopped = entry.path.name if is_stage else stopped
        for entry, path in trash:
            try:
                atomic.remove(path)
            except OSError as error:
                failed.append(Entry(entry.path, str(error)))
    return failed


def show(made: Plan, failed: Sequence[Entry], out: Output, *, dry: bool) -> None:
    """Prints removed paths to stdout and kept ones, with reasons, to stderr; --json has all. `dry`: a dry run."""
    lost = {entry.path for entry in failed}
    removed = [entry for entry in made.remove if entry.path not in lost]
    nbytes = sum(entry.nbytes for entry in removed)
    out.result(
        {
            "removed": [str(entry.path) for entry in removed],
            "bytes": nbytes,
            **{
                name: [{"path": str(entry.path), "why": entry.why} for entry in entries]
                for name, entries in (("kept", made.keep), ("left_alone", made.alone), ("failed", failed))
            },
        }
    )
    for entry in removed:
        out.text(f"{entry.path}  ({entry.why})")
    for why, entries in _grouped(made.keep).items():
        first = entries[0].path.relative_to(made.root)
        more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
        out.info(f"kept {first}{more}, {size(sum(entry.nbytes for entry in entries))}: {why}")
    for entry in made.alone[:SHOWN]:
        out.warn(f"left alone: {entry.path}: {entry.why}")
    if len(made.alone) > SHOWN:
        out.warn(f"left alone: {len(made.alone) - SHOWN} more (--json lists them)")
    out.info(f"{'would free' if dry else 'freed'} {size(nbytes)}")


def check_failed(failed: Sequence[Entry], root: Path) -> None:
    """StageError with all entries that could not be removed, if there are any."""
    if failed:
        raise StageError(
            f"{len(failed)} paths in {root} could not be removed.",
            why="\n".join(f"{entry.path}: {entry.why}" for entry in failed[:10]),
            hint="Check their owner and whether the disk is read-only, then run this again: it continues from here.",
        )


def _put_aside(path: Path) -> Path:
    """Renames a stage to a name that is not a stage's. If we are killed now, the next clean removes it.

    Likewise an environment of AIPerf, which also disappears when the next one is made.
    """
    if path.parent == cache() and not path.name.startswith("."):
        return path.rename(path.parent / f".{path.name}.{os.getpid()}.tmp")
    if not KEY.fullmatch(path.name):
        return path
    aside = path.parent / f".{path.name}.{os.getpid()}.trash"
    path.rename(aside)
    return aside


def _add_links(graph: Graph, request: Request, removed: dict[Path, str], made: Plan) -> None:
    """Plans to remove links first: if we are killed then, the next clean removes the repositories without links."""
    for link in graph.links:
        if link.is_requested(request):
            why = "--all" if request.everything else "named"
            kept = "" if link.repository.path in removed else "; its repository is kept"
            made.remove.append(Entry(link.path, why + kept, bytes_of(link.path)))
    made.remove += graph.dangling


def _downstream_first(entry: Entry) -> tuple[int, Path]:
    """Sort key that removes a repository before its engine, so that a kill leaves no repository without one."""
    stage = entry.path.parent.name
    return (STAGES.index(stage) if stage in STAGES else len(STAGES) + EVALUATION.index(stage)) * -1, entry.path


def _grouped(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.why, []).append(entry)
    return found
