"""Paths from a repository to what it serves: relative, so that the output directory can be moved or mounted elsewhere.

A model's configuration refers to its engine or checkpoint relative to the model's directory, and the facts relative to
the repository's. `builder serve` gives Triton absolute paths in its private copy of the configuration: the C++ backend
looks in the server's working directory (std::filesystem::exists in model_instance_state.cc@c8c6df08).
"""

from __future__ import annotations

import os
from pathlib import Path

# Parameters of config.pbtxt, and keys of the llmapi target's model.yaml, that are such paths.
PARAMETERS = ("gpt_model_path", "xgrammar_tokenizer_info_path")
ARGUMENTS = ("model",)


def relative(target: Path, directory: Path) -> str:
    """The path of `target` from a directory. Neither needs to exist."""
    return os.path.relpath(target.resolve(), directory.resolve())


def resolved(reference: str, directory: Path) -> Path:
    """The absolute path of a reference in a file of `directory`. An absolute one stays as it is."""
    return Path(os.path.normpath(directory.resolve() / reference))
