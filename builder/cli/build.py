"""The commands that build: the whole chain, or as far as one of its stages."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from builder.cli import combine, plan_beside
from builder.cli.options import (
    STAGE_NAMES,
    add_command,
    add_force,
    add_output,
    add_recipe,
    forced_stages,
    path,
    resolve,
    with_same_recipe,
)
from builder.core.output import Output

if TYPE_CHECKING:
    from builder.pipeline import Built
    from builder.recipe.schema import Resolved
    from builder.serving.smoke import SmokeReport

TITLE = "build"


def add(commands: Any) -> None:
    """Adds build, plan, fetch, transform, calibrate, quantize, engine and render."""
    _add_build(commands)
    _add_plan(commands)
    stages: dict[str, tuple[str | None, str]] = {
        "fetch": ("download the model and verify its files", "--revision main"),
        "transform": (None, "--transform spinquant"),  # a step of a sweep
        "calibrate": (None, "--calib-data rows.jsonl"),
        "quantize": ("stop at the checkpoint, in both layouts", "--calib-data rows.jsonl"),
        "engine": ("stop at the engine", "--tp 2"),
        "render": ("stop at the Triton repository; do not serve it", "--preset throughput"),
    }
    for name, (text, more) in stages.items():
        examples = [f"builder {name} --model Qwen/Qwen3-8B --gpu sm120 {more}"]
        if name == "engine":
            examples.append("builder engine --model Qwen/Qwen3-8B --gpu sm120 --dry-run")
        if name == "render":
            examples.append("builder render --model Qwen/Qwen3-8B --gpu sm120 --add both --as qwen3")
        command = _add_stages(commands, name, text, examples)
        if name == "engine":
            command.add_argument("--dry-run", action="store_true", help="print the trtllm-build command; run nothing")
        if name == "render":
            command.add_argument("--add", metavar="NAME", help="add the model to this repository of several models")
            command.add_argument("--as", metavar="MODEL", dest="model_as",
                                 help="its name there, for clients (default: that of its own repository)")  # fmt: skip


def _add_build(commands: Any) -> None:
    examples = [
        "builder build --model Qwen/Qwen3-8B --gpu sm120",
        "builder build --model tests/data/tiny-qwen3 --gpu cpu --output /tmp/demo",
        "builder build --model Qwen/Qwen3-8B --gpu sm120 --keep-bf16 '*.down_proj' --min-score 98",
        "builder build --recipe configs/recipes/demo.yaml --set engine.max_batch_size=8",
    ]
    command = _add_stages(commands, "build", "turn a model and a GPU name into a tested Triton repository", examples)
    command.add_argument("--dry-run", action="store_true", help="the same as `builder plan`")
    command.add_argument("--no-smoke", action="store_true", help="do not serve and test the repository")
    command.add_argument("--junit", type=path, metavar="FILE", help="write the smoke test's results as JUnit XML")


def _add_plan(commands: Any) -> None:
    examples = [
        "builder plan --model Qwen/Qwen3-8B --gpu sm120 --max-seq-len 8192",
        "builder plan --model tests/data/tiny-qwen3 --gpu cpu",
        "builder plan --model tests/data/tiny-qwen3 --gpu sm120 --json",
        "builder plan --model Qwen/Qwen3-8B --gpu 'RTX 5090' --as chat --with configs/recipes/demo.yaml=demo",
    ]
    command = add_command(commands, "plan", "show what a build would do, and why; run nothing", run_plan,
                          examples=examples)  # fmt: skip
    add_recipe(command)
    add_output(command)
    command.add_argument("--all", action="store_true", help="also print defaults, every card and the launch command")
    plan_beside.add(command)


def _add_stages(commands: Any, name: str, text: str | None, examples: list[str]) -> argparse.ArgumentParser:
    command = add_command(commands, name, text, run_build, examples=examples)
    add_recipe(command)
    add_output(command)
    add_force(command)
    command.add_argument("--from", metavar="STAGE", dest="start", choices=STAGE_NAMES,
                         help="run this stage and all later ones again")  # fmt: skip
    return command


def run_build(arguments: argparse.Namespace, out: Output) -> int:
    """build, or one of the commands that stop earlier: runs the chain as far as the command's name says."""
    if getattr(arguments, "dry_run", False):
        return run_plan(arguments, out)
    resolved = resolve(arguments)
    from builder import pipeline
    from builder.cli import summary
    from builder.core.store import STAGES, Store
    from builder.preflight import doctor
    from builder.publish import links
    from builder.serving.smoke import SmokeFailed

    force = forced_stages(arguments)
    if arguments.start:
        force |= set(STAGES[STAGES.index(STAGE_NAMES[arguments.start]) :])
    until = STAGE_NAMES.get(arguments.command, "smoke")
    if getattr(arguments, "no_smoke", False):
        until = "repository"
    if os.environ.get(doctor.INSIDE) and "engine" in STAGES[: STAGES.index(until) + 1]:
        recipe = resolved.recipe
        doctor.require(resolved.gpu, recipe.engine.tensorrt_llm, arguments.output, target=recipe.target)
    store = Store(arguments.output, out, force=sorted(force))
    combine.check_add(arguments, store.root)
    plan_beside.check_add(arguments, resolved, store.root)
    links.check_free(resolved.recipe.name, store.root)
    try:
        with store.in_use():
            built = pipeline.build(resolved, store, until=until)
    except SmokeFailed as failed:
        _write_junit(failed.report, arguments)
        out.result({"smoke": failed.report.as_dict()})
        raise
    if built.smoke:
        _write_junit(built.smoke, arguments)
    summary.show(built, resolved, store, until, out)
    _check_quality(built, resolved, arguments)
    if built.evaluation:
        built.evaluation.check()
    if built.link:
        combine.add_built(arguments, built.link, store)
    return 0


def _check_quality(built: Built, resolved: Resolved, arguments: argparse.Namespace) -> None:
    """Raises EvaluationError if the build failed its quality check; the error lists the commands to try next."""
    if built.quality is None:
        return
    from builder.preflight.better_algorithm import better_algorithm
    from builder.report.quality_summary import error

    model = None if resolved.stored or built.prepared is None else built.prepared.model
    better = "" if model is None else better_algorithm(resolved.recipe, model)
    command = with_same_recipe("build", arguments)
    found = error(built.quality, resolved.recipe.quality.min_score, command, better=better)
    if found:
        raise found


def _write_junit(report: SmokeReport, arguments: argparse.Namespace) -> None:
    from builder.serving.smoke import write_junit

    if getattr(arguments, "junit", None):
        write_junit(report, arguments.junit)


def run_plan(arguments: argparse.Namespace, out: Output) -> int:
    """plan, or --dry-run: prints what a build would do. UnsupportedError (exit code 3) after it if it would not fit."""
    resolved = resolve(arguments)
    from builder import plan
    from builder.cli import plan_view
    from builder.core.store import Store

    beside = getattr(arguments, "beside", None)
    if arguments.command == "plan":
        plan_beside.check(arguments)
    found = plan.plan(resolved, Store(arguments.output, Output("quiet"), dry=True))
    if beside:
        plan_beside.run(found, arguments, out)
        return 0
    if arguments.command == "engine":
        plan_view.show_command(found, out)
    else:
        build = with_same_recipe("build", arguments)
        plan_view.show(found, out, complete=getattr(arguments, "all", False), build=build)
    if found.refusal:
        raise found.refusal
    return 0
