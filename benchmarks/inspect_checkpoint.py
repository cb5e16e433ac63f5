"""Measures `builder inspect` against its goals: python benchmarks/inspect_checkpoint.py [--rounds 5] [--directory DIR]

- time relative to a plain read of the same bytes, in alternating runs. `inspect / read` is that of the inspection in a
  process that has imported its modules; `command / read` is that of the whole command, where the start of Python with
  numpy and pydantic counts, whatever the size of the checkpoint. The goal is for the first
- peak memory, for a random model in Qwen3-0.6B's shape and for one with a quarter of its layers
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from process_tree import run
from random_checkpoint import make

# The project's goals: a ratio, bytes, and how much more memory a model of four times the layers may take.
GOALS = {"inspect / read": 2.0, "peak memory": 300e6, "growth": 1.1}
READ = """
import sys
with open(sys.argv[1], "rb", buffering=0) as file:
    while file.read(1 << 24):
        pass
"""
INSPECT = """
import sys, time
from pathlib import Path
from builder.architectures import catalog
from builder.checkpoint import validate
catalog.every()
start = time.perf_counter()
found = validate.inspect(Path(sys.argv[1]))
middle = time.perf_counter()
with open(Path(sys.argv[1], "model.safetensors"), "rb", buffering=0) as file:
    while file.read(1 << 24):
        pass
end = time.perf_counter()
assert not found.findings
print(middle - start, end - middle)
"""


def in_process(source: Path) -> tuple[float, float]:
    """Seconds of an inspection and of a plain read, in one process."""
    done = subprocess.run([sys.executable, "-c", INSPECT, str(source)], check=True, capture_output=True, text=True)
    inspection, read = map(float, done.stdout.split())
    return inspection, read


def inspected(source: Path) -> tuple[float, int]:
    """An inspection; it ends with an error if it finds one."""
    return run([sys.executable, "-m", "builder", "inspect", str(source), "-q"])


def main() -> int:
    """Exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", type=Path, help="where to work (default: the temporary directory)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.directory) as name:
        small, large = (make(Path(name) / str(layers), layers) for layers in (7, 28))
        file = large / "model.safetensors"
        read = [sys.executable, "-c", READ, str(file)]
        run(read)  # both find the file in the page cache
        ratios, commands, peaks = [], [], []
        for n in range(asked.rounds):
            (command, peak), (plain, _), (inside, bare) = inspected(large), run(read), in_process(large)
            ratios.append(inside / bare)
            commands.append(command / plain)
            peaks.append(peak)
            print(
                f"round {n + 1}: inspect {inside:.2f} s, read {bare:.2f} s; commands: {command:.2f} s, {plain:.2f} s; "
                f"peak {peak / 1e6:.0f} MB",
                file=sys.stderr,
            )
        growth = statistics.median(peaks) / inspected(small)[1]
    found = {"inspect / read": statistics.median(ratios), "peak memory": max(peaks), "growth": growth}
    print(f"{'command / read':<16} {statistics.median(commands):12.4g}")
    for goal, limit in GOALS.items():
        print(f"{goal:<16} {found[goal]:12.4g}  goal {limit:.4g}: {found[goal] <= limit}")
    return 0 if all(found[goal] <= limit for goal, limit in GOALS.items()) else 1


if __name__ == "__main__":
    sys.exit(main())
