"""Whole sweeps on a real Ray cluster: a node that dies, ctrl-C, a cluster that goes away, nodes with disks of their own
that share through a real S3 server."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray_cluster
import s3_server
import yaml

from builder.core import paths
from builder.core.environment import STORE

pytestmark = [pytest.mark.slow, pytest.mark.any_version]


def sweep_file(directory: Path, **more: Any) -> Path:
    """Three data-free points without tasks. more: keys of the file instead of its own."""
    asked = yaml.safe_load(paths.data("configs", "sweeps", "smallest.yaml").read_text())
    del asked["recipe"]["tasks"], asked["exclude"]
    asked["recipe"] |= {"calibration": {"samples": 0}}
    asked["recipe"]["evaluation"] |= {"texts": 3, "max_tokens": 32}
    rounding = {"max": {}, "mse": {"quantization.algorithm": "mse"}, "FP8": {"quantization.format": "fp8"}}
    asked |= {"matrix": {"rounding": rounding}, **more}
    (directory / "sweep.yaml").write_text(yaml.safe_dump(asked, sort_keys=False))
    return directory / "sweep.yaml"


class Sweep:
    """The command as a process, and what it says."""

    def __init__(self, directory: Path, *more: str, file: Path | None = None, **environment: str) -> None:
        self.output, self.said, file = directory / "out", directory / "said", file or sweep_file(directory)
        argv = [sys.executable, "-m", "builder", "sweep", str(file), "--output", str(self.output)]
        with open(self.said, "wb") as sink:
            self.process = subprocess.Popen([*argv, *more], stderr=sink, env={**os.environ, **environment})

    def wait_for(self, text: str) -> None:
        deadline = time.monotonic() + 240
        while text not in self.said.read_text():
            assert self.process.poll() is None, self.said.read_text()
            assert time.monotonic() < deadline, self.said.read_text()
            time.sleep(0.05)

    def ended(self) -> tuple[int, str]:
        code = self.process.wait(400)
        return code, self.said.read_text()

    def rows(self) -> list[dict[str, str]]:
        [file] = self.output.glob("sweeps/*/results.csv")
        with open(file, newline="") as opened:
            return list(csv.DictReader(opened))

    def status(self) -> dict[str, str]:
        return {row["point"]: row["status"] for row in self.rows()}


ALL = dict.fromkeys(("max", "mse", "fp8"), "measured")


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def test_a_node_that_is_killed_loses_only_its_step(tmp_path: Path) -> None:
    """Its processes die with it, the step runs on another node, and a second run has nothing to do."""
    with ray_cluster.running(3, 1) as nodes:
        sweep = Sweep(tmp_path, "--on", nodes.address)
        sweep.wait_for("max/quantize begins")
        while not (found := ray_cluster.processes(f"{tmp_path}/out/sweeps/")):
            time.sleep(0.05)
        raylets = {node.all_processes["raylet"][0].process.pid for node in nodes.worker_nodes}
        chain = [found[0]]
        while chain[-1] not in raylets:
            chain.append(parent(chain[-1]))
        for pid in reversed(chain):  # as when power fails; the supervisor and what it started end by themselves
            if pid in raylets or b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
        code, said = sweep.ended()
        assert code == 0, said
        assert sweep.status() == ALL
        assert not ray_cluster.processes(f"{tmp_path}/out/sweeps/")
        assert not list((tmp_path / "out").glob("*/.*.tmp"))
        code, said = Sweep(tmp_path, "--on", nodes.address).ended()
        assert code == 0, said
        assert "begins" not in said


def test_ctrl_c_ends_the_steps_on_all_nodes_and_the_next_run_continues_here(tmp_path: Path) -> None:
    with ray_cluster.running(2, 1) as nodes:
        sweep = Sweep(tmp_path, "--on", nodes.address)
        sweep.wait_for("measure begins")
        time.sleep(1)
        sweep.process.send_signal(signal.SIGINT)
        code, said = sweep.ended()
        assert code == 130, said
        deadline = time.monotonic() + 15
        while ray_cluster.processes(f"{tmp_path}/out/sweeps/") and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not ray_cluster.processes(f"{tmp_path}/out/sweeps/")
    again = Sweep(tmp_path)
    code, said = again.ended()
    assert code == 0, said
    assert "baseline " not in said, "it was finished on the cluster"
    assert again.status() == ALL


def test_a_cluster_that_goes_away_is_named_and_what_was_finished_is_kept(tmp_path: Path) -> None:
    with ray_cluster.running(2, 1) as nodes:
        sweep = Sweep(tmp_path, "--on", nodes.address)
        sweep.wait_for("measure begins")
        for node in (*nodes.worker_nodes, nodes.head_node):
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        code, said = sweep.ended()
    assert code == 1, said
    assert "went away" in said
    assert "Traceback" not in said
    code, said = Sweep(tmp_path).ended()
    assert code == 0, said
    assert "baseline " not in said


@contextmanager
def own_disks(place: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a cluster of two nodes for each of which place/out is an empty directory of its own, and the
    variables of a bucket that they can use."""
    (place / "out").mkdir()
    with s3_server.running(place) as keys, ray_cluster.running(0) as head:  # noqa: SIM117
        with _with_own_disks(head.address, place / "out", place, **keys):
            yield head.address, keys


