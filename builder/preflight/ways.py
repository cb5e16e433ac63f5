"""The ways to quantize a model: what each needs, which one a build takes, and why. Pure, but for `device`.

whole: ModelOpt calibrates the model, held in memory. low: one decoder layer at a time is in memory. data-free: nothing
is calibrated, and scales of activations follow from a rule.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from builder.architectures import names, written
from builder.core.errors import UnsupportedError, UsageError
from builder.core.output import size
from builder.core.safetensors_io import byte_size
from builder.formats import algorithms
from builder.machine.gpus import visible
from builder.preflight import memory, rounding, suggestions
from builder.preflight.memory import Machine
from builder.preflight.model_facts import ModelFacts
from builder.quantize import exclude, modelopt
from builder.quantize.writer import BLOCK_BYTES
from builder.recipe.schema import Recipe

Name = Literal["whole", "low", "data-free"]
TITLES: dict[Name, str] = {
    "whole": "whole model in memory",
    "low": "one decoder layer at a time",
    "data-free": "data-free",
}
FLAGS: dict[Name, str] = {"whole": "--memory whole", "low": "--memory low", "data-free": "--data-free"}
# Bytes of a process's libraries, in host memory: torch, transformers and ModelOpt; torch and transformers.
LIBRARIES: dict[Name, int] = {"whole": 900_000_000, "low": 500_000_000, "data-free": 0}
# Seconds and rates of one core, from a random model in Qwen3-0.6B's shape (440 million parameters in its decoder
# layers, 1.2 GB) with 8 x 256 tokens on 2 cores of a server without AMX (benchmarks/calibrated.py and data_free.py):
# imports 5 s; calibration 5.5 s; the writer 0.7 s from the page cache. Disks are slower than that.
STARTING: dict[Name, float] = {"whole": 5.0, "low": 4.5, "data-free": 0.2}
OPERATIONS = 1.6e11  # per second and core, multiplications and additions of a forward pass in BF16
WRITTEN = 0.9e9  # bytes of 16-bit weights, read and packed per second and core
# More seconds of a core for each weight whose block scale is searched (benchmarks/kernels.py, AVX-512).
SEARCHED = 2.0e-9
BASIS = "an estimate from 2 cores of a server, without waiting for a disk"
NOT_MEASURED = "not measured on a GPU"


@dataclass(frozen=True)
class Device:
    """What quantizing computes on. memory: bytes, of all GPUs together or of this machine; largest: of one of them.
    None if the driver does not tell. cores: of this machine, for one without a GPU."""

    name: str
    memory: int | None
    largest: int | None
    cores: int
    gpu: bool

    def holds(self, way: Name, nbytes: int) -> bool:
        """Whether a way that needs so much fits. Layers one at a time are computed on one GPU."""
        has = self.memory if way == "whole" else self.largest
        return has is None or nbytes <= has


@dataclass(frozen=True)
class Rounding:
    """What an algorithm takes beside what `max` does. seconds: None where there is no basis for an estimate. passes:
    how often the rows run through a decoder layer, at most."""

    algorithm: str
    memory: int
    seconds: float | None
    passes: int = 1


@dataclass(frozen=True)
class Way:
    """One of the ways. memory: bytes, on the device or, data-free, of the host. seconds: an estimate, None where there
    is no basis; basis: where it comes from. impossible: why this model can't be quantized so, or "". rounding: what of
    the memory and the time is for an algorithm other than `max`."""

    name: Name
    memory: int
    seconds: float | None
    basis: str
    fits: bool
    impossible: str = ""
    rounding: Rounding | None = None

    @property
    def possible(self) -> bool:
        """Whether it can be taken."""
        return self.fits and not self.impossible


@dataclass(frozen=True)
class Choice:
    """The ways, the one that is taken, and why. refusal: it does not fit, and no other one would be taken.
    as_good: other ways whose result is taken instead if it is in the store."""

    device: Device
    ways: tuple[Way, ...]
    taken: Way
    why: str
    refusal: UnsupportedError | None = None
    as_good: tuple[Name, ...] = ()


def device(host: Machine) -> Device:
    """What this machine quantizes on."""
    cores = len(os.sched_getaffinity(0))
    if modelopt.calibrating():
        seen = visible() or []
        known = [one.memory for one in seen if one.memory]
        complete = bool(known) and len(known) == len(seen)
        name = " and ".join(dict.fromkeys(one.name for one in seen)) or modelopt.calibrating()[0]
        return Device(name, sum(known) if complete else None, known[0] if complete else None, cores, True)
    return Device("this machine", host.memory, host.memory, cores, False)


def choose(recipe: Recipe, model: ModelFacts, on: Device, *, scales: bool = False) -> Choice:
    """The way to quantize a model. `--memory auto` takes the whole model if it fits, else one layer at a time.

    scales: only scales of a quantized model are calibrated, whose weights stay.
    """
    asked, rows = recipe.quantization.memory, recipe.calibration
    found = ways(recipe, model, on)
    if scales:  # ModelOpt need not write the weights, whatever their format
        found = tuple(replace(way, impossible="") for way in found[:2])
    whole, low, *rest = found
    if rows.data_free and rest:
        return Choice(on, found, rest[0], "no calibration rows")
    if (algorithm := rounding.algorithm_of(recipe)).reads_rows:
        why = f"--algorithm {algorithm.name} rounds a layer once its rows have run"
        return Choice(on, found, low, why, _refusal(low, found, recipe, model, on))
    if asked != "auto":
        taken = whole if asked == "whole" else low
        return Choice(on, found, taken, f"--memory {asked}", _refusal(taken, found, recipe, model, on))
    if whole.possible:
        return Choice(on, found, whole, "the whole model fits", as_good=("low",) if not low.impossible else ())
    if low.possible:
        needs = f"the whole model needs {size(whole.memory)}, and {on.name} has {size(on.memory or 0)}"
        return Choice(on, found, low, needs, as_good=("whole",))
    refusal = _refusal(whole, found, recipe, model, on)
    return Choice(on, found, whole, low.impossible or "no other way fits either", refusal)


def ways(recipe: Recipe, model: ModelFacts, on: Device) -> tuple[Way, ...]:
    """Whole, low and data-free, in this order."""
    rows, weights = recipe.calibration, sum(byte_size(dtype, shape) for dtype, shape in model.written.values())
    batch = rows.batch_size * rows.seq_len
    tokens = rows.samples * rows.seq_len
    writing = weights / WRITTEN / on.cores
    passes = 2 * active_parameters(model) * tokens / (OPERATIONS * on.cores)
    why, algorithm = _needs_modelopt(recipe, model), rounding.algorithm_of(recipe)
    by_layer = f"--algorithm {algorithm.name} rounds one decoder layer at a time" if algorithm.reads_rows else ""
    searched = any(one.scales_inputs for one in recipe.quantization.quantized_formats)
    cost = None if algorithm is algorithms.MAX else _rounding(recipe, model, on, passes)

    def way(name: Name, needs: int, took: float | None) -> Way:
        impossible = by_layer if by_layer and name != "low" else why * (name != "whole")
        basis = NOT_MEASURED if on.gpu and name != "data-free" else BASIS
        more = None if impossible else cost
        needs += (0 if on.gpu else LIBRARIES[name]) + (more.memory if more else 0)
        if took is not None:
            took += STARTING[name] + writing + ((more.seconds or 0.0) if more else 0.0)
        if basis == NOT_MEASURED:
            took, more = None, replace(more, seconds=None) if more else None
        return Way(name, needs, took, basis, name == "data-free" or on.holds(name, needs), impossible, more)

    return (
        way("whole", memory.calibration_memory(model, batch), None if searched else passes),
        way("low", memory.streamed_memory(model, batch), passes),
        way("data-free", free_memory(on.cores), 0.0),
    )


def _rounding(recipe: Recipe, model: ModelFacts, on: Device, once: float) -> Rounding:
    """What the recipe's algorithm costs. once: seconds of a pass of all rows through all layers."""
    tokens = recipe.calibration.samples * recipe.calibration.seq_len
    took = rounding.seconds(recipe, model, tokens) + _searched(recipe, model) * SEARCHED
    # What the driver does not tell is taken to be enough.
    found = list(rounding.passes(recipe, model, on.largest).values()) if on.largest else []
    again = once * sum(number - 1 for number in found) / max(1, len(found))
    most = max(found, default=1)
    return Rounding(recipe.quantization.algorithm, rounding.memory(recipe, model), took / on.cores + again, most)


