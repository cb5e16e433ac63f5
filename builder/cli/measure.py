"""The commands that measure: what quantization cost, as a whole or by layer, and whether a checkpoint or a
repository is sound."""

from __future__ import annotations

import argparse
from typing import Any

from builder.cli import recommend, sweep
from builder.cli.options import (
    add_command,
    add_force,
    add_output,
    add_recipe,
    forced_stages,
    path,
    path_text,
    placeholder,
    resolve,
    with_same_recipe,
)
from builder.core.output import Output
from builder.recipe.flags import TASK_FLAGS

TITLE = "measure"


def add(commands: Any) -> None:
    """Adds eval, sensitivity, recommend, sweep, compare, inspect, repair and lint."""
    _add_eval(commands)
    _add_sensitivity(commands)
    recommend.add(commands)
    sweep.add(commands)
    _add_inspect(commands)
    _add_repair(commands)
    _add_lint(commands)


def _add_eval(commands: Any) -> None:
    command = add_command(
        commands, "eval", "measure what quantization cost: perplexity, KL, tasks", run_eval,
        examples=[
            "builder eval --model tests/data/tiny-qwen3 --gpu cpu --data tests/data/eval/prose.jsonl",
            "builder eval --model Qwen/Qwen3-8B --gpu sm120 --runner bf16 --runner checkpoint --runner served",
            "builder eval --model Qwen/Qwen3-8B --gpu sm120 --tasks mmlu,gsm8k --task-limit 100",
            "builder eval --model Qwen/Qwen3-8B --gpu sm120 --against data-free --against ./Qwen3-8B-FP4",
        ],
    )  # fmt: skip
    add_recipe(command)
    command.add_argument("--compare-kv", dest="evaluation.compare_kv", action="store_const", const=True,
                         help="measure the checkpoint without its FP8 KV cache as well")  # fmt: skip
    command.add_argument("--against", metavar="DIR", type=path_text, action="append", default=[],
                         help="compare with the quantized checkpoint or build in DIR on the same texts, or with "
                         "data-free: the recipe without calibration; repeatable")  # fmt: skip
    add_force(command)
    for option, key, kind, text in TASK_FLAGS:
        command.add_argument(option, dest=key, type=kind, metavar=placeholder(option, kind), help=text)
    add_output(command)


def _add_sensitivity(commands: Any) -> None:
    command = add_command(
        commands, "sensitivity", "measure what each linear layer loses by quantization", run_sensitivity,
        examples=[
            "builder sensitivity --model Qwen/Qwen3-8B --gpu sm120 --sensitivity-data texts.jsonl",
            "builder sensitivity --model tests/data/tiny-qwen3 --gpu cpu --proxy",
            "builder sensitivity --model Qwen/Qwen3-8B --gpu sm120 --parts --sensitivity-data texts.jsonl",
        ],
    )  # fmt: skip
    add_recipe(command)
    either = command.add_mutually_exclusive_group()
    either.add_argument("--proxy", action="store_true",
                        help="measure errors of outputs (without texts: of weights), not KL")  # fmt: skip
    either.add_argument("--parts", action="store_true",
                        help="measure weights, inputs and KV cache of the checkpoint apart, by layer")  # fmt: skip
    add_force(command)
    add_output(command)


def _add_inspect(commands: Any) -> None:
    command = add_command(
        commands, "inspect", "check a checkpoint: NaN, scales, shapes, bits per weight", run_inspect,
        examples=["builder inspect artifacts/checkpoint/0123456789abcdef", "builder inspect ./Qwen3-8B-NVFP4 --json"],
    )  # fmt: skip
    command.add_argument("path", type=path, metavar="CHECKPOINT", help="directory of a quantized checkpoint")


def _add_repair(commands: Any) -> None:
    command = add_command(
        commands, "repair", "replace scales of a checkpoint that are not numbers", run_repair,
        examples=[
            "builder repair ./Qwen3-8B-NVFP4",
            "builder repair ./Qwen3-8B-NVFP4 --output ./Qwen3-8B-NVFP4-repaired",
            "builder repair ./Qwen3-8B-NVFP4 --undo",
        ],
    )  # fmt: skip
    command.add_argument("path", type=path, metavar="CHECKPOINT", help="directory of a checkpoint, Hugging Face layout")
    command.add_argument("--output", type=path, metavar="DIRECTORY",
                         help="write a repaired copy there and leave CHECKPOINT as it is")  # fmt: skip
    command.add_argument("--undo", action="store_true", help="remove the patches of earlier repairs")


