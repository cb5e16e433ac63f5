"""The commands that measure: what quantization cost, as a whole or by layer, and whether a checkpoint is sound."""

from __future__ import annotations

import argparse
from typing import Any

from builder.cli.options import (
    add_command,
    add_force,
    add_output,
    add_recipe,
    forced_stages,
    path,
    placeholder,
    resolve,
    with_same_recipe,
)
from builder.core.output import Output
from builder.recipe.flags import TASK_FLAGS

TITLE = "measure"


def add(commands: Any) -> None:
    """Adds eval, sensitivity and inspect."""
    command = add_command(
        commands, "eval", "measure what quantization cost: perplexity, KL, tasks", run_eval,
        examples=[
            "builder eval --model tests/data/tiny-qwen3 --gpu cpu --data tests/data/eval/prose.jsonl",
            "builder eval --model Qwen/Qwen3-8B --gpu sm120 --runner bf16 --runner checkpoint --runner served",
            "builder eval --model Qwen/Qwen3-8B --gpu sm120 --tasks mmlu,gsm8k --task-limit 100",
        ],
    )  # fmt: skip
    add_recipe(command)
    command.add_argument("--compare-kv", dest="evaluation.compare_kv", action="store_const", const=True,
                         help="measure the checkpoint without its FP8 KV cache as well")  # fmt: skip
    add_force(command)
    for option, key, kind, text in TASK_FLAGS:
        command.add_argument(option, dest=key, type=kind, metavar=placeholder(option, kind), help=text)
    add_output(command)

    command = add_command(
        commands, "sensitivity", "measure what each linear layer loses in NVFP4", run_sensitivity,
        examples=[
            "builder sensitivity --model Qwen/Qwen3-8B --gpu sm120 --sensitivity-data texts.jsonl",
            "builder sensitivity --model tests/data/tiny-qwen3 --gpu cpu --proxy",
        ],
    )  # fmt: skip
    add_recipe(command)
    command.add_argument("--proxy", action="store_true",
                         help="measure errors of outputs (without texts: of weights), not KL")  # fmt: skip
    add_force(command)
    add_output(command)

    command = add_command(
        commands, "inspect", "check a checkpoint: NaN, scales, shapes, bits per weight", run_inspect,
        examples=["builder inspect artifacts/checkpoint/0123456789abcdef", "builder inspect ./Qwen3-8B-NVFP4 --json"],
    )  # fmt: skip
    command.add_argument("path", type=path, metavar="CHECKPOINT", help="directory of a quantized checkpoint")


def run_eval(arguments: argparse.Namespace, out: Output) -> int:
    """Builds what is to be measured, unless the store has it, and measures it. EvaluationError if a gate fails."""
    resolved = resolve(arguments)
    from builder import pipeline
    from builder.core.store import Store
    from builder.evaluate.stage import show

    store = Store(arguments.output, out, force=sorted(forced_stages(arguments)))
    with store.in_use():
        found = pipeline.measure(resolved, store)
    show(found, out)
    out.text(f"kept       {found.path / 'evaluation.json'}")
    found.check()
    return 0


def run_sensitivity(arguments: argparse.Namespace, out: Output) -> int:
    """Measures each group of layers by itself."""
    resolved = resolve(arguments)
    from builder import pipeline
    from builder.core.store import Store
    from builder.evaluate.sensitivity.stage import show

    store = Store(arguments.output, out, force=sorted(forced_stages(arguments)))
    with store.in_use():
        found = pipeline.measure_layers(resolved, store, proxy=arguments.proxy)
    show(found, with_same_recipe("quantize", arguments), out)
    return 0


def run_inspect(arguments: argparse.Namespace, out: Output) -> int:
    """Validates any checkpoint, as `quantize` validates its own. IntegrityError for one that is damaged."""
    from builder.checkpoint.validate import inspect

    inspection = inspect(arguments.path)
    out.table("checkpoint", ["fact", "value"], inspection.summary.items())
    out.result(inspection.facts())
    inspection.check(arguments.path)
    out.info("no problem found")
    return 0
