"""The parts that a quantized model loses by, and what was measured of each. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PARTS = {"weights": "weights", "inputs": "inputs of layers", "cache": "KV cache"}  # {part: its name for people}
WHOLE = "everything"


def alone(part: str, layer: int | None = None) -> str:
    """The name of the measurement in which this part alone is quantized: of the model, or of one decoder layer."""
    return part if layer is None else f"{part} of layer {layer}"


def without(part: str) -> str:
    """The name of the measurement in which everything but this part is quantized."""
    return f"everything but {part}"


@dataclass(frozen=True)
class Figure:
    """A KL divergence from BF16 in nats per token, with its 95 % interval over texts."""

    kl: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.kl:.4f} ({self.low:.4f} to {self.high:.4f})"


@dataclass(frozen=True)
class Losses:
    """What was measured.

    whole: everything quantized. alone, without: {part: with this part alone, and with all others}, for each part that
    the checkpoint quantizes. layers: {decoder layer: {part: KL with this part of this layer alone}}. modules: {decoder
    layer: the first part of its modules' names}.
    """

    whole: Figure
    alone: Mapping[str, Figure]
    without: Mapping[str, Figure]
    layers: Mapping[int, Mapping[str, float]]
    modules: Mapping[int, str]
    tokens: int
    path: Path = Path()

    @property
    def by_loss(self) -> Iterator[tuple[int, float]]:
        """(layer, the sum of its parts' KLs), largest first."""
        sums = {layer: sum(parts.values()) for layer, parts in self.layers.items()}
        yield from sorted(sums.items(), key=lambda one: -one[1])
