"""Measures calibrated quantization (NVFP4, FP8 KV cache, 8 rows of 256 tokens) against its goals:

    python benchmarks/calibrated.py [--rounds 2] [--peers modelopt,llm-compressor] [--json]

- time of `builder quantize` (ModelOpt calibrates the whole model) and of `builder quantize --memory low` (one layer at
  a time), relative to ModelOpt's own quantize and export and to llm-compressor's `oneshot`. Ours write both layouts,
  hash and inspect them; peers write one. Whole processes in turns
- peak memory of the streamed way at two depths, relative to what it must hold
- the bytes of all tensors must be ModelOpt's, with either backend; else the benchmark ends with an error

Where the time of `--memory low` goes on two cores (AMD EPYC, Zen 4, with avx512_bf16 and sha_ni; torch 2.13, a model of
Qwen3-0.6B's shape): CPU seconds of its parts, by sampling, and of the same work alone:

    part                                                       in the run   alone   threads
    products of matrices in the layers (oneDNN, 203 GFLOP/s)          8.7     8.9   2
    attention (torch's own kernel, with MKL's sgemm)                  1.5     1.6   2
    norms, rotation, SiLU, ranges, Python                             1.6           2
    reading the layers' weights                                       0.5     0.3   2
    starting the worker, importing torch                              1.3     1.1   1
    starting the command, plan; inspection of both layouts            1.2           1
    sha256 of the model's file, 1.19 GB                               0.9     0.9   1
    reading, packing and writing, both layouts                        1.3           2, beside the rows
    sha256 of both layouts, 1.43 GB                                   1.0     1.0   2
    sum                                                              18.0

18.0 CPU seconds are 9.0 s if neither core is ever idle. The command's start (0.8 s) and torch's import (1.3 s) run in
one thread each, beside 0.9 s of hashing. On this machine, otherwise idle, two runs of one round took:

    way                      s               times faster than ModelOpt
    builder --memory low     10.7 and 10.5   3.03 and 2.78 (goal: 3)
    builder                  16.6 and 16.6   1.95 and 1.76 (goal: 1.6)
    ModelOpt                 32.4 and 29.2

So the goal of --memory low is at the edge: our time varies by 2 %, ModelOpt's by 11 %. The peak was 476 and 458 MB. The
bits of the products are ModelOpt's, so they stay; the start, the packing and the elementwise operations could be
shorter.
"""

from __future__ import annotations

import sys
from pathlib import Path

import process_tree
from comparison import ENVIRONMENT, Asked, Result, Way, builder, figure, main, peer, ratios, take_turns, unified
from random_model import embedding_bytes, layer_bytes, make, make_rows
from same_tensors import require_same

ROWS, TOKENS = 8, 256
STREAMED, DEFAULT, LAYERS, GROWTH = 3, 1.6, 1.5, 1.1


def ours(model: Path, rows: Path, output: Path, memory: str, count: int = ROWS, tokens: int = TOKENS) -> list[str]:
    """The command line of our own way: memory "low" or "whole"."""
    calibration = ("--calib-data", str(rows), "--calib-samples", str(count), "--calib-seq-len", str(tokens))
    asked = ("--gpu", "cpu", "--format", "nvfp4", "--kv-cache-dtype", "fp8", "--memory", memory)
    return builder("quantize", str(model), output, *asked, *calibration)


def ways(model: Path, rows: Path, asked: Asked) -> list[Way]:
    """Our two backends and the peers."""
    work = asked.work
    found = [
        Way("builder --memory low (streamed)", ours(model, rows, work / "low", "low"), work / "low"),
        Way("builder (ModelOpt calibrates)", ours(model, rows, work / "whole", "whole"), work / "whole"),
    ]
    data = (str(rows), str(TOKENS))
    if "modelopt" in asked.peers:
        argv = peer("modelopt", "peer_modelopt.py", "calibrated", str(model), str(work / "modelopt"), *data)
        found.append(Way("ModelOpt NVFP4 + FP8 KV", argv, work / "modelopt", "modelopt"))
    if "llm-compressor" in asked.peers:
        argv = peer("llm-compressor", "peer_llmcompressor.py", "calibrated", str(model), str(work / "oneshot"), *data)
        found.append(Way("llm-compressor oneshot", argv, work / "oneshot", "llm-compressor"))
    return found


def measure(asked: Asked) -> Result:
    """Costs, ratios and memory."""
    model, rows = make(asked.work / "model", asked.config), make_rows(asked.work / "rows.jsonl", ROWS, TOKENS)
    found = ways(model, rows, asked)
    title = f"Calibrated NVFP4 + FP8 KV, {ROWS} x {TOKENS} tokens (random model, {asked.shape}'s shape)"
    result = Result(title, take_turns(found, asked.rounds))
    low, whole = (result.costs[way.name] for way in found[:2])
    if "modelopt" in asked.peers:
        theirs = result.costs[found[2].name]
        for name, runs, goal in (("streamed", low, STREAMED), ("default", whole, DEFAULT)):
            times = ratios(theirs, runs)
            result.figures.append(figure(f"times faster than ModelOpt, {name}", times, goal, at_least=True))
        for name in ("low", "whole"):
            result.notes.append(f"{name}: {require_same(unified(asked.work / name), asked.work / 'modelopt')}")
    else:
        require_same(unified(asked.work / "low"), unified(asked.work / "whole"))
    depth(result, asked, max(cost.resident for cost in low))
    return result


def depth(result: Result, asked: Asked, peak: int) -> None:
    """The streamed way's memory, with half as many layers and with all of them.

    What it must hold: 1.5 layers, the embeddings and the hidden states of all rows, on top of Python with torch."""
    config = asked.config
    shallow = make(asked.work / "shallow", config | {"num_hidden_layers": max(1, config["num_hidden_layers"] // 2)})
    rows, output = asked.work / "rows.jsonl", asked.work / "half"
    half = Way("builder --memory low, half the layers", ours(shallow, rows, output, "low"), output)
    result.costs[half.name] = [half.run()]
    torch = process_tree.run([sys.executable, "-c", "import torch"], ENVIRONMENT).resident
    hidden = ROWS * TOKENS * config["hidden_size"] * 2
    allowed = LAYERS * layer_bytes(config) + embedding_bytes(config) + 2 * hidden
    result.notes.append(
        f"import torch alone: {torch / 1e6:.0f} MB; 1.5 layers, embeddings and hidden states: {allowed / 1e6:.0f} MB"
    )
    result.figures.append(figure("peak MB of the streamed way", [peak / 1e6], (torch + allowed) / 1e6))
    growth = peak / result.costs[half.name][0].resident
    result.figures.append(figure("growth of the peak with twice the layers", [growth], GROWTH))


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, "builder --memory low (streamed)"))
