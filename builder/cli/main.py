"""The command line: what can be typed, and how what goes wrong becomes a message and an exit code."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from builder import __version__
from builder.cli.commands import (
    MEASUREMENTS,
    STAGE_NAMES,
    run_build,
    run_clean,
    run_doctor,
    run_eval,
    run_explain,
    run_gpus,
    run_inspect,
    run_load,
    run_plan,
    run_probe,
    run_report,
    run_schema,
    run_sensitivity,
    run_serve,
    run_smoke,
    run_verify,
)
from builder.core import streams
from builder.core.errors import BuilderError, UsageError
from builder.core.output import Output, print_error
from builder.core.safe_text import safe
from builder.recipe.flags import LIST_FLAGS, RECIPE_FLAGS, SWITCHES, TASK_FLAGS

EXAMPLES = """examples:
  builder build --model Qwen/Qwen3-8B --gpu sm120
  builder build --model tests/data/tiny-qwen3 --gpu cpu --output /tmp/demo
  builder plan  --model Qwen/Qwen3-8B --gpu sm120 --max-seq-len 8192
  builder serve artifacts/models/tiny-qwen3-cpu-nvfp4
  builder eval  --model tests/data/tiny-qwen3 --gpu cpu --data tests/data/eval/prose.jsonl

exit codes: 0 ok, 1 a stage failed, 2 usage or recipe, 3 does not fit or is not supported,
            4 the quality check or an accuracy gate failed, or what was asked can't be measured,
            5 serving or smoke test, 6 integrity or version, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, runs one command, and turns what goes wrong into a message and an exit code."""
    streams.prepare()
    try:
        arguments = parser().parse_args(argv)
    except SystemExit as ended:  # --help and --version, or a flag that does not exist
        raise SystemExit(streams.finish(ended.code if isinstance(ended.code, int) else 2)) from None
    return streams.finish(_run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    out = Output("json" if arguments.json else "quiet" if arguments.quiet else "human")
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # ignored under nohup: then a closed terminal is no reason
        signal.signal(signal.SIGHUP, _interrupt)
    try:
        return _run_command(arguments, out)
    finally:
        out.finish()


def _run_command(arguments: argparse.Namespace, out: Output) -> int:
    try:
        code: int = arguments.run(arguments, out)
        return code
    except (BuilderError, OSError) as raised:
        if arguments.traceback:
            raise
        error = raised if isinstance(raised, BuilderError) else _refused(raised, arguments)
        print_error(error)
        out.result(
            {
                "error": {"what": error.what, "why": error.why, "hint": error.hint, "cure": error.hint},
                "exit_code": error.exit_code,
            }
        )
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; finished stages are kept, nothing half-made is", file=sys.stderr)
        return 130


def _refused(error: OSError, arguments: argparse.Namespace) -> BuilderError:
    """What the operating system refused, wherever it did: a file system that is full or read-only, a file of others."""
    from builder.core.store import disk_error

    named = error.filename if isinstance(error.filename, (str, bytes)) else ""  # it may be a descriptor's number
    path = Path(os.fsdecode(named) or getattr(arguments, "output", "."))
    if os.path.exists(path) and not os.access(path, os.R_OK):
        return UsageError(f"Can't read {path}.", why=str(error), hint="Change its owner or its permissions.")
    return disk_error(error, path)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


class _Parser(argparse.ArgumentParser):
    """Its messages quote what was typed, or pasted."""

    def error(self, message: str) -> NoReturn:
        super().error(safe(message))


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog="builder",
        description="From a Hugging Face model and a GPU name to a tested Triton repository, quantized to NVFP4.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"builder {__version__}")
    subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    _add_chain(subparsers)
    _add_measuring(subparsers)
    _add_serving(subparsers)
    _add_keeping(subparsers)
    _add_machine(subparsers)
    return top


def _add_chain(subparsers: Any) -> None:
    """The stages: the whole way, or as far as one of them."""
    chain = {
        "build": ("model and GPU name in, tested Triton repository out", run_build),
        "plan": ("what a build would do, and why; nothing is made", run_plan),
        "fetch": ("the first stage: the model's files, verified", run_build),
        "quantize": ("as far as the checkpoint in both layouts, inspected", run_build),
        "engine": ("as far as the engine", run_build),
        "render": ("as far as the Triton repository, not served", run_build),
    }
    for name, (text, run) in chain.items():
        command = _command(subparsers, name, text, run)
        _add_recipe_flags(command)
        _add_output(command)
        if name != "plan":
            _add_force(command)
            command.add_argument("--from", metavar="STAGE", dest="start", choices=STAGE_NAMES,
                                 help="make this stage and all after it again")  # fmt: skip
        if name == "engine":
            command.add_argument("--dry-run", action="store_true", help="print the trtllm-build command, make nothing")
        if name == "build":
            command.add_argument("--dry-run", action="store_true", help="the same as `builder plan`")
            command.add_argument("--no-smoke", action="store_true", help="leave the repository untested")
            command.add_argument("--junit", type=_path, metavar="FILE", help="smoke results as JUnit XML")


def _add_measuring(subparsers: Any) -> None:
    """What quantization cost, and whether a checkpoint is sound."""
    command = _command(subparsers, "eval", "what quantization cost: perplexity, KL to BF16, agreement", run_eval)
    _add_recipe_flags(command)
    command.add_argument("--compare-kv", dest="evaluation.compare_kv", action="store_const", const=True,
                         help="the checkpoint also without its FP8 KV cache")  # fmt: skip
    _add_force(command)
    for option, key, kind, text in TASK_FLAGS:
        command.add_argument(option, dest=key, type=kind, help=text)
    _add_output(command)

    command = _command(subparsers, "sensitivity", "what each linear layer loses in NVFP4, worst first", run_sensitivity)
    _add_recipe_flags(command)
    command.add_argument(
        "--proxy", action="store_true", help="no KL: errors of outputs or, without texts, of weights; for large models"
    )
    _add_force(command)
    _add_output(command)

    command = _command(subparsers, "inspect", "check a checkpoint: NaN, scales, shapes, bits per weight", run_inspect)
    command.add_argument("path", type=_path, metavar="CHECKPOINT")


def _add_serving(subparsers: Any) -> None:
    """A repository, served and asked."""
    command = _command(subparsers, "serve", "serve a repository until Ctrl-C", run_serve)
    _add_served(command)
    command.add_argument("--follow-log", action="store_true", help="what the server says, on stderr too")
    command.add_argument("--until-eof", action="store_true", help="stop when stdin ends")
    command = _command(subparsers, "smoke", "start a repository's server, test every way to ask it, stop it", run_smoke)
    _add_served(command)
    _add_running(command)
    command.add_argument("--junit", type=_path, metavar="FILE", help="results as JUnit XML")
    command = _command(
        subparsers, "load", "how soon and how fast a repository answers, asked by many at once", run_load
    )
    _add_served(command)
    _add_running(command)
    command.add_argument("--clients", type=int, metavar="N", action="append", default=[],
                         help="so many at once; repeatable (default: 1, 4 and 16)")  # fmt: skip
    for name, default, text in (
        ("requests", None, "of all of them together (default: 32, or two for each client)"),
        ("input-tokens", 128, "of each prompt"),
        ("output-tokens", 32, "of each answer"),
    ):
        shown = f"{text} (default: {default})" if default else text
        command.add_argument(f"--{name}", type=int, metavar="N", default=default, help=shown)


def _add_running(command: argparse.ArgumentParser) -> None:
    command.add_argument("--http", metavar="HOST:PORT", help="ask the server that runs there; start none")
    command.add_argument("--grpc", metavar="HOST:PORT", help="its gRPC port (with --http)")


def _add_keeping(subparsers: Any) -> None:
    """What is known of a repository, and the store that keeps it."""
    command = _command(
        subparsers, "report", "what is known of a repository: one HTML page, a model card, a table", run_report
    )
    command.add_argument("repository", type=_path, help="a repository, as in artifacts/models/")
    for option, text in (("html", "the page"), ("markdown", "the model card"), ("csv", "the table that grows")):
        command.add_argument(f"--{option}", type=_path, metavar="FILE", help=f"{text} (default: in OUTPUT/reports/)")

    command = _command(subparsers, "verify", "hash every stored file again", run_verify)
    _add_output(command)
    command = _command(subparsers, "clean", "remove leftovers, and builds by name or age", run_clean)
    command.add_argument(
        "names", metavar="NAME", nargs="*", help="a link in OUTPUT/models or STAGE/KEY: it and what only it needs goes"
    )
    _add_output(command)
    command.add_argument("--older-than", metavar="AGE", help="also what no link needs and no build used since: 7d, 12h")
    command.add_argument("--all", action="store_true", help="all builds, with their links")
    command.add_argument("--dry-run", action="store_true", help="only say what would go, and what stays and why")


def _add_machine(subparsers: Any) -> None:
    """This machine, its card, and the facts that everything is decided by."""
    command = _command(subparsers, "probe", "ask this machine's card which doubtful flags build", run_probe)
    command.add_argument("--gpu", default="auto", help="the profile that it must be of (default: what is here)")
    command.add_argument("--only", metavar="QUESTION", action="append", default=[], help="ask this one (repeatable)")
    command.add_argument("--force", action="store_true", help="ask again what is answered")
    command.add_argument("--time-limit", type=int, metavar="SECONDS", help="for each engine (default: 1800)")
    _add_output(command)
    command = _command(
        subparsers, "doctor", "does this machine or container fit: driver, GPU, Docker, limits", run_doctor
    )
    command.add_argument("--gpu", help="profile to build for (default: the card that is here)")
    _add_output(command)

    _command(subparsers, "gpus", "the GPU profiles, what runs on them, the cards behind them", run_gpus)
    command = _command(subparsers, "explain", "a flag or LLM argument: meaning, defaults, rules, sources", run_explain)
    command.add_argument("flag", metavar="FLAG", help="as context_fmha, with or without dashes")
    _command(subparsers, "schema", "the JSON Schema of a recipe file", run_schema)


def _path(text: str) -> Path:
    """An empty one, as of an unset variable in a script, would be the current directory."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty path; give a name, or leave the option out")
    return Path(text)


