"""Steps on a real Ray cluster of several nodes: order, failures, nodes that die, what is refused before the work."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray_cluster

from builder.core import environment
from builder.core.errors import StageError, UsageError
from builder.sweep import cluster, points, ray_task, scheduler
from builder.sweep.cluster import Cluster, Watch
from builder.sweep.graph import Step
from builder.sweep.local import Job
from builder.sweep.ray_executor import RayExecutor
from builder.sweep.ray_task import Common, Task
from builder.sweep.scheduler import Outcome
from builder.sweep.slots import Slots

pytestmark = pytest.mark.any_version


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    with ray_cluster.running(2, 1) as started:
        yield started


@pytest.fixture(scope="module")
def on(nodes: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster.connected(nodes.address, [], tmp_path_factory.mktemp("output")) as found:
        yield found


class Steps:
    """Runs steps whose commands are Python statements, by their names."""

    def __init__(self, place: Path, **code: str) -> None:
        self.place, self.code, self.begun = place, code, list[str]()

    def job(self, step: Step) -> Job:
        directory = self.place / step.name
        directory.mkdir(exist_ok=True)
        (directory / "recipe.yaml").write_text("model: {id: m}\n")
        return Job(step.name, ("timeit", "-n1", "-r1", self.code[step.name]), Slots(1, 1000), directory)

    def run(self, executor: RayExecutor, **needs: Sequence[str]) -> dict[str, Outcome]:
        steps = [Step(name, "measure", (), tuple(needs.get(name, ()))) for name in self.code]
        with executor:
            return scheduler.run(steps, self.job, executor, lambda step: self.begun.append(step.name), lambda _: None)


def test_steps_run_on_several_nodes_in_order_and_a_failure_stops_what_needs_it(on: Cluster, tmp_path: Path) -> None:
    assert (on.whole.cores, on.total.cores, len(on.nodes)) == (1, 2, 2)
    assert on.shares(tmp_path)
    meet = "import os, time; open({mine!r}, 'w').close()\nwhile not os.path.exists({other!r}): time.sleep(0.01)"
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    seen = "import os; print(os.environ.get('OMP_NUM_THREADS'), os.environ['BUILDER_LOGS'], os.getcwd())"
    steps = Steps(
        tmp_path,
        a=meet.format(mine=one, other=two),
        b=meet.format(mine=two, other=one),
        c=seen,
        d="raise SystemExit('no such file')",
        e="pass",
    )
    found = steps.run(RayExecutor(on, shared=True), c=["a", "b"], e=["d"])
    assert {name for name, outcome in found.items() if outcome.ok} == {*"abc"}, found["a"].why
    said = (tmp_path / "c" / "run.log").read_text().splitlines()[1]
    assert said == f"None {tmp_path / 'c'} {os.getcwd()}", "Ray's limit of threads would be part of the keys"
    assert "no such file" in found["d"].why
    assert not found["d"].retried


def test_a_worker_that_is_killed_loses_its_step_once(on: Cluster, tmp_path: Path) -> None:
    """The step's own supervisor and process die with Ray's worker."""
    first = tmp_path / "first"
    code = f"""
import os, signal, time
if not os.path.exists({str(first)!r}):
    open({str(first)!r}, 'w').close()
    supervisor = os.getppid()
    worker = int(open(f'/proc/{{supervisor}}/stat').read().rsplit(')', 1)[1].split()[1])
    os.kill(worker, signal.SIGKILL)
    time.sleep(77.125)
