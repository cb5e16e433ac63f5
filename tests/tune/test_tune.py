"""`builder tune` with the real AIPerf, Optuna and server. See `make test-aiperf`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import exports
import pytest

from builder.aiperf import environment
from builder.core.output import Output
from builder.recipe import schema
from builder.tune import suggest

pytestmark = pytest.mark.aiperf

SIZES = ["--concurrency", "2", "--requests", "4", "--input-tokens", "24", "--output-tokens", "4"]


def suggested(**told: Any) -> dict[str, int] | None:
    place = environment.environment(Output("human"))
    argv = [str(place.python), str(suggest.__file__)]
    done = subprocess.run(argv, input=json.dumps(told), capture_output=True, text=True, check=True)
    found: dict[str, int] | None = json.loads(done.stdout)["indices"]
    return found


def test_suggestions_are_new_repeatable_and_end() -> None:
    sizes, trials = {"a": 2, "b": 2}, []
    for _ in range(4):
        found = suggested(sizes=sizes, trials=trials, seed=1)
        assert found == suggested(sizes=sizes, trials=trials, seed=1), "an interrupted search goes on in the same way"
        assert found is not None
        assert found not in [trial["indices"] for trial in trials]
        trials.append({"indices": found, "value": None if len(trials) == 1 else float(len(trials))})
    assert suggested(sizes=sizes, trials=trials, seed=1) is None


def tune(output: Path, *options: str) -> tuple[dict[str, Any], str]:
    argv = [sys.executable, "-m", "builder", "tune", "--model", str(exports.MODELS["qwen3"]), "--gpu", "cpu"]
    argv += ["--calib-samples", "4", "--search", "max_batch_size=1,4", "--output", str(output / "out"), *SIZES]
    argv += ["--objective", "ttft<=60s", "--save", str(output / "tuned.yaml"), "--json", *options]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def test_each_trial_serves_its_settings_and_a_second_search_measures_nothing_again(tmp_path: Path) -> None:
    made, said = tune(tmp_path, "--trials", "2")
    assert "say nothing about a GPU" in said
    assert len(made["trials"]) == 2
    assert all(trial["value"] > 0 for trial in made["trials"])
    sizes = [trial["settings"]["max_batch_size"] for trial in made["trials"]]
    rendered = [path.read_text() for path in (tmp_path / "out").glob("repository/*/models/tensorrt_llm/config.pbtxt")]
    assert len(rendered) == 2
    assert all(any(f"max_batch_size: {size}\n" in text for text in rendered) for size in sizes)
    recipe = schema.resolve({}, recipe_file=tmp_path / "tuned.yaml").recipe
    assert recipe.engine.max_batch_size == made["best"]["settings"]["max_batch_size"]
    assert not (tmp_path / "out" / "models").exists(), "a trial is not published"
    again, said = tune(tmp_path, "--trials", "2")
    assert again["trials"] == made["trials"]
    assert said.count("measured before") == 2
