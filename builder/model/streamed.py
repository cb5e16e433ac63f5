"""A causal language model of transformers that computes with one decoder layer in memory at a time.

The modules are transformers' own, built without weights, and weights are those of the files, so results equal those of
a model that was loaded whole, bit for bit. What a decoder layer is called with beside the hidden states
(positions, masks) is recorded from one run of the model whose layers do nothing. Imports torch; transformers inside
functions.

    model = streamed.open_model(job)
    with torch.inference_mode():
        with model.prelude() as begin:
            states = [begin(ids) for ids in batches]
        for index in range(model.depth):
            with model.layer(index):
                for state in states:
                    state.hidden = model.advance(index, state, state.hidden)
        with model.head() as logits_of:
            logits = [logits_of(state, logits_to_keep=1) for state in states]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from builder.architectures import catalog
from builder.architectures.attention import shared_kv_layers
from builder.architectures.names import is_head, layer_of
from builder.architectures.written import is_loaded
from builder.core.errors import UnsupportedError
from builder.model import dense, dtypes, loading, tensor_names
from builder.model.files import CONFIG, GENERATION, parse_config
from builder.model.hashed_files import SourceFiles
from builder.model.imports import only_needed
from builder.model.source_tensors import open_tensors
from builder.model.streamed_weights import Source, StoredSource, Weights, buffers_to

WHOLE = "Compute with the whole model in memory instead: --memory whole"


@dataclass(frozen=True)
class Call:
    """How one decoder layer is called beside the hidden states: further positional and named arguments."""

    args: tuple[Any, ...]
    named: Mapping[str, Any]


@dataclass
class State:
    """A batch on its way through the model. hidden: [rows, tokens, hidden size] after the layers so far; ids: the token
    ids; calls: one for each decoder layer."""

    ids: Tensor
    hidden: Tensor
    calls: Sequence[Call] = field(repr=False)


class StreamedModel:
    """A model without weights, which it reads from `source` layer by layer.

    model: transformers' causal language model with parameters on the meta device. UnsupportedError if its layers are
    not a plain list that hands on nothing but hidden states.
    """

    def __init__(self, model: Any, source: Source, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.device = model.eval(), device
        self.config = model.config
        self.path, self.layers = _decoder_layers(model)
        self.depth = len(self.layers)
        self._weights = Weights(model, source, dtype, device)
        self._sources = _by_layer(model.config.to_dict(), source)
        self._known: dict[tuple[int, ...], Sequence[Call]] = {}
        self._in_tuple: bool | None = None  # whether layers return a tuple, once it is known
        buffers_to(model, device)

    @contextmanager
    def prelude(self) -> Iterator[Callable[[Tensor], State]]:
        """While the block runs, the function that makes the state of a batch of token ids, [rows, tokens]: what the
        model computes before its first layer."""
        self._known.clear()
        with self._base(head=False):
            yield self._begin

    def nbytes(self, index: int) -> int:
        """The size of a decoder layer's parameters in bytes."""
        return sum(parameter.nbytes for parameter in self.layers[index].parameters())

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """The decoder layer with its weights; the next one's are read ahead."""
        with self._weights.loaded(self._sources.get(index, ()), [f"{self.path}.{index}."]):
            self._weights.prefetch(self._sources.get(index + 1, ()))
            yield self.layers[index]

    def advance(self, index: int, state: State, hidden: Tensor) -> Tensor:
        """The hidden states after a decoder layer, which has its weights (`layer`). hidden: those before it."""
        call = state.calls[index]
        found = self.layers[index](hidden, *call.args, **call.named)
        made: Tensor = found[0] if isinstance(found, tuple) else found
        _forget_shared(self.model, call)
        return made

    @contextmanager
    def head(self) -> Iterator[Callable[..., Tensor]]:
        """While the block runs, a function of a state and of options of the model's forward (`logits_to_keep`), which
        returns logits."""
        with self._base(head=True):
            yield self._finish

    @contextmanager
    def _base(self, *, head: bool) -> Iterator[None]:
        """Loads what lies outside of the decoder layers: before the first one or, with `head`, what logits need."""
        architecture, outside = catalog.of(self.config.to_dict()), self._sources.get(None, [])
        parts = [name for name, _ in self.model.named_parameters() if not name.startswith(f"{self.path}.")]
        apart = {} if head and self.config.tie_word_embeddings else self._embedding
        if not head:
            outside = [name for name in outside if not is_head(architecture, name.rpartition(".")[0])]
            parts = [name for name in parts if name.startswith(f"{self._body}.")]
        sources = [name for name in outside if name not in apart]
        parts = [name for name in parts if name not in apart.values()]
        with self._weights.loaded(sources, parts), ExitStack() as stack:
            self.model.tie_weights()
            for name in () if head else apart:
                stack.enter_context(self._weights.by_rows(self.model.get_input_embeddings(), name))
            yield

    @property
    def _body(self) -> str:
        """The module of embedding and layers."""
        return self.path.rpartition(".")[0]

    @cached_property
    def _embedding(self) -> dict[str, str]:
        """{tensor in the files: parameter} of the embedding; {} where it is a part of something else."""
        embedding, stored = self.model.get_input_embeddings(), tensor_names.embedding(self.config.to_dict())
        names = [name for name, one in self.model.named_modules() if one is embedding and name.startswith(self._body)]
        plain = isinstance(embedding, nn.Embedding) and len(names) == 1 and stored in self._sources.get(None, [])
        return {stored: f"{names[0]}.weight"} if plain else {}

    def _begin(self, ids: Tensor) -> State:
        recorded: list[tuple[Tensor, Call]] = []
        ids = ids.to(self.device)
        with self._replaced(lambda index: _recorder(recorded, index)):
            self._run_base(ids, recorded)
        calls = [call for _, call in recorded]
        shape, known = tuple(ids.shape), self._known.get(tuple(ids.shape))
        if known is None or not _same(known, calls):
            self._known[shape] = known = calls
        return State(ids, recorded[0][0], known)

    def _run_base(self, ids: Tensor, recorded: list[tuple[Tensor, Call]]) -> None:
        """Runs the model with layers that hand on what they get: a tensor or, where the model unpacks it, a tuple."""
        for in_tuple in (False, True) if self._in_tuple is None else (self._in_tuple,):
            recorded.clear()
            self._in_tuple = in_tuple
            try:
                self.model.get_submodule(self._body)(ids, use_cache=False)
            except (TypeError, IndexError, ValueError, RuntimeError):
                if in_tuple or not recorded:
                    raise
                continue
            if len(recorded) == self.depth and all(hidden is recorded[0][0] for hidden, _ in recorded):
                return
        raise _not_layered(self.model, "Its decoder layers do not just hand their hidden states on to the next one.")

    @contextmanager
    def _replaced(self, made: Callable[[int], Callable[..., Tensor]]) -> Iterator[None]:
        """Calls functions instead of the decoder layers."""
        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                function = made(index)

                def forward(*args: Any, function: Callable[..., Tensor] = function, **named: Any) -> Any:
                    hidden = function(*args, **named)
                    return (hidden,) if self._in_tuple else hidden

                layer.forward = forward
                stack.callback(layer.__dict__.pop, "forward")
            yield

    def _finish(self, state: State, **options: Any) -> Tensor:
        def last(index: int) -> Callable[..., Tensor]:
            return lambda hidden, *_, **__: state.hidden if index == self.depth - 1 else hidden

        with self._replaced(last), self._without_embedding(state):
            logits: Tensor = self.model(state.ids, use_cache=False, **options).logits
        return logits

    @contextmanager
    def _without_embedding(self, state: State) -> Iterator[None]:
        """The embedding, whose result is not used, gives zeros."""
        embedding = self.model.get_input_embeddings()
        zeros = state.hidden.new_zeros(*state.ids.shape, embedding.weight.shape[-1])
        embedding.forward = lambda *_, **__: zeros
        try:
            yield
        finally:
            del embedding.forward


