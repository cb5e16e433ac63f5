"""Gives the modules of a transformers model their weights, one part of the model at a time, and takes them back.

transformers' own loading code does it, so that dtypes, names and the experts that transformers 5 joins in one parameter
are those of a model that was loaded whole (core_model_loading.py, convert_and_load_state_dict_in_model, 5.14;
modeling_utils.py, _load_state_dict_into_meta_model, 4.57). Files are read, not mapped: one that is cut while it is
mapped ends the process with SIGBUS. Imports torch; transformers inside functions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from builder.core.safetensors_io import Tensors
from builder.formats.arithmetic.dtypes import read
from builder.model.dense import DenseModel
from builder.model.streamed_embedding import by_rows, read_rows

READERS = 4  # threads that read a layer of a plain decoder


class Source(Protocol):
    """Where weights come from, by the names that the model's files have."""

    def __iter__(self) -> Iterator[str]: ...

    def tensor(self, name: str) -> Tensor:
        """The tensor, in memory of its own."""
        ...

    def rows(self, name: str, numbers: Sequence[int]) -> Tensor:
        """Rows of a matrix; numbers: sorted."""
        ...

    def prefetch(self, names: Iterable[str]) -> None:
        """The tensors will be read soon."""
        ...


class StoredSource:
    """The tensors of safetensors files."""

    def __init__(self, stored: Tensors) -> None:
        self.stored = stored

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def tensor(self, name: str) -> Tensor:
        """The tensor. IntegrityError if its file has become shorter."""
        return read(self.stored, name)

    def rows(self, name: str, numbers: Sequence[int]) -> Tensor:
        """Rows of a matrix; numbers: sorted. IndexError for one that it lacks."""
        return read_rows(self.stored, name, numbers)

    def prefetch(self, names: Iterable[str]) -> None:
        """Asks the kernel to read the tensors ahead."""
        for name in names:
            self.stored.prefetch(name)


