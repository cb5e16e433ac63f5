"""A quantized checkpoint as an ordinary model: its weights dequantized, its scales in a file beside them.

The files, tensors and formulas are those of the pseudo-quantization that a fork of AutoGPTQ documents for NVFP4, so
that tools made for it read them: value = code x per_block_scale x scale_2, where scale_2 is the tensor's largest
magnitude over 6 x 448. Added are an index and the model's own config.json and tokenizer, for transformers.

One tensor at a time is in memory. Imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from builder.checkpoint import conversion, quantized_source
from builder.checkpoint.description import CONFIG, Description, describe_directory
from builder.checkpoint.layouts import write_json
from builder.checkpoint.shards import write_shards
from builder.core.errors import UnsupportedError
from builder.core.safetensors_io import NewTensor, Tensors, write
from builder.formats.arithmetic.dtypes import read
from builder.formats.base import NumberFormat
from builder.quantize import stored_model
from builder.quantize.pseudo_names import DTYPES as WRITTEN
from builder.quantize.pseudo_names import LARGEST_FILE, QUANTIZE_CONFIG, check_formats, has_blocks, is_int8, stem

# Below this scale of a block, or of an INT8 output, FP16's subnormal numbers are too far apart to tell all codes from
# each other: they are 2^-24 apart, and a code is lost if its value moves by a quarter of the scale, or half of INT8's.
LEAST_SCALE = 2.0**-22
FLOATS = ("BF16", "F16")  # take the type that is written; F32 tensors, as of routers, stay


@dataclass
class Written:
    """What was written. files: names, the weights first. inexact: layers some of whose codes FP16 can't tell apart."""

    files: list[str] = field(default_factory=list)
    nbytes: int = 0
    inexact: list[str] = field(default_factory=list)


def write_pseudo(
    unified: Path,
    destination: Path,
    dtype: str,
    *,
    algorithm: str | None = None,
    largest: int = LARGEST_FILE,
    done: Callable[[int], None] = lambda nbytes: None,
) -> Written:
    """Writes the pseudo-quantized model of a unified checkpoint into an existing, empty directory.

    dtype: bf16 or fp16. algorithm: what rounded the weights, where it is known. largest: bytes of a file of weights.
    UnsupportedError for formats other than NVFP4, FP8 and INT8 without scales of inputs, and for weights beyond FP16's
    range.
    """
    found = describe_directory(unified)
    quantized = {module: one for module, one in found.layers.items() if one.quant_algo is not None}
    check_formats(quantized.values())
    whole, made = quantized_source.formats(found).whole, Written()
    model = _Model(unified, found, dtype, made.inexact)
    weights = write_shards(destination, list(model.weights()), largest, None, done, stem(whole))
    scales = destination / f"{stem(whole)}_scales.safetensors"
    write(scales, list(model.scales(quantized)), {"format": "pt"})
    config = conversion.without_quantization(found.config)
    stated = {name: WRITTEN[dtype].title for name in ("dtype", "torch_dtype")}
    write_json(destination / CONFIG, {**config, **stated})
    write_json(destination / QUANTIZE_CONFIG, _document(found, quantized, whole, dtype, algorithm))
    conversion.copy_companions(unified, destination)
    made.files = [file.name for file in (*weights, scales)]
    made.nbytes = sum((destination / name).stat().st_size for name in made.files)
    return made


class _Model:
    """The tensors to write, each made when it is written."""

    def __init__(self, unified: Path, found: Description, dtype: str, inexact: list[str]) -> None:
        self._stored, self._formats, self._dtype = Tensors(unified), found.formats, WRITTEN[dtype]
        self._inexact = inexact

    def weights(self) -> Iterator[NewTensor]:
        """Every parameter of the model."""
        ends = stored_model.scale_ends(self._formats)
        for name, info in self._stored.items():
            if name.endswith(ends):
                continue
            module, _, leaf = name.rpartition(".")
            one = self._formats.of_weight(module, info.dtype)
            if leaf == one.weight.unified and one.quant_algo is not None:
                shape = one.weight.weight_shape(info.shape)
                yield NewTensor(name, self._dtype.safetensors, shape, self._dequantized(module, one))
            elif info.dtype in FLOATS and info.dtype != self._dtype.safetensors:
                yield NewTensor(name, self._dtype.safetensors, info.shape, self._cast(name))
            else:
                yield NewTensor(name, info.dtype, info.shape, [self._stored.place(name)])

    def scales(self, quantized: Mapping[str, NumberFormat]) -> Iterator[NewTensor]:
        """The scales of every quantized layer, as they are stored."""
        for module, one in quantized.items():
            names = {"block_scale": "per_block_scale", "weight_scale": "scale_2" if has_blocks(one) else "scale"}
            for tensor in one.tensors:
                if tensor.name in names:
                    name = f"{module}.{tensor.unified}"
                    info = self._stored[name]
                    place = [self._stored.place(name)]
                    yield NewTensor(f"{module}.{names[tensor.name]}", info.dtype, info.shape, place)

    def _dequantized(self, module: str, one: NumberFormat) -> Iterator[memoryview]:
        stored = stored_model.tensors_of(self._stored, module, one)
        if self._dtype.torch == torch.float16 and (has_blocks(one) or is_int8(one)):
            scales = stored["block_scale"].float() if has_blocks(one) else torch.ones(1)
            if bool((scales * stored["weight_scale"] < LEAST_SCALE).any()):
                self._inexact.append(module)
        yield self._raw(one.dequantize(stored, self._dtype.torch), module)

    def _cast(self, name: str) -> Iterator[memoryview]:
        yield self._raw(read(self._stored, name).to(self._dtype.torch), name)

    def _raw(self, made: Tensor, name: str) -> memoryview:
        """The bytes of a tensor. UnsupportedError if FP16 holds not all of its values."""
        if self._dtype.torch == torch.float16 and not bool(torch.isfinite(made).all()):
            raise UnsupportedError(
                f"FP16 can't hold the weights of {name}: its largest number is 65504.",
                why="The model was made for BF16, which has the range of FP32.",
                hint="Write BF16, the default.",
            )
        return memoryview(made.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _document(
    found: Description, quantized: Mapping[str, NumberFormat], whole: NumberFormat, dtype: str, algorithm: str | None
) -> dict[str, Any]:
    """quantize_config.json, with AutoGPTQ's keys and what they leave open."""
    layers: dict[str, list[str]] = {}
    for module, one in quantized.items():
        layers.setdefault(one.name, []).append(module)
    values = {name: _formula(quantized[modules[0]]) for name, modules in layers.items()}
    return {
        "bits": int(whole.bits),
        "group_size": whole.group_size or -1,
        "desc_act": False,  # the columns are in the model's own order, so there is no g_idx
        "sym": True,
        "quant_method": whole.name,
        "model_file_base_name": stem(whole),
        "pseudo_quantized": True,
        "format": whole.name,
        "algorithm": algorithm,
        "dtype": WRITTEN[dtype].title,
        "values": values,
        # Only where formats are mixed: all quantized layers have the scales that name them.
        "layers": layers if len(layers) > 1 else {},
        "producer": {"name": found.producer.name, "version": found.producer.version},
    }


def _formula(one: NumberFormat) -> str:
    return "code x per_block_scale x scale_2" if has_blocks(one) else "code x scale"
