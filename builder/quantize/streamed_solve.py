"""`hessian` and `gptq` on the way through the layers: rounds the weights of a decoder layer once its rows have run.

Hessians are those of the unquantized model, in one pass. Each group of linear layers with the same input shares one.
What is made is in files of `partial/`, under the names that quantize/writer.py copies, and their checksums in the
layer's result, so that a killed run continues. Layers that an algorithm can't round are left to `algorithms.fallback`:
`mse` for NVFP4, `max` for INT8. Imports torch.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from builder.architectures import names
from builder.core.safetensors_io import NewTensor, Tensors, write
from builder.formats import algorithms
from builder.formats.arithmetic import nvfp4
from builder.formats.arithmetic.dtypes import DTYPES
from builder.formats.base import NumberFormat
from builder.formats.int8_dynamic import Int8
from builder.machine.host_memory import host_memory
from builder.model.streamed import StreamedModel
from builder.quantize import expert_inputs
from builder.quantize.algorithms import gptq, hessian
from builder.quantize.algorithms.grids import Grid, Int8Rows, Nvfp4Blocks
from builder.quantize.algorithms.hessian import Rounded
from builder.quantize.algorithms.moments import Moments
from builder.quantize.source_weights import SourceModel, WeightReader, rounded
from builder.quantize.unified_plan import Layer, UnifiedPlan

_ROWS = 4096  # of a weight at a time

Group = Sequence[Layer]
Solved = dict[str, Any]  # JSON values: `files` {name: checksum}, `rounded` modules, `left` {module: why}, `damping`


class LayerSolver:
    """Rounds the layers of one model.

    rounding: the job's `algorithm` and its values. partial: where files go, a path without suffix.
    """

    def __init__(
        self,
        source: SourceModel,
        planned: UnifiedPlan,
        rounding: Mapping[str, Any],
        model: StreamedModel,
        partial: Path,
    ) -> None:
        self._source, self._planned, self._model, self._partial = source, planned, model, partial
        self._algorithm = algorithms.of_job(rounding)
        self._blocks = self._algorithm is algorithms.HESSIAN
        self._options = None if self._blocks else gptq.Options.of_job(rounding["gptq"])
        self._reader = WeightReader(source.tensors)
        self._place_of = expert_inputs.places(model.model)
        self._groups: dict[int | None, list[Group]] = {}
        for group in self._same_inputs():
            layer = names.layer_of(planned.architecture, f"{group[0].module}.weight")
            self._groups.setdefault(layer, []).append(group)

    def _same_inputs(self) -> Iterable[Group]:
        """The layers to round, those with the same input together: of NVFP4 they also share their global scale."""
        found: dict[tuple[str, NumberFormat], list[Layer]] = {}
        for layer in (one for group in self._planned.groups for one in group):
            if self._algorithm.treats(layer.number_format):
                name = names.same_input(self._planned.architecture, layer.module)
                found.setdefault((name, layer.number_format), []).append(layer)
        return found.values()

    def passes(self, index: int) -> list[tuple[Sequence[Group], Moments]]:
        """The groups of a decoder layer, in parts whose moments fit into memory together, at least one part."""
        groups = self._groups.get(index, [])
        sizes = [self._algorithm.moments(group[0].part.shape[-1]) for group in groups]
        parts = algorithms.in_passes(sizes, _available(self._model.device))
        return [(part, self._moments(part)) for part in ([groups[number] for number in one] for one in parts)]

    def _moments(self, groups: Sequence[Group]) -> Moments:
        wanted = {self._place_of(group[0].module): group[0].part.shape[-1] for group in groups}
        return Moments(wanted, blocks=self._blocks)

    def solve(self, index: int, number: int, groups: Sequence[Group], seen: Moments) -> Solved:
        """Rounds the groups of a part of a decoder layer, and stores codes and scales in a file of their own."""
        made: dict[str, Rounded] = {}
        found: Solved = {"files": {}, "rounded": [], "left": {}, "damping": {}}
        for group in groups:
            why = self._round(group, seen, made, found["damping"])
            if why:
                found["left"] |= {layer.module: why for layer in group}
        if made:
            path = self._partial.with_name(f"{self._partial.name}-{index:04}-{number:04}.safetensors")
            found["files"] = {path.name: _write(path, made, self._planned.layers)}
            found["rounded"] = list(made)
        return found

    def _round(self, group: Group, seen: Moments, made: dict[str, Rounded], damping: dict[str, float]) -> str:
        """Adds what is made of a group's layers to `made`. Returns why nothing is; "" if something is."""
        place, columns = self._place_of(group[0].module), group[0].part.shape[-1]
        tokens = seen.tokens[place]
        if columns % nvfp4.BLOCK:  # only of INT8
            seen.take(place)
            return f"inputs that are not a multiple of {nvfp4.BLOCK}"
        if tokens < self._algorithm.least_tokens(columns):
            seen.take(place)
            return "few tokens" if tokens else "no token"
        global_scale = self._global_scale(group)
        if global_scale is None:
            return "no scale"
        rounds = self._rounding(seen, place, group[0].number_format, global_scale)
        if rounds is None:
            return "singular Hessian"
        function, added = rounds
        if self._options is not None and added > self._options.damping:
            damping |= {layer.module: added for layer in group}
        for layer in group:
            parts = [function(rows) for rows in self._weight(layer)]
            made[layer.module] = torch.cat([p for p, _ in parts]).cpu(), torch.cat([s for _, s in parts]).cpu()
        return ""

    def _rounding(
        self, seen: Moments, place: str, one: NumberFormat, global_scale: Tensor
    ) -> tuple[Callable[[Tensor], Rounded], float] | None:
        """A function that rounds rows of a weight, and the damping that it took. None if the Hessian is singular."""
        if self._options is None:
            blocks = _taken(seen, place)
            return lambda rows: hessian.round_rows(rows, blocks, global_scale), 0.0
        options, factored = self._options, gptq.factor(_taken(seen, place), self._options)
        if factored is None:
            return None
        grid: Grid = Nvfp4Blocks(global_scale)
        if isinstance(one, Int8):
            grid = Int8Rows(one, DTYPES[self._planned.dtype])
        return lambda rows: gptq.round_rows(rows, factored, grid, options), factored.damping

    def _global_scale(self, group: Group) -> Tensor | None:
        """The scale that the writer gives the group; None if there is none, which the writer reports."""
        largest = [rows.abs().amax() for layer in group for rows in self._weight(layer)]
        amax = torch.stack(largest).amax()
        return nvfp4.scale_of(amax) if bool(torch.isfinite(amax) & (amax > 0)) else None

    def _weight(self, layer: Layer) -> Iterator[Tensor]:
        """The weight as it is served, float32 rows on the device."""
        part, dtype = layer.part, self._source.tensors[layer.part.source].dtype
        for begin in range(0, part.shape[0], _ROWS):
            bits = self._reader.rows(part, begin, min(begin + _ROWS, part.shape[0]))
            served = bits if dtype == self._planned.dtype else rounded(bits, dtype, self._planned.dtype)
            tensor = torch.from_numpy(served.view("<i2")).view(DTYPES[self._planned.dtype])
            yield tensor.to(device=self._model.device, dtype=torch.float32)

    def holds(self, results: Iterable[Mapping[str, Any]]) -> bool:
        """Whether the files of a killed run's results are there as they were written."""
        stored = [item for one in results for item in one.get("solved", _nothing())["files"].items()]
        try:
            return all(_checksum(self._partial.with_name(name)) == crc for name, crc in stored)
        except OSError:
            return False

    def solved(self, results: Iterable[Mapping[str, Any]]) -> dict[str, Path]:
        """{module: the file that holds its codes and scales}, for writer.Work."""
        files = [self._partial.with_name(name) for one in results for name in one.get("solved", _nothing())["files"]]
        return {name.rpartition(".")[0]: path for path in files for name in Tensors(path.parent, [path])}

    def facts(self, results: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """For the manifest: how many layers were rounded so, which were left to `mse` or `max` and why, and where
        damping was raised."""
        whole = joined([one["solved"] for one in results if "solved" in one])
        outside = [layer.module for group in self._groups.get(None, ()) for layer in group]
        left: dict[str, dict[str, str]] = {}
        for module, why in (whole["left"] | dict.fromkeys(outside, "outside of the decoder layers")).items():
            name = algorithms.fallback(self._planned.layers[module]).name
            left.setdefault(f"left_to_{name}", {})[module] = why
        return {
            "rounded_linears": len(whole["rounded"]),
            **left,
            **({"raised_damping": whole["damping"]} if whole["damping"] else {}),
        }


def joined(parts: Sequence[Solved]) -> Solved:
    """The results of the parts of a layer, or of all layers, as one."""
    found = _nothing()
    for one in parts:
        found["files"] |= one["files"]
        found["rounded"] += one["rounded"]
        found["left"] |= one["left"]
        found["damping"] |= one["damping"]
    return found


def _nothing() -> Solved:
    return {"files": {}, "rounded": [], "left": {}, "damping": {}}


def _taken(seen: Moments, place: str) -> Tensor:
    """The moments of a place that has seen tokens. Nothing else holds them then."""
    found = seen.take(place)
    assert found is not None
    return found


def _available(device: torch.device) -> float:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory().available


def _write(path: Path, made: Mapping[str, Rounded], formats: Mapping[str, NumberFormat]) -> int:
    """Writes codes and scales, as the layers' formats store them, whole or not at all. Returns the file's checksum."""
    tensors = []
    for module, pair in made.items():
        stored = [tensor for tensor in formats[module].tensors if tensor.per_output]
        for one, tensor in zip(stored, pair, strict=True):
            data = tensor.contiguous().view(torch.uint8).numpy().data.cast("B")
            tensors.append(NewTensor(f"{module}.{one.name}", one.dtypes[0], tuple(tensor.shape), [data]))
    written = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write(written, tensors, {})
    crc = _checksum(written)
    written.replace(path)
    return crc


def _checksum(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while data := file.read(1 << 22):
            crc = zlib.crc32(data, crc)
    return crc
