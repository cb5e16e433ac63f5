"""Host memory that this process may use: the machine's, or less where a container or a slice of it has a limit.

A limit counts on each level of the process's cgroup, in cgroup v2 (memory.max) and v1 (memory.limit_in_bytes); see the
kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Pages of files, which the kernel takes back when memory is needed, by the names of memory.stat.
FILE_PAGES = {1: ("total_active_file", "total_inactive_file"), 2: ("active_file", "inactive_file")}
LIMIT_AND_USED = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}


@dataclass(frozen=True)
class HostMemory:
    """Bytes: all that this process could have, and what is free or can be freed now."""

    total: int
    available: int


def host_memory(root: Path = Path("/")) -> HostMemory:
    """What /proc/meminfo says, or less where a cgroup has a limit. root: where `proc` and `sys` are."""
    lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    info = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line}
    total = info["MemTotal"]
    available = info.get("MemAvailable", total)
    for limit, free in _limits(root):
        total, available = min(total, limit), min(available, free)
    return HostMemory(total, max(0, available))


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, what is left of it) of each cgroup that this process is in."""
    for directory, version in _cgroups(root):
        try:
            limit, used = (int((directory / name).read_text(encoding="ascii")) for name in LIMIT_AND_USED[version])
        except (OSError, ValueError):  # "max", or no controller of memory here
            continue
        yield limit, limit - used + _file_pages(directory, version)


def _cgroups(root: Path) -> Iterator[tuple[Path, int]]:
    """(directory, version of cgroup) of the process's cgroup and those above it."""
    mounted = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in filter(None, lines):
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, version = mounted / "memory", 1
        elif not controllers:
            top, version = mounted, 2
        else:
            continue
        # In a container the path can be the host's, which is not mounted there; the top is then its own cgroup.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(parts), -1, -1):
            yield top.joinpath(*parts[:depth]), version


def _file_pages(directory: Path, version: int) -> int:
    try:
        lines = (directory / "memory.stat").read_text(encoding="ascii").splitlines()
        found = {name: int(value) for name, _, value in (line.partition(" ") for line in lines)}
    except (OSError, ValueError):
        return 0
    return sum(found.get(name, 0) for name in FILE_PAGES[version])