def open_model(
    job: Mapping[str, Any], device: torch.device | None = None, dtype: torch.dtype | None = None, **options: Any
) -> StreamedModel:
    """The source model of a job (`model`, `source`, `trust_remote_code`).

    device: where to compute; the CPU if None. dtype: the 16-bit one that the model is served in if None. options:
    passed on to `build`. IntegrityError if a file changed since it was hashed; UnsupportedError if transformers can't
    read the model, or if it can't be streamed.
    """
    return _opened(job, device, dtype, tokens=None, **options)


def open_decoder(job: Mapping[str, Any], device: torch.device | None, tokens: int) -> StreamedModel:
    """The same for rows of at most `tokens` tokens and without logits: torch alone computes a plain decoder
    (model/dense.py), with the same results."""
    return _opened(job, device, None, tokens=tokens)


def _opened(
    job: Mapping[str, Any],
    device: torch.device | None,
    dtype: torch.dtype | None,
    tokens: int | None,
    **options: Any,
) -> StreamedModel:
    files = SourceFiles.of_job(job)
    files.check_unchanged()
    stored = open_tensors(files.root)
    config = parse_config((files.root / CONFIG).read_bytes(), str(files.root))
    headers = {name: (info.dtype, info.shape) for name, info in stored.items()}
    dtype = dtype or getattr(torch, dtypes.served(dtypes.with_type(config, headers)))
    model: Any
    if tokens is not None and dense.computes(config, tokens):
        model = dense.DenseModel(config, dtype)
    else:
        with files.linked(without=[CONFIG, GENERATION]) as directory:
            loading.write_config(files.root, directory, config)
            model = build(directory, dtype, trust_remote_code=job["trust_remote_code"], **options)
    loading.check_tied(config, files.root)
    model.name_or_path = model.config._name_or_path = str(files.root)
    return StreamedModel(model, StoredSource(stored), dtype, device or torch.device("cpu"))


