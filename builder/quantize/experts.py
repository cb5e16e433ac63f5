"""The experts of a mixture during calibration: the tokens that were routed to each, and the ranges of those with few.

transformers 5 keeps a layer's experts in one module, which is called with the experts chosen for each token. ModelOpt
0.47 gives it one quantizer for the inputs of all (quantization/plugins/huggingface.py, _QuantFusedExperts). 4.57 has a
module for each expert, called with its tokens. ModelOpt 0.37 gives each its own quantizers and, in families that it
knows, sends all tokens to all experts first (_QuantMoeSparseMoe). Imports torch only inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from builder.calibration.coverage import rare


@dataclass
class RoutedTokens:
    """{module that holds a layer's experts: tokens routed to each expert}, counted while the model runs.

    see_all: whether the experts' quantizers saw all tokens, whatever the routing.
    """

    layers: dict[str, list[int]] = field(default_factory=dict)
    see_all: bool = False

    def facts(self) -> dict[str, Any]:
        """For the manifest; {} for a model without experts."""
        return {"experts": self.layers, "experts_see_all": self.see_all} if self.layers else {}


@contextmanager
def counted(model: Any) -> Iterator[RoutedTokens]:
    """Counts, while the block runs, the tokens that the model's routers send to each expert.

    Experts whose module gets all tokens and no choice (Llama 4) are not counted.
    """
    from torch import nn

    counts = RoutedTokens()
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            experts: Any = getattr(module, "experts", None)
            place = f"{name}.experts" if name else "experts"
            if isinstance(experts, nn.ModuleList):
                counts.layers[place] = [0] * len(experts)
                add = _adds_rows(counts, place, module, len(experts))
                for index, expert in enumerate(experts):
                    hooks.callback(expert.register_forward_pre_hook(add(index), with_kwargs=True).remove)
            elif isinstance(getattr(experts, "num_experts", None), int):
                hook = _adds_choices(counts, place, experts.num_experts)
                hooks.callback(experts.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield counts


def _adds_rows(counts: RoutedTokens, place: str, block: Any, experts: int) -> Callable[[int], Callable[..., None]]:
    """Hooks for experts that are called with their tokens. While ModelOpt 0.37 sends all tokens to all experts of the
    block, which sets its top_k to the number of experts, nothing is counted."""
    routed = getattr(block, "top_k", None)

    def hook_of(index: int) -> Callable[..., None]:
        def hook(_: Any, args: Sequence[Any], named: Mapping[str, Any]) -> None:
            if getattr(block, "top_k", None) != routed:
                counts.see_all = True
                return
            tokens = args[0] if args else next(iter(named.values()))
            counts.layers[place][index] += tokens.numel() // tokens.shape[-1]

        return hook

    return hook_of


def _adds_choices(counts: RoutedTokens, place: str, experts: int) -> Callable[..., None]:
    """A hook for a module of all experts, called with the numbers of those chosen for each token."""
    import torch

    def hook(_: Any, args: Sequence[Any], named: Mapping[str, Any]) -> None:
        tensors = [one for one in (*args, *named.values()) if isinstance(one, torch.Tensor)]
        chosen = next((one for one in tensors if not one.is_floating_point() and one.dtype != torch.bool), None)
        if chosen is None:
            return
        # An index past the last one marks a token that is sent nowhere (expert parallelism in transformers 5).
        found = torch.bincount(chosen.reshape(-1), minlength=experts)[:experts].tolist()
        before = counts.layers.setdefault(place, [0] * experts)
        counts.layers[place] = [one + other for one, other in zip(before, found, strict=True)]

    return hook


def widen_ranges(model: Any, counts: RoutedTokens) -> dict[str, list[int]]:
    """Gives experts that saw few tokens (coverage.EXPERT_TOKENS) the widest input range of their layer, projection by
    projection. Returns {module: numbers of the experts}.

    TensorRT-LLM takes the largest scale of a layer's experts for all of them (tensorrt_llm/_torch/modules/fused_moe/
    quantization.py, load_activation_scales_*), so this loses nothing there. An expert without any token gets the same
    from ModelOpt's exporters (export/layer_utils.py, set_expert_quantizer_amax). Where one quantizer serves all
    experts, it holds the widest range already. Weights' scales do not depend on data.
    """
    from torch import nn

    few = {place: rare(tokens) for place, tokens in counts.layers.items() if rare(tokens)}
    if counts.see_all:
        return {}
    modules = dict(model.named_modules())
    for place, indices in few.items():
        if isinstance(modules[place], nn.ModuleList):
            _widen(modules[place], indices)
    return few


def _widen(experts: Any, indices: Sequence[int]) -> None:
    """Sets the input ranges of these experts to the largest of all in the list, for each of their linear layers."""
    import torch

    inputs = [
        {name: one for name, one in expert.named_modules() if name.endswith("input_quantizer") and one.is_enabled}
        for expert in experts
    ]
    for name in dict.fromkeys(name for one in inputs for name in one):  # single experts may be left in BF16
        known = [one[name].amax.float() for one in inputs if name in one and one[name].amax is not None]
        if not known:
            continue
        widest = torch.stack(known).amax(0)
        for quantizer in [inputs[index][name] for index in indices if name in inputs[index]]:
            if hasattr(quantizer, "_amax"):
                del quantizer._amax  # its setter would keep the shape of a range that may be absent
            quantizer.amax = widest.clone()
