"""Worker process that measures the parts of a checkpoint's loss: python -m builder.evaluate.parts.worker JOB.json

The BF16 model is loaded once. For each measurement some of its weights are replaced by the checkpoint's, some inputs
are rounded as the checkpoint says, and some keys and values; then all is undone. The arithmetic is that of the formats
(builder/formats), as in the runner `checkpoint` and the reference executor, so any checkpoint can be measured, whatever
tool and algorithm made it. Each result is written before the next one is measured, so an interrupted run resumes.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from builder.architectures import catalog, names
from builder.checkpoint.layouts import hf_quant_config
from builder.core.errors import BuilderError, IntegrityError, UnsupportedError
from builder.core.safetensors_io import Tensors
from builder.core.worker import emit, worker_main
from builder.evaluate import metrics
from builder.evaluate.datasets import Sequences, sequences
from builder.evaluate.parts.figures import PARTS, WHOLE, alone, without
from builder.evaluate.runners import worker as runners
from builder.evaluate.runners.local import ATTENTION, Causal, RoundedInput, attend, cache_scales, dtype_of, places
from builder.evaluate.sensitivity.results import Results
from builder.formats.arithmetic.dtypes import read
from builder.formats.declared import declared
from builder.model import loading as model_loading
from builder.model.hashed_files import SourceFiles
from builder.model.source_tensors import open_tensors
from builder.quantize import stored_model
from builder.quantize.device import check_device
from builder.tokenizer import loading as tokenizer_loading


@dataclass(frozen=True)
class Quantized:
    """What is quantized in one measurement: the layers of each part, by the names of their modules."""

    weights: Collection[str] = ()
    inputs: Collection[str] = ()
    cache: Collection[str] = ()


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Measures the whole model, each part alone, all but each, and each part of each decoder layer."""
    check_device(job.get("gpus", ()))
    emit(progress={"label": "loading the model", "done": 0, "total": None})
    done = Results(Path(job["results"]))
    tokenizer = tokenizer_loading.load(Path(job["model"]), trust_remote_code=job["trust_remote_code"])
    texts = sequences(Path(job["texts"]), tokenizer, name="the sensitivity texts", **job["lengths"])
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=job["scratch"]) as scratch:
        model = Model(job)
        wanted = _wanted(model, by_layer=job["by_layer"])
        missing = sum(name not in done for name in wanted)
        meter = Meter(model, texts, Path(scratch), done)
        meter.begin(missing, top=job["top"])
        for name, what in wanted.items():
            meter.measure(name, what)
        SourceFiles.of_job(job).check_unchanged()
    return {
        "results": {name: done[name] for name in wanted},
        "parts": [part for part in PARTS if model.of(part)],
        "layers": {str(number): model.prefix(number) for number in model.layers if job["by_layer"]},
        "tokens": sum(len(one) - 1 for one in texts.ids),
    }


def _wanted(model: Model, *, by_layer: bool = True) -> dict[str, Quantized]:
    """What to measure, by name: the model first, so that a part without any loss is known before its layers."""
    parts = {part: model.of(part) for part in PARTS if model.of(part)}
    found = {WHOLE: Quantized(**parts)}
    for part in parts:
        found[alone(part)] = Quantized(**{part: parts[part]})
        found[without(part)] = Quantized(**{other: parts[other] for other in parts if other != part})
    for number in model.layers if by_layer else ():
        for part in parts:
            if inside := model.of(part, number):
                found[alone(part, number)] = Quantized(**{part: inside})
    return found


