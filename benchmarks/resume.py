"""Measures how much of a streamed calibration a killed run saves, against its goal:

    python benchmarks/resume.py [--rounds 2] [--json]

`builder quantize --memory low` runs once as a whole. Another run is killed, with all its processes, as soon as half of
the layers are calibrated; the same command then continues it. The bytes of both must be the same. There are 32 rows of
512 tokens, so that most of the time goes into calibration: what comes before and after it is the same in both.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import process_tree
from calibrated import ours
from comparison import ENVIRONMENT, Asked, Result, clear, figure, main, ratios, unified
from random_model import make, make_rows
from same_tensors import require_same

GOAL = 0.6
ROWS, TOKENS = 32, 512


def calibrated(output: Path, layers: int) -> Callable[[], bool]:
    """Whether so many layers' results are stored. A line is one layer's, but for the first: the embedding's."""

    def reached() -> bool:
        return any(len(file.read_bytes().splitlines()) > layers for file in output.glob("partial/*.jsonl"))

    return reached


def measure(asked: Asked) -> Result:
    """Whole runs, and what is left after a kill."""
    work, config = asked.work, asked.config
    model, rows = make(work / "model", config), make_rows(work / "rows.jsonl", ROWS, TOKENS)
    whole, killed = work / "whole", work / "killed"
    result = Result("Resume after a kill at half of the layers", {"whole run": [], "rest after the kill": []})
    for number in range(asked.rounds):
        clear(whole)
        result.costs["whole run"].append(process_tree.run(ours(model, rows, whole, "low", ROWS, TOKENS), ENVIRONMENT))
        clear(killed)
        command = ours(model, rows, killed, "low", ROWS, TOKENS)
        after = process_tree.run_until(command, calibrated(killed, config["num_hidden_layers"] // 2), ENVIRONMENT)
        result.costs["rest after the kill"].append(process_tree.run(command, ENVIRONMENT))
        result.notes.append(f"round {number + 1}: killed after {after:.2f} s")
        require_same(unified(killed), unified(whole), what="a whole run")
    rest = ratios(result.costs["rest after the kill"], result.costs["whole run"])
    result.figures.append(figure("rest / whole run", rest, GOAL))
    result.notes.append("the bytes are those of a whole run")
    return result


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, "whole run"))
