"""What the pipeline does beside its stages, which have tests of their own: names for what was built."""

from __future__ import annotations

import os

import pytest

from builder import pipeline, recipe
from builder.repository import Repository
from builder.store import Store


@pytest.mark.parametrize(
    ("tp", "pp", "kept", "name"),
    [
        (1, 1, {}, "Qwen3-8B-sm120-nvfp4"),
        (2, 1, {}, "Qwen3-8B-sm120-nvfp4-tp2"),
        (1, 2, {}, "Qwen3-8B-sm120-nvfp4-pp2"),
        (4, 2, {}, "Qwen3-8B-sm120-nvfp4-tp4-pp2"),
        (1, 1, {"keep_bf16": ["*.down_proj"]}, "Qwen3-8B-sm120-nvfp4-keep-bf16"),
        (2, 1, {"keep_bf16": ["*.down_proj"]}, "Qwen3-8B-sm120-nvfp4-keep-bf16-tp2"),
        (1, 1, {"keep_fp8": ["*.down_proj"]}, "Qwen3-8B-sm120-nvfp4-keep-fp8"),
    ],
)
def test_what_is_served_otherwise_has_a_name_of_its_own(
    store: Store, tp: int, pp: int, kept: dict[str, list[str]], name: str
) -> None:
    """A model over several GPUs, or with layers left in BF16 or FP8, replaces none without."""
    sizes = {"engine.tp": tp, "engine.pp": pp}
    asked = {"model.id": "Qwen/Qwen3-8B", "gpu": "sm120", **sizes}
    asked |= {f"quantization.{key}": patterns for key, patterns in kept.items()}
    repository = Repository(store.root / "repository" / "key", "0" * 64, {})
    made = pipeline.link(recipe.resolve(asked), repository, store)
    assert made == store.root / "models" / name
    assert os.readlink(made) == "../repository/key"
