"""What a backend finds on calibration rows: the largest magnitudes of inputs and of keys and values. Pure.

Every backend gives them under the names that the checkpoint has, and quantize/writer.py makes the stored scales of
them. Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder.architectures.facts import Architecture
from builder.core.atomic import replace_file
from builder.formats.base import NumberFormat
from builder.formats.kv_cache import KvCacheFormat
from builder.quantize import stored_scales


@dataclass(frozen=True)
class Ranges:
    """inputs: {linear layer: largest magnitude of its inputs}. cache: {attention: those of its keys, after RoPE, and of
    its values}.

    Modules have the names of the checkpoint's tensors: experts are apart (`...experts.3.up_proj`), whatever module held
    them. A layer that no token reached is absent. Projections that are served as one layer may have ranges of their
    own; their scales are made of the widest.
    """

    inputs: Mapping[str, float] = field(default_factory=dict)
    cache: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def scales(
        self, layers: Mapping[str, NumberFormat], cache: KvCacheFormat, architecture: Architecture
    ) -> dict[str, float]:
        """{tensor of the unified layout: scale} for {linear layer: its format} and the format of the KV cache.

        IntegrityError for a layer that needs a range and has none, or one that is zero, NaN or Inf.
        """
        return {
            **stored_scales.of_inputs(layers, self.inputs, architecture),
            **stored_scales.of_cache(cache, self.cache),
        }

    def as_json(self) -> dict[str, Any]:
        """The same as JSON values. Floats survive `json.dumps` and `json.loads` bit by bit, since Python writes the
        shortest number that reads back as the same float."""
        return {"inputs": dict(self.inputs), "cache": {name: list(both) for name, both in self.cache.items()}}

    @classmethod
    def of_json(cls, content: Mapping[str, Any]) -> Ranges:
        """The inverse of `as_json`. KeyError, TypeError or ValueError for something else."""
        cache = {str(name): (float(keys), float(values)) for name, (keys, values) in content["cache"].items()}
        return cls({str(name): float(amax) for name, amax in content["inputs"].items()}, cache)

    def save(self, path: Path) -> None:
        """Writes them to a JSON file, atomically."""
        replace_file(path, json.dumps(self.as_json()))

    @classmethod
    def load(cls, path: Path) -> Ranges:
        """Reads a file that `save` wrote. OSError or ValueError if that fails."""
        return cls.of_json(json.loads(path.read_text(encoding="utf-8")))
