"""Steps as real processes: their order, slots, failures, the one retry, and what ctrl-C leaves."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from builder.sweep import scheduler
from builder.sweep.graph import Step
from builder.sweep.local import Job, LocalExecutor
from builder.sweep.scheduler import Outcome
from builder.sweep.slots import Slots

GIB = 1 << 30
SLEEP = "import time; time.sleep(0.3)"


def steps(needs: Mapping[str, Sequence[str]]) -> list[Step]:
    return [Step(name, "measure", (), tuple(wanted)) for name, wanted in needs.items()]


class Run:
    """Runs steps whose commands are Python statements, and notes when each began and ended."""

    def __init__(self, place: Path, slots: Slots, takes: Mapping[str, Slots], code: Mapping[str, str]) -> None:
        self.place, self.slots, self.takes, self.code = place, slots, takes, code
        self.events: list[tuple[str, str]] = []
        self.most = 0

    def job(self, step: Step) -> Job:
        directory = self.place / step.name
        directory.mkdir(exist_ok=True)
        argv = ("timeit", "-n1", "-r1", self.code.get(step.name, SLEEP))
        return Job(step.name, argv, self.takes.get(step.name, Slots(1, 0)), directory)

    def begun(self, step: Step) -> None:
        self.events.append(("begun", step.name))
        running = sum(1 if what == "begun" else -1 for what, _ in self.events)
        self.most = max(self.most, running)

    def ended(self, outcome: Outcome) -> None:
        if ("begun", outcome.step.name) in self.events:
            self.events.append(("ended", outcome.step.name))

    def __call__(self, found: Sequence[Step]) -> dict[str, Outcome]:
        with LocalExecutor(self.slots) as executor:
            return scheduler.run(found, self.job, executor, self.begun, self.ended)


def test_a_step_waits_for_those_that_it_needs_and_two_run_at_once(tmp_path: Path) -> None:
    run = Run(tmp_path, Slots(2, GIB), {}, {})
    found = run(steps({"c": ["a", "b"], "a": [], "b": []}))
    assert all(outcome.ok for outcome in found.values())
    assert run.events[-2:] == [("begun", "c"), ("ended", "c")]
    assert run.most == 2
    assert found["a"].memory > 1 << 20


@pytest.mark.parametrize("takes", [Slots(2, 0), Slots(1, GIB * 2 // 3), Slots(1, 0, 1)])
def test_what_does_not_fit_waits(tmp_path: Path, takes: Slots) -> None:
    run = Run(tmp_path, Slots(2, GIB, 1), {"a": takes, "b": takes}, {})
    assert all(outcome.ok for outcome in run(steps({"a": [], "b": []})).values())
    assert run.most == 1


def test_each_process_has_cores_and_gpus_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-abc")
    cores = len(os.sched_getaffinity(0))
    if cores < 2:
        pytest.skip("one core")
    code = f"import os; print(os.sched_getaffinity(0), os.environ['CUDA_VISIBLE_DEVICES']); {SLEEP}"
    run = Run(tmp_path, Slots(2, GIB, 2), {"a": Slots(1, 0, 1), "b": Slots(1, 0, 1)}, {"a": code, "b": code})
    run(steps({"a": [], "b": []}))
    said = [(tmp_path / name / "run.log").read_text().splitlines()[1].split("} ") for name in "ab"]
    assert run.most == 2
    assert {gpu for _, gpu in said} == {"3", "GPU-abc"}
    assert len({core for core, _ in said}) == 2
    assert len(os.sched_getaffinity(0)) == cores, "the sweep itself keeps all"


def test_a_failure_stops_only_what_needs_it(tmp_path: Path) -> None:
    run = Run(tmp_path, Slots(1, GIB), {}, {"a": "raise SystemExit('no such file')", "b": "pass"})
    found = run(steps({"a": [], "c": ["a"], "e": ["c"], "b": [], "d": ["b"]}))
    assert ("begun", "e") not in run.events, "nor what needs that"
    assert [name for name, outcome in found.items() if outcome.ok] == ["b", "d"]
    assert "no such file" in found["a"].why
    assert found["c"].why.startswith("a, which it needs, failed: ")
    assert not (tmp_path / "c").exists()
    assert not found["a"].retried, "its own fault"


@pytest.mark.parametrize("times", [1, 2])
def test_what_the_machine_killed_is_tried_once_more(tmp_path: Path, times: int) -> None:
    count = tmp_path / "count"
    code = f"""
import os, signal
with open({str(count)!r}, 'a') as file:
    file.write('x')
if os.path.getsize({str(count)!r}) <= {times}:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    found = Run(tmp_path, Slots(1, GIB), {}, {"a": code})(steps({"a": []}))
    assert count.read_text() == "xx"
    assert found["a"].retried
    assert found["a"].ok == (times == 1)


def test_an_interrupt_leaves_no_process(tmp_path: Path) -> None:
    def stop(step: Step) -> None:
        if step.name == "b":
            raise KeyboardInterrupt

    marker = f"import time; time.sleep({60 + time.monotonic() % 1})"
    run = Run(tmp_path, Slots(2, GIB), {}, {"a": marker, "b": marker})
    with pytest.raises(KeyboardInterrupt), LocalExecutor(run.slots) as executor:
        scheduler.run(steps({"a": [], "b": []}), run.job, executor, stop, run.ended)
    alive = [path for path in Path("/proc").glob("[0-9]*/cmdline") if marker.encode() in _read(path)]
    assert not alive


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
