"""Schemes: names in recipes for a format of most layers and another one of the attention's projections.

They change with the model's names of modules, which a lower package does not know: quantize/exclude.py assigns them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from builder.formats import registry
from builder.formats.base import NumberFormat
from builder.formats.declared import MIXED


@dataclass(frozen=True)
class LayerScheme:
    """A named assignment of formats to linear layers.

    whole: the format of MLPs and experts. attention: that of the projections of queries, keys, values and the output.
    Other layers (linear attention, state spaces) stay in BF16, as in ModelOpt's configuration. source: who uses it.
    """

    name: str
    title: str
    whole: NumberFormat
    attention: NumberFormat
    source: str

    @property
    def formats(self) -> tuple[NumberFormat, ...]:
        """The quantized formats in it."""
        return tuple(one for one in (self.whole, self.attention) if one is not registry.BF16)


SCHEMES: Mapping[str, LayerScheme] = {
    one.name: one
    for one in (
        LayerScheme(
            name="nvfp4_mlp_only",
            title="NVFP4 MLP or experts, BF16 attention",
            whole=registry.NVFP4,
            attention=registry.BF16,
            source="ModelOpt, NVFP4_MLP_ONLY_CFG (0.37 to 0.47)",
        ),
        LayerScheme(
            name="nvfp4-fp8_attention",
            title="NVFP4 MLP or experts, FP8 attention",
            whole=registry.NVFP4,
            attention=registry.FP8,
            source="MIXED_PRECISION checkpoints: ModelOpt, export/quant_utils.py, process_layer_quant_config (0.37 to "
            "0.47)",
        ),
    )
}


def names() -> list[str]:
    """What a recipe can choose for the weights: formats for a whole model, then schemes."""
    return [one.name for one in registry.for_whole_model()] + list(SCHEMES)


def whole(name: str) -> NumberFormat:
    """The format of most layers for a name in recipes. KeyError for an unknown one."""
    return SCHEMES[name].whole if name in SCHEMES else registry.get(name)


def quant_algo(name: str) -> str | None:
    """What a checkpoint's configuration calls its weights for a name in recipes. KeyError for an unknown one."""
    mixed = name in SCHEMES and len(SCHEMES[name].formats) > 1
    return MIXED if mixed else whole(name).quant_algo
