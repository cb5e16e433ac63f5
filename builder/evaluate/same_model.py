"""Whether a quantized checkpoint was made from a model, as far as sizes and tokens tell. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.architectures import catalog
from builder.checkpoint import quantized_source
from builder.checkpoint.description import Description
from builder.core.errors import UsageError
from builder.core.output import listed
from builder.core.untrusted_text import parse_json, read_regular
from builder.hub.snapshot import Source

# Sizes in config.json that two checkpoints of one model share, in every layout.
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def check_same_model(found: Description, base: Source, place: str, directory: Path) -> None:
    """UsageError if the checkpoint was made from another model: sizes, shapes of tensors, vocabulary."""
    theirs, ours = (catalog.with_common_keys(dict(config)) for config in (found.config, base.config))
    differ = [
        f"{key} is {theirs[key]}, not {ours[key]}"
        for key in SIZES
        if theirs.get(key) is not None and ours.get(key) is not None and theirs[key] != ours[key]
    ]
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
