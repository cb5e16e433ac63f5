"""What is known of a model before any weight is read: config.json, tensor headers, and the formats of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from builder.architectures import catalog, names
from builder.architectures.facts import Architecture
from builder.formats.base import NumberFormat
from builder.formats.registry import FP8, NVFP4
from builder.model import tensor_names
from builder.model.dtypes import NOT_WRITTEN


@dataclass(frozen=True)
class ModelFacts:
    """A model before any weight is read.

    tensors: {name: (dtype, shape)}. kept, fp8: the linear layers that stay in BF16 or in FP8; number_format: that of
    the others. directory: holds config.json and the tokenizer files.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    kept: tuple[str, ...] = ()
    fp8: tuple[str, ...] = ()
    directory: Path | None = None
    number_format: NumberFormat = NVFP4

    @cached_property
    def architecture(self) -> Architecture:
        """What is known about the model's architecture."""
        return catalog.of(self.config)

    def quantizes(self, tensor: str, shape: Sequence[int]) -> bool:
        """Whether this tensor is the weight of a layer that is quantized."""
        quantizable = names.is_quantizable(self.architecture, tensor, shape)
        return quantizable and tensor.removesuffix(".weight") not in self._kept

    def format_of(self, tensor: str) -> NumberFormat:
        """The format of a quantized layer, by the name of its weight."""
        return FP8 if tensor.removesuffix(".weight") in self._fp8 else self.number_format

    @cached_property
    def written(self) -> Mapping[str, tuple[str, tuple[int, ...]]]:
        """The tensors that transformers loads and saves: without an output layer that is tied to the embedding."""
        tied = {self.head} if self.config.get("tie_word_embeddings") else set()
        return {name: info for name, info in self.tensors.items() if name not in tied and not NOT_WRITTEN.search(name)}

    @property
    def head(self) -> str:
        """The name of the output layer's weight."""
        return tensor_names.head(self.config)

    @cached_property
    def embedding(self) -> tuple[str, tuple[int, ...]] | None:
        """(dtype, shape) of the embedding; None if no tensor has such a name."""
        weights = ((name.removesuffix(".weight"), info) for name, info in self.tensors.items())
        return next((info for name, info in weights if names.is_embedding(self.architecture, name)), None)

    @cached_property
    def _kept(self) -> frozenset[str]:
        return frozenset(self.kept)

    @cached_property
    def _fp8(self) -> frozenset[str]:
        return frozenset(self.fp8)
