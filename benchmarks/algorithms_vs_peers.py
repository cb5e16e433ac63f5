"""Measures each algorithm of NVFP4 against the peers that have it: cost, and KL to BF16 of the checkpoints.

    python benchmarks/algorithms_vs_peers.py [--model DIR] [--texts 60] [--rounds 2] [--peers modelopt,llm-compressor]
    python benchmarks/algorithms_vs_peers.py --random [--shape qwen3-0.6b] [--layers 4]      costs alone

- `mse` and `hessian` against ModelOpt's sweep and local Hessian, `gptq` against llm-compressor's
- whole processes in turns: same model, same rows in the same order, no KV cache quantized. Ours write both layouts,
  hash and inspect them; peers write one
- KL of all checkpoints by our evaluation (accuracy.py), those of llm-compressor after `builder convert`

ModelOpt simulates NVFP4 with kernels for CUDA only. On a CPU our arithmetic takes their place (quantize/simulation.py),
so its seconds are not those of a GPU. make bench-peers installs the peers; --model as in accuracy.py.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import comparison
import random_model
from accuracy import SETS, Texts, ratio
from comparison import ENVIRONMENT, ROOT, Asked, Figure, Result, Way, builder, peer

ROWS, TOKENS = 32, 512
OURS = {
    "mse": ("mse",),
    "hessian": ("hessian",),
    "gptq": ("gptq",),
    "gptq, scales by max": ("gptq", "--set", "quantization.gptq.scales=max"),
}
# {whose: {the peer's name of it: ours that are compared with it}}
THEIRS = {
    "modelopt": {"mse": ("mse",), "local_hessian": ("hessian",)},
    "llm-compressor": {"gptq": ("gptq", "gptq, scales by max")},
}


def ways(model: Path, rows: Path, asked: Asked) -> dict[str, Way]:
    """{name: way}, ours first."""
    calibration = ("--calib-data", str(rows), "--calib-samples", str(ROWS), "--calib-seq-len", str(TOKENS))
    common = ("--gpu", "cpu", "--format", "nvfp4", "--kv-cache-dtype", "auto", "--memory", "low", *calibration)
    found = {}
    for number, (name, flags) in enumerate(OURS.items()):
        output = asked.work / f"ours-{number}"
        found[name] = Way(name, builder("quantize", str(model), output, *common, "--algorithm", *flags), output)
    data = (str(rows), str(TOKENS))
    for name in THEIRS["modelopt"] if "modelopt" in asked.peers else ():
        output = asked.work / f"modelopt-{name}"
        argv = peer("modelopt", "peer_modelopt.py", "algorithm", str(model), str(output), *data, name)
        environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}  # for the arithmetic
        found[f"ModelOpt {name}"] = Way(f"ModelOpt {name}", argv, output, "modelopt", environment)
    for name in THEIRS["llm-compressor"] if "llm-compressor" in asked.peers else ():
        output = asked.work / f"llmcompressor-{name}"
        argv = peer("llm-compressor", "peer_llmcompressor.py", name, str(model), str(output), *data)
        found[f"llm-compressor {name}"] = Way(f"llm-compressor {name}", argv, output, "llm-compressor")
    return found


def pairs(found: Mapping[str, Way]) -> list[tuple[str, str]]:
    """(ours, the peer's) to compare."""
    whose = {"modelopt": "ModelOpt", "llm-compressor": "llm-compressor"}
    named = [(f"{whose[tool]} {name}", ours) for tool, known in THEIRS.items() for name, ours in known.items()]
    return [(ours, theirs) for theirs, several in named if theirs in found for ours in several]


def measure(model: Path, rows: Path, asked: Asked, texts: int) -> Result:
    """Costs and, with texts, KLs."""
    found = ways(model, rows, asked)
    result = Result(f"{model.name}, {ROWS} rows of at most {TOKENS} tokens")
    result.costs = comparison.take_turns(found.values(), asked.rounds)
    for ours, theirs in pairs(found):
        both = list(zip(result.costs[ours], result.costs[theirs], strict=True))
        for what in ("seconds", "cpu", "resident"):
            times = [getattr(one, what) / getattr(other, what) for one, other in both]
            result.figures.append(comparison.figure(f"{what}: {ours} / {theirs}", times, 1.0))
    if texts:
        _quality(result, found, Texts(model, texts))
    return result


def _quality(result: Result, found: Mapping[str, Way], texts: Texts) -> None:
    """Adds the KL of each checkpoint, and ours relative to the peer's."""
    kls = {name: texts.kl(texts.checkpoint(_checkpoint(way))) for name, way in found.items()}
    for name, kl in kls.items():
        each = ", ".join(f"{one} {kl[one].sum() / texts.tokens(one):.4f}" for one in SETS)
        result.notes.append(f"KL of {name}: {each}")
    for ours, theirs in pairs(found):
        for one in SETS:
            value, low, high = ratio(kls[ours][one], kls[theirs][one])
            title = f"KL on {one}: {ours} / {theirs}"
            # No worse: the interval of the ratio reaches 1 or lies below.
            result.figures.append(Figure(f"{title}, low end", low, 1.0, spread=(value, high)))


def _checkpoint(way: Way) -> Path:
    """A directory whose `unified` is the checkpoint."""
    if not way.peer:
        return comparison.unified(way.output).parent
    made = way.output.with_name(f"{way.output.name}-unified")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    if way.peer == "modelopt":
        (made / "unified").symlink_to(way.output)
        return made
    argv = [sys.executable, "-m", "builder", "convert", str(way.output), str(made / "unified"), "--to", "unified", "-q"]
    subprocess.run(argv, check=True, env=ENVIRONMENT)
    return made


def first_rows(path: Path) -> Path:
    """The first rows of a bundled calibration set, plain text."""
    lines = (ROOT / "configs" / "calibration" / "python-docs-text.jsonl").read_text(encoding="utf-8").splitlines()
    path.write_text("".join(f"{line}\n" for line in lines[:ROWS]), encoding="utf-8")
    return path


def main() -> int:
    """Prints a table. Returns 1 if a goal is missed."""
    parser = comparison.parser(__doc__)
    parser.add_argument("--model", type=Path, default=ROOT / "tests" / "data" / "tiny-qwen3")
    parser.add_argument("--random", action="store_true", help="a random model of --shape, whose KL says nothing")
    parser.add_argument("--texts", type=int, default=60, help="of each of the two sets; 0: costs alone")
    given = parser.parse_args()
    with comparison.started(given) as asked:
        model = random_model.make(asked.work / "model", asked.config) if given.random else given.model.resolve()
        rows = first_rows(asked.work / "rows.jsonl")
        result = measure(model, rows, asked, 0 if given.random else given.texts)
    if given.json:
        print(json.dumps(result.as_json()))
    else:
        comparison.show(result, "gptq")
    return 0 if all(one.met for one in result.figures) else 1


if __name__ == "__main__":
    sys.exit(main())
