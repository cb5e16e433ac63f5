"""Which tensors the unified layout of a model in given formats has, and of which part of the source each is made. Pure.

By headers alone, so that it is known before a weight is read or has arrived.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from builder.architectures import catalog, names, written
from builder.architectures.facts import Architecture
from builder.architectures.written import Header, Part
from builder.core.errors import UnsupportedError
from builder.core.output import listed
from builder.core.safetensors_io import byte_size
from builder.formats.assignment import ModelFormats
from builder.formats.base import SCALAR, NumberFormat
from builder.formats.registry import BF16
from builder.model import tensor_names
from builder.model.dtypes import NOT_WRITTEN

# What the bytes of the layout depend on, beside builder/formats, builder/architectures and what modelopt.SOURCES lists.
SOURCES = (
    "builder/quantize/writer.py",
    "builder/quantize/ranges.py",
    "builder/quantize/stored_scales.py",
    "builder/quantize/source_weights.py",
    "builder/quantize/unified_files.py",
    "builder/quantize/unified_plan.py",
    "builder/checkpoint/unified_config.py",
    "builder/model/source_tensors.py",
    "builder/model/tensor_names.py",
)
# The size from which a checkpoint is several files: the default of ModelOpt's exporter (0.47, export_hf_checkpoint).
# In 0.37 it is that of transformers 4, 5 GB.
SHARD_BYTES = 10_000_000_000


@dataclass(frozen=True)
class Layer:
    """A linear layer to quantize. part: its weight, [outputs, inputs]."""

    module: str
    number_format: NumberFormat
    part: Part

    @property
    def tensors(self) -> dict[str, Header]:
        """{tensor: (dtype, shape)} of the unified layout."""
        shape = self.part.shape
        return {
            f"{self.module}.{one.unified}": (one.dtypes[0], one.shape(shape) if one.dims else SCALAR[0])
            for one in self.number_format.tensors
        }


@dataclass(frozen=True)
class UnifiedPlan:
    """The unified layout before its weights are read.

    dtype: the type that the model is served in, BF16 or F16. groups: the linear layers to quantize, those that share
    one scale together. copies: all other tensors, whose floats are rounded to their dtype. scales: F32 numbers that
    calibration gives.
    """

    architecture: Architecture
    dtype: str
    groups: Sequence[Sequence[Layer]]
    copies: Sequence[Part]
    scales: Mapping[str, float] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, NumberFormat]:
        """{linear layer: its format} of the quantized ones."""
        return {layer.module: layer.number_format for group in self.groups for layer in group}

    @property
    def unquantized(self) -> list[str]:
        """The modules that are left as they are and that loaders could take for quantized ones, in the model's order:
        embedding, output layer and everything else with a matrix."""
        kept = {p.name.rpartition(".")[0] for p in self.copies if p.name.endswith(".weight") and len(p.shape) > 1}
        return sorted(kept, key=self._position)

    @property
    def tensors(self) -> dict[str, Header]:
        """{name: (dtype, shape)} of the layout, in the model's order: embedding, decoder layers, what follows them."""
        found: dict[str, Header] = {part.name: (part.dtype, part.shape) for part in self.copies}
        for group in self.groups:
            for layer in group:
                found |= layer.tensors
        found |= {name: ("F32", SCALAR[0]) for name in self.scales}
        return dict(sorted(found.items(), key=lambda item: self._position(item[0])))

    def _position(self, name: str) -> tuple[float, str]:
        layer = names.layer_of(self.architecture, name)
        if layer is not None:
            return layer, name
        return (-1 if names.is_embedding(self.architecture, name.removesuffix(".weight")) else math.inf), name

    def shards(self, shard_bytes: int = SHARD_BYTES) -> list[dict[str, Header]]:
        """The tensors of each file: of at most `shard_bytes`, or of one larger tensor."""
        made: list[dict[str, Header]] = [{}]
        filled = 0
        for name, header in self.tensors.items():
            nbytes = byte_size(*header)
            if made[-1] and filled + nbytes > shard_bytes:
                made.append({})
                filled = 0
            made[-1][name] = header
            filled += nbytes
        return made


def plan(config: Mapping[str, Any], found: Mapping[str, Header], dtype: str, formats: ModelFormats) -> UnifiedPlan:
    """The layout of a model with these tensors, {name: (dtype, shape)}, whose scales are not known yet.

    UnsupportedError for a format whose weights depend on calibration data, a layer that is not made of its format's
    groups, and experts that are quantized stacked.
    """
    architecture = catalog.of(config)
    single = {module: one for one, modules in formats.layers.items() for module in modules}
    groups: dict[tuple[str, NumberFormat], list[Layer]] = {}
    copies = []
    for part in _parts(config, found, dtype, quantized=formats.quantizes):
        module = part.name.removesuffix(".weight")
        one = single.get(module, formats.whole)
        if not names.is_quantizable(architecture, part.name, part.shape):
            if one is not BF16 and written.stacked(architecture, part.name, part.shape):
                raise _stacked(part.name, one)
            one = BF16
        if one is BF16:
            copies.append(part)
        else:
            groups.setdefault((_shared(architecture, module, one), one), []).append(Layer(module, one, part))
    return UnifiedPlan(architecture, dtype, list(groups.values()), copies)


def _parts(config: Mapping[str, Any], found: Mapping[str, Header], dtype: str, *, quantized: bool) -> Iterator[Part]:
    """The tensors before quantization, in the dtypes that they are written in, without an output layer that is tied to
    the embedding. Experts stay stacked in a model that is not quantized: TensorRT-LLM reads them so."""
    architecture = catalog.of(config)
    tied = {tensor_names.head(config)} if config.get("tie_word_embeddings") else set()
    known = {name: header for name, header in found.items() if name not in tied and not NOT_WRITTEN.search(name)}
    for part in written.parts(config, known, apart=quantized):
        name = architecture.renamed.get(part.name, part.name)
        yield replace(part, name=name, dtype=dtype if part.dtype == "BF16" else part.dtype)


def _shared(architecture: Architecture, module: str, one: NumberFormat) -> str:
    """What names the layers that share one scale of the weights: themselves, where the format has none for a layer.

    ModelOpt leaves FP8 layers with the same input alone; those that are served as one share it (quantizers.py).
    """
    if not any(not tensor.dims and not tensor.calibrated for tensor in one.tensors):
        return module
    if not one.prepare_export:
        return names.same_input(architecture, module)
    fused = names.fused_name(architecture, module)
    return f"{module.rpartition('.')[0]}.{fused}" if fused else module


def check(layers: Mapping[str, NumberFormat]) -> None:
    """UnsupportedError for formats whose weights can't be written without ModelOpt."""
    searched = sorted({one.title for one in layers.values() if not one.packs})
    if searched:
        raise UnsupportedError(
            f"{listed(searched)} can't be written without calibration data.",
            why="The weights depend on scales of the inputs, which ModelOpt searches with the calibration rows.",
            hint="Choose another --format, or leave --data-free and --memory out.",
        )


def _stacked(name: str, one: NumberFormat) -> UnsupportedError:
    return UnsupportedError(
        f"The experts in {name} can't be quantized to {one.title} without ModelOpt.",
        why="This architecture's checkpoints hold all experts of a layer in one tensor, with one scale.",
        hint="Quantize it with ModelOpt: leave --data-free and --memory out.",
    )
