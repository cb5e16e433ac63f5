"""Whether adapters fit a model and the engine path: layers, shapes, ranks. Pure but for the adapters' headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from builder.core.errors import UnsupportedError, UsageError
from builder.core.output import size
from builder.core.safe_text import quoted
from builder.formats.base import NumberFormat
from builder.lora.adapter import MERGE, Adapter
from builder.lora.modules import sizes
from builder.lora.tensors import check_size, nbytes


def check_fits(adapters: Sequence[Adapter], config: Mapping[str, Any]) -> None:
    """UsageError for an adapter of another model, by this one's config.json."""
    layers, known = int(config["num_hidden_layers"]), sizes(config)
    for adapter in adapters:
        for (layer, kind), pair in adapter.pairs.items():
            inputs, outputs = known[kind]
            found = (adapter.tensors[pair.a].shape[1], adapter.tensors[pair.b].shape[0])
            if layer >= layers:
                raise _other_model(adapter, f"It changes layer {layer}, and the model's last one is {layers - 1}.")
            if found != (inputs, outputs):
                why = f"{kind} of layer {layer} has {inputs} inputs and {outputs} outputs, in the adapter "
                raise _other_model(adapter, f"{why}{found[0]} and {found[1]}.")


def _other_model(adapter: Adapter, why: str) -> UsageError:
    trained = f" It was trained on {quoted(adapter.base)}." if adapter.base else ""
    return UsageError(
        f"The adapter {adapter.name} does not fit this model.",
        why=why + trained,
        hint="Name an adapter of this model, or the model of this adapter (--model).",
    )


def check_engine(adapters: Sequence[Adapter], config: Mapping[str, Any]) -> None:
    """UnsupportedError for an adapter that is too large for a request, or that the C++ backend would read wrongly.

    It takes attention's output projection for a layer from hidden_size to hidden_size
    (tensorrt_llm/runtime/loraModule.cpp@2a9abd95, createLoraModules: kATTN_DENSE).
    """
    inputs, hidden = sizes(config)["o_proj"]
    for adapter in adapters:
        check_size(adapter)
        if "o_proj" in adapter.modules and inputs != hidden:
            raise UnsupportedError(
                f"The adapter {adapter.name} changes o_proj, which has {inputs} inputs in this model, and TensorRT-LLM "
                f"can change o_proj only where it has as many as hidden_size, {hidden}.",
                why="cpp/tensorrt_llm/runtime/loraModule.cpp@2a9abd95, createLoraModules.",
                hint=f"Train it without o_proj, or use --target llmapi. Or: {MERGE}",
            )


class Changing(Protocol):
    """An adapter: its name, and the kinds of layers that it changes."""

    @property
    def name(self) -> str: ...
    @property
    def modules(self) -> Sequence[str]: ...


def check_inputs(adapters: Sequence[Changing], formats: Sequence[NumberFormat], *, rotated: bool) -> None:
    """UnsupportedError where the layers get other inputs than those that an adapter was trained with: it would be
    applied to them, and the answers would be wrong without an error."""
    folded = {f"{role}_proj": one.title for one in formats for tensor in one.tensors for role in tensor.folded}
    for adapter in adapters:
        if rotated:
            raise UnsupportedError(
                f"The adapter {adapter.name} can't be served with rotated weights.",
                why="The rotations change the inputs of the layers, which its matrices were trained on.",
                hint="--set transform.name=none, or merge the adapter into the model first.",
            )
        if wrong := [kind for kind in adapter.modules if kind in folded]:
            raise UnsupportedError(
                f"The adapter {adapter.name} changes {', '.join(wrong)}, whose inputs are scaled with "
                f"{folded[wrong[0]]}.",
                why="The scales are folded into the norm before these layers, so the adapter's matrices would get "
                "scaled inputs.",
                hint="--format fp8, or merge the adapter into the model first.",
            )


def notes(adapters: Sequence[Adapter], model_id: str) -> list[str]:
    """What the adapters say of themselves that a user should know: another base model than the recipe's."""
    found = []
    for adapter in adapters:
        one, other = (name.rstrip("/").rsplit("/", 1)[-1].lower() for name in (adapter.base, model_id))
        if one and one != other:
            found.append(
                f"The adapter {adapter.name} says that it was trained on {quoted(adapter.base)}, and the model is "
                f"{model_id}. Its shapes fit; whether it is the same model can't be told from them."
            )
    return found


def sizes_note(adapters: Sequence[Adapter]) -> list[str]:
    """What the adapters are and what they take."""
    if not adapters:
        return []
    each = [f"{one.name} (rank {one.rank}, {', '.join(one.modules)}, {size(nbytes(one))})" for one in adapters]
    return [f"Adapters, each a model of the gateway's clients: {'; '.join(each)}."]
