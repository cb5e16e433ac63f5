"""A sweep from end to end: shared work once, results, what is repeated, and what a failure leaves."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import s3_server
import yaml

from builder.cli import main
from builder.core import bucket, paths
from builder.core.environment import STORE
from builder.sweep import sweep
from builder.sweep.points import read

FILE = paths.data("configs", "sweeps", "smallest.yaml")


def small(directory: Path, **matrix: dict[str, object]) -> Path:
    """Data-free points without tasks, which take a few seconds each."""
    asked = yaml.safe_load(FILE.read_text())
    del asked["recipe"]["tasks"], asked["exclude"]
    asked["recipe"]["calibration"] = {"samples": 0}
    asked["recipe"]["evaluation"] |= {"texts": 3, "max_tokens": 32}
    asked["matrix"] = matrix or {"rounding": {"max": {}, "mse": {"quantization.algorithm": "mse"}}}
    (directory / "sweep.yaml").write_text(yaml.safe_dump(asked, sort_keys=False))
    return directory / "sweep.yaml"


def rows(output: Path) -> list[dict[str, str]]:
    [file] = output.glob("sweeps/*/results.csv")
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


def test_points_share_work_one_that_fails_stops_no_other_and_one_added_later_costs_only_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    (tmp_path / "bad.jsonl").write_text("no json\n")
    bad = {"calibration.samples": 4, "calibration.data": str(tmp_path / "bad.jsonl")}
    argv = ["sweep", str(small(tmp_path, rounding={"max": {}, "bad": bad})), "--output", str(output)]
    assert main.main([*argv, "--dry-run", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    shared, own = ["fetch", "baseline"], ["quantize", "measure"]
    assert [step["kind"] for step in planned["steps"]] == [*shared, *own, "calibrate", *own]
    assert not output.exists()
    assert main.main(argv) == 1, "one fails, the other is measured"
    first = capsys.readouterr()
    began = [line.split()[0] for line in first.err.splitlines() if line.endswith(" begins")]
    assert sorted(began) == sorted([*shared, *own, "calibrate"])
    assert "bad/calibrate failed" in first.err
    assert "recommended" in first.out
    assert [(row["point"], row["kind"], row["status"]) for row in rows(output)] == [
        ("max", "texts", "measured"),
        ("bad", "", "failed"),
    ]
    assert "bad.jsonl" in rows(output)[1]["why"]
    [run] = output.glob("sweeps/*/runs/*")
    assert {path.name for path in (run / "max").iterdir()} == {"quantize", "measure"}
    for stage in (run / "max").iterdir():
        assert {path.name for path in stage.iterdir()} >= {"recipe.yaml", "run.sh", "run.log"}
    assert list((run / "max" / "measure").glob("*-evaluate-checkpoint-*.log"))
    assert "--force quantize" in (run / "max" / "quantize" / "run.sh").read_text()
    assert len(list((output / "snapshot").iterdir())) == 1

    small(tmp_path, rounding={"max": {}, "mse": {"quantization.algorithm": "mse"}})
    assert main.main(argv) == 0
    said = capsys.readouterr().err
    assert [line.split()[1] for line in said.splitlines() if line.endswith(" begins")] == [
        "mse/quantize",
        "mse/measure",
    ]
    found = {row["point"]: row for row in rows(output)}
    assert {name: row["status"] for name, row in found.items()} == {
        "max": "measured",
        "mse": "measured",
        "bad": "failed",
    }
    assert float(found["mse"]["kl_ratio"]) < 1.2
    assert "<svg" in next(output.glob("sweeps/*/report.html")).read_text()

    assert main.main(argv) == 0, "all is there: nothing runs"
    assert "begins" not in capsys.readouterr().err
    [fetch] = run.glob("fetch-*/run.sh")
    for more_words, made in (([], "nothing to do"), (["--force", "fetch"], "making")):
        again = subprocess.run(["sh", str(fetch), *more_words], capture_output=True, text=True, cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        assert [line for line in again.stderr.splitlines() if line.startswith("snapshot ") and made in line]
    assert "--force fetch" in fetch.read_text()


@pytest.mark.slow
def test_ctrl_c_leaves_no_process_and_the_next_run_continues(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "builder", "sweep", str(small(tmp_path)), "--output", str(tmp_path / "out")]
    running = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    assert running.stderr
    for line in running.stderr:
        if "begins" in line and line.startswith("quantize"):
            break
    time.sleep(0.5)
    running.send_signal(signal.SIGINT)
    assert running.wait(30) == 130
    marked = [path for path in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _read(path)]
    assert not marked
    again = subprocess.run(argv, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "fetch " not in again.stderr
    assert "baseline " not in again.stderr


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_two_sweeps_over_one_store_at_once_make_everything_once(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "builder", "sweep", str(small(tmp_path)), "--output", str(tmp_path / "out")]
    running = [subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [one.communicate(timeout=500)[1] for one in running]
    assert [one.returncode for one in running] == [0, 0], said
    stages = {stage: len([*(tmp_path / "out" / stage).iterdir()]) for stage in ("snapshot", "checkpoint", "evaluation")}
    assert stages == {"snapshot": 1, "checkpoint": 2, "evaluation": 3}, "one of BF16 alone, one of each point"
    assert [row["point"] for row in rows(tmp_path / "out")] == ["max", "mse"]


def test_results_of_another_version_are_refused_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "out" / "sweeps" / "gptq-in-nvfp4-tiny-qwen3"
    place.mkdir(parents=True)
    (place / "results.csv").write_text("format,point,kind,name\n1,a,texts,prose\n")
    assert main.main(["sweep", str(small(tmp_path)), "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert "has version 1 of the results" in said.err
    assert "begins" not in said.err, "before anything runs"
    assert (place / "results.csv").read_text().endswith("1,a,texts,prose\n")


@pytest.mark.slow
def test_a_sweep_is_measured_on_texts_and_tasks(tmp_path: Path) -> None:
    assert main.main(["sweep", str(FILE), "--output", str(tmp_path)]) == 0
    found = {(row["point"], row["kind"]): row for row in rows(tmp_path)}
    assert float(found["gptq-nvfp4", "texts"]["kl_ratio_high"]) < 1
    assert found["rtn-nvfp4", "texts"]["kl_ratio"] == ""
    assert float(found["gptq-nvfp4", "task"]["task_low"]) <= float(found["gptq-nvfp4", "task"]["task"])


class Found:
    """What a sweep found of each point over all of its texts."""

    def __init__(self, output: Path) -> None:
        self.rows = rows(output)
        self.of = {row["point"]: row for row in self.rows if row["name"] == "overall"}

    def kl(self, point: str, end: str = "") -> float:
        return float(self.of[point][f"kl{end}"])

    def is_better_than_its_base(self, point: str) -> bool:
        return float(self.of[point]["kl_ratio_high"]) < 1


def run_file(name: str, output: Path, *sets: str) -> Found:
    """Runs a file that comes with the builder on fewer texts and questions, all points with figures."""
    more = [word for text in ("evaluation.texts=4", "tasks.limit=8", *sets) for word in ("--set", text)]
    assert main.main(["sweep", str(FILE.with_stem(name)), "--output", str(output), *more]) == 0
    _, points = read(FILE.with_stem(name))
    found = Found(output)
    names = {point.slug for point in points}
    for kind, of, figure in (("texts", {"prose", "chat", "overall"}, "kl"), ("task", {"follows", "next_word"}, "task")):
        of_kind = [row for row in found.rows if row["kind"] == kind]
        assert {(row["point"], row["name"]) for row in of_kind} == {(point, name) for point in names for name in of}
        assert all(float(row[f"{figure}_low"]) <= float(row[figure]) <= float(row[f"{figure}_high"]) for row in of_kind)
    assert all(0 <= float(row["task"]) <= 1 and row["change"] for row in found.rows if row["kind"] == "task")
    return found


@pytest.mark.slow
def test_nvfp4_loses_less_by_each_algorithm_than_by_the_largest_value(tmp_path: Path) -> None:
    found = run_file("algorithms", tmp_path)
    for point in ("mse", "hessian", "gptq-on-max", "gptq-on-mse", "gptq-on-hessian"):
        assert found.is_better_than_its_base(point), point
    for scales in ("mse", "hessian"):
        assert found.kl(f"gptq-on-{scales}") < min(found.kl(scales), found.kl("gptq-on-max"))


@pytest.mark.slow
def test_more_calibration_rows_are_not_worse(tmp_path: Path) -> None:
    found = run_file("calibration", tmp_path)
    for weights in ("nvfp4", "gptq-in-nvfp4", "fp8"):
        assert found.kl(f"512-{weights}", "_low") <= found.kl(f"32-{weights}", "_high")
    for rows in ("32", "128", "512"):
        assert found.kl(f"{rows}-fp8") < found.kl(f"{rows}-gptq-in-nvfp4") < found.kl(f"{rows}-nvfp4")
    assert found.kl("none-fp8") < found.kl("none-nvfp4")


@pytest.mark.slow
def test_a_kv_cache_in_fp8_costs_less_than_the_weights_format(tmp_path: Path) -> None:
    found = run_file("kv-cache", tmp_path)
    for cache in ("bf16", "fp8"):
        assert found.kl(f"{cache}-fp8") < found.kl(f"{cache}-gptq-in-nvfp4") < found.kl(f"{cache}-nvfp4")
    assert float(found.of["fp8-fp8"]["kl_ratio_low"]) > 1, "the cache is rounded"


@pytest.mark.slow
def test_w8a8_static_loses_most_in_down_proj_and_gptq_helps_nvfp4(tmp_path: Path) -> None:
    """The file has no tasks, and holds no model whole, which tasks need."""
    tasks = ("tasks.directory=tests/data/tasks", "tasks.names=[follows, next_word]", "quantization.memory=auto")
    found = run_file("short", tmp_path, *tasks)
    for weights in ("original", "r1r2"):
        assert found.kl(f"gptq-{weights}-nvfp4", "_high") < found.kl(f"rtn-{weights}-nvfp4", "_low")
        for rounding in ("rtn", "gptq"):
            static = found.kl(f"{rounding}-{weights}-w8a8-static", "_low")
            for better in ("w8a8-dynamic", "w8a8-static-without-down-proj"):
                assert found.kl(f"{rounding}-{weights}-{better}", "_high") < static / 3


@pytest.mark.slow
def test_points_are_built_served_and_measured_unless_the_quality_check_rejects_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, asked = small(tmp_path), yaml.safe_load(small(tmp_path).read_text())
    asked["recipe"]["quality"] = {"texts": 8}
    asked |= {"measure": ["eval", "load"], "load": {"concurrency": [1, 2], "requests": 4, "output_tokens": 8}}
    impossible = {"quality.min_score": 100, "quantization.format": "nvfp4"}
    asked["matrix"] = {"format": {"FP8": {"quantization.format": "fp8"}, "rejected": impossible}}
    file.write_text(yaml.safe_dump(asked, sort_keys=False))
    argv = ["sweep", str(file), "--output", str(tmp_path / "out")]
    assert main.main(argv) == 0, "a rejected build is a result"
    assert "rejected/load has nothing to serve: the build was rejected" in capsys.readouterr().err
    found = rows(tmp_path / "out")
    assert [(row["point"], row["kind"], row["name"], row["verdict"]) for row in found] == [
        ("fp8", "texts", "prose", "passed"),
        ("fp8", "load", "concurrency 1", "passed"),
        ("fp8", "load", "concurrency 2", "passed"),
        ("rejected", "texts", "prose", "failed"),
    ]
    assert all(float(row["tokens_per_second"]) > 0 and float(row["ttft"]) > 0 for row in found if row["kind"] == "load")
    [link] = (tmp_path / "out" / "models").iterdir()
    assert link.name == "gptq-in-nvfp4-tiny-qwen3-fp8"
    capsys.readouterr()
    assert main.main(argv) == 0
    assert "begins" not in capsys.readouterr().err, "both are in the store"


def test_a_script_names_the_bucket_and_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {STORE: s3_server.ADDRESS, "AWS_SECRET_ACCESS_KEY": "only-in-the-environment"}.items():
        monkeypatch.setenv(name, value)
    script = sweep._script("measure", ("builder", "eval"))
    assert f"export {STORE}={s3_server.ADDRESS}" in script
    assert "only-in-the-environment" not in script


@pytest.mark.slow
def test_two_output_directories_share_their_work_through_a_bucket(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one runs nothing and takes no weights; the bucket's keys are in no file of either."""
    file = small(tmp_path, rounding={"max": {}})
    monkeypatch.setenv(STORE, "")  # restored at the end: --store sets it
    with s3_server.running(tmp_path) as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        for place in ("one", "two"):
            argv = ["sweep", str(file), "--output", str(tmp_path / place), "--store", s3_server.ADDRESS]
            assert main.main(argv) == 0
            bucket.opened.cache_clear()
    assert capsys.readouterr().err.count("measure begins") == 1
    assert rows(tmp_path / "one")[0]["kl"] == rows(tmp_path / "two")[0]["kl"]
    assert {path.name for path in (tmp_path / "two").iterdir() if path.is_dir()} <= {"locks", "sweeps"}
    [script] = (tmp_path / "one").glob("sweeps/*/runs/*/max/measure/run.sh")
    assert f"export {STORE}={s3_server.ADDRESS}" in script.read_text()
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".parquet"]
    assert not [path for path in written if variables["AWS_SECRET_ACCESS_KEY"].encode() in path.read_bytes()]
