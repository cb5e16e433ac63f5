"""The language model inside a multimodal one: its config.json, and which tensors belong to it. Pure.

Targets serve text, so the other parts (vision, audio) are neither quantized nor copied. Which language models can stand
alone is data: `language_model_of` in configs/architectures.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from builder.architectures import catalog

# In a config.json of a language model that was taken out: the multimodal architecture that it comes from.
MARK = "language_model_of"
# How the names of its tensors begin in the files of transformers 5 and 4, and in a model of its own.
NAMES: Mapping[str, str] = {
    "model.language_model.": "model.",
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
}
KEPT = ("lm_head.", "mtp.")
# What the language model's own configuration may leave out. Signs of quantization must not get lost.
INHERITED = (
    "dtype", "torch_dtype", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    "quantization_config", "compression_config", "transformers_version",
)  # fmt: skip
_Value = TypeVar("_Value")


def language_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of the language model; `config` itself if it is not of a multimodal model whose part is known.

    `text_config` may leave out what is the default of its class (`config.defaults` in the architecture's file).
    """
    name, text = catalog.name_of(config), config.get("text_config")
    part = catalog.language_model_of(name)
    if part is None or not isinstance(text, Mapping) or text.get("model_type") not in part.model_types:
        return dict(config)
    outer = {key: config[key] for key in INHERITED if config.get(key) is not None and text.get(key) is None}
    defaults = {key: value for key, value in part.config.defaults.items() if key != "rope_theta"}  # attention.rope
    return {**defaults, **text, **outer, "architectures": [part.name], MARK: name}


def own_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's config.json as it is written: without the name of the multimodal model."""
    return {key: value for key, value in config.items() if key != MARK}


def language_name(name: str) -> str | None:
    """The name of a multimodal model's tensor in its language model; None for a tensor of another part."""
    for start, own in NAMES.items():
        if name.startswith(start):
            return own + name.removeprefix(start)
    return name if name.startswith(KEPT) else None


def language_tensors(config: Mapping[str, Any], tensors: Mapping[str, _Value]) -> dict[str, _Value]:
    """The tensors of the language model under its own names; all of them for a model that is not multimodal."""
    if MARK not in config:
        return dict(tensors)
    named = {language_name(name): value for name, value in tensors.items()}
    return {name: value for name, value in named.items() if name is not None}


def key_mapping() -> dict[str, str]:
    """`NAMES` as regular expressions, as from_pretrained takes them."""
    return {f"^{re.escape(start)}": own for start, own in NAMES.items()}


def known() -> list[str]:
    """The multimodal architectures whose language model can stand alone."""
    return sorted(part.name for one in catalog.every() for part in one.language_model_of)


def note(config: Mapping[str, Any]) -> str | None:
    """What a user should know about a multimodal model; None for any other."""
    if MARK not in config:
        return None
    return (
        f"It is a multimodal model ({config[MARK]}): only its language model ({catalog.name_of(config)}) is quantized "
        "and served; images, video and audio are not. The other parts are left out of the checkpoint."
    )
