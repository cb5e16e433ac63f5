"""The unified layout of a quantized checkpoint as a model of transformers, its weights dequantized. Imports torch.

Experts of a mixture are stored one by one; transformers 5 joins those of a layer as it does for any other checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from builder.core.errors import NotMeasurable
from builder.core.safetensors_io import Tensors
from builder.formats import kv_cache
from builder.formats.arithmetic.dtypes import read
from builder.formats.base import NumberFormat
from builder.formats.declared import DeclaredFormats
from builder.model import loading as model_loading
from builder.model import streamed
from builder.model.files import parse_config
from builder.model.streamed import StreamedModel
from builder.model.streamed_embedding import read_rows


def load(unified: Path, config: Any, formats: DeclaredFormats, *, dtype: torch.dtype, **options: Any) -> Any:
    """The model in `dtype`, each weight dequantized as it is read.

    config: transformers' configuration of the model, without its quantization. options: passed on to from_pretrained.
    NotMeasurable if transformers has no such model; IntegrityError if tensors are missing, unexpected or of another
    shape.
    """
    of_model, source = _class(unified), Dequantized(Tensors(unified), formats, dtype)
    model, info = of_model.from_pretrained(
        None,
        config=config,
        state_dict={key: source.tensor(key) for key in source},
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `info` lists them
        **options,
    )
    model_loading.check_loaded(model, info, unified)
    return model.eval()


def load_streamed(
    unified: Path, config: Any, formats: DeclaredFormats, *, dtype: torch.dtype, device: torch.device, **options: Any
) -> StreamedModel:
    """The same model, each layer of which is dequantized when it is computed. options: passed on to the class.

    NotMeasurable if transformers has no such model; UnsupportedError if it can't be computed layer by layer.
    """
    of_model = _class(unified)
    with streamed.without_weights():
        model = of_model._from_config(config, dtype=dtype, **options)
    model.name_or_path = model.config._name_or_path = str(unified)
    return StreamedModel(model, Dequantized(Tensors(unified), formats, dtype), dtype, device)


def _class(unified: Path) -> Any:
    """transformers' class of a model. NotMeasurable if it has none."""
    import transformers

    raw = parse_config((unified / "config.json").read_bytes(), str(unified))
    name = (raw.get("architectures") or ["unknown"])[0]
    if not hasattr(transformers, name):
        raise NotMeasurable(f"transformers has no {name}.", hint="Measure it served: --runner served")
    return getattr(transformers, name)


class Dequantized:
    """The parameters of a model in `dtype`, from the tensors of its quantized layout (streamed_weights.Source)."""

    def __init__(self, stored: Tensors, formats: DeclaredFormats, dtype: torch.dtype) -> None:
        self._stored, self._formats, self._dtype = stored, formats, dtype
        self._ends = scale_ends(formats)

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._stored if not name.endswith(self._ends))

    def tensor(self, name: str) -> Tensor:
        """A parameter, in memory of its own."""
        return weight(self._stored, self._formats, name, self._dtype)

    def rows(self, name: str, numbers: Sequence[int]) -> Tensor:
        """Rows of a matrix; numbers: sorted. IndexError for one that it lacks."""
        module = name.rpartition(".")[0]
        if self._formats.of_weight(module, self._stored[name].dtype).quant_algo is not None:
            return self.tensor(name)[list(numbers)]
        return read_rows(self._stored, name, numbers).to(self._dtype)

    def prefetch(self, names: Iterable[str]) -> None:
        """Asks the kernel to read these tensors ahead; scales are small."""
        for name in names:
            self._stored.prefetch(name)


def weight(stored: Tensors, formats: DeclaredFormats, name: str, dtype: torch.dtype) -> Tensor:
    """A parameter of the model in `dtype`; the weight of a quantized linear layer is dequantized."""
    module, _, leaf = name.rpartition(".")
    number_format = formats.of_weight(module, stored[name].dtype)
    if leaf != number_format.weight.unified or number_format.quant_algo is None:
        return read(stored, name).to(dtype)
    return number_format.dequantize(tensors_of(stored, module, number_format), dtype)


def tensors_of(stored: Tensors, module: str, number_format: NumberFormat) -> dict[str, Tensor]:
    """A linear layer's tensors by their names in its format, without those that were not calibrated or that it may
    lack."""
    names = {one.name: f"{module}.{one.unified}" for one in number_format.tensors}
    may_lack = {one.name for one in number_format.tensors if one.optional or one.calibrated}
    return {name: read(stored, key) for name, key in names.items() if key in stored or name not in may_lack}


def linears(stored: Mapping[str, Any], formats: DeclaredFormats) -> dict[str, NumberFormat]:
    """{linear layer: its format} of the quantized ones."""
    found = {}
    for key, info in stored.items():
        module, _, leaf = key.rpartition(".")
        number_format = formats.stored(module, info.dtype)
        if leaf == number_format.weight.unified and number_format.quant_algo is not None:
            found[module] = number_format
    return found


def scale_ends(formats: DeclaredFormats) -> tuple[str, ...]:
    """Ends of the names of tensors that are not parameters of the model: scales."""
    leaves = [one.unified for number_format in formats.used for one in number_format.tensors[1:]]
    cache = [name for one in kv_cache.FORMATS.values() for name in one.unified]
    return tuple(f".{name}" for name in (*leaves, *cache))
