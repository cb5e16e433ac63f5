"""Options that several commands share, and how their values become a recipe.

Nothing here imports pydantic, torch or another large library: `builder --help` must be quick.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from builder.core.output import Output
from builder.core.safe_text import safe
from builder.recipe.flags import LIST_FLAGS, RECIPE_FLAGS, SWITCHES, TASK_FLAGS

if TYPE_CHECKING:
    from builder.recipe.schema import Resolved

# The stage names that --force and --from take, and the store's name for each.
STAGE_NAMES = {
    "fetch": "snapshot",
    "transform": "transform",
    "calibrate": "calibration",
    "quantize": "checkpoint",
    "layouts": "layouts",
    "split": "ranks",
    "engine": "engine",
    "render": "repository",
    "smoke": "smoke",
}
# What --force also takes: the measurements, and the stages of the store that each of them fills.
MEASUREMENTS = {
    "quality": ["quality"],
    "texts": ["texts"],
    "scores": ["scores"],
    "tasks": ["tasks"],
    "sensitivity": ["sensitivity", "proxy", "parts"],
    "parts": ["parts"],
    "selection": ["selection", "mixtures"],
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose error messages are safe to print: they quote what was typed or pasted."""

    def error(self, message: str) -> NoReturn:
        """Prints the usage and the message, and exits with 2."""
        super().error(safe(message))


def add_command(
    commands: Any,
    name: str,
    text: str | None,
    run: Callable[[argparse.Namespace, Output], int],
    *,
    examples: Sequence[str],
) -> argparse.ArgumentParser:
    """Adds a command with the options that every command has.

    `commands` is what ArgumentParser.add_subparsers returned. `text` is the line in `builder --help`; None hides the
    command, which is for an old name that still works and for a step of a sweep. `run` returns the exit code.
    `examples` are complete command lines, printed at the end of the command's own help.
    """
    about = {"help": text, "description": text[0].upper() + text[1:] + "."} if text else {}
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        **about,
        epilog="\n  ".join(["examples:", *examples]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    command.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    command.add_argument("--traceback", action="store_true", help="show where an error was raised")
    command.set_defaults(run=run)
    return command


def path(text: str) -> Path:
    """A path, not an empty one."""
    return Path(path_text(text))


def path_text(text: str) -> str:
    """The same as it was typed. An empty path, as an unset variable in a script gives, would mean the current
    directory: it is refused."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty path; give a name, or leave the option out")
    return text


def port(text: str) -> int:
    """A TCP port, 1 to 65535."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 6 else 0
    if not 0 < number < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: give a number from 1 to 65535")
    return number


def placeholder(option: str, kind: Callable[[str], Any]) -> str:
    """What help shows as the value of an option: N for an integer, X for a number, else the option's last word."""
    return {int: "N", float: "X"}.get(kind, option.rpartition("-")[2].upper())  # type: ignore[call-overload, no-any-return]


def add_recipe(command: argparse.ArgumentParser) -> None:
    """The options that set values of the recipe."""
    command.usage = f"{command.prog} --model MODEL [--gpu GPU] [OPTION ...]"  # naming all of them takes 20 lines
    group = command.add_argument_group("recipe (flag > --set > --recipe > --preset > GPU profile > default)")
    switched = {key for _, key, *_ in SWITCHES}
    either = {key: group.add_mutually_exclusive_group() for _, key, *_ in RECIPE_FLAGS if key in switched}
    for option, key, kind, text in RECIPE_FLAGS:
        into = either.get(key, group)
        into.add_argument(option, dest=key, type=kind, metavar=placeholder(option, kind), help=text)
    for option, key, shown, text in LIST_FLAGS:
        group.add_argument(option, dest=key, action="append", metavar=shown, help=text)
    for option, key, value, text in SWITCHES:
        either.get(key, group).add_argument(option, dest=key, action="store_const", const=value, help=text)
    group.add_argument("--preset", metavar="NAME", help="latency, throughput, accuracy or a format")
    group.add_argument("--recipe", type=path, metavar="FILE", help="a YAML recipe (examples: configs/recipes/)")
    group.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="set any recipe key; repeatable")


def add_force(command: argparse.ArgumentParser) -> None:
    """--force."""
    names = [*STAGE_NAMES, *MEASUREMENTS]
    command.add_argument("--force", metavar="STAGE", action="append", default=[], choices=names,
                         help=f"run this stage again: {', '.join(names)}; repeatable")  # fmt: skip


def add_output(command: argparse.ArgumentParser) -> None:
    """--output: the directory that holds the store."""
    command.add_argument(
        "--output", type=path, default=os.environ.get("BUILDER_OUTPUT") or "artifacts", metavar="DIR",
        help="where artifacts are kept (BUILDER_OUTPUT, default ./artifacts)",
    )  # fmt: skip


def resolve(arguments: argparse.Namespace) -> Resolved:
    """The recipe that the options of `add_recipe` describe. UsageError for one that is not valid."""
    from builder.recipe import schema
    from builder.recipe.evaluation import RUNNERS

    values = vars(arguments)
    keys = ["evaluation.compare_kv", *(key for _, key, _, _ in SWITCHES)]
    keys += [key for _, key, _, _ in (*RECIPE_FLAGS, *LIST_FLAGS, *TASK_FLAGS)]
    flags = {key: values[key] for key in keys if values.get(key) is not None}
    if "all" in flags.get("evaluation.runners", ()):
        flags["evaluation.runners"] = RUNNERS
    return schema.resolve(flags, sets=arguments.set, recipe_file=arguments.recipe, preset=arguments.preset)


def forced_stages(arguments: argparse.Namespace) -> set[str]:
    """The store's stages that --force names."""
    return {stage for name in arguments.force for stage in MEASUREMENTS.get(name) or [STAGE_NAMES[name]]}


def with_same_recipe(name: str, arguments: argparse.Namespace) -> list[str]:
    """The words of another `builder` command with the recipe and the output directory of this one."""
    values = vars(arguments)
    words = ["builder", name]
    for option, key, *_ in RECIPE_FLAGS:
        words += [option, str(values[key])] if values[key] is not None else []
    lists = [*((option, values[key]) for option, key, *_ in LIST_FLAGS), ("--set", arguments.set)]
    words += [word for option, found in lists for value in found or () for word in (option, value)]
    for option, value in (
        ("--recipe", arguments.recipe),
        ("--preset", arguments.preset),
        ("--output", arguments.output),
    ):
        words += [option, str(value)] if value is not None else []
    valued = {key for _, key, *_ in RECIPE_FLAGS}
    return words + [option for option, key, value, _ in SWITCHES if values[key] is value and key not in valued]