"""
    found = Steps(tmp_path, a=code).run(RayExecutor(on, shared=True))
    assert found["a"].ok
    assert found["a"].retried
    assert not ray_cluster.processes(str(first))


def test_an_interrupt_leaves_no_process_and_jobs_bound_what_runs(on: Cluster, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    steps = Steps(tmp_path, a=f"import time; open({str(runs)!r}, 'w').close(); time.sleep(88.5)", b="pass")
    began = float("inf")

    def interrupt() -> None:
        nonlocal began
        while not runs.exists():
            time.sleep(0.05)
        began = time.monotonic()
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        steps.run(RayExecutor(on, shared=True, jobs=1))
    assert time.monotonic() - began < 9, "after ten seconds it would have been killed"
    assert steps.begun == ["a"], "one job at once"
    assert "KeyboardInterrupt" in (tmp_path / "a" / "run.log").read_text(), "it was not killed"
    deadline = time.monotonic() + 20
    while ray_cluster.processes("88.5") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not ray_cluster.processes("88.5")


def test_logs_come_back_from_nodes_with_disks_of_their_own(on: Cluster, tmp_path: Path) -> None:
    steps = Steps(tmp_path, a="print('here'); import os; os.unlink(os.environ['BUILDER_LOGS'] + '/run.log')")
    assert steps.run(RayExecutor(on, shared=False))["a"].ok
    common = Common(os.getcwd(), ray_task.versions(), {}, own_disk=True)
    elsewhere = tmp_path / "elsewhere" / "a"
    argv = ("timeit", "-n1", "-r1", "print('here')")
    done = ray_task.run(common, Task("a", argv, 1, str(elsewhere), {"recipe.yaml": b"model"}))
    assert done.how.code == 0
    assert (elsewhere / "recipe.yaml").read_bytes() == b"model"
    assert set(done.logs) == {"run.log"}
    assert b"here" in done.logs["run.log"]


def test_what_must_run_before_runs_on_the_same_node_and_its_failure_is_the_steps(tmp_path: Path) -> None:
    common = Common(os.getcwd(), ray_task.versions(), {}, own_disk=True)
    makes = ("timeit", "-n1", "-r1", f"open({str(tmp_path / 'made')!r}, 'w').close()")
    needs = ("timeit", "-n1", "-r1", f"open({str(tmp_path / 'made')!r}).close()")
    done = ray_task.run(common, Task("a", needs, 1, str(tmp_path / "a"), {}, before=makes))
    assert done.how.code == 0
    assert set(done.logs) == {"before.log", "run.log"}
    failed = ray_task.run(common, Task("b", needs, 1, str(tmp_path / "b"), {}, before=("timeit", "-n1", "1 / 0")))
    assert failed.how.code != 0
    assert "ZeroDivisionError" in failed.how.why
    assert set(failed.logs) == {"before.log"}


def test_a_node_with_other_versions_is_refused(on: Cluster, tmp_path: Path) -> None:
    common = Common(os.getcwd(), {**ray_task.versions(), "torch": "9.9"}, {})
    done = ray_task.run(common, Task("a", ("timeit",), 1, str(tmp_path / "a"), {}))
    assert done.how.code == 2
    assert "torch" in done.how.why
    assert "instead of 9.9" in done.how.why
    [node, *_] = on.nodes.values()
    other = replace(node, versions={**node.versions, "trtllm-builder": "0.0.9"})
    with pytest.raises(UsageError, match="same versions") as found:
        cluster._check({"10.0.0.7": other})
    assert "10.0.0.7: trtllm-builder 0.0.9" in found.value.why


def test_files_that_nodes_lack_a_bucket_that_they_can_not_use_and_disks_of_their_own_are_named(
    on: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [node, *_] = on.nodes.values()
    with pytest.raises(UsageError, match="lack files") as found:
        cluster._check({"10.0.0.7": replace(node, missing=["/data/rows.jsonl"])})
    assert "10.0.0.7: /data/rows.jsonl" in found.value.why
    with pytest.raises(UsageError, match="can't use the bucket"):
        cluster._check({"10.0.0.7": replace(node, refused="The store s3://b does not exist.")})
    monkeypatch.setattr(cluster, "_look", lambda ids, root, paths: {"10.0.0.7": replace(node, missing=paths)})
    with pytest.raises(UsageError, match="can't see the output directory"):
        on.shares(tmp_path)
    monkeypatch.setenv(environment.STORE, "s3://models/x")
    assert not on.shares(tmp_path)
    assert not list((tmp_path / "locks").iterdir())
    _, listed = points.read(Path("configs/sweeps/smallest.yaml"))
    named = cluster._paths(listed)
    assert named[0] == os.getcwd()
    assert {Path(path).name for path in named[1:]} >= {"tiny-qwen3", "prose.jsonl", "tasks"}


def test_no_cluster_is_named_before_ray_tries_for_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for address, said in (
        ("127.0.0.1:9", "No Ray cluster answers at 127.0.0.1:9"),
        ("ray://head:10001", "Ray Client is not supported"),
        ("somewhere", "is not HOST:PORT"),
    ):
        began = time.monotonic()
        with pytest.raises(UsageError, match=said), cluster.connected(address, [], tmp_path):
            pass
        assert time.monotonic() - began < 20


def test_a_cluster_that_went_away_ends_the_sweep(on: Cluster) -> None:
    watch = Watch(on, seconds=0.05)
    watch.check()
    gone = Watch(replace(on, gcs=("127.0.0.1", 9)), seconds=0.05)
    gone.check()
    time.sleep(0.1)
    with pytest.raises(StageError, match="went away") as found:
        gone.check()
    assert "kept" in found.value.hint
