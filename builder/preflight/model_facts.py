"""What is known of a model before any weight is read: config.json, tensor headers, and the formats of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from builder.architectures import catalog, names, written
from builder.architectures.facts import Architecture
from builder.formats.assignment import Layers, by_layer
from builder.formats.base import NumberFormat
from builder.formats.registry import BF16, NVFP4
from builder.model import tensor_names
from builder.model.dtypes import NOT_WRITTEN


@dataclass(frozen=True)
class ModelFacts:
    """A model before any weight is read.

    tensors: {name: (dtype, shape)}. layers: the linear layers in a format of their own, by its name; number_format:
    that of the others. directory: holds config.json and the tokenizer files.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    layers: Layers = field(default_factory=dict)
    directory: Path | None = None
    number_format: NumberFormat = NVFP4

    @cached_property
    def architecture(self) -> Architecture:
        """What is known about the model's architecture."""
        return catalog.of(self.config)

    def quantizes(self, tensor: str, shape: Sequence[int]) -> bool:
        """Whether this tensor is the weight of a layer that is quantized."""
        return names.is_quantizable(self.architecture, tensor, shape) and self.format_of(tensor) is not BF16

    def format_of(self, tensor: str) -> NumberFormat:
        """The format of a linear layer that can be quantized, by the name of its weight."""
        return self.single.get(tensor.removesuffix(".weight"), self.number_format)

    def modules(self, name: str) -> Sequence[str]:
        """The linear layers in a format of their own, by the format's name."""
        return self.layers.get(name, ())

    @cached_property
    def single(self) -> Mapping[str, NumberFormat]:
        """{module: format} of the linear layers in a format of their own."""
        return by_layer(self.layers)

    @property
    def compressed_only(self) -> bool:
        """Whether a layer is in a format that TensorRT-LLM has no layout of."""
        return any(one.compressed_only for one in (self.number_format, *self.single.values()))

    @cached_property
    def written(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """The tensors that a checkpoint is made of (architectures/written.py), without an output layer that is tied to
        the embedding."""
        tied = {self.head} if self.config.get("tie_word_embeddings") else set()
        found = {n: info for n, info in self.tensors.items() if n not in tied and not NOT_WRITTEN.search(n)}
        return written.tensors(self.config, found)

    @property
    def head(self) -> str:
        """The name of the output layer's weight."""
        return tensor_names.head(self.config)

    @cached_property
    def embedding(self) -> tuple[str, tuple[int, ...]] | None:
        """(dtype, shape) of the embedding; None if no tensor has such a name."""
        weights = ((name.removesuffix(".weight"), info) for name, info in self.written.items())
        return next((info for name, info in weights if names.is_embedding(self.architecture, name)), None)
