"""The command that searches for the settings that serve the most requests within an objective."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.cli import bench, measure, serve
from builder.cli.options import add_command, add_output, add_recipe, path, resolve
from builder.core.errors import UsageError
from builder.core.output import Output

if TYPE_CHECKING:
    from builder.recipe.schema import Resolved
    from builder.tune.search import Request, Trial

TITLE = measure.TITLE
DEFAULT = Path("tuned.yaml")


def add(commands: Any) -> None:
    """Adds tune."""
    command = add_command(
        commands, "tune", "find the settings that serve most within an objective", run_tune,
        examples=[
            "builder tune --model Qwen/Qwen3-8B --gpu sm120 --objective 'ttft<=500ms,itl<=50ms' --rate 4 --rate 8",
            "builder tune --recipe configs/recipes/demo.yaml --search max_batch_size=2,8 --trials 2 --concurrency 4",
            "builder tune --model Qwen/Qwen3-8B --gpu sm120 --target llmapi --container --rate 4",
        ],
    )  # fmt: skip
    add_recipe(command)
    bench.add_workload(command)
    command.add_argument("--search", metavar="NAME=V,V", action="append", default=[],
                         help="a setting and the values to try; repeatable (default: batch size, queue delay or tokens "
                         "of a batch, and on a GPU the KV cache's share of memory)")  # fmt: skip
    command.add_argument("--trials", type=int, metavar="N", default=12, help="most settings to try (default: 12)")
    command.add_argument("--save", type=path, default=DEFAULT, metavar="FILE",
                         help=f"the recipe file to write (default: {DEFAULT})")  # fmt: skip
    serve.add_container(command)
    add_output(command)


def run_tune(arguments: argparse.Namespace, out: Output) -> int:
    """Searches, prints all trials, and writes the best one's recipe."""
    from builder.aiperf.environment import environment
    from builder.core.store import Store
    from builder.tune import recipe_file, search

    if arguments.save.is_dir():
        raise UsageError(f"--save {arguments.save} is a directory.", hint=f"Name a file in it: {DEFAULT}")
    resolved = resolve(arguments)
    request = _request(arguments, resolved)
    store = Store(arguments.output, out)
    search.check(resolved, request, store)
    _explain(resolved, request, out)
    place = environment(out)
    with store.in_use():
        trials = search.search(resolved, request, place, store=store)
    best = search.best(trials)
    _show(trials, best, out)
    recipe_file.write(best, trials[0], resolved, arguments.save)
    shown = [_as_dict(trial) for trial in trials]
    recipe = recipe_file.values(best, resolved)
    out.result({"trials": shown, "best": _as_dict(best), "recipe_file": str(arguments.save), "recipe": recipe})
    out.text(f"written to {arguments.save}")
    out.text(f"next       builder build --recipe {arguments.save}")
    return 0


def _request(arguments: argparse.Namespace, resolved: Resolved) -> Request:
    from builder.tune.search import Request
    from builder.tune.space import space

    if arguments.seed is None:
        arguments.seed = 0  # the same requests in every trial, and in a search that is continued
    if not (arguments.concurrency or arguments.clients or arguments.rate or arguments.trace):
        arguments.concurrency = [resolved.recipe.engine.max_batch_size]
    return Request(
        space(resolved.recipe, arguments.search),
        bench.workload_of(arguments),
        arguments.trials,
        lambda asked, repository: bench.with_route(asked, arguments.api, repository),
        arguments.image if arguments.container else "",
    )


def _explain(resolved: Resolved, request: Request, out: Output) -> None:
    """What the search can't show here."""
    from builder.recipe.target_facts import REFERENCE, target_facts
    from builder.tune.space import TEXT_MODELS

    named = [one.name for one in request.parameters]
    if resolved.recipe.target == REFERENCE.name:
        out.warn(
            "The reference executor on a CPU is measured: the search runs for real, but its figures, and the settings "
            "that win, say nothing about a GPU. kv_fraction is not searched: it has no effect here."
        )
    if found := [name for name in named if name in TEXT_MODELS]:
        out.warn(f"{', '.join(found)}: the gateway does the work of these models itself, so AIPerf, which measures the "
                 "gateway, can show no effect but that of their memory and CPU.")  # fmt: skip
    if "max_batch_size" in named and target_facts(resolved.recipe.target).builds_tensorrt:
        out.info("each max_batch_size needs an engine of its own, which takes minutes to build; engines are kept")


def _show(trials: list[Trial], best: Trial, out: Output) -> None:
    from builder.tune.space import spoken

    measured = best.measurement
    unit = "good requests/s" if measured and measured.objective else "tokens/s"
    rows = []
    for trial in trials:
        value = trial.error if trial.value is None else f"{trial.value:.3f}"
        rows.append(("best" if trial is best else "", spoken(trial.settings), value))
    out.table("tune (the first row: the recipe's own settings)", ["which", "settings", unit], rows)


def _as_dict(trial: Trial) -> dict[str, Any]:
    measured = trial.measurement.as_dict() if trial.measurement else None
    return {"settings": dict(trial.settings), "value": trial.value, "error": trial.error, "measurement": measured}
