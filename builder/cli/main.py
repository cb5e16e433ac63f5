"""The command line: its parser, and how a failure becomes a message and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from builder import __version__
from builder.cli import bench, build, keep, machine, measure, serve, tune
from builder.cli.options import Parser
from builder.core import interrupts, streams, temporary
from builder.core.errors import BuilderError, UsageError
from builder.core.output import Output, print_error

GROUPS = (build, measure, serve, bench, tune, keep, machine)  # in the order of `builder --help`
INTERRUPTED = 130  # as shells say it
EPILOG = """examples:
  builder build --model Qwen/Qwen3-8B --gpu sm120
  builder plan --model Qwen/Qwen3-8B --gpu sm120 --max-seq-len 8192
  builder COMMAND --help

exit codes: 0 ok, 1 a stage failed, 2 usage or recipe,
  3 not supported or does not fit, 4 quality check or accuracy gate,
  5 serving or smoke test, 6 integrity or version, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parses `argv` (default: sys.argv), runs one command and returns the exit code. Errors become messages.

    SystemExit for --help, --version and usage errors, as argparse raises it.
    """
    interrupts.handle()  # first: until then SIGTERM and SIGHUP end the process without a word
    streams.prepare()
    try:
        top = parser()
        arguments = top.parse_args(argv)
        if arguments.command is None:
            top.print_help()
            return streams.finish(0)
    except SystemExit as ended:  # --help, --version or a usage error
        raise SystemExit(streams.finish(ended.code if isinstance(ended.code, int) else 2)) from None
    return streams.finish(_run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    """Runs the command. Once it was interrupted, no other exception and no exit code counts: see core/interrupts.py."""
    out = Output("json" if arguments.json else "quiet" if arguments.quiet else "human")
    try:
        temporary.settle()
        code = _run_command(arguments, out)
        interrupts.check()
    except BaseException as error:
        if not (interrupts.received() or isinstance(error, KeyboardInterrupt)):
            raise
        print("interrupted; finished stages are kept, partial ones are removed", file=sys.stderr)
        code = INTERRUPTED
    finally:
        out.finish()
    return code


def _run_command(arguments: argparse.Namespace, out: Output) -> int:
    try:
        code: int = arguments.run(arguments, out)
        return code
    except (BuilderError, OSError) as raised:
        if arguments.traceback or interrupts.received():
            raise
        error = raised if isinstance(raised, BuilderError) else _from_os_error(raised, arguments)
        print_error(error)
        out.result(
            {
                "error": {"what": error.what, "why": error.why, "hint": error.hint, "cure": error.hint},
                "exit_code": error.exit_code,
            }
        )
        return error.exit_code


def _from_os_error(error: OSError, arguments: argparse.Namespace) -> BuilderError:
    """A message for an OSError that no stage handled: a full or read-only disk, a file of another user."""
    from builder.core.store import disk_error

    named = error.filename if isinstance(error.filename, (str, bytes)) else ""  # it may be a descriptor's number
    path = Path(os.fsdecode(named) or getattr(arguments, "output", "."))
    if os.path.exists(path) and not os.access(path, os.R_OK):
        return UsageError(f"Can't read {path}.", why=str(error), hint="Change its owner or its permissions.")
    return disk_error(error, path)


class _TopParser(Parser):
    """Prints the commands by group. argparse itself knows only one flat list of subcommands."""

    groups: Sequence[tuple[str, Sequence[argparse.Action]]] = ()

    def format_help(self) -> str:
        """The help of `builder --help`."""
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, self._actions, self._mutually_exclusive_groups)
        formatter.add_text(self.description)
        for title, actions in (*self.groups, ("options", self._get_optional_actions())):
            formatter.start_section(title)
            formatter.add_arguments(actions)
            formatter.end_section()
        formatter.add_text(self.epilog)
        return formatter.format_help()


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    top = _TopParser(
        prog="builder",
        description="From a Hugging Face model and a GPU name to a tested Triton repository.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"builder {__version__}")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    groups: dict[str, list[argparse.Action]] = {}
    for group in GROUPS:
        before = len(commands._choices_actions)
        group.add(commands)
        groups.setdefault(group.TITLE, []).extend(commands._choices_actions[before:])
    top.groups = list(groups.items())
    top.set_defaults(parser=top)  # `builder completion` writes it down
    return top
