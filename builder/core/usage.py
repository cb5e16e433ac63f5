"""What limited a piece of work: the cores, the disk or the network, by what was measured while it ran."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from builder.core.output import seconds, size

BLOCK = 512  # bytes in a block of ru_inblock and ru_oublock (kernel/exit.c and include/linux/task_io_accounting_ops.h)
# A share from which something counts as the limit. Below all of them several things took turns.
BUSY, HELD_UP = 0.75, 0.5


@dataclass(frozen=True)
class Usage:
    """What a piece of work used. seconds: wall time. cpu: CPU seconds of this process and its children; cores: how many
    they could run on; busy: the share of the machine's cores that were busy, with anything.

    stalled: seconds in which some task waited for a disk. read, written: bytes from and to disks, by this process and
    its children. downloading: seconds in which a download ran; received: its bytes.
    """

    seconds: float
    cpu: float
    cores: int
    busy: float
    stalled: float
    read: int = 0
    written: int = 0
    downloading: float = 0.0
    received: int = 0


def limit(used: Usage) -> str:
    """What limited the work: "cores", "disk", "network", "one core" (the others had nothing to do), or "" if none of
    them did for long enough.

    Cores first: a disk or a network that is slow leaves them idle. A disk before the network, because a download waits
    for the disk that it writes to.
    """
    if used.busy >= BUSY or used.cpu >= BUSY * used.seconds * used.cores:
        return "cores"
    if used.stalled >= HELD_UP * used.seconds:
        return "disk"
    if used.downloading >= HELD_UP * used.seconds:
        return "network"
    return "one core" if used.cpu >= HELD_UP * used.seconds else ""


def sentence(used: Usage) -> str:
    """One line for people: what limited the work, and the figures that say so."""
    by = {"one core": "one core: most of the work was in one thread", "": "nothing for most of the time"}
    what = limit(used)
    figures = [
        f"{seconds(used.cpu)} of CPU in {seconds(used.seconds)} on {used.cores} core{'s' * (used.cores > 1)}",
        f"{used.busy:.0%} of the machine busy",
        f"{seconds(used.stalled)} of waiting for disks ({size(used.read)} read, {size(used.written)} written)",
    ]
    if used.downloading:
        figures.append(f"{size(used.received)} downloaded in {seconds(used.downloading)}")
    return f"limited by {by.get(what, f'the {what}')}: {', '.join(figures)}"


def started() -> Callable[[], Usage]:
    """A function that returns the usage since this call. Children count once they have been waited for.

    The share of busy cores and the time of waiting for disks are those of the machine (/proc/stat, /proc/pressure).
    """
    start = _now()

    def usage() -> Usage:
        wall, cpu, read, written, busy, total, stalled = (b - a for a, b in zip(start, _now(), strict=True))
        share = busy / total if total else 0.0
        cores = len(os.sched_getaffinity(0))
        return Usage(wall, cpu, cores, share, min(stalled, wall), int(read), int(written))

    return usage


def with_download(used: Usage, nbytes: int, took: float) -> Usage:
    """The same with a download that ran meanwhile."""
    return replace(used, downloading=took, received=nbytes)


def _now() -> tuple[float, ...]:
    """Wall and CPU seconds, bytes read and written, ticks of busy cores and of all, seconds of waiting for disks."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(one.ru_utime + one.ru_stime for one in both)
    read, written = sum(one.ru_inblock for one in both), sum(one.ru_oublock for one in both)
    ticks = [int(word) for word in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    idle, iowait = ticks[3:5]  # proc(5): user nice system idle iowait irq softirq steal
    stalled = _pressure()
    if stalled is None:  # a kernel without pressure stall information
        stalled = iowait / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), cpu, read * BLOCK, written * BLOCK, sum(ticks) - idle - iowait, sum(ticks), stalled


def _pressure() -> float | None:
    """Seconds since boot in which some task waited for a disk (Documentation/accounting/psi.rst); None if the kernel
    does not count them."""
    try:
        first = Path("/proc/pressure/io").read_text(encoding="ascii").split("\n", 1)[0]
    except OSError:
        return None
    return int(first.rpartition("total=")[2]) / 1e6
