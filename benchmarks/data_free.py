"""Measures quantization without data, from file to file, against its goals:

    python benchmarks/data_free.py [--rounds 2] [--peers modelopt,llm-compressor] [--json]

- time relative to a plain copy of the weights, and to ModelOpt's and llm-compressor's ways (NVFP4 weights; make
  bench-peers installs them). Whole processes in turns: the start of Python and imports count. "writer" writes the one
  layout that peers write, "builder" is `builder quantize --data-free`, which writes both layouts with scales of inputs
  and KV cache, inspects them, and hashes the input and the output
- time with block scales that are searched (--algorithm mse), relative to that of "builder" in the same round
- peak memory of all processes, on a model in Qwen3-0.6B's shape and on one with Qwen3-8B's widths, whose layers are 12
  times as large
- the bytes of all weights and their scales must be ModelOpt's; else the benchmark ends with an error

"writer" reaches 20 times; "builder" can't where the model is one file. The sha256 of a file is one chain of blocks:
0.85 s for 1.19 GB on a core with sha_ni, after 0.5 s in which Python starts and the command is planned, and a
twentieth of the fastest peer's 18 s is 0.9 s. All its CPU seconds (start and plan 0.5, hash of the model 0.9, reading,
packing and writing 1.3, hashes of both layouts 1.0, inspection 0.5) make 2.1 s on two cores that are never idle.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from comparison import (
    ROOT,
    Asked,
    Result,
    Way,
    builder,
    fastest,
    figure,
    main,
    peer,
    plain_copy,
    ratios,
    take_turns,
    unified,
)
from random_model import make, shape
from same_tensors import require_same

from builder.core.manifest import sha256

# Times faster than the fastest peer, copies of the input, MB, how much more memory the larger layers may take, and how
# many times longer the search of block scales.
FASTER, COPIES, MEMORY, GROWTH, SEARCHED = 20, 1.5, 300, 1.25, 3
WIDE_LAYERS = 4  # of the model with Qwen3-8B's widths: a layer is processed as any other


def ours(model: Path | str, output: Path) -> list[str]:
    """The command line of our own way."""
    return builder("quantize", str(model), output, "--gpu", "cpu", "--format", "nvfp4", "--data-free")


def written(model: Path, output: Path) -> list[str]:
    """The command line of its writer alone."""
    return [sys.executable, str(ROOT / "benchmarks" / "write_unified.py"), str(model), str(output)]


def ways(model: Path, asked: Asked) -> list[Way]:
    """A copy, our own way, its writer alone, and those of the peers."""
    work = asked.work
    found = [
        Way("copy, with the start of Python", plain_copy(model, work / "copy"), work / "copy"),
        Way("writer", written(model, work / "writer"), work / "writer"),
        Way("builder", ours(model, work / "ours"), work / "ours"),
        Way("builder, mse", [*ours(model, work / "mse"), "--algorithm", "mse"], work / "mse"),
    ]
    if "modelopt" in asked.peers:
        argv = peer("modelopt", "peer_modelopt.py", "data-free", str(model), str(work / "modelopt"))
        found.append(Way("ModelOpt W4A16_NVFP4", argv, work / "modelopt", "modelopt"))
    if "llm-compressor" in asked.peers:
        for name in ("oneshot", "model_free_ptq"):
            argv = peer("llm-compressor", "peer_llmcompressor.py", name, str(model), str(work / name))
            found.append(Way(f"llm-compressor {name}", argv, work / name, "llm-compressor"))
    return found


def measure(asked: Asked) -> Result:
    """Costs, ratios and memory."""
    model = make(asked.work / "model", asked.config)
    found = ways(model, asked)
    result = Result(
        f"Data-free NVFP4, file to file (random model, {asked.shape}'s shape)", take_turns(found, asked.rounds)
    )
    copy = result.costs[found[0].name]
    if peers := [way.name for way in found if way.peer]:
        theirs = fastest(result.costs, peers)
        for name in ("writer", "builder"):
            times = ratios(theirs, result.costs[name])
            result.figures.append(figure(f"times faster than the fastest peer, {name}", times, FASTER, at_least=True))
    for name in ("writer", "builder"):
        result.figures.append(figure(f"time / copy of the input, {name}", ratios(result.costs[name], copy), COPIES))
    result.notes.append(
        f"hashing input and output takes one core {hashing(model, unified(asked.work / 'ours').parent):.2f} s"
    )
    searched = ratios(result.costs["builder, mse"], result.costs["builder"])
    result.figures.append(figure("time / max in the same format, mse", searched, SEARCHED))
    if "modelopt" in asked.peers:
        for output, more in ((asked.work / "writer", False), (unified(asked.work / "ours"), True)):
            result.notes.append(require_same(output, asked.work / "modelopt", ranges=more))
    memory(result, asked)
    return result


def hashing(*directories: Path) -> float:
    """CPU seconds that the hashes in the store's manifests take, whatever else is done. All files are in memory."""
    start = time.process_time()
    for path in (path for directory in directories for path in directory.rglob("*") if path.is_file()):
        sha256(path)
    return time.process_time() - start


def memory(result: Result, asked: Asked) -> None:
    """The peaks of both ways, with a model of larger layers too."""
    small = {name: max(cost.resident for cost in result.costs[name]) / 1e6 for name in ("writer", "builder")}
    wide = make(asked.work / "wide", shape("qwen3-8b", min(asked.layers or WIDE_LAYERS, WIDE_LAYERS)), shards=2)
    output = asked.work / "large"
    for name, argv in (("writer", written(wide, output)), ("builder", ours(wide, output))):
        cost = Way(name, argv, output).run()
        result.costs[f"{name}, Qwen3-8B's widths"] = [cost]
        peak = cost.resident / 1e6
        result.figures.append(figure(f"peak MB, {name}, {asked.shape}'s shape", [small[name]], MEMORY))
        result.figures.append(figure(f"peak MB, {name}, Qwen3-8B's widths", [peak], MEMORY))
        result.figures.append(figure(f"growth of the peak to 8B widths, {name}", [peak / small[name]], GROWTH))


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, "builder"))
