"""What serves a checkpoint is asked through one protocol: no other code compares a target with a name."""

from __future__ import annotations

import ast
from typing import get_args

import imports
import pytest

from builder.core.errors import UsageError
from builder.formats.registry import FP8
from builder.recipe import schema
from builder.recipe.target_facts import TARGETS
from builder.targets import base, target
from builder.targets.base import Excluded

NAMES = set(get_args(schema.Target))
METHODS = sorted(name for name in vars(base.Target) if not name.startswith("_"))


def test_every_target_of_the_recipe_has_facts_and_answers_every_question() -> None:
    assert set(TARGETS) == NAMES
    for name in NAMES:
        assert target(name).facts is TARGETS[name]
        assert not [method for method in METHODS if not hasattr(target(name), method)]


def compared(node: ast.Compare) -> bool:
    """Whether a name that speaks of a target is compared with the name of one."""
    sides = [node.left, *node.comparators]
    literals = {c.value for side in sides for c in ast.walk(side) if isinstance(c, ast.Constant)}
    return bool(literals & NAMES) and any("target" in ast.unparse(side) for side in sides)


def test_no_code_compares_a_target_with_a_name() -> None:
    found = []
    for name, path in imports.modules().items():
        if name.startswith("builder.targets") or name == "builder.recipe.schema":
            continue
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Compare)]
        found += [f"{name}:{node.lineno} {ast.unparse(node)}" for node in nodes if compared(node)]
    assert not found, "ask builder.recipe.target_facts, or a method of builder.targets"


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("recipe.target == 'llmapi'", True),
        ("facts['target'] != 'reference'", True),
        ("target in ('engine', 'reference')", True),
        ("runner == 'reference'", False),
        ("target.name == name", False),
    ],
)
def test_what_counts_as_a_comparison(text: str, is_one: bool) -> None:
    [node] = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Compare)]
    assert compared(node) is is_one


def test_each_target_decides_about_layers_that_are_left_in_fp8() -> None:
    """q_proj in NVFP4 and o_proj in FP8: only the LLM class does not join them."""
    excluded = Excluded({"model.layers.0.self_attn.o_proj": FP8}, ("model.layers.0.self_attn.o_proj",))
    assert target("llmapi").why_output_is_quantized([], "fp8")
    assert not target("llmapi").why_output_is_quantized([], "bf16")
    assert not target("reference").why_output_is_quantized([], "fp8")
    target("reference").check_excluded(excluded, [])


def test_only_an_engine_has_a_command_and_only_the_llm_api_has_no_stages_for_one() -> None:
    assert [name for name, facts in TARGETS.items() if facts.builds_tensorrt] == ["engine"]
    assert [name for name, facts in TARGETS.items() if not facts.has_engine] == ["llmapi"]
    assert isinstance(base.no_engine(), UsageError)