def _searched(recipe: Recipe, model: ModelFacts) -> int:
    """The weights whose block scales are searched."""
    if recipe.quantization.algorithm != algorithms.MSE.name or not algorithms.MSE.treats(model.number_format):
        return 0
    named = ((name.removesuffix(".weight"), shape) for name, (_, shape) in model.written.items())
    linears = {*exclude.linears(model.written, model.architecture)} - {*model.single}
    return sum(math.prod(shape) for name, shape in named if name in linears)


def free_memory(cores: int) -> int:
    """Bytes of host memory that a data-free quantization takes, whatever the model: the interpreter with numpy, and for
    each thread a block of weights and what is made of it."""
    return 100_000_000 + cores * 3 * BLOCK_BYTES


def active_parameters(model: ModelFacts) -> int:
    """Parameters of the decoder layers that a token is multiplied with: of a mixture's experts, those of one token."""
    share, total = rounding.expert_share(model), 0.0
    for name, (_, shape) in model.written.items():
        if names.layer_of(model.architecture, name) is not None and len(shape) > 1:
            routed = names.experts_of(name.removesuffix(".weight")) or written.stacked(model.architecture, name, shape)
            total += math.prod(shape) * (share if routed else 1.0)
    return int(total)


def check(recipe: Recipe, model: ModelFacts) -> None:
    """UsageError for a recipe that contradicts itself, UnsupportedError for a model or a format that has to be
    calibrated with ModelOpt where the recipe says otherwise."""
    rows, part = recipe.calibration, recipe.quantization
    flag = "--data-free" if rows.data_free else "--memory low" if part.memory == "low" else ""
    if flag and part.kept_budget is not None:
        why = "measures nothing" if rows.data_free else "never holds the whole model"
        raise UsageError(
            f"{flag} {why}, and auto chooses layers by the loss that it measures with the whole model in memory.",
            hint=f"Name the layers: --keep-fp8 '*.down_proj' or --keep-bf16 '*.down_proj'. Or leave {flag} out.",
        )
    rounding.check(recipe, model, measured=_measured(recipe), exported=_exported(recipe, model))
    if flag and (why := _needs_modelopt(recipe, model)):
        raise UnsupportedError(f"{flag} can't be used here.", why=why, hint=f"Leave {flag} out.")


