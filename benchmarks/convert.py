"""Measures `builder convert` against its goals: python benchmarks/convert.py [--rounds 3] [--directory DIR]

- time relative to a plain read and write of the same bytes, in alternating runs; the start of both processes counts
- peak memory, for a random model in Qwen3-0.6B's shape and for one with a quarter of its layers
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from process_tree import run
from random_checkpoint import make

# The project's goals: a ratio, bytes, and how much more memory a model of four times the layers may take.
GOALS = {"convert / copy": 2.0, "peak memory": 300e6, "growth": 1.1}
COPY = """
import sys
source, target = sys.argv[1:]
with open(source, "rb", buffering=0) as a, open(target, "wb", buffering=0) as b:
    while chunk := a.read(1 << 24):
        b.write(chunk)
"""


def converted(source: Path, target: Path, layout: str) -> tuple[float, int]:
    """A conversion; `target` is removed before."""
    shutil.rmtree(target, ignore_errors=True)
    return run([sys.executable, "-m", "builder", "convert", str(source), str(target), "--to", layout, "-q"])


def main() -> int:
    """Exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="where to work (default: the temporary directory)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.directory) as name:
        root = Path(name)
        large, small = make(root / "large", 28), make(root / "small", 7)
        results = [
            measure(root, large, small, layout, asked.rounds) for layout in ("compressed-tensors", "tensorrt_llm")
        ]
        converted(large, root / "between", "compressed-tensors")
        converted(small, root / "between-small", "compressed-tensors")
        results.append(measure(root, root / "between", root / "between-small", "unified", asked.rounds))
    return 0 if all(results) else 1


def measure(root: Path, large: Path, small: Path, layout: str, rounds: int) -> bool:
    """Prints one layout's ratio and memory; returns whether the goals are met."""
    weights, pairs = large / "model.safetensors", []
    for _ in range(rounds + 1):  # the first warms the page cache
        copied = run([sys.executable, "-c", COPY, str(weights), str(root / "copy")])
        made = converted(large, root / "new", layout)
        pairs.append((made[0] / copied[0], made[0], copied[0], made[1]))
    (root / "copy").unlink()
    ratio = statistics.median(pair[0] for pair in pairs[1:])
    peak, little = max(pair[3] for pair in pairs), converted(small, root / "new", layout)[1]
    shutil.rmtree(root / "new")
    met = ratio <= GOALS["convert / copy"] and peak <= GOALS["peak memory"] and peak / little <= GOALS["growth"]
    times = ", ".join(f"{made:.2f} / {copied:.2f} s" for _, made, copied, _ in pairs[1:])
    print(f"{layout:<18} convert / copy {ratio:.2f} ({times}), goal {GOALS['convert / copy']}; peak memory "
          f"{peak / 1e6:.0f} MB, with 7 of 28 layers {little / 1e6:.0f} MB, goal 300 MB and flat: {met}")  # fmt: skip
    return met


if __name__ == "__main__":
    sys.exit(main())