def build(directory: Path, dtype: torch.dtype, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """transformers' causal language model for a directory's config.json, without weights. options: of transformers'
    configuration, such as attn_implementation."""
    with only_needed():
        from transformers import AutoConfig, AutoModelForCausalLM

    with loading.refused(directory), without_weights():
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=trust_remote_code)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code, **options)


@contextmanager
def without_weights() -> Iterator[None]:
    """Models of transformers that are built in the block have parameters on the meta device, and computed buffers."""
    with only_needed():
        from accelerate import init_empty_weights
        from transformers import modeling_utils
        from transformers.utils import logging

    logging.disable_progress_bar()
    # 4.57 would initialize some parameters in a way that fails on the meta device.
    initialize_none = getattr(modeling_utils, "no_init_weights", nullcontext)
    with initialize_none(), init_empty_weights(include_buffers=False):
        yield


def _decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name. UnsupportedError if there is none."""
    depth = model.config.num_hidden_layers
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth}
    if not lists:
        raise _not_layered(model, f"It has no list of its {depth} decoder layers.")
    config = {**model.config.to_dict(), "num_hidden_layers": depth}
    if shared := shared_kv_layers(config):
        raise _not_layered(model, f"Its last {len(shared)} layers use keys of earlier ones.")
    name = min(lists, key=lambda one: one.count("."))
    return name, lists[name]


def _by_layer(config: Mapping[str, Any], source: Source) -> dict[int | None, list[str]]:
    """{decoder layer: its tensors in the files}; None: those outside of the layers."""
    architecture, found = catalog.of(config), dict[int | None, list[str]]()
    for name in source:
        if is_loaded(architecture, config, name) and not dtypes.NOT_WRITTEN.search(name):
            found.setdefault(layer_of(architecture, name), []).append(name)
    return found


def _recorder(recorded: list[tuple[Tensor, Call]], index: int) -> Callable[..., Tensor]:
    """A function to call instead of a layer: notes its arguments, and returns the hidden states that it gets."""

    def record(*args: Any, **named: Any) -> Tensor:
        hidden: Tensor
        hidden, *rest = args if args else (named.pop("hidden_states"),)
        recorded.append((hidden, Call(tuple(rest), named)))
        return hidden

    return record


def _same(one: Any, other: Any) -> bool:
    """Whether two recorded values are equal, tensors bit for bit."""
    if one is other:
        return True
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, Call) and isinstance(other, Call):
        return _same(one.args, other.args) and _same(dict(one.named), dict(other.named))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple) and type(one) is type(other):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)


def _forget_shared(model: Any, call: Call) -> None:
    """UnsupportedError if a layer wrote to something that it shares with others.

    Gemma 4 keeps the keys and values of its last layers in a dictionary, whether or not there are layers that read them
    (modeling_gemma4.py, store_full_length_kv, 5.14); where there are none it is emptied.
    """
    for name, value in call.named.items():
        if isinstance(value, MutableMapping | list) and value:
            if getattr(model.config, "num_kv_shared_layers", None) != 0:
                raise _not_layered(model, f"Its decoder layers share more than hidden states ({name}).")
            value.clear()


def _not_layered(model: Any, why: str) -> UnsupportedError:
    return UnsupportedError(f"{type(model).__name__} can't be computed layer by layer.", why=why, hint=WHOLE)
