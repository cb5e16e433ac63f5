"""Worker process that measures what each layer loses: python -m builder.evaluate.sensitivity.worker JOB.json

One group of linear layers at a time is quantized by ModelOpt's quantizers while all others stay in BF16; the KL from
BF16 at the output is the group's loss. With a budget it searches for the layers to keep instead. Each result is written
as a line of the job's results file before the next one is measured, so an interrupted run resumes. With `proxy` only
BF16 is run, and each decoder layer once more per group.
"""

from __future__ import annotations

import decimal
import math
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builder.core.errors import BuilderError, IntegrityError, UnsupportedError
from builder.core.worker import emit, worker_main
from builder.evaluate.datasets import Sequences, sequences
from builder.evaluate.runners.local import Causal
from builder.evaluate.runners.worker import score_set
from builder.evaluate.sensitivity import searched_weights
from builder.evaluate.sensitivity.results import Results
from builder.evaluate.sensitivity.weight_error import weight_errors
from builder.formats import algorithms, kv_cache, registry
from builder.formats.assignment import of_job
from builder.model.hashed_files import SourceFiles
from builder.model.source_tensors import open_tensors
from builder.quantize import worker
from builder.quantize.device import check_device
from builder.quantize.simulation import enable_cpu_simulation
from builder.tokenizer import loading as tokenizer_loading

