"""Small random models of the families that can be rotated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pytest

from builder.architectures import catalog

ROTATED = [one for one in catalog.every() if one.rotation]
SIZES = {"hidden_size": 80, "num_attention_heads": 4, "num_key_value_heads": 2}  # 80 = 4 x Paley's 20
NO_R2 = {"phi3": "r1"}


def model_of(model_type: str, directory: Path, **config: Any) -> Any:
    """A small model in float32 whose norms and biases are random too. Skips families that transformers lacks."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        made = families.config(model_type)
    except ValueError:
        pytest.skip(f"this transformers has no {model_type}")
    for key, value in {**SIZES, "head_dim": 20, **config}.items():
        setattr(made, key, value)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(1 if weight.dim() == 1 else 0, 0.5 if weight.dim() == 1 else 0.1)
    model.save_pretrained(directory, safe_serialization=True)
    return model
