"""Measures `builder inspect` against its goals: python benchmarks/inspect_checkpoint.py [--rounds 5] [--directory DIR]

- time relative to a plain read of the same bytes, in alternating runs. `inspect / read` is that of the inspection in a
  process that has imported its modules; `command / read` is that of the whole command, where the start of Python with
  numpy and pydantic counts, whatever the size of the checkpoint. The goal is for the first
- peak memory, for a random model in Qwen3-0.6B's shape and for one with a quarter of its layers

The weights are random, but numbers that a quantizer could have written, so that the inspection finds nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from convert import CONFIG, LINEARS, NORMS, run, scale

from builder.core.safetensors_io import NewTensor, write

# The project's goals: a ratio, bytes, and how much more memory a model of four times the layers may take.
GOALS = {"inspect / read": 2.0, "peak memory": 300e6, "growth": 1.1}
ROWS = 4096  # of the embedding at a time
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


def floats(random: np.random.Generator, *shape: int) -> Iterator[bytes]:
    """BF16 numbers below 2."""
    rows = ROWS if len(shape) == 2 else shape[0]
    for start in range(0, shape[0], rows):
        size = (min(rows, shape[0] - start), *shape[1:])
        yield random.integers(0, 0x4000, size, np.uint16).tobytes()


def blocks(random: np.random.Generator, rows: int, columns: int) -> Iterator[bytes]:
    """Positive E4M3 scales of blocks of 16, 448 among them. Made when they are written, so that none is kept."""
    yield random.integers(1, 0x7F, (rows, columns // 16), np.uint8).tobytes()


def codes(random: np.random.Generator, rows: int, columns: int) -> Iterator[bytes]:
    """Packed E2M1 values."""
    yield random.bytes(rows * columns // 2)


def layer(number: int, random: np.random.Generator) -> Iterator[NewTensor]:
    """The tensors of one decoder layer; the largest block scale of each weight is 448."""
    prefix = f"model.layers.{number}."
    for name, size in NORMS.items():
        yield NewTensor(f"{prefix}{name}.weight", "BF16", (size,), floats(random, size))
    for name, (rows, columns) in LINEARS.items():
        yield NewTensor(f"{prefix}{name}.weight_scale", "F8_E4M3", (rows, columns // 16), blocks(random, rows, columns))
        yield NewTensor(f"{prefix}{name}.weight", "U8", (rows, columns // 2), codes(random, rows, columns))
        yield NewTensor(f"{prefix}{name}.weight_scale_2", "F32", (), scale(1e-4 * (1 + number / 100)))
        yield NewTensor(f"{prefix}{name}.input_scale", "F32", (), scale(1e-2 * (1 + number / 100)))
    for x in "kv":
        yield NewTensor(f"{prefix}self_attn.{x}_proj.{x}_scale", "F32", (), scale(1.0))


def make(directory: Path, layers: int) -> Path:
    """A unified NVFP4 checkpoint with so many layers."""
    directory.mkdir()
    random, vocabulary = np.random.default_rng(0), (CONFIG["vocab_size"], CONFIG["hidden_size"])
    embedding = NewTensor("model.embed_tokens.weight", "BF16", vocabulary, floats(random, *vocabulary))
    tensors = [embedding, NewTensor("model.norm.weight", "BF16", (1024,), floats(random, 1024))]
    write(directory / "model.safetensors", [*tensors, *(t for n in range(layers) for t in layer(n, random))])
    quantization = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": "FP8",
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    }
    stated = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": quantization}
    (directory / "hf_quant_config.json").write_text(json.dumps(stated))
    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    return directory


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
