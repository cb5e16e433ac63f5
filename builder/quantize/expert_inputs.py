"""Where linear layers of a checkpoint get their inputs in a model of transformers, those of joined experts too.

transformers 5 has one module for all experts of a layer (its implementation `eager`), which calls F.linear twice for
each expert: with the tokens of the expert, then with what goes into its down projection. Imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from builder.quantize import calibrated

_EXPERT = re.compile(r"(?P<experts>.+?\bexperts)(?:\.\d+)?\.(?P<projection>\w+)")
_NUMBER = re.compile(r"\bexperts\.(\d+)\.")

Each = Callable[[str, int, Tensor], Tensor]  # of the parameter's name, the expert's number, and the input


def is_joined(module: nn.Module) -> bool:
    """Whether a module holds all experts of a layer in three-dimensional parameters, as ModelOpt looks for it."""
    sizes = {name: parameter.dim() for name, parameter in module.named_parameters(recurse=False)}
    return hasattr(module, "num_experts") and sizes.get("down_proj") == 3 and bool(first_of(module))


def first_of(module: nn.Module) -> str:
    """The parameter of joined experts that is multiplied first; "" if there is none."""
    return next((name for name in ("gate_up_proj", "up_proj") if getattr(module, name, None) is not None), "")


def one_by_one(config: Any) -> None:
    """Makes a model compute joined experts one by one: other ways hide their inputs. config: the model's."""
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = "eager"


def replaced(module: nn.Module, each: Each) -> Callable[..., Any]:
    """A forward for a module of joined experts, in which each multiplication takes what `each` makes of its input."""
    functional: Any = nn.functional
    original, first = module.forward, first_of(module)

    def forward(*args: Any, **named: Any) -> Any:
        calls, real = 0, functional.linear

        def linear(values: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            nonlocal calls
            leaf = first if calls % 2 == 0 else "down_proj"
            values = each(leaf, _number(getattr(module, leaf), weight), values)
            calls += 1
            made: Tensor = real(values, weight, bias)
            return made

        functional.linear = linear
        try:
            return original(*args, **named)
        finally:
            functional.linear = real

    return forward


def _number(joined: Tensor, weight: Tensor) -> int:
    """Which of the joined matrices a weight is, a view of one."""
    return (weight.storage_offset() - joined.storage_offset()) // joined.stride(0)


def expert_place(projection: str, expert: int) -> str:
    """The name of one expert's part of a projection of joined experts."""
    return f"{projection}#{expert}"


def places(model: Any) -> Callable[[str], str]:
    """A function from a linear layer of the checkpoint to the place where its input is seen: a module or, of joined
    experts, `expert_place` of the parameter."""
    module_of, modules = calibrated.renamed(model), dict(model.named_modules())

    def place_of(module: str) -> str:
        place = module_of(f"{module}.weight")
        found, number = _EXPERT.fullmatch(place), _NUMBER.search(f"{module}.")
        if place in modules or found is None or number is None or found["experts"] not in modules:
            return place
        last = found["projection"] == "down_proj"
        leaf = "down_proj" if last else first_of(modules[found["experts"]])
        return expert_place(f"{found['experts']}.{leaf}", int(number[1]))

    return place_of
