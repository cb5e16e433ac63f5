"""What steps are expected to take: from earlier sweeps, else from the plan; and the table of those that run."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from builder.cli import main
from builder.core.output import Output
from builder.core.store import Store
from builder.sweep import expected, planning, scheduler
from builder.sweep.expected import Expected, makespan
from builder.sweep.graph import Step
from builder.sweep.points import read
from builder.sweep.slots import Slots


def written(directory: Path, **evaluation: Any) -> Path:
    shared = {"model": {"id": "tests/data/tiny-qwen3"}, "gpu": "cpu", "calibration": {"samples": 0}}
    shared["evaluation"] = {"data": ["tests/data/eval/prose.jsonl"], "texts": 4, "max_tokens": 32, **evaluation}
    formats = {name: {"quantization.format": name} for name in ("fp8", "nvfp4")}
    directory.mkdir(exist_ok=True)
    (directory / "sweep.yaml").write_text(yaml.safe_dump({"title": "t", "recipe": shared, "matrix": {"f": formats}}))
    return directory / "sweep.yaml"


def planned(file: Path, root: Path) -> planning.Planned:
    return planning.plan(*read(file), Store(root, Output("quiet"), dry=True))


def ran(of: planning.Planned, runs: Path, seconds: float) -> None:
    """Notes of all steps, as an earlier sweep leaves them."""
    for step in of.steps:
        (runs / step.name).mkdir(parents=True)
        expected.note(scheduler.Outcome(step, seconds, 1000), runs)


def test_without_anything_earlier_the_plan_is_what_is_expected(tmp_path: Path) -> None:
    found = planned(written(tmp_path), tmp_path).expected
    assert {one.basis for one in found.values()} == {"plan", "unknown"}
    assert found["fp8/quantize"].disk > found["nvfp4/quantize"].disk > 0
    assert found["fp8/measure"].seconds


def test_a_step_is_expected_to_take_what_the_most_similar_one_took(tmp_path: Path) -> None:
    earlier = planned(written(tmp_path), tmp_path)
    ran(earlier, tmp_path / "sweeps" / "t" / "runs" / "1", 3.0)
    other = planned(written(tmp_path / "other", texts=9), tmp_path)
    ran(other, tmp_path / "sweeps" / "t" / "runs" / "2", 7.0)
    (tmp_path / "sweeps" / "t" / "runs" / "1" / "fp8" / "measure" / "step.json").write_text("{")
    same = planned(written(tmp_path), tmp_path).expected
    assert same["nvfp4/measure"] == Expected(3.0, 1000, 0, "measured")
    assert same["fp8/measure"].seconds == 7.0, "the damaged note is passed over, and another one is of this format"


def test_a_failed_step_leaves_no_note(tmp_path: Path) -> None:
    step = planned(written(tmp_path), tmp_path).steps[0]
    (tmp_path / step.name).mkdir()
    expected.note(scheduler.Outcome(step, 1.0, code=1), tmp_path)
    assert not [*(tmp_path / step.name).iterdir()]


@given(st.lists(st.tuples(st.floats(0, 9), st.lists(st.integers(0, 8), max_size=3)), min_size=1, max_size=9))
def test_all_steps_take_at_least_the_longest_path_and_at_most_their_sum(found: list[tuple[float, list[int]]]) -> None:
    steps, takes, ends = [], {}, dict[str, float]()
    for number, (seconds, needs) in enumerate(found):
        before = tuple(f"s{need}" for need in sorted({*needs}) if need < number)
        steps.append(Step(f"s{number}", "measure", (), before))
        takes[f"s{number}"] = Slots(1, 0)
        ends[f"s{number}"] = seconds + max((ends[need] for need in before), default=0.0)
    each = {f"s{number}": Expected(seconds, 0, 0, "plan") for number, (seconds, _) in enumerate(found)}
    total = sum(seconds for seconds, _ in found)
    took = makespan(steps, takes, Slots(2, 0), each)
    assert max(max(ends.values()), total / 2) <= took + 1e-9
    assert took <= total + 1e-9
    assert makespan(steps, takes, Slots(1, 0), each) == pytest.approx(total)


def test_a_dry_run_says_where_each_time_is_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path)
    ran(planned(file, tmp_path), tmp_path / "sweeps" / "t" / "runs" / "1", 3.0)
    assert main.main(["sweep", str(file), "--output", str(tmp_path), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "about 3.0s\tearlier" in said
    assert "cached     nothing" in said
    assert "expected   about" in said
    assert main.main(["sweep", str(file), "--output", str(tmp_path), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"][0]["basis"] == "measured"


def test_a_terminal_shows_the_steps_that_run(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    file = written(tmp_path, texts=2)
    argv = [sys.executable, "-m", "builder", "sweep", str(file), "--output", str(tmp_path / "out")]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    running = subprocess.Popen(argv, stderr=theirs, stdout=subprocess.DEVNULL, env=environment)
    os.close(theirs)
    said = b""
    try:
        while chunk := os.read(ours, 65536):
            said += chunk
            if b"measure" in said and re.search(rb"fp8/quantize +1 point ", said):
                break
    finally:
        running.terminate()
        running.wait(60)
        os.close(ours)
    text = said.decode()
    assert re.search(r"\d of 6 steps, about .* left", text)
    assert "expected" in text
    assert " begins" not in text
