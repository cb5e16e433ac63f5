"""Measures what each algorithm of NVFP4 loses: KL to BF16 of the checkpoints that `builder quantize` writes.

    python benchmarks/accuracy.py [--model DIR] [--row mse] [--texts 60] [--work DIR] [--served]

All are calibrated with the same rows of Python's documentation and measured on the same other texts, prose and chat of
tests/data/eval, with the KV cache in the model's own type. Ratios to `max` are paired: each resample draws the same
texts for both. --served measures what Triton answers instead: prompt logits of the reference executor over gRPC. By
default the bundled model; a real one: make .venv/real/smollm2-135m-instruct/config.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
SETS = ("prose", "chat")
MAX_TOKENS, RESAMPLES = 256, 2000
GPTQ = ("--algorithm", "gptq", "--set")
BY_HESSIAN = (*GPTQ, "quantization.gptq.scales=hessian")
LEARNED = ("--transform", "spinquant", "--set", "transform.kind=learned")
ROWS: Mapping[str, Sequence[str]] = {
    "max": (),
    "mse": ("--algorithm", "mse"),
    "hessian": ("--algorithm", "hessian"),
    "gptq, scales by max": (*GPTQ, "quantization.gptq.scales=max"),
    "gptq, scales by mse": (*GPTQ, "quantization.gptq.scales=mse"),
    "gptq, scales by hessian": BY_HESSIAN,
    "gptq, scales by hessian, attention in BF16": (*BY_HESSIAN, "--keep-bf16", "*.self_attn.*"),
    "W4A16, max": ("--format", "w4a16_nvfp4"),
    "W4A16, mse": ("--format", "w4a16_nvfp4", "--algorithm", "mse"),
    "W4A16, gptq, scales by max": ("--format", "w4a16_nvfp4", *GPTQ, "quantization.gptq.scales=max"),
    "W4A16, gptq, scales by mse": ("--format", "w4a16_nvfp4", *GPTQ, "quantization.gptq.scales=mse"),
    "W4A16, gptq": ("--format", "w4a16_nvfp4", *BY_HESSIAN),
    "spinquant, max": ("--transform", "spinquant"),
    "spinquant, gptq": ("--transform", "spinquant", *BY_HESSIAN),
    "learned rotation, max": LEARNED,
    "learned rotation, gptq": (*LEARNED, *BY_HESSIAN),
}
EXACT = "weights exact, activations NVFP4"


RENDER = ("--no-quality-check", "--set", "engine.flags.gather_context_logits=enable")


def quantize(model: Path, flags: Sequence[str], samples: int, output: Path, *, served: bool) -> tuple[Path, float]:
    """Runs `builder quantize`, or `builder render` for what is to be served. Returns the checkpoint or the repository,
    and the CPU seconds that it took."""
    argv = [sys.executable, "-m", "builder", "render" if served else "quantize", "--model", str(model), "--gpu", "cpu"]
    argv += ["--memory", "low", "--kv-cache-dtype", "auto", "--calib-data", "builtin:python-docs", "--calib-samples"]
    argv += [str(samples), "--calib-seq-len", "256", "--output", str(output), "--json", *flags]
    before = cpu()
    done = subprocess.run([*argv, *(RENDER if served else ())], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.stderr)
    return Path(json.loads(done.stdout)["path"]), cpu() - before


def cpu() -> float:
    """The CPU seconds of finished child processes."""
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Texts:
    """The texts, and what the BF16 model predicts for them."""

    def __init__(self, model: Path, count: int) -> None:
        import torch

        from builder.evaluate.datasets import sequences
        from builder.evaluate.runners import local
        from builder.tokenizer import loading

        self.job = {"model": str(model), "trust_remote_code": False, "gpus": [], "kv_cache_dtype": "auto"}
        self.job |= {"dtype": "float32", "batch_tokens": 2048, "memory": "whole"}
        tokenizer = loading.load(model, trust_remote_code=False)
        data = ROOT / "tests" / "data" / "eval"
        self.ids = {
            name: sequences(data / f"{name}.jsonl", tokenizer, name=name, min_tokens=16, max_tokens=MAX_TOKENS).ids[
                :count
            ]
            for name in SETS
        }
        with torch.inference_mode(), local.bf16(self.job) as runner:
            self.expected = {
                name: [logits.log_softmax(-1).half() for logits in self._logits(runner, name)] for name in SETS
            }

    def _logits(self, runner: Any, name: str) -> Any:
        return (logits.float() for ids in self.ids[name] for logits in runner.logits([ids]))

    def kl(self, opened: AbstractContextManager[Any]) -> dict[str, np.ndarray[Any, Any]]:
        """{set: KL of each text, summed over its tokens} of what a runner predicts."""
        import torch

        found = {}
        with torch.inference_mode(), opened as runner:
            for name in SETS:
                sums = []
                for expected, logits in zip(self.expected[name], self._logits(runner, name), strict=True):
                    wanted = expected.float()
                    sums.append(float((wanted.exp() * (wanted - logits.log_softmax(-1))).sum()))
                found[name] = np.array(sums)
        return found

    @contextmanager
    def checkpoint(self, path: Path, *, exact: bool = False) -> Iterator[Any]:
        """A checkpoint. exact: with the weights of the BF16 model."""
        from builder.evaluate.runners import local

        with local.checkpoint({**self.job, "unified": str(path / "unified")}) as runner:
            if exact:
                _exact(runner.model, Path(self.job["model"]))
            yield runner

    def served(self, path: Path) -> AbstractContextManager[Any]:
        """A Triton repository, which is served meanwhile. Its log is beside it."""
        from builder.evaluate.runners import triton
        from builder.triton.repository import open_repository

        found = open_repository(path)
        job = {"models": str(found.models), "facts": found.facts, "logits": False, "timeout": 600.0}
        return triton.served(job | {"batch_tokens": 2048, "server_log": str(path.with_suffix(".log"))})

    def tokens(self, name: str) -> int:
        """The tokens that the KL is a mean over."""
        return sum(len(ids) for ids in self.ids[name])


def _exact(model: Any, source: Path) -> None:
    """Gives the quantized layers the weights of the BF16 model. Their inputs are still rounded."""
    from builder.formats.arithmetic.dtypes import read
    from builder.model.source_tensors import open_tensors

    stored = open_tensors(source)
    for name, module in model.named_modules():
        if module._forward_pre_hooks and f"{name}.weight" in stored:
            module.weight.data = read(stored, f"{name}.weight").to(module.weight.dtype)


def ratio(found: np.ndarray[Any, Any], of: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """The ratio of sums, and the ends of its 95 % interval by a paired bootstrap."""
    draws = np.random.default_rng(0).integers(0, len(of), (RESAMPLES, len(of)))
    low, high = np.quantile(found[draws].sum(1) / of[draws].sum(1), [0.025, 0.975])
    return float(found.sum() / of.sum()), float(low), float(high)


def main() -> None:
    """Prints the table, a line for each row as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "tests" / "data" / "tiny-qwen3")
    parser.add_argument("--row", action="append", choices=[*ROWS], help="only this one, after max (repeatable)")
    parser.add_argument("--texts", type=int, default=60, help="of each of the two sets")
    parser.add_argument("--samples", type=int, default=64, help="calibration rows of at most 256 tokens")
    parser.add_argument("--threads", type=int, default=2, help="of the measurements")
    parser.add_argument("--served", action="store_true", help="measure the model that Triton serves")
    parser.add_argument("--work", type=Path, help="where checkpoints are kept (default: a temporary directory)")
    asked = parser.parse_args()
    chosen = {name: flags for name, flags in ROWS.items() if not asked.row or name in ("max", *asked.row)}
    import torch

    torch.set_num_threads(asked.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work, texts = asked.work or Path(temporary), Texts(asked.model, asked.texts)
        counts = ", ".join(f"{texts.tokens(name)} tokens of {name}" for name in SETS)
        print(f"{asked.model.name}: KL to BF16 in nats per token on {counts}; {asked.samples} calibration rows")
        print("| algorithm | prose | against max | chat | against max | CPU s |\n| --- | --- | --- | --- | --- | --- |")
        base: dict[str, np.ndarray[Any, Any]] = {}
        for title, flags in chosen.items():
            path, seconds = quantize(asked.model, flags, asked.samples, work, served=asked.served)
            kl = texts.kl(texts.served(path) if asked.served else texts.checkpoint(path))
            base = base or kl
            report(title, kl, base, texts, f"{seconds:.0f}")
            if title == "max" and not asked.served:
                began = time.process_time()
                report(EXACT, texts.kl(texts.checkpoint(path, exact=True)), base, texts, "")
                print(f"(one measurement: {time.process_time() - began:.0f} CPU s)", file=sys.stderr)


def report(title: str, kl: Mapping[str, Any], base: Mapping[str, Any], texts: Texts, seconds: str) -> None:
    """Prints a row."""
    cells = []
    for name in SETS:
        value, low, high = ratio(kl[name], base[name])
        cells += [f"{kl[name].sum() / texts.tokens(name):.4f}", f"{value:.2f} ({low:.2f} to {high:.2f})"]
    print(f"| {title} | {' | '.join(cells)} | {seconds} |", flush=True)


if __name__ == "__main__":
    main()