@contextmanager
def _with_own_disks(head: str, hidden: Path, place: Path, **environment: str) -> Iterator[None]:
    start = f"mount -t tmpfs tmpfs {hidden} && exec {sys.executable} -m ray.scripts.scripts start --address {head} "
    start += f"--num-cpus 1 --memory {ray_cluster.MEMORY} --object-store-memory {ray_cluster.OBJECTS} --block"
    argv = ["unshare", "--mount", "--propagation", "private", "sh", "-c", start]
    nodes = []
    try:
        for number in range(2):
            with open(place / f"node-{number}.log", "wb") as log:
                kept = {**os.environ, **environment, "RAY_raylet_start_wait_time_s": "120"}
                nodes.append(subprocess.Popen(argv, stdout=log, stderr=log, env=kept, start_new_session=True))
            _wait_for_node(place / f"node-{number}.log")
        yield
    finally:
        for node in nodes:
            os.killpg(node.pid, signal.SIGTERM)
        for node in nodes:
            node.wait(60)


def _may_mount() -> bool:
    argv = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return bool(shutil.which("unshare")) and subprocess.run(argv, capture_output=True).returncode == 0


def test_nodes_with_disks_of_their_own_share_through_a_bucket(tmp_path: Path) -> None:
    if not _may_mount():
        pytest.skip("mounting is not allowed")
    with own_disks(tmp_path) as (head, keys):
        refused = Sweep(tmp_path, "--on", head)
        code, said = refused.ended()
        assert code == 2, said
        assert "can't see the output directory" in said
        sweep = Sweep(tmp_path, "--on", head, "--store", s3_server.ADDRESS, **keys)
        code, said = sweep.ended()
        assert code == 0, said
        assert sweep.status() == ALL
        logs = list(sweep.output.glob("sweeps/*/runs/*/*/measure/run.log"))
        assert len(logs) == 3
        assert any("comes from s3://" in log.read_text() for log in logs)
        assert not (sweep.output / "checkpoint").exists(), "weights stay on the nodes and in the bucket"
        scripts = [path.read_text() for path in sweep.output.glob("sweeps/*/runs/*/*/*/run.sh")]
        assert all(f"export {STORE}={s3_server.ADDRESS}" in text for text in scripts)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if keys["AWS_SECRET_ACCESS_KEY"].encode() in path.read_bytes()]


def test_points_are_served_on_nodes_with_disks_of_their_own(tmp_path: Path) -> None:
    """What is served comes out of the bucket; verdict, figures and logs come back through it, and nothing else does."""
    if not _may_mount():
        pytest.skip("mounting is not allowed")
    recipe = yaml.safe_load(sweep_file(tmp_path).read_text())["recipe"] | {"quality": {"texts": 8}}
    rejected = {"quality.min_score": 100, "quantization.format": "nvfp4"}
    asked: dict[str, Any] = {"recipe": recipe, "measure": ["build", "load"]}
    asked["load"] = {"concurrency": [1, 2], "requests": 4, "output_tokens": 8}
    asked["matrix"] = {"format": {"FP8": {"quantization.format": "fp8"}, "rejected": rejected}}
    with own_disks(tmp_path) as (head, keys):
        argv = ("--on", head, "--store", s3_server.ADDRESS)
        sweep = Sweep(tmp_path, *argv, file=sweep_file(tmp_path, **asked), **keys)
        code, said = sweep.ended()
        assert code == 0, said
        assert [(row["point"], row["kind"], row["name"], row["verdict"]) for row in sweep.rows()] == [
            ("fp8", "load", "concurrency 1", "passed"),
            ("fp8", "load", "concurrency 2", "passed"),
            ("rejected", "build", "", "failed"),
        ]
        assert all(float(row["tokens_per_second"]) > 0 for row in sweep.rows()[:2])
        [run] = sweep.output.glob("sweeps/*/runs/*")
        taken = (run / "fp8/load/before.log").read_text()
        assert "repository " in taken, "its node has it"
        assert "making" not in taken, "and it was made by the build"
        assert "tokens/s" in (run / "fp8/load/run.log").read_text()
        assert "benchmark/" in (run / "fp8/load/artifacts.txt").read_text()
        made = {path.name for path in sweep.output.iterdir() if path.is_dir()}
        assert made <= {"snapshot", "verdict", "benchmark", "sweeps", "locks", "pulled", "logs"}, "no weights"
        code, said = Sweep(tmp_path, *argv, file=tmp_path / "sweep.yaml", **keys).ended()
        assert code == 0, said
        assert "begins" not in said, "both are in the bucket"


def _wait_for_node(log: Path) -> None:
    deadline = time.monotonic() + 120
    while "Ray runtime started" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
