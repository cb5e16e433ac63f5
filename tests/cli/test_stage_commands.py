"""`builder transform` and `builder calibrate`, the steps of a sweep, stop where they say."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.cli import main

MODEL = ["--model", "tests/data/tiny-qwen3", "--gpu", "cpu"]
ROWS = ["--calib-data", "builtin:python-docs", "--calib-samples", "4"]


@pytest.mark.parametrize(
    ("words", "made"),
    [
        (["transform", "--transform", "spinquant"], {"snapshot", "transform"}),
        (["transform"], {"snapshot"}),
        (["calibrate"], {"snapshot", "calibration"}),
        (["calibrate", "--data-free"], {"snapshot"}),
    ],
)
def test_it_stops_there(words: list[str], made: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, *more = words
    recipe = MODEL if "--data-free" in more else [*MODEL, *ROWS]
    assert main.main([command, *recipe, *more, "--output", str(tmp_path)]) == 0
    found = {path.name for path in tmp_path.iterdir() if path.is_dir()} - {"locks", "logs"}
    assert found == made
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith(str(tmp_path))
