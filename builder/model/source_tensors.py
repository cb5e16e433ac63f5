"""The tensors of a source model under the model's own names. Every reader of its weights opens them here.

The files of a multimodal model hold other parts beside the language model, whose tensors have longer names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.core.safetensors_io import Tensors
from builder.model import multimodal
from builder.model.files import CONFIG, parse_config


def open_tensors(directory: Path) -> Tensors:
    """The tensors of the model in `directory`; of a multimodal one those of its language model, under the names that
    they have in a model of its own. Raises what Tensors and parse_config raise."""
    return own_names(Tensors(directory), parse_config((directory / CONFIG).read_bytes(), str(directory)))


def own_names(stored: Tensors, config: Mapping[str, Any]) -> Tensors:
    """The tensors of files under the names that `open_tensors` gives them."""
    return stored.renamed(multimodal.language_name) if multimodal.MARK in config else stored
