"""Measures the scoring throughput relative to lm-eval's `hf` model, and the memory for more texts.

    python benchmarks/evaluate.py [--rounds 3] [--dtype bfloat16]

The extra `tasks` installs lm-eval. Both run in the same process, with the same model class, dtype and threads, in
alternating rounds. Both tokenize and score the same texts. Ours stores no BF16 distributions here (`top` 0), as
lm-eval stores none. lm-eval's default batch size is 1; 8 and 32 are measured too.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, TypeAlias

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
MODEL = "tests/data/tiny-qwen3"
ROWS = [Path("tests/data/eval/prose.jsonl"), Path("tests/data/eval/chat.jsonl")]
GOAL, BATCHES = 1.5, (1, 8, 32)
Times: TypeAlias = Any  # [wall, CPU] seconds


def now() -> Times:
    """The wall clock and the CPU clock, in seconds. Other programs on the machine do not affect the second."""
    import numpy as np

    return np.array([time.perf_counter(), time.process_time()])


def texts(copies: int = 1) -> list[str]:
    """The fixture's texts, repeated."""
    from builder.evaluate.datasets import text_of

    rows = [json.loads(line) for path in ROWS for line in path.read_text(encoding="utf-8").splitlines()]
    return [text_of(row) for row in rows] * copies


def ours(runner: Any, tokenizer: Any, rows: Path) -> tuple[int, Times, float]:
    """Scores with our runner: the number of tokens, the seconds, and the sum of the negative log-likelihoods."""
    import numpy as np
    import torch

    from builder.evaluate.datasets import sequences
    from builder.evaluate.runners.worker import score_set

    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        start = now()
        found = sequences(rows, tokenizer, name="fixture", min_tokens=2, max_tokens=2040)
        tokens = score_set(runner, found, Path(directory))["tokens"]
        elapsed = now() - start
        return tokens, elapsed, float(np.load(Path(directory) / "nll.npy").sum(dtype=np.float64))


def theirs(model: Any, tokenizer: Any, batch: int) -> tuple[int, Times, float]:
    """The same with lm-eval's rolling log-likelihood, which also scores each text's first token."""
    from lm_eval.api.instance import Instance

    model.batch_size_per_gpu = batch
    requests = [
        Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=index)
        for index, text in enumerate(texts())
    ]
    start = now()
    found = model.loglikelihood_rolling(requests, disable_tqdm=True)
    elapsed = now() - start
    return sum(len(tokenizer(text)["input_ids"]) for text in texts()), elapsed, -sum(found)


def memory(copies: int) -> int:
    """The maximum resident set size in kB of a process that scores this many copies of the fixture's texts."""
    argv = [sys.executable, __file__, "--memory", str(copies)]
    return int(subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()[-1])


def job(dtype: str) -> dict[str, Any]:
    """The job of a runner."""
    return {"model": MODEL, "dtype": dtype, "trust_remote_code": False, "batch_tokens": 8192}


def score_copies(copies: int, dtype: str) -> None:
    """Scores copies of the texts, storing the most likely tokens, and prints the maximum resident set size in kB."""
    import torch
    from transformers import AutoTokenizer

    from builder.evaluate.datasets import sequences
    from builder.evaluate.runners import local
    from builder.evaluate.runners.worker import score_set

    with tempfile.TemporaryDirectory() as directory, torch.inference_mode(), local.bf16(job(dtype)) as runner:
        rows = Path(directory) / "rows.jsonl"
        rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(copies)), encoding="utf-8")
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        found = sequences(rows, tokenizer, name="fixture", min_tokens=2, max_tokens=2040)
        score_set(runner, found, Path(directory), top=1024)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def compare(rounds: int, dtype: str) -> bool:
    """Prints both throughputs and their ratios; returns whether the goal is met at batch size 1."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from builder.evaluate.runners import local

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    lm = HFLM(pretrained=MODEL, dtype=dtype, device="cpu", batch_size=1, max_length=2048)
    speeds: dict[str, list[Times]] = {}
    ratios: dict[int, list[Times]] = {batch: [] for batch in BATCHES}
    with tempfile.TemporaryDirectory() as directory, local.bf16(job(dtype)) as runner:
        rows = Path(directory) / "rows.jsonl"
        rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()), encoding="utf-8")
        for number in range(rounds):
            for batch in BATCHES:
                tokens, elapsed, nll = ours(runner, tokenizer, rows)
                other, other_elapsed, other_nll = theirs(lm, tokenizer, batch)
                ratios[batch].append((tokens / elapsed) / (other / other_elapsed))
                speeds.setdefault("ours", []).append(tokens / elapsed)
                speeds.setdefault(f"lm-eval, batch {batch}", []).append(other / other_elapsed)
            print(f"round {number + 1}: mean NLL {nll / tokens:.3f}, lm-eval {other_nll / other:.3f}", file=sys.stderr)
    for name, values in speeds.items():
        print(f"{name:<18} tokens/s {summary(values, 0)}")
    for batch, values in ratios.items():
        print(f"ratio, batch {batch:<5} {summary(values, 2)}" + (f"  goal {GOAL}" if batch == 1 else ""))
    return statistics.median(float(cpu) for _, cpu in ratios[1]) >= GOAL


def summary(values: list[Times], digits: int) -> str:
    """The median and the extremes by wall clock and by CPU clock."""
    wall, cpu = ([float(value[clock]) for value in values] for clock in (0, 1))
    return ", ".join(
        f"{name} {statistics.median(times):.{digits}f} ({min(times):.{digits}f} to {max(times):.{digits}f})"
        for name, times in (("wall", wall), ("CPU", cpu))
    )


def main() -> int:
    """Exit code 1 if a goal is missed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--memory", type=int)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.memory:
        score_copies(arguments.memory, arguments.dtype)
        return 0
    met = compare(arguments.rounds, arguments.dtype)
    few, many = memory(1), memory(8)
    print(f"memory             {few / 1e3:.0f} MB for the fixture's 405 texts, {many / 1e3:.0f} MB for 8 times as many")
    return 0 if met and many < 1.1 * few else 1


if __name__ == "__main__":
    sys.exit(main())
