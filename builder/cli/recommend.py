"""The command that searches for the cheapest recipe within a budget."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.cli.options import (
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
    from builder.core.store import Store
    from builder.recommend.recommendation import Recommendation

DEFAULT = Path("recommended.yaml")


def add(commands: Any) -> None:
    """Adds recommend."""
    command = add_command(
        commands, "recommend", "find the cheapest recipe within a budget of loss and bytes", run_recommend,
        examples=[
            "builder recommend --model Qwen/Qwen3-8B --gpu sm120 --max-kl 0.05",
            "builder recommend --model Qwen/Qwen3-8B --gpu sm120 --max-kl 0.05 --max-bytes 7GB",
            "builder recommend --model tests/data/tiny-qwen3 --gpu cpu --max-kl 0.02 --dry-run",
        ],
    )  # fmt: skip
    add_recipe(command)
    group = command.add_argument_group("search (the budget is --max-kl, --min-score or both)")
    group.add_argument("--max-bytes", metavar="SIZE",
                       help="of weights and the KV cache of one full sequence, as 500MB or 7GB")  # fmt: skip
    group.add_argument("--max-candidates", type=int, default=16, metavar="N",
                       help="how many to build and measure at most (default: 16)")  # fmt: skip
    group.add_argument(
        "--max-minutes", type=float, metavar="N", help="end the search by then, with what it found so far"
    )
    group.add_argument("--save", type=path, default=DEFAULT, metavar="FILE",
                       help=f"the recipe file to write (default: {DEFAULT})")  # fmt: skip
    group.add_argument("--remove", action="store_true", help="remove the checkpoints of candidates that lost")
    group.add_argument("--dry-run", action="store_true", help="print what would be tried, in order; measure nothing")
    add_force(command)
    add_output(command)


def run_recommend(arguments: argparse.Namespace, out: Output) -> int:
    """Searches, prints all candidates, and writes the winner's recipe. EvaluationError if none meets the budget."""
    from builder.core.errors import UsageError

    for option, value in (("--max-candidates", arguments.max_candidates), ("--max-minutes", arguments.max_minutes)):
        if value is not None and not value > 0:
            raise UsageError(f"{option} must be above 0 (got {value:g}).")
    if arguments.save.is_dir():
        raise UsageError(f"--save {arguments.save} is a directory.", hint=f"Name a file in it: {DEFAULT}")
    resolved = resolve(arguments)
    from builder.checkpoint.conversion import parse_size
    from builder.core.store import Store
    from builder.recommend import recommendation
    from builder.recommend.request import Request

    request = Request(
        resolved.recipe.evaluation.limits,
        parse_size(arguments.max_bytes) if arguments.max_bytes else None,
        arguments.max_candidates,
        arguments.max_minutes and 60 * arguments.max_minutes,
    )
    if arguments.dry_run:
        store = Store(arguments.output, Output("quiet"), dry=True)
        recommendation.show(recommendation.plan(resolved, request, store=store), out)
        return 0
    store = Store(arguments.output, out, force=sorted(forced_stages(arguments)))
    with store.in_use():
        found = recommendation.recommend(resolved, request, store=store)
    recommendation.show(found, out)
    if found.outcome.winner is not None:
        _write(found, arguments, out)
    _settle_losers(found, store, out, remove=arguments.remove)
    found.check()
    return 0


def _settle_losers(found: Recommendation, store: Store, out: Output, *, remove: bool) -> None:
    """Removes the checkpoints that lost, if this search made them, or names the command that removes all."""
    import shlex

    from builder.clean import removal
    from builder.clean.reachability import Request
    from builder.core.output import size

    losers = found.losers(store, new=remove)
    if not losers:
        return
    if not remove:
        out.info(f"to remove the {len(losers)} checkpoints that lost: "
                 f"{shlex.join(['builder', 'clean', *losers, '--output', str(store.root)])}")  # fmt: skip
        return
    with store.in_use(exclusive=True):
        made = removal.plan(removal.check_root(store.root), Request(tuple(losers)))
        failed = removal.carry_out(made)
    out.info(f"removed {len(losers)} checkpoints that lost, {size(sum(one.nbytes for one in made.remove))}")
    removal.check_failed(failed, store.root)


def _write(found: Recommendation, arguments: argparse.Namespace, out: Output) -> None:
    import shlex

    from builder.recommend.recipe_file import values, write

    assert found.outcome.winner is not None
    write(found.outcome.winner, found.user, arguments.save)
    out.result({"recipe_file": str(arguments.save), "recipe": values(found.outcome.winner, found.user)})
    out.text(f"recommended {found.reason}")
    out.text(f"written to  {arguments.save}")
    words = with_same_recipe("build", arguments)
    output = words[words.index("--output") :][:2] if "--output" in words else []
    out.text(f"Build it: {shlex.join(['builder', 'build', '--recipe', str(arguments.save), *output])}")
