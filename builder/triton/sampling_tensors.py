"""Tensors of an engine's models with default sampling values, which preprocessing fills in for the engine.

An ensemble can't give a step a constant, so the value goes through preprocessing, the client's own one too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FROM_REQUEST, FROM_PREPROCESSING = "tensorrt_llm_from_request", "tensorrt_llm_from_preprocessing"


def with_defaults(tensors: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors (triton-tensors.json) of models that know these defaults, {the client's name: value}."""
    preprocessing, maps = tensors["preprocessing"], tensors["maps"]
    inputs = {client: name for name, client in maps["preprocessing_from_request"].items()}
    kinds = {entry["name"]: entry["data_type"] for entry in preprocessing["input"]}
    engine = {client: name for name, client in maps[FROM_REQUEST].items()}
    outputs = [{"name": _output(inputs[name]), "data_type": kinds[inputs[name]], "dims": [1]} for name in defaults]
    return {
        **tensors,
        "preprocessing": {**preprocessing, "output": [*preprocessing["output"], *outputs]},
        "maps": {
            **maps,
            FROM_REQUEST: {name: client for name, client in maps[FROM_REQUEST].items() if client not in defaults},
            FROM_PREPROCESSING: {
                **maps[FROM_PREPROCESSING],
                **{engine[name]: _output(inputs[name]) for name in defaults},
            },
        },
    }


def by_input(tensors: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults by the names of preprocessing's inputs."""
    inputs = {client: name for name, client in tensors["maps"]["preprocessing_from_request"].items()}
    return {inputs[name]: value for name, value in defaults.items()}


def _output(name: str) -> str:
    return f"OUT_{name}"
