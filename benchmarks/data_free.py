"""Measures quantization without data, from file to file, against its goals:

    python benchmarks/data_free.py [--rounds 2] [--peers modelopt,llm-compressor] [--json]

- time of `builder quantize --data-free` relative to a plain copy of the weights, and to ModelOpt's and llm-compressor's
  ways (NVFP4 weights; make bench-peers installs them). Whole processes in turns: the start of Python and imports count.
  The builder writes both layouts, hashes and inspects them; "unified only" writes the one layout that peers write
- peak memory of all processes, on a model in Qwen3-0.6B's shape and on one with Qwen3-8B's widths
- the bytes of all weights and their scales must be ModelOpt's; else the benchmark ends with an error
"""

from __future__ import annotations

import sys
from pathlib import Path

from comparison import Asked, Result, Way, builder, fastest, figure, main, peer, plain_copy, ratios, take_turns, unified
from random_model import make, shape
from same_tensors import require_same

FASTER, COPIES, MEMORY, GROWTH = 20, 1.5, 300, 1.1
WIDE_LAYERS = 4  # of the model with Qwen3-8B's widths: a layer is processed as any other


def ours(model: Path, output: Path, *options: str) -> list[str]:
    """The command line of our own way."""
    return builder("quantize", str(model), output, "--gpu", "cpu", "--format", "nvfp4", "--data-free", *options)


def ways(model: Path, asked: Asked) -> list[Way]:
    """A copy, our own way and those of the peers."""
    work = asked.work
    found = [
        Way("copy, with the start of Python", plain_copy(model, work / "copy"), work / "copy"),
        Way("builder --data-free", ours(model, work / "ours"), work / "ours"),
        Way("builder --data-free, unified only", ours(model, work / "one", "--target", "llmapi"), work / "one"),
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
    model = make(asked.work / "model", shape("qwen3-0.6b", asked.layers))
    found = ways(model, asked)
    result = Result("Data-free NVFP4, file to file (random model, Qwen3-0.6B's shape)", take_turns(found, asked.rounds))
    copy, default, one = (result.costs[way.name] for way in found[:3])
    if peers := [way.name for way in found if way.peer]:
        theirs = fastest(result.costs, peers)
        for name, runs in (("both layouts", default), ("unified only", one)):
            times = ratios(theirs, runs)
            result.figures.append(figure(f"times faster than the fastest peer, {name}", times, FASTER, at_least=True))
    for name, runs in (("both layouts", default), ("unified only", one)):
        result.figures.append(figure(f"time / copy of the input, {name}", ratios(runs, copy), COPIES))
    if "modelopt" in asked.peers:
        result.notes.append(require_same(unified(asked.work / "ours"), asked.work / "modelopt", only_weights=True))
    wide = make(asked.work / "wide", shape("qwen3-8b", min(asked.layers or WIDE_LAYERS, WIDE_LAYERS)), shards=2)
    large = Way("builder, Qwen3-8B's widths", ours(wide, asked.work / "large"), asked.work / "large").run()
    result.costs["builder, Qwen3-8B's widths"] = [large]
    least = max(cost.resident for cost in default) / 1e6
    result.figures.append(figure("peak MB of all processes, Qwen3-0.6B's shape", [least], MEMORY))
    result.figures.append(figure("peak MB of all processes, Qwen3-8B's widths", [large.resident / 1e6], MEMORY))
    result.figures.append(figure("growth of the peak from 0.6B to 8B widths", [large.resident / 1e6 / least], GROWTH))
    return result


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, "builder --data-free"))