class Model:
    """The BF16 model, and what the checkpoint changes: weights, inputs of linear layers, keys and values."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        AttentionInterface.register(ATTENTION, attend)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        self.dtype = dtype_of(job, None) or torch.bfloat16
        model = model_loading.load(job, dtype=self.dtype, attn_implementation=ATTENTION, **places())
        self.runner = Causal(model, job["batch_tokens"])
        self._source, self._stored = open_tensors(Path(job["model"])), Tensors(Path(job["unified"]))
        quantization = hf_quant_config(Path(job["unified"]))["quantization"]
        self._declared = declared(quantization)
        self._formats = stored_model.linears(self._stored, self._declared)
        self.modules = dict(model.named_modules())
        self._check()
        last: dict[str, Any] = {}
        self.inputs = {name: self._hook(name, last) for name in self._formats}
        self._cache = cache_scales(self._stored, quantization, job)
        architecture = catalog.of(model.config.to_dict())
        self._layer = {name: names.layer_of(architecture, f"{name}.") for name in (*self._formats, *self._cache)}
        self.layers = sorted({number for number in self._layer.values() if number is not None})

    def of(self, part: str, layer: int | None = None) -> list[str]:
        """The modules of a part, in the whole model or in one decoder layer."""
        found = self._cache if part == "cache" else self._formats
        return [name for name in found if layer is None or self._layer[name] == layer]

    def prefix(self, number: int) -> str:
        """The beginning of the names of a layer's modules: model.layers.3"""
        name = next(name for name, layer in self._layer.items() if layer == number)
        parts = name.split(".")
        return ".".join(parts[: parts.index(str(number)) + 1])

    @contextmanager
    def quantized(self, what: Quantized) -> Iterator[None]:
        """Quantizes these parts while the block runs. A weight is read again from the files afterwards, so that no
        model is in memory twice."""
        for name in what.weights:
            self.put(name, self.stored_weight(name))
        for name in what.inputs:
            self.inputs[name].on = True
        self.switch_cache(what.cache, on=True)
        try:
            yield
        finally:
            self.switch_cache(what.cache, on=False)
            for name in what.inputs:
                self.inputs[name].on = False
            for name in what.weights:
                self.put(name, self.original_weight(name))

    def switch_cache(self, attentions: Collection[str] | None = None, *, on: bool) -> None:
        """Quantizes the keys and values of these attentions, by default of all, or leaves them as they are."""
        for name in self._cache if attentions is None else attentions:
            module = self.modules[name]
            module.k_scale = module.v_scale = None
            if on:
                module.k_scale, module.v_scale, module.kv_cache_format = self._cache[name]

    def put(self, name: str, weight: Tensor) -> None:
        """Replaces the weight of a linear layer."""
        self.modules[name].weight.data.copy_(weight)

    def stored_weight(self, name: str) -> Tensor:
        """The weight of a linear layer in the checkpoint."""
        return stored_model.weight(self._stored, self._declared, f"{name}.weight", self.dtype)

    def original_weight(self, name: str) -> Tensor:
        """The weight of a linear layer in the BF16 model."""
        return read(self._source, f"{name}.weight").to(self.dtype)

    def _check(self) -> None:
        """UnsupportedError for layers that are no linear ones in transformers, or whose inputs are scaled."""
        for name, one in self._formats.items():
            if not isinstance(self.modules.get(name), torch.nn.Linear) or f"{name}.weight" not in self._source:
                raise UnsupportedError(
                    f"{name} is not a linear layer of its own in this model.",
                    why="transformers stores the experts of a mixture in one module.",
                    hint="Measure the checkpoint as a whole: builder eval",
                )
            if one.scales_inputs:
                raise scaled(one.title)

    def _hook(self, name: str, last: dict[str, Any]) -> Switched:
        number_format = self._formats[name]
        tensors = stored_model.tensors_of(self._stored, name, number_format)
        hook = Switched(RoundedInput(number_format, tensors, last))
        self.modules[name].register_forward_pre_hook(hook)
        return hook


class Switched:
    """A hook that rounds a layer's input while it is on."""

    def __init__(self, rounded: RoundedInput) -> None:
        self._rounded, self.on = rounded, False

    def __call__(self, layer: Any, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        return self._rounded(layer, inputs) if self.on else None


def scaled(title: str) -> UnsupportedError:
    """The error for a format that scales the inputs of layers: its weights are not those of the BF16 model."""
    return UnsupportedError(
        f"The loss of {title} can't be divided into weights and inputs.",
        why="It moves a part of each weight into a scale of the inputs, so neither is quantized alone.",
        hint="Measure the checkpoint as a whole: builder eval",
    )


class Meter:
    """Measures KL from BF16 on the texts. BF16's likeliest tokens are computed once and read back batch by batch."""

    def __init__(self, model: Model, texts: Sequences, scratch: Path, done: Results) -> None:
        self._model, self._texts, self._scratch, self._done = model, texts, scratch, done
        self._count, self._total = 0, 0
        self._reference = scratch / "bf16"

    def begin(self, missing: int, *, top: int) -> None:
        """Measures BF16, if anything is to be compared with it. missing: how many measurements follow."""
        self._total = missing + 1
        if missing:
            self._reference.mkdir()
            self._score("BF16", self._reference, top=top)

    def measure(self, name: str, what: Quantized) -> None:
        """Mean KL(BF16 || quantized) in nats per token, into the results file unless it is there."""
        if name in self._done:
            return
        self._count += 1
        if self._lossless(name):
            self._done.add(name=name, kl=0.0, low=0.0, high=0.0)
            return
        with self._model.quantized(what), tempfile.TemporaryDirectory(dir=self._scratch) as directory:
            self._score(name, Path(directory), reference=self._reference)
            sums = metrics.read(Path(directory), self._reference)
        found = metrics.measure([sums], resamples=1000, seed=0)["kl"]
        if not math.isfinite(found.value):
            raise IntegrityError(
                f"The model computes NaN or Inf with {name} quantized.", hint="`builder inspect` lists damaged scales."
            )
        self._done.add(name=name, kl=found.value, low=found.low, high=found.high)

    def _lossless(self, name: str) -> bool:
        """Whether this is a part of a layer, and that part of the whole model loses nothing, as inputs of W4A16."""
        part = name.partition(" of layer ")[0]
        return part != name and part in self._done and self._done[part]["kl"] == 0

    def _score(self, label: str, directory: Path, **how: Any) -> None:
        step = self._count

        def tell(done: int, total: int) -> None:
            emit(progress={"label": label, "done": step * total + done, "total": self._total * total})

        runners.score_set(self._model.runner, self._texts, directory, progress=tell, **how)


def known(error: BaseException, job: Mapping[str, Any]) -> BuilderError | None:
    """The error to show if memory ran out; None for any other."""
    return runners.known(error, job)


def main(arguments: Sequence[str]) -> int:
    """Runs a job, whose file is the second argument."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return worker_main(list(arguments), run, known)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
