"""`builder clean`: a plan of what goes and why, which is printed, and then carried out as it stands.

What goes is provably the store's own: a stage directory whose manifest says so and that holds nothing else, a link to
one, a name that only this program gives. Finished stages go only if somebody asked: by name, by age, by --all, or by
removing the link in models/ that a build had made. Everything else stays and is named.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from builder.clean import leftovers, reachability
from builder.clean.leftovers import DAY, Entry, bytes_of
from builder.clean.reachability import Graph, Request
from builder.core import atomic
from builder.core.errors import StageError, UsageError
from builder.core.locks import lock_unless_served
from builder.core.manifest import KEY
from builder.core.output import Output, size
from builder.core.store import EVALUATION, MARKER, STAGES
from builder.publish import build_record

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": DAY, "w": 7 * DAY}
SHOWN = 20  # lines of what was left alone


@dataclass
class Plan:
    """`remove` in the order in which it happens; `keep`: finished stages that stay; `alone`: what is not ours."""

    root: Path
    remove: list[Entry] = field(default_factory=list)
    keep: list[Entry] = field(default_factory=list)
    alone: list[Entry] = field(default_factory=list)


def age(text: str) -> float:
    """Seconds of `7d`, `12h`, `30m`, `2w` or plain seconds. UsageError for anything else."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhdw]?)", text.strip())
    if not found:
        raise UsageError(f"{text[:40]!a} is not an age.", hint="Give a number and a unit: --older-than 7d, or 12h")
    return float(found[1]) * UNITS[found[2]]


def check_root(root: Path) -> Path:
    """The store's directory, resolved. UsageError for what is not a store."""
    if not root.is_dir():
        raise UsageError(f"There is nothing at {root}.", hint="Name the directory that a build wrote: --output DIR")
    resolved = root.resolve()
    if resolved in (Path("/"), Path.home().resolve()):
        raise UsageError(
            f"{resolved} is not cleaned: no output directory should be there.",
            hint="Name the directory that a build wrote: --output DIR",
        )
    if not (resolved / MARKER).is_file() and not reachability.read_store(resolved).nodes:
        raise UsageError(
            f"{resolved} is not an output directory of this program; nothing was touched.",
            why=f"It has no {MARKER}, which every build writes, and no stage with a manifest.",
            hint="Name the directory that a build wrote: --output DIR",
        )
    return resolved


def plan(root: Path, request: Request) -> Plan:
    """What cleaning this store would do. The caller holds the store's lock exclusively: nothing is being built."""
    graph = reachability.read_store(root)
    gone, kept = reachability.removable(graph, request)
    made = Plan(root, alone=list(graph.alone))
    for path, why in kept.items():
        where = made.alone if path in graph.stuck else made.keep
        where.append(Entry(path, graph.stuck.get(path, why), bytes_of(path)))
    _add_links(graph, request, gone, made)
    stages = [Entry(path, why, bytes_of(path)) for path, why in gone.items()]
    made.remove += sorted(stages, key=_downstream_first)
    for path in build_record.stale(root, gone=[entry.path for entry in stages]):
        made.remove.append(Entry(path, "the record of a repository that is gone", bytes_of(path)))
    known = {entry.path for entry in made.remove}
    lists = {"remove": made.remove, "keep": made.keep, "alone": made.alone}
    older_than = 0.0 if request.everything else request.older_than
    for what, entry in leftovers.find_leftovers(root, older_than):
        lists[what] += [] if entry.path in known else [entry]
    return made


def carry_out(made: Plan) -> list[Entry]:
    """Removes what the plan says, each stage by a rename first; returns what could not be removed, and why."""
    trash: list[tuple[Entry, Path]] = []
    failed: list[Entry] = []
    stopped = ""
    with ExitStack() as held:
        for entry in made.remove:
            is_stage = KEY.fullmatch(entry.path.name) is not None
            if is_stage and stopped:
                failed.append(Entry(entry.path, f"not tried, for {stopped} stays and may need it"))
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
    """Removed paths on stdout, what stays and why on stderr; all of it with --json."""
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
    """Raises one BuilderError for all that could not be removed."""
    if failed:
        raise StageError(
            f"{len(failed)} of the paths in {root} could not be removed.",
            why="\n".join(f"{entry.path}: {entry.why}" for entry in failed[:10]),
            hint="Check their owner and whether the disk is read-only, then clean again: it goes on from here.",
        )


def _put_aside(path: Path) -> Path:
    """Under a name that nothing takes for a stage; a kill from here on leaves only leftovers for the next clean."""
    if not KEY.fullmatch(path.name):
        return path
    aside = path.parent / f".{path.name}.{os.getpid()}.trash"
    path.rename(aside)
    return aside


def _add_links(graph: Graph, request: Request, gone: dict[Path, str], made: Plan) -> None:
    """Links go first: without its link a repository that a kill leaves is finished by the next clean."""
    for link in graph.links:
        if link.is_asked(request):
            why = "--all" if request.everything else "named"
            stays = "" if link.repository.path in gone else "; its repository stays"
            made.remove.append(Entry(link.path, why + stays, bytes_of(link.path)))
    made.remove += graph.dangling


def _downstream_first(entry: Entry) -> tuple[int, Path]:
    """So that a kill leaves no repository without its engine."""
    stage = entry.path.parent.name
    return (STAGES.index(stage) if stage in STAGES else len(STAGES) + EVALUATION.index(stage)) * -1, entry.path


def _grouped(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.why, []).append(entry)
    return found
