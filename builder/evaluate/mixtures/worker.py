"""Worker process that mixes two checkpoints of a model: python -m builder.evaluate.mixtures.worker JOB.json

A mixture has some groups of layers from the second checkpoint, or from the BF16 model, and all others from the first.
None is written: the BF16 model is loaded once, and its weights and the hooks on its inputs are replaced. A layer's
codes and scales don't depend on the formats of other layers, so the figures are those of the checkpoint that a build
of the mixture makes. Each result is written before the next one is measured, so an interrupted run resumes.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from builder.checkpoint.layouts import hf_quant_config
from builder.core.safetensors_io import Tensors
from builder.core.worker import emit, worker_main
from builder.evaluate import metrics
from builder.evaluate.datasets import Sequences, sequences
from builder.evaluate.gate import surely_within
from builder.evaluate.metrics import Estimate
from builder.evaluate.parts.worker import Model, Switched
from builder.evaluate.runners import worker as runners
from builder.evaluate.runners.local import RoundedInput
from builder.evaluate.sensitivity.results import Results
from builder.formats.declared import declared
from builder.model.hashed_files import SourceFiles
from builder.quantize import stored_model
from builder.quantize.device import check_device
from builder.tokenizer import loading as tokenizer_loading

WHOLE = "none"  # the mixture that takes no group from the second checkpoint


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Ranks the groups or, with an `order`, finds the shortest beginning of it that keeps the loss within `limits`."""
    check_device(job.get("gpus", ()))
    emit(progress={"label": "loading the model", "done": 0, "total": None})
    tokenizer = tokenizer_loading.load(Path(job["model"]), trust_remote_code=job["trust_remote_code"])
    sets = [(one, sequences(Path(one["rows"]), tokenizer, **job["lengths"], name=one["name"])) for one in job["sets"]]
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=job["scratch"]) as scratch:
        meter = Meter(Mixture(job), sets, Path(scratch), job)
        found = _rank(meter, job) if job["order"] is None else _choose(meter, job)
        SourceFiles.of_job(job).check_unchanged()
    return found


def _rank(meter: Meter, job: Mapping[str, Any]) -> dict[str, Any]:
    """The KL with no group, and with each unit of groups, from the second checkpoint."""
    units = job["units"]
    meter.total = len(units) + 1
    whole = meter.figures(WHOLE, ())["kl"].value
    return {"whole": whole, "with": {unit: meter.figures(unit, units[unit])["kl"].value for unit in units}}


def _choose(meter: Meter, job: Mapping[str, Any]) -> dict[str, Any]:
    """Bisects the number of groups, each step measured; `most` is known to find room, and none to be too few."""
    order, limits, most = job["order"], job["limits"], len(job["order"])
    meter.total = most.bit_length() + 1

    def figures(number: int) -> dict[str, Estimate]:
        return meter.figures(f"{number} of {len(job['groups'])} groups", order[:number])

    low, high = 0, most
    met = surely_within(limits, figures(most))
    while met and low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if surely_within(limits, figures(middle)) else (middle, high)
    found = {name: asdict(one) for name, one in figures(high).items()}
    return {"groups": order[:high], "met": met, "figures": found}