def _port(text: str) -> int:
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 6 else 0
    if not 0 < number < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port: give a number from 1 to 65535")
    return number


def _command(subparsers: Any, name: str, text: str, run: Callable[..., int]) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = subparsers.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")
    command.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    command.add_argument("--traceback", action="store_true", help="show where an error was raised")
    command.set_defaults(run=run)
    return command


def _add_recipe_flags(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("recipe (flag > --set > --recipe > --preset > GPU profile > default)")
    for option, key, kind, text in RECIPE_FLAGS:
        group.add_argument(option, dest=key, type=kind, help=text)
    for option, key, placeholder, text in LIST_FLAGS:
        group.add_argument(option, dest=key, action="append", metavar=placeholder, help=text)
    for option, key, value, text in SWITCHES:
        group.add_argument(option, dest=key, action="store_const", const=value, help=text)
    group.add_argument("--preset", help="latency or throughput")
    group.add_argument("--recipe", type=_path, metavar="FILE", help="a YAML recipe (configs/recipes/)")
    group.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="any value of the recipe")


def _add_force(command: argparse.ArgumentParser) -> None:
    names = [*STAGE_NAMES, *MEASUREMENTS]
    command.add_argument("--force", metavar="STAGE", action="append", default=[], choices=names,
                         help=f"make this stage again: {', '.join(names)}")  # fmt: skip


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--output", type=_path, default=os.environ.get("BUILDER_OUTPUT") or "artifacts",
        help="where everything is kept (BUILDER_OUTPUT, default ./artifacts)",
    )  # fmt: skip


def _add_served(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "repository", type=_path, nargs="?",
        help="a repository, as in artifacts/models/; default: MODEL_REPOSITORY, or the only one in OUTPUT/models",
    )  # fmt: skip
    _add_output(command)
    command.add_argument("--ungated", action="store_true", default=os.environ.get("UNGATED", "") not in ("", "0"),
                         help="serve it although it failed a gate (UNGATED)")  # fmt: skip
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    for name in ("http", "grpc", "metrics"):
        command.add_argument(f"--{name}-port", type=_port, metavar="PORT", help="default: a free one")
    command.add_argument("--container", action="store_true", help="in a Docker container, which goes when we go")
    command.add_argument("--image", default=os.environ.get("BUILDER_IMAGE", "trtllm-builder"),
                         help="for --container (BUILDER_IMAGE, default trtllm-builder)")  # fmt: skip
