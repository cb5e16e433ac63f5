"""The ranges that max calibration reads while a decoder layer runs: of the inputs of its linear layers, and of keys and
values. They equal ModelOpt's, without ModelOpt.

ModelOpt 0.47 gives the experts that transformers 5 joins one range for the inputs of all, and experts that are modules
the widest of their layer; 0.37, with transformers 4.57, sends all tokens to all experts of the families that it knows
(quantization/plugins/huggingface.py: _QuantFusedExperts, _QuantSparseSequentialMoe, _QuantMoeSparseMoe). Keys and
values are those that the attention function gets, so keys are rotated (_QuantAttention). Imports torch.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from builder.calibration.coverage import rare
from builder.model.streamed import StreamedModel
from builder.quantize import calibrated, expert_inputs
from builder.quantize.algorithms.moments import Moments
from builder.quantize.experts import RoutedTokens, counted
from builder.quantize.ranges import Ranges

# Blocks whose experts all see all tokens during a calibration with ModelOpt 0.37, with transformers 4.
SEE_ALL = (
    "Llama4TextMoe",
    "MixtralSparseMoeBlock",
    "Qwen2MoeSparseMoeBlock",
    "Qwen3MoeSparseMoeBlock",
    "Qwen3NextSparseMoeBlock",
)


class Seen:
    """The largest magnitudes so far, as tensors: `inputs` of {linear layer, or joined experts' projection}, and `keys`
    and `values` of {attention}.

    moments: gathers the second moments of inputs too. everywhere: whether all tokens are being sent to all experts, for
    ranges alone. Batches may run in several threads, but not with moments.
    """

    def __init__(self, moments: Moments | None = None) -> None:
        self.moments, self.everywhere = moments, False
        self.inputs: dict[str, Tensor] = {}
        self.keys: dict[str, Tensor] = {}
        self.values: dict[str, Tensor] = {}
        self._lock, self._of_thread = threading.Lock(), threading.local()

    def add(self, found: MutableMapping[str, Tensor], name: str, values: Tensor) -> None:
        """Widens the range of `name` to these values."""
        if not values.numel():
            return
        last: tuple[Tensor, Tensor] | None = getattr(self._of_thread, "last", None)
        if last is None or last[0] is not values:  # q, k and v get the same tensor, and so do gate and up
            low, high = torch.aminmax(values)
            last = self._of_thread.last = values, torch.maximum(-low, high).float()
        largest = last[1]
        with self._lock:
            found[name] = torch.maximum(found[name], largest) if name in found else largest

    def add_input(self, name: str, values: Tensor, expert: int | None = None) -> None:
        """Adds the input of a linear layer, or of a projection of joined experts for one of them."""
        self.add(self.inputs, name, values)
        if self.moments is not None and not self.everywhere:
            self.moments.add(name if expert is None else expert_inputs.expert_place(name, expert), values)

    def numbers(self) -> dict[str, dict[str, float]]:
        """The same as JSON values: {"inputs", "keys", "values"}."""
        self._of_thread = threading.local()
        found = {"inputs": self.inputs, "keys": self.keys, "values": self.values}
        return {kind: {name: float(one) for name, one in ranges.items()} for kind, ranges in found.items()}


@contextmanager
def observed(layer: nn.Module, prefix: str, seen: Seen) -> Iterator[RoutedTokens]:
    """Records, while the block runs, the ranges of a decoder layer, whose modules' names begin with `prefix`; also
    counts the tokens of each expert."""
    with ExitStack() as stack:
        routed = stack.enter_context(counted(layer))
        attentions: dict[nn.Module, str] = {}
        for name, module in layer.named_modules(prefix=prefix):
            if isinstance(module, nn.Linear):
                hook = _input_hook(seen, name)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            elif expert_inputs.is_joined(module):
                _replace_forward(stack, module, _joined(seen, name, module))
            elif _is_attention(module):
                attentions[module] = name
            elif type(module).__name__ in SEE_ALL and isinstance(getattr(module, "experts", None), nn.ModuleList):
                _replace_forward(stack, module, _with_all_experts(seen, module))
        _observe_attention(stack, seen, attentions)
        yield routed


@contextmanager
def observed_outside(model: StreamedModel, seen: Seen) -> Iterator[None]:
    """Records, while the block runs, the ranges of linear layers that run before the decoder layers."""
    with ExitStack() as stack:
        for name, module in model.model.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith(f"{model.path}."):
                stack.callback(module.register_forward_pre_hook(_input_hook(seen, name), with_kwargs=True).remove)
        yield


def _replace_forward(stack: ExitStack, module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = forward
    stack.callback(module.__dict__.pop, "forward")


def _input_hook(seen: Seen, name: str) -> Callable[..., None]:
    def hook(_: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        seen.add_input(name, args[0] if args else named["input"])

    return hook


def _joined(seen: Seen, name: str, module: nn.Module) -> Callable[..., Any]:
    """The forward of joined experts that records the inputs of each."""

    def each(leaf: str, expert: int, values: Tensor) -> Tensor:
        seen.add_input(f"{name}.{leaf}", values, expert)
        return values

    return expert_inputs.replaced(module, each)


def _is_attention(module: nn.Module) -> bool:
    """Whether ModelOpt gives this module quantizers of the KV cache (register_hf_attentions_on_the_fly)."""
    inner = [one for one in module.modules() if type(one).__name__.endswith("Attention")]
    return inner == [module] and hasattr(inspect.getmodule(type(module)), "ALL_ATTENTION_FUNCTIONS")


def _observe_attention(stack: ExitStack, seen: Seen, observed: Mapping[nn.Module, str]) -> None:
    """Records the keys and values which attention functions get from these modules, {module: name}."""
    for code, kind in dict.fromkeys(map(_function_of, observed)):
        real = code.eager_attention_forward if kind == "eager" else code.ALL_ATTENTION_FUNCTIONS[kind]
        _set_attention(code, kind, _recording(seen, observed, real))
        stack.callback(_set_attention, code, kind, real)


def _function_of(module: nn.Module) -> tuple[Any, str]:
    """Where an attention module looks its function up, and under which name."""
    return inspect.getmodule(type(module)), getattr(module.config, "_attn_implementation", None) or "eager"


def _recording(seen: Seen, observed: Mapping[nn.Module, str], real: Callable[..., Any]) -> Callable[..., Any]:
    def function(self: Any, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        if self in observed:
            seen.add(seen.keys, observed[self], key)
            seen.add(seen.values, observed[self], value)
        return real(self, query, key, value, *rest, **options)

    return function


def _set_attention(code: Any, kind: str, function: Callable[..., Any]) -> None:
    if kind == "eager":
        code.eager_attention_forward = function
    else:
        code.ALL_ATTENTION_FUNCTIONS[kind] = function


def _with_all_experts(seen: Seen, block: Any) -> Callable[..., Any]:
    """The forward of a mixture that first sends all tokens to all experts, for their ranges alone."""
    original = block.forward

    def forward(hidden_states: Tensor) -> Any:
        chosen, block.top_k, seen.everywhere = block.top_k, block.num_experts, True
        try:
            original(hidden_states)
        finally:
            block.top_k, seen.everywhere = chosen, False
        return original(hidden_states)

    return forward


def widen(inputs: dict[str, float], routed: RoutedTokens, *, all_alike: bool) -> dict[str, list[int]]:
    """Gives experts that are modules and saw few tokens the widest range of their layer, projection by projection
    (quantize/experts.py). all_alike: gives it to all of them. Returns {module of the experts: numbers of those with few
    tokens}."""
    few = {} if routed.see_all else {place: rare(tokens) for place, tokens in routed.layers.items() if rare(tokens)}
    for place in routed.layers if all_alike else few:
        apart = re.compile(rf"{re.escape(place)}\.\d+\.(.+)")
        found = {name: match[1] for name in inputs if (match := apart.fullmatch(name))}
        widest: dict[str, float] = {}
        for name, projection in found.items():
            widest[projection] = max(widest.get(projection, 0.0), inputs[name])
        chosen = range(len(routed.layers[place])) if all_alike else few[place]
        inputs.update(
            {f"{place}.{index}.{projection}": widest[projection] for index in chosen for projection in widest}
        )
    return few


def by_checkpoint_names(numbers: Mapping[str, Mapping[str, float]], model: Any, tensors: Iterable[str]) -> Ranges:
    """What `Seen.numbers` has for the model's modules, by the names of the checkpoint's tensors, in which experts are
    apart."""
    inputs, keys, values = (numbers[kind] for kind in ("inputs", "keys", "values"))
    return calibrated.by_checkpoint_names(
        model,
        tensors,
        lambda place: inputs.get(place, inputs.get(_of_joined(place, inputs))),
        lambda attention: (keys[attention], values[attention]) if attention in keys else None,
    )


def _of_joined(place: str, inputs: Mapping[str, float]) -> str:
    """The name under which joined experts' inputs are recorded for one expert's projection; "" for other layers."""
    found = calibrated.EXPERT.fullmatch(place)
    if found is None:
        return ""
    names = ("down_proj",) if found["projection"] == "down_proj" else ("gate_up_proj", "up_proj")
    return next((f"{found['experts']}.{name}" for name in names if f"{found['experts']}.{name}" in inputs), "")
