"""One layout of a checkpoint that is being inspected: its files, what its configuration says, what was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from builder.architectures import catalog, names
from builder.architectures.facts import Architecture
from builder.checkpoint import description, layout_names, sharding
from builder.checkpoint.description import Description
from builder.checkpoint.inspection import files, findings
from builder.checkpoint.inspection.files import Opened
from builder.checkpoint.inspection.findings import Finding
from builder.checkpoint.layout_names import LayoutNames
from builder.checkpoint.layouts import read_json
from builder.core.errors import IntegrityError
from builder.core.safetensors_io import Tensors
from builder.formats import kv_cache
from builder.formats.base import NumberFormat, StoredTensor
from builder.formats.declared import DeclaredFormats, declared
from builder.formats.kv_cache import KvCacheFormat
from builder.formats.registry import BF16
from builder.model import tensor_names

CONFIG = "config.json"
FOLDERS = ("", "unified", "tensorrt_llm", "compressed_tensors")  # where a checkpoint has its layouts


@dataclass
class Layout:
    """The files of one layout.

    name: of the layout, with the rank of a split TensorRT-LLM layout. config: config.json with common keys. opened:
    its tensors. names: None if the shapes of the tensors do not follow from the configuration. here: whether this build
    has just made it.
    """

    name: str
    folder: Path
    said: Description
    config: Mapping[str, Any]
    opened: Opened
    names: LayoutNames | None
    rank: int = 0
    here: bool = False
    findings: list[Finding] = field(default_factory=list)
    _formats: dict[str, NumberFormat] = field(default_factory=dict)

    @property
    def tensors(self) -> Tensors:
        """Its readable tensors."""
        return self.opened.tensors

    @property
    def formats(self) -> DeclaredFormats:
        """What the configuration declares."""
        return self.said.formats

    @property
    def cache(self) -> KvCacheFormat:
        """The declared format of the KV cache."""
        return self.said.cache

    @property
    def tensorrt_llm(self) -> bool:
        """Whether this is TensorRT-LLM's layout; the others have Hugging Face names."""
        return self.said.layout == "tensorrt_llm"

    @property
    def compressed(self) -> bool:
        """Whether this is the compressed-tensors layout."""
        return self.said.layout == "compressed_tensors"

    @cached_property
    def architecture(self) -> Architecture:
        """The architecture that config.json names."""
        return catalog.of(self.config)

    @property
    def main(self) -> NumberFormat:
        """The format that names the checkpoint: the one with the fewest bits."""
        return min(self.formats.used, key=lambda one: one.bits, default=BF16)

    @property
    def head(self) -> str:
        """The name of the output layer."""
        return self.names.head if self.names else names.ENGINE_HEAD

    def leaf(self, tensor: StoredTensor) -> str:
        """The last part of a tensor's name in this layout."""
        if self.compressed and tensor.compressed_tensors is not None:
            return tensor.compressed_tensors
        return tensor.leaf(unified=not self.tensorrt_llm)

    def format_of(self, module: str) -> NumberFormat:
        """The format that is declared for a linear layer."""
        if module not in self._formats:
            self._formats[module] = self.formats.of(module)
        return self._formats[module]

    def divides(self, tensor: StoredTensor | None) -> bool:
        """Whether this layout stores 1 / x of it."""
        return self.compressed and tensor is not None and tensor.reciprocal

    def cache_scales(self) -> tuple[str, ...]:
        """The names of a layer's KV cache scales, after the attention's name."""
        if self.compressed:
            return self.cache.compressed_tensors
        return self.cache.tensorrt_llm if self.tensorrt_llm else self.cache.unified

    def fused(self, module: str) -> str | None:
        """The name of the layer that servers multiply this one in; None if it is alone or already joined."""
        own = None if self.tensorrt_llm else names.fused_name(self.architecture, module)
        return f"{module.rpartition('.')[0]}.{own}" if own else None

    def report(self, tensor: str, what: str, kind: str) -> None:
        """Records a finding about a tensor or a file."""
        self.findings.append(findings.finding(self.name, tensor, what, kind, here=self.here))


def open_all(path: Path, *, here: bool = False) -> Iterator[Layout]:
    """The layouts in a directory and in its folders; if this build has made them, also one without a quantization."""
    for folder in FOLDERS:
        yield from _open(path / folder, here)


def _open(folder: Path, here: bool) -> Iterator[Layout]:
    documents = {n: read_json(folder / n) for n in description.DOCUMENTS if (folder / n).is_file()}
    config = documents.get(CONFIG, {})
    if "pretrained_config" in config:  # an engine directory wraps it
        documents[CONFIG] = config = config["pretrained_config"]
    which = description.layout_of(documents) or ("unified" if here and config else None)
    if which is None:
        return
    if which == "tensorrt_llm":
        if not any(folder.glob("rank*.safetensors")):
            return
        split = sharding.rank_files(folder, config)
        opened = [files.open_files(folder, [file]) for file in split]
    else:
        opened = [files.open_files(folder)]
    for rank, one in enumerate(opened):
        said = _described(documents, one.tensors, folder)
        name = which if len(opened) == 1 else f"{which} rank{rank}"
        common = config if which == "tensorrt_llm" else catalog.with_common_keys(config)
        _check_sizes(common, folder)
        known = layout_names.tensorrt_llm(common) if which == "tensorrt_llm" else layout_names.unified(common)
        layout = Layout(name, folder, said, common, one, known, rank, here)
        for tensor, what, kind in one.problems:
            layout.report(tensor, what, kind)
        yield layout


def _check_sizes(config: Mapping[str, Any], folder: Path) -> None:
    """IntegrityError for a configuration without the sizes that the shapes of the tensors follow from."""
    known = catalog.of(config).tensors is not None or catalog.engine_of(config) is not None
    if known and (lacking := [key for key in tensor_names.NEEDED if config.get(key) is None]):
        raise IntegrityError(
            f"{folder / CONFIG} lacks {', '.join(lacking)}.",
            hint="Copy config.json again from the checkpoint or from the original model.",
        )


def _described(documents: Mapping[str, Any], tensors: Tensors, folder: Path) -> Description:
    """The description of a layout; of one without a quantization, that all layers are in BF16."""
    if description.layout_of(documents) is not None:
        return description.describe(documents, tensors, str(folder))
    config = catalog.with_common_keys(documents[CONFIG])
    return Description("unified", config, declared({}), kv_cache.AUTO, tensors)