class Weights:
    """Loads groups of a model's weights. `dtype`: that of the model, `device`: where modules compute."""

    def __init__(self, model: Any, source: Source, dtype: torch.dtype, device: torch.device) -> None:
        self._model, self._source, self.device = model, source, device
        self._empty = {name: parameter for name, parameter in model.named_parameters(remove_duplicate=False)}
        self._load = _loader(model, dtype, device)
        self._ignored = [re.compile(one) for one in getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        self._optional = [re.compile(one) for one in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
        self._tied = _tied(model)

    @contextmanager
    def loaded(self, sources: Sequence[str], parts: Sequence[str]) -> Iterator[None]:
        """While the block runs, the modules whose parameters' names begin with one of `parts` have their weights, made
        from the tensors `sources`. IntegrityError if these are not exactly the ones that the modules need."""
        from builder.model.loading import check_loaded

        expected = {name for name in self._names() if name.startswith(tuple(parts))}
        try:
            info = self._load(sources, self._source.tensor)
            missing = info.pop("missing") & expected - self._tied
            info["missing_keys"] = [name for name in sorted(missing) if not _matches(self._optional, name)]
            info["unexpected_keys"] = [n for n in sorted(info["unexpected_keys"]) if not _matches(self._ignored, n)]
            check_loaded(self._model, info, self._model.name_or_path or type(self._model).__name__)
            yield
        finally:
            for name in (expected | self._tied) & self._empty.keys():
                module, _, leaf = name.rpartition(".")
                self._model.get_submodule(module)._parameters[leaf] = self._empty[name]

    def by_rows(self, embedding: nn.Embedding, name: str) -> AbstractContextManager[None]:
        """While the block runs, the embedding reads the rows that it needs of the tensor `name`."""
        return by_rows(embedding, lambda numbers: self._source.rows(name, numbers), self.device)

    def prefetch(self, sources: Iterable[str]) -> None:
        """Starts to read tensors that `loaded` is called with next."""
        self._source.prefetch(sources)

    def _names(self) -> Iterator[str]:
        yield from self._empty
        persistent = self._model.state_dict().keys()
        yield from (name for name, _ in self._model.named_buffers() if name in persistent)


def _matches(patterns: Iterable[re.Pattern[str]], name: str) -> bool:
    return any(pattern.search(name) for pattern in patterns)


def _tied(model: Any) -> set[str]:
    """The parameters that are tied to others, which have the weights."""
    if not model.config.tie_word_embeddings:
        return set()
    known = getattr(model, "all_tied_weights_keys", None) or getattr(model, "_tied_weights_keys", None) or ()
    return set(known)


Read = Callable[[str], Tensor]  # by its name in the files


def _loader(model: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A function that reads the named tensors into the model, and returns transformers' loading info with the names of
    all tensors of the model that were not among them as `missing`."""
    if isinstance(model, DenseModel):
        return _loader_of_torch(model, dtype, device)
    try:
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
    except ImportError:
        return _loader_of_4(model, dtype, device)
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.modeling_utils import LoadStateDictConfig

    from builder.model.joined_experts import JoinedExperts

    options = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model, None, None),
    )

    model._weight_conversions = options.weight_mapping  # as if the whole model had been loaded
    experts = JoinedExperts(model, options.weight_mapping or (), options.dtype_plan)

    def load(names: Sequence[str], read: Read) -> dict[str, Any]:
        joined, rest = experts.join(names, read, device)
        info, _ = convert_and_load_state_dict_in_model(model, {name: read(name) for name in rest}, options, None)
        model._weight_conversions = options.weight_mapping
        found = info.to_dict()
        return {**found, "missing": set(info.missing_keys) - joined}

    return load


def _loader_of_4(model: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """The same for transformers 4.57, which has a module for each expert."""
    from transformers.modeling_utils import _load_state_dict_into_meta_model

    kept = [
        *(model._keep_in_fp32_modules_strict or ()),
        *(model._keep_in_fp32_modules or ()) * (dtype == torch.float16),
    ]
    float32 = re.compile("|".join(rf"((^|\.){one}($|\.))" for one in kept)) if kept else None

    def load(names: Sequence[str], read: Read) -> dict[str, Any]:
        prefix, whole = model.base_model_prefix, model.state_dict()
        bare = bool(prefix) and hasattr(model, prefix) and not any(name.startswith(prefix) for name in names)
        named = model._get_key_renaming_mapping(list(names), None, False, bare and not whole.keys() & {*names})
        found = {named[name]: read(name) for name in names}
        wrong = [(n, t.shape, whole[n].shape) for n, t in found.items() if n in whole and t.shape != whole[n].shape]
        fitting = {n: t for n, t in found.items() if n in whole and n not in {one[0] for one in wrong}}
        loaded = set(fitting)
        _load_state_dict_into_meta_model(model, fitting, "", {}, device_map={"": device}, keep_in_fp32_regex=float32)
        return {
            "missing": whole.keys() - loaded,
            "unexpected_keys": found.keys() - whole.keys(),
            "mismatched_keys": wrong,
        }

    return load


def _loader_of_torch(model: DenseModel, dtype: torch.dtype, device: torch.device) -> Any:
    """The same for a model whose tensors have the names of its parameters. Several are read at a time, since one core
    copies slower than memory allows."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    cores = torch.get_num_threads()

    def load(names: Sequence[str], read: Read) -> dict[str, Any]:
        wrong, wanted = [], sorted(shapes.keys() & names)
        with ThreadPoolExecutor(min(cores, READERS), "read") as pool:
            made = pool.map(lambda name: read(name).to(device=device, dtype=dtype), wanted)
            tensors = dict(zip(wanted, made, strict=True))
        for name, tensor in tensors.items():
            module, _, leaf = name.rpartition(".")
            if tensor.shape != shapes[name]:
                wrong.append((name, tensor.shape, shapes[name]))
                continue
            model.get_submodule(module)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        return {
            "missing": shapes.keys() - {*names},
            "unexpected_keys": {*names} - shapes.keys(),
            "mismatched_keys": wrong,
        }

    return load


def buffers_to(module: nn.Module, device: torch.device) -> None:
    """Moves a module's buffers, which are small, to the device."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = buffer.to(device)
