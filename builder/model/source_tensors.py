"""The tensors of a source model under the model's own names. Every reader of its weights opens them here.

The files of a multimodal model hold other parts beside the language model, whose tensors have longer names.
"""

from __future__ import annotations

from pathlib import Path

from builder.core.safetensors_io import Tensors
from builder.model import multimodal
from builder.model.files import CONFIG, parse_config


def open_tensors(directory: Path) -> Tensors:
    """The tensors of the model in `directory`; of a multimodal one those of its language model, under the names that
    they have in a model of its own. Raises what Tensors and parse_config raise."""
    stored = Tensors(directory)
    config = parse_config((directory / CONFIG).read_bytes(), str(directory))
    return stored.renamed(multimodal.language_name) if multimodal.MARK in config else stored
