"""Host memory that this process may use, with limits of cgroups v1 and v2."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.machine.host_memory import HostMemory, host_memory

GB = 10**9
MEMINFO = "MemTotal:       {total} kB\nMemFree:  1 kB\nMemAvailable:   {available} kB\n"


def machine(root: Path, cgroup: str | None, files: dict[str, str | int]) -> Path:
    """Files of a machine with 64 GB, 32 GB of them available."""
    texts: dict[str, str | int] = {
        "proc/meminfo": MEMINFO.format(total=64 * GB // 1024, available=32 * GB // 1024),
        **({} if cgroup is None else {"proc/self/cgroup": cgroup}),
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


ALL = HostMemory(64 * GB, 32 * GB)
V2 = {"memory.max": 8 * GB, "memory.current": 5 * GB, "memory.stat": f"anon 1\ninactive_file {GB}\nactive_file {GB}"}
V1 = {
    "memory/memory.limit_in_bytes": 8 * GB,
    "memory/memory.usage_in_bytes": 5 * GB,
    "memory/memory.stat": f"cache 7\ninactive_file 1\ntotal_inactive_file {GB}\ntotal_active_file {GB}",
}
LIMITED = HostMemory(8 * GB, 5 * GB)


@pytest.mark.parametrize(
    ("cgroup", "files", "found"),
    [
        (None, {}, ALL),
        ("0::/", {}, ALL),  # no container: the top has no limit
        ("0::/", V2, LIMITED),  # a container with a namespace of its own
        ("0::/user.slice/one", {f"user.slice/{name}": text for name, text in V2.items()}, LIMITED),
        ("0::/user.slice/one", {f"user.slice/one/{name}": text for name, text in V2.items()}, LIMITED),
        ("0::/../../other", V2, LIMITED),
        ("0::/", {**V2, "memory.max": "max"}, ALL),
        ("0::/", {**V2, "memory.max": "nonsense"}, ALL),
        ("0::/", {**V2, "memory.max": 100 * GB, "memory.current": 1}, ALL),
        ("0::/", {**V2, "memory.current": 9 * GB, "memory.stat": ""}, HostMemory(8 * GB, 0)),
        ("4:memory:/docker/abc\n0::/", V1, LIMITED),  # the host's path, which is not mounted here
        ("5:cpu,memory:/", V1, LIMITED),
        ("4:memory:/", {**V1, "memory/memory.limit_in_bytes": 0x7FFFFFFFFFFFF000}, ALL),
        ("3:cpuset:/", V1, ALL),
    ],
)  # fmt: skip
def test_limits_of_cgroups_count(
    cgroup: str | None, files: dict[str, str | int], found: HostMemory, tmp_path: Path
) -> None:
    made = host_memory(machine(tmp_path, cgroup, files))
    assert abs(made.total - found.total) < 1024
    assert abs(made.available - found.available) < 1024


def test_this_machine_has_memory() -> None:
    found = host_memory()
    assert 0 < found.available <= found.total
