"""Whether a quantized checkpoint was made from a model, as far as sizes and tokens tell. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.checkpoint import quantized_source
from builder.checkpoint.description import Description
from builder.core.errors import UsageError
from builder.core.output import listed
from builder.core.untrusted_text import parse_json, read_regular
from builder.hub.snapshot import Source


def check_same_model(found: Description, base: Source, place: str, directory: Path) -> None:
    """UsageError if the checkpoint was made from another model: sizes, shapes of tensors, vocabulary."""
    differ = quantized_source.different_sizes(found.config, base.config)
    if not differ and found.layout != "tensorrt_llm":
        tensors = quantized_source.unquantized(found, place)
        differ = [
            f"{name} is {list(shape)}, not {list(base.tensors[name][1])}"
            for name, (_, shape) in tensors.items()
            if name in base.tensors and tuple(shape) != tuple(base.tensors[name][1])
        ]
    if not differ and not _same_vocabulary(directory, base.directory):
        differ = ["tokenizer.json has other tokens"]
    if differ:
        raise UsageError(
            f"{place} was not made from {base.model.id}.",
            why=f"In the checkpoint, {listed(differ)}. Two models are compared on the same tokens.",
            hint="Give checkpoints of the model that --model names.",
        )


def _same_vocabulary(one: Path, other: Path) -> bool:
    """Whether both directories have the same tokens, as far as both have a tokenizer.json."""
    files = [directory / "tokenizer.json" for directory in (one, other)]
    if not all(file.is_file() for file in files):
        return True
    contents = [read_regular(file) for file in files]
    if contents[0] == contents[1]:
        return True
    tokens = [_vocabulary(parse_json(content)) for content in contents]
    return bool(tokens[0] == tokens[1])


def _vocabulary(tokenizer: Any) -> Any:
    model = tokenizer.get("model") if isinstance(tokenizer, Mapping) else None
    return model.get("vocab") if isinstance(model, Mapping) else None