WHOLE, KV_CACHE = "whole model", "KV cache"  # the names of two results that are no group's


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Measures the losses of all groups; with a `budget`, selects the groups to keep and measures what is left."""
    done = Results(Path(job["results"]))
    if job["budget"] is None and done.output_errors and all(name in done for name in _wanted(job)):
        return _summary(job, done)
    check_device(job.get("gpus", ()))
    emit(progress={"label": "loading the model", "done": 0, "total": None})
    tokenizer = tokenizer_loading.load(Path(job["model"]), trust_remote_code=job["trust_remote_code"])
    texts = sequences(Path(job["texts"]), tokenizer, name="the sensitivity texts", **job["lengths"])
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=job["scratch"]) as scratch:
        model = Simulated(job)
        meter = Meter(model, texts, Path(scratch), done, job)
        if job["budget"] is None:
            for name in _wanted(job):
                meter.kl(name, _quantized(job, name))
        found = _summary(job, done) if job["budget"] is None else select(meter, job)
        _check_source(job)
        return found


def _check_source(job: Mapping[str, Any]) -> None:
    """IntegrityError if the model changed during the measurement; its results are then discarded."""
    try:
        SourceFiles.of_job(job).check_unchanged()
    except IntegrityError:
        Path(job["results"]).unlink(missing_ok=True)
        raise


def _wanted(job: Mapping[str, Any]) -> list[str]:
    if job["proxy"]:
        return []
    return [WHOLE, *([KV_CACHE] if _caches(job) else []), *job["groups"]]


def _caches(job: Mapping[str, Any]) -> bool:
    """Whether the KV cache is quantized."""
    return kv_cache.get(job["kv_cache_dtype"]).quantized


@dataclass(frozen=True)
class Quantized:
    """Which layers to quantize for one measurement.

    groups: in the model's format. fp8: groups in FP8. cache: whether the KV cache too. named: whether the layers that
    the recipe's patterns put in FP8 too.
    """

    groups: Sequence[str] = ()
    fp8: Sequence[str] = ()
    cache: bool = False
    named: bool = False


def _quantized(job: Mapping[str, Any], name: str) -> Quantized:
    """Which layers to quantize for the result with this name."""
    if name == WHOLE:
        return Quantized(list(job["groups"]), cache=_caches(job), named=True)
    return Quantized(cache=_caches(job)) if name == KV_CACHE else Quantized([name])


def select(meter: Meter, job: Mapping[str, Any]) -> dict[str, Any]:
    """The shortest prefix of `order` that must stay in BF16 or FP8 so that the KL is within the budget.

    By bisection; every step is measured. UnsupportedError if the whole of `order` is not enough.
    """
    order, budget, title = job["order"], job["budget"], job["kept_format"].upper()
    flag = "--keep-fp8" if title == "FP8" else "--keep-bf16"

    def kl(number: int) -> float:
        kept = sorted(order[:number])
        rest = [group for group in job["groups"] if group not in kept]
        what = Quantized(rest, kept if title == "FP8" else (), cache=_caches(job), named=True)
        name = f"in {title}: {', '.join(kept)}" if kept else WHOLE
        return meter.kl(name, what, label=f"{number} of {len(job['groups'])} in {title}")

    low, high = 0, len(order)
    if kl(0) <= budget:
        high = 0
    elif (least := kl(high)) > budget:
        raise UnsupportedError(
            f"A KL of {budget:g} can't be reached: it is {least:.3g} with every possible layer in {title}.",
            why=f"With all layers quantized it is {kl(0):.3g}. {job['rest']}",
            hint=f"Allow more, as {flag} auto:{_ceiling(least)}"
            + (f", or keep layers in BF16: --keep-bf16 auto:{budget:g}" if title == "FP8" else "")
            + (", or keep the KV cache in the model's type: --kv-cache-dtype auto" if _caches(job) else ""),
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if kl(middle) <= budget else (middle + 1, high)
    return {"kept": order[:high], "kl": kl(high), "kl_before": kl(0), "tokens": meter.tokens}


def _ceiling(kl: float) -> str:
    """A KL rounded up to two significant digits."""
    exact = decimal.Decimal(kl)  # a float's step would lose what lies just above a round number
    return str(exact.quantize(decimal.Decimal(1).scaleb(exact.adjusted() - 1), decimal.ROUND_CEILING))


def _summary(job: Mapping[str, Any], done: Results) -> dict[str, Any]:
    emit(progress={"label": "weight errors", "done": 0, "total": None})
    return {
        "results": {name: done[name] for name in _wanted(job)},
        "output_errors": done.output_errors,
        "weight_errors": weight_errors(
            open_tensors(Path(job["model"])), job["groups"], registry.get(job["format"]), algorithms.of_job(job)
        ),
        "tokens": done.tokens,
    }


class Simulated:
    """The calibrated model with ModelOpt's quantizers, all disabled; `quantized` enables some for the block."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        from modelopt.torch.export import unified_export_hf

        self.model, rows = worker.load({**job, **job["calibration"]})
        worker.calibrate(self.model, rows, of_job(job))
        if not torch.cuda.is_available():
            enable_cpu_simulation()
        unified_export_hf.requantize_resmooth_fused_llm_layers(self.model)  # shared ranges, as in the checkpoint
        cpu = None if torch.cuda.is_available() else torch.float32
        dtype = cpu if job["dtype"] == "auto" else getattr(torch, job["dtype"])
        self.model = self.model.eval() if dtype is None else self.model.eval().to(dtype)
        modules = dict(self.model.named_modules())
        lost = [name for members in job["groups"].values() for name in members if name not in modules]
        if lost:
            raise UnsupportedError(
                f"{len(lost)} linear layers are not separate modules in {type(self.model).__name__}: {lost[0]}, ...",
                why="transformers stores the experts of a mixture in one module.",
                hint="Use the proxy, which reads the weights only: builder sensitivity --proxy",
            )
        self.groups = {group: [modules[name] for name in members] for group, members in job["groups"].items()}
        self.named = [
            modules[name] for one, names in job["layers"].items() if one != registry.BF16.name for name in names
        ]
        self.cache = [
            module for name, module in modules.items() if name.endswith(("k_bmm_quantizer", "v_bmm_quantizer"))
        ]
        quantizers = [m for m in modules.values() if hasattr(m, "is_enabled") and hasattr(m, "disable")]
        if algorithms.of_job(job) is algorithms.MSE:
            searched_weights.search(self.model)
        self._used = {id(quantizer) for quantizer in quantizers if quantizer.is_enabled}
        for quantizer in quantizers:
            quantizer.disable()

    @contextmanager
    def quantized(self, what: Quantized) -> Iterator[None]:
        """Quantizes these layers while the block runs.

        Weights are rounded in each forward pass, which costs little and avoids a second model in memory. A layer that
        was calibrated for NVFP4 knows its largest values, which is all that FP8 needs; after a format that leaves
        inputs as they are, FP8 takes those of each batch.
        """
        fp8 = self._quantizers(module for group in what.fp8 for module in self.groups[group])
        quantizers = self._quantizers(module for group in what.groups for module in self.groups[group])
        quantizers += (self._quantizers(self.named) if what.named else []) + (self.cache if what.cache else [])
        quantizers = [one for one in quantizers if id(one) in self._used] + fp8
        before = [(quantizer.num_bits, quantizer.block_sizes) for quantizer in fp8]
        try:
            for quantizer in fp8:
                quantizer.num_bits, quantizer.block_sizes = (4, 3), None  # as FP8_DEFAULT_CFG says
            for quantizer in quantizers:
                quantizer.enable()
            yield
        finally:
            for quantizer, (bits, blocks) in zip(fp8, before, strict=True):
                quantizer.num_bits, quantizer.block_sizes = bits, blocks
            for quantizer in quantizers:
                quantizer.disable()

    def _quantizers(self, linears: Iterable[Any]) -> list[Any]:
        return [q for module in linears for q in (module.weight_quantizer, module.input_quantizer)]

    @contextmanager
    def watched(self) -> Iterator[dict[str, float]]:
        """Measures {group: output error} for all tokens that run in the block; filled when the block ends.

        The error is what the quantized group changes in its decoder layer's output, relative to it, as a root mean
        square over tokens. Each layer runs once more for each of its groups, on BF16 inputs: about five forward passes
        in all.
        """
        sums: dict[str, list[float]] = {group: [] for group in self.groups}
        found: dict[str, float] = {}
        busy = False

        def hook(layer: Any, groups: Sequence[str], inputs: Any, named: Any, output: Any) -> None:
            nonlocal busy
            if busy:
                return
            busy = True
            for group in groups:
                with self.quantized(Quantized([group])):
                    changed = layer(*inputs, **named)
                sums[group].append(_relative(_first(changed), _first(output)))
            busy = False

        hooks = [
            layer.register_forward_hook(
                lambda module, inputs, named, output, groups=groups: hook(module, groups, inputs, named, output),
                with_kwargs=True,
            )
            for layer, groups in self._layers()
        ]
        try:
            yield found
        finally:
            for one in hooks:
                one.remove()
        found |= {group: math.sqrt(sum(parts) / len(parts)) for group, parts in sums.items() if parts}

    def _layers(self) -> list[tuple[Any, list[str]]]:
        """The decoder layers, each with the names of its groups."""
        found: dict[str, list[str]] = {}
        for group in self.groups:
            if inside := re.match(r"(.*?\blayers\.\d+)\.", group):
                found.setdefault(inside[1], []).append(group)
        return [(self.model.get_submodule(name), groups) for name, groups in found.items()]