class Mixture:
    """The BF16 model, each linear layer of which is in one of three states."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.base = Model(job)
        self._groups = job["groups"]
        self._kept = Kept(self.base, Path(job["kept"])) if job["kept"] else None
        self._all = self.base.of("inputs")
        self._states: dict[str, str] = dict.fromkeys(self._all, "original")

    def original(self) -> None:
        """The BF16 model."""
        self._set(dict.fromkeys(self._all, "original"))
        self.base.switch_cache(on=False)

    def mix(self, groups: Collection[str]) -> None:
        """The first checkpoint, with these groups from the second one."""
        kept = {module for group in groups for module in self._groups[group]}
        self._set({name: "kept" if name in kept else "stored" for name in self._all})
        self.base.switch_cache(on=True)

    def _set(self, states: Mapping[str, str]) -> None:
        """Changes the layers that are in another state."""
        for name, state in states.items():
            if state == self._states[name]:
                continue
            if state == "stored":
                self.base.put(name, self.base.stored_weight(name))
            elif state == "kept" and self._kept is not None:
                self.base.put(name, self._kept.weight(name))
            else:
                self.base.put(name, self.base.original_weight(name))
            self.base.inputs[name].on = state == "stored"
            if self._kept is not None and name in self._kept.inputs:
                self._kept.inputs[name].on = state == "kept"
            self._states[name] = state


class Kept:
    """The second checkpoint's weights, and hooks that round inputs as it says."""

    def __init__(self, base: Model, unified: Path) -> None:
        self._stored, self._dtype = Tensors(unified), base.dtype
        self._declared = declared(hf_quant_config(unified)["quantization"])
        last: dict[str, Any] = {}
        self.inputs: dict[str, Switched] = {}
        for name, one in stored_model.linears(self._stored, self._declared).items():
            self.inputs[name] = Switched(RoundedInput(one, stored_model.tensors_of(self._stored, name, one), last))
            base.modules[name].register_forward_pre_hook(self.inputs[name])

    def weight(self, name: str) -> torch.Tensor:
        """A linear layer's weight, dequantized."""
        return stored_model.weight(self._stored, self._declared, f"{name}.weight", self._dtype)


class Meter:
    """Measures mixtures on the sets, against the BF16 scores of each set or, where the job has none, its own."""

    def __init__(
        self,
        mixture: Mixture,
        sets: Sequence[tuple[Mapping[str, Any], Sequences]],
        scratch: Path,
        job: Mapping[str, Any],
    ) -> None:
        self._mixture, self._sets, self._scratch, self._job = mixture, sets, scratch, job
        self._done = Results(Path(job["results"]))
        self._count, self.total = 0, 1
        self._references = [Path(one["reference"]) if one["reference"] else None for one, _ in sets]

    def figures(self, name: str, groups: Collection[str]) -> dict[str, Estimate]:
        """KL and score over all sets with these groups from the second checkpoint."""
        self._count += 1
        if name not in self._done:
            self._refer()
            self._mixture.mix(groups)
            with tempfile.TemporaryDirectory(dir=self._scratch) as directory:
                sums = [self._sums(number, name, Path(directory)) for number in range(len(self._sets))]
            found = metrics.measure(sums, resamples=self._job["resamples"], seed=self._job["seed"])
            kl, score = found["kl"], found["score"]
            self._done.add(name=name, kl=kl.value, **_flat("kl", kl), **_flat("score", score))
        line = self._done[name]
        return {
            metric: Estimate(*(line[f"{metric}_{part}"] for part in ("value", "low", "high")))
            for metric in ("kl", "score")
        }

    def _sums(self, number: int, label: str, directory: Path) -> metrics.Sums:
        reference, scores = self._references[number], directory / str(number)
        scores.mkdir()
        self._score(label, number, scores, reference=reference)
        return metrics.read(scores, reference)

    def _refer(self) -> None:
        """Scores the BF16 model on the sets that have no scores of it."""
        for number, reference in enumerate(self._references):
            if reference is None:
                self._mixture.original()
                self._references[number] = self._scratch / f"bf16-{number}"
                (self._scratch / f"bf16-{number}").mkdir()
                self._score("BF16", number, self._scratch / f"bf16-{number}", top=self._job["top"])

    def _score(self, label: str, number: int, directory: Path, **how: Any) -> None:
        step = self._count - 1

        def tell(done: int, total: int) -> None:
            emit(progress={"label": f"mixture: {label}", "done": step * total + done, "total": self.total * total})

        runners.score_set(self._mixture.base.runner, self._sets[number][1], directory, progress=tell, **how)


def _flat(metric: str, one: Estimate) -> dict[str, float]:
    return {f"{metric}_{part}": value for part, value in asdict(one).items()}


def main(arguments: Sequence[str]) -> int:
    """Runs a job, whose file is the second argument."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return worker_main(list(arguments), run, runners.known)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