def check_scales(recipe: Recipe) -> None:
    """UsageError for --calibrate-scales without rows to calibrate on."""
    if recipe.calibration.scales and recipe.calibration.data_free:
        raise UsageError(
            "--calibrate-scales measures scales on calibration rows, and --data-free names none.",
            hint="Build twice: first with --data-free; then give the checkpoint that it made (its directory unified/) "
            "as --model, with --calibrate-scales.",
        )


def check_measured(recipe: Recipe) -> None:
    """UsageError for measuring layers, which needs the whole model and, unless the format is of weights alone,
    calibrated ranges, without either."""
    if recipe.calibration.data_free and _reads_ranges(recipe):
        raise UsageError(
            "The loss of each layer is measured with calibrated ranges, and --data-free calibrates nothing.",
            hint="Leave --data-free out; a few rows are enough: --calib-samples 64",
        )
    if recipe.quantization.memory == "low":
        raise UsageError(
            "The loss of each layer is measured with the whole model in memory, and --memory low excludes that.",
            hint="Leave --memory low out. Or rank layers by the errors of their weights: --proxy without texts",
        )


def check_fits(choice: Choice) -> None:
    """UnsupportedError for measuring layers where the whole model does not fit."""
    whole = next(way for way in choice.ways if way.name == "whole")
    if not whole.fits:
        raise UnsupportedError(
            f"The loss of each layer is measured with the whole model in memory: about {size(whole.memory)}, and "
            f"{choice.device.name} has {size(choice.device.memory or 0)}.",
            hint="Use fewer rows at once (--set calibration.batch_size=1) or shorter ones (--calib-seq-len 512). "
            "Or rank layers by the errors of their weights: --proxy without texts",
        )


def _reads_ranges(recipe: Recipe) -> bool:
    """Whether the formats have scales of inputs, keys or values."""
    part = recipe.quantization
    inputs = any(tensor.calibrated for one in part.quantized_formats for tensor in one.tensors)
    return inputs or part.cache_format.quantized


def _needs_modelopt(recipe: Recipe, model: ModelFacts) -> str:
    """Why ModelOpt must hold the whole model; "" if it need not."""
    return _measured(recipe) or _exported(recipe, model)


def _measured(recipe: Recipe) -> str:
    """Why the whole model must be in memory before it is quantized, or ""."""
    measures = recipe.quantization.kept_budget is not None
    return "auto chooses layers by the loss that it measures with the whole model in memory." if measures else ""


def _exported(recipe: Recipe, model: ModelFacts) -> str:
    """Why ModelOpt must choose and write the weights, or ""."""
    searched = [one.title for one in recipe.quantization.quantized_formats if one.quant_algo and not one.packs]
    if searched:
        return f"The weights of {' and '.join(searched)} depend on the inputs: ModelOpt searches scales on the rows."
    stacked = [name for name, (_, shape) in model.written.items() if written.stacked(model.architecture, name, shape)]
    if stacked and recipe.quantization.number_format.quant_algo is not None:
        return f"The experts of a layer are quantized as one tensor ({stacked[0]}), which only ModelOpt writes."
    return ""


def _refusal(
    taken: Way, found: Sequence[Way], recipe: Recipe, model: ModelFacts, on: Device
) -> UnsupportedError | None:
    """The error for a way that does not fit on this machine, with what would."""
    if taken.fits or (on.gpu and taken.name == "whole"):  # what the GPUs do not hold, the host does (accelerate)
        return None
    rows, layers = recipe.calibration, taken.name == "low"
    fitting = [way for way in found if way.possible and way is not taken]
    left = (on.largest or 0) - (0 if on.gpu else LIBRARIES[taken.name])
    refused = suggestions.calibration_refusal(model, rows, left, layers=layers, where=on.name)
    if refused and fitting:
        needs = " or ".join(f"{FLAGS[way.name]} (about {size(way.memory)})" for way in fitting)
        refused.hint = f"Fits here: {needs}. {refused.hint}"
    return refused