def _add_lint(commands: Any) -> None:
    command = add_command(
        commands, "lint", "check a Triton model repository, whoever rendered it", run_lint,
        examples=[
            "builder lint artifacts/models/qwen3-sm120-nvfp4",
            "builder lint ./triton_model_repo --engine ./engines/qwen3 --json",
        ],
    )  # fmt: skip
    command.add_argument("path", type=path, metavar="REPOSITORY", help="directory of the models that Triton serves")
    command.add_argument("--engine", type=path, metavar="DIRECTORY",
                         help="the engine here, where the repository names another path")  # fmt: skip


def run_eval(arguments: argparse.Namespace, out: Output) -> int:
    """Builds what is to be measured, unless the store has it, and measures it. EvaluationError if a gate fails."""
    resolved = resolve(arguments)
    from builder import pipeline
    from builder.core.store import Store
    from builder.evaluate.stage import show

    store = Store(arguments.output, out, force=sorted(forced_stages(arguments)))
    with store.in_use():
        found = pipeline.measure(resolved, store, against=arguments.against)
    show(found, out)
    out.text(f"kept       {found.path / 'evaluation.json'}")
    found.check()
    return 0


def run_sensitivity(arguments: argparse.Namespace, out: Output) -> int:
    """Measures each group of layers by itself, or each part of the checkpoint."""
    resolved = resolve(arguments)
    from builder import pipeline
    from builder.core.store import Store
    from builder.evaluate.sensitivity.stage import show

    store = Store(arguments.output, out, force=sorted(forced_stages(arguments)))
    if arguments.parts:
        from builder.evaluate.parts.stage import show as show_parts

        with store.in_use():
            parts = pipeline.measure_parts(resolved, store)
        show_parts(parts, resolved.recipe, out)
        return 0
    with store.in_use():
        found = pipeline.measure_layers(resolved, store, proxy=arguments.proxy)
    command = with_same_recipe("quantize", arguments)
    if resolved.recipe.calibration.data_free and "--calib-samples" in command:  # auto measures on rows
        at = command.index("--calib-samples")
        command = [*command[:at], *command[at + 2 :]]
    show(found, command, out, resolved.recipe.quantization.algorithm)
    return 0


def run_inspect(arguments: argparse.Namespace, out: Output) -> int:
    """Validates any checkpoint, as a build validates its own. IntegrityError for one that is damaged."""
    from builder.checkpoint.inspection.show import show
    from builder.checkpoint.validate import inspect

    inspection = inspect(arguments.path)
    out.result(inspection.facts())
    show(inspection, out)
    inspection.check(arguments.path)
    if not inspection.findings:
        out.info("no problem found")
    return 0


def run_lint(arguments: argparse.Namespace, out: Output) -> int:
    """Checks every model of a repository without a server. IntegrityError if there are errors."""
    from builder.triton.lint.run import lint
    from builder.triton.lint.show import show

    show(lint(arguments.path, engine=arguments.engine), out)
    return 0


def run_repair(arguments: argparse.Namespace, out: Output) -> int:
    """Repairs a checkpoint, or undoes it. IntegrityError if problems are left that a repair can't cure."""
    from builder.checkpoint import repair
    from builder.checkpoint.inspection.show import show_repair
    from builder.checkpoint.validate import inspect
    from builder.core.errors import UsageError

    if arguments.undo:
        if arguments.output:
            raise UsageError("--undo and --output exclude each other.", hint="A copy is undone by removing it.")
        patches = repair.undo(arguments.path)
        out.result({"directory": str(arguments.path), "removed": patches})
        out.info(f"removed {', '.join(patches)}; the files are as they were")
        return 0
    done = repair.repair(arguments.path, output=arguments.output)
    out.result(done.facts())
    show_repair(done, out)
    left = inspect(done.directory)
    out.result(left.facts())
    left.check(done.directory)
    return 0