def _first(output: Any) -> torch.Tensor:
    """The hidden states of a layer's output; transformers 4 has layers that return a tuple."""
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


def _relative(changed: torch.Tensor, output: torch.Tensor) -> float:
    """Mean over tokens of the squared relative error. Relative per token, because the outputs of a few tokens are a
    hundred times as large."""
    error = (changed - output).double().pow(2).sum(-1)
    return float((error / output.double().pow(2).sum(-1).clamp(min=1e-30)).mean())


class Meter:
    """Measures KL from BF16 on the texts. BF16's likeliest tokens are computed once and read back batch by batch."""

    def __init__(
        self, model: Simulated, texts: Sequences, scratch: Path, done: Results, job: Mapping[str, Any]
    ) -> None:
        self._model, self._texts, self._scratch, self._done = model, texts, scratch, done
        self._runner = Causal(model.model, job["batch_tokens"])
        self._count, self._total = 0, len(_wanted(job)) + 1 if job["budget"] is None else None
        reference = scratch / "bf16"
        reference.mkdir()
        watched: AbstractContextManager[dict[str, float]] = nullcontext({}) if done.output_errors else model.watched()
        with watched as errors:
            summary = self._score("BF16", reference, top=0 if job["proxy"] else job["top"])
        self._reference, self.tokens = reference, summary["tokens"]
        if errors:
            done.add(output_errors=errors, tokens=self.tokens)

    def kl(self, name: str, what: Quantized, label: str = "") -> float:
        """Mean KL(BF16 || quantized) in nats per token, from the results file or measured now."""
        self._count += 1
        if name not in self._done:
            with self._model.quantized(what), tempfile.TemporaryDirectory(dir=self._scratch) as directory:
                self._score(label or name, Path(directory), reference=self._reference)
                kl = np.load(f"{directory}/kl.npy").mean(dtype=np.float64)
                same = np.load(f"{directory}/best.npy") == np.load(self._reference / "best.npy")
            if not math.isfinite(kl):
                raise IntegrityError(f"NaN or Inf with {name} quantized.", hint="Calibrate on other texts.")
            self._done.add(name=name, kl=float(kl), agreement=float(same.mean()))
        return self._done[name]["kl"]

    def _score(self, label: str, directory: Path, **how: Any) -> dict[str, Any]:
        step = self._count

        def tell(done: int, total: int) -> None:
            of = None if self._total is None else self._total * total
            emit(progress={"label": label, "done": step * total + done if of else done, "total": of or total})

        return score_set(self._runner, self._texts, directory, progress=tell, **how)


def known(error: BaseException, job: Mapping[str, Any]) -> BuilderError | None:
    """The error to show, as in the worker that quantizes."""
    return worker.known(error, {**job, "destination": job["results"]})


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(worker_main(sys.argv, run, known))
