"""Measures the overhead of the build against its goals: python benchmarks/chain.py [--rounds 3]

- a second build without changes, and whether it imports torch
- `builder --help` and `builder plan`
- a build from fetch to the rendered repository, relative to calling ModelOpt's quantize and export directly
  (alternating runs)
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "tests/data/tiny-qwen3"
ROWS = "configs/calibration/python-docs.jsonl"
SEQ_LEN = "512"
# The project's goals: seconds, and for the last one a ratio.
GOALS = {"second build": 1.0, "builder --help": 0.25, "builder plan": 1.0, "chain / direct": 1.15}


def timed(argv: list[str]) -> float:
    """Runs a command and returns its wall time in seconds."""
    start = time.perf_counter()
    subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def builder(*argv: str) -> list[str]:
    """The command line of this checkout's builder."""
    return [sys.executable, "-m", "builder", *argv]


def chain(command: str, output: Path) -> list[str]:
    """The command line that builds the fixture model up to `command`."""
    recipe = ["--model", MODEL, "--gpu", "cpu", "--calib-data", ROWS, "--calib-seq-len", SEQ_LEN]
    return builder(command, *recipe, "--output", str(output))


def imports_torch(argv: list[str]) -> bool:
    """Whether a Python command imports torch."""
    done = subprocess.run([argv[0], "-X", "importtime", *argv[1:]], check=True, capture_output=True, text=True)
    return any(line.rpartition("|")[2].strip() == "torch" for line in done.stderr.splitlines())


def show(name: str, values: list[float], unit: str) -> bool:
    """Prints the median, the extremes and the goal; returns whether the goal is met."""
    median, goal = statistics.median(values), GOALS[name]
    met = median <= goal
    print(f"{name:<16} {median:6.3f}{unit}  ({min(values):.3f} to {max(values):.3f})  goal {goal}{unit}: {met}")
    return met


def main() -> int:
    """Exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        direct = [sys.executable, "benchmarks/peer_modelopt.py", "calibrated", MODEL]
        subprocess.run(chain("render", work / "warm"), check=True)
        ratios, times = [], []
        for n in range(rounds):
            ours = timed(chain("render", work / f"chain{n}"))
            theirs = timed([*direct, str(work / f"direct{n}"), ROWS, SEQ_LEN])
            ratios.append(ours / theirs)
            times.append((ours, theirs))
            print(f"round {n + 1}: chain {ours:.2f} s, direct {theirs:.2f} s", file=sys.stderr)
        subprocess.run(chain("build", work / "warm"), check=True, stdout=subprocess.DEVNULL)
        second = chain("build", work / "warm")
        met = [
            show("chain / direct", ratios, ""),
            show("second build", [timed(second) for _ in range(5)], " s"),
            show("builder --help", [timed(builder("--help")) for _ in range(5)], " s"),
            show("builder plan", [timed(chain("plan", work / "warm")) for _ in range(5)], " s"),
            not imports_torch(second),
        ]
        print(f"second build imports torch: {not met[-1]}")
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
