"""The commands about this machine, its card, and the facts that decisions rest on."""

from __future__ import annotations

import argparse
from typing import Any

from builder.cli.options import add_command, add_output
from builder.core.errors import UnsupportedError, UsageError
from builder.core.output import Output

TITLE = "machine"


def add(commands: Any) -> None:
    """Adds doctor, probe, gpus, explain, schema and completion."""
    command = add_command(commands, "doctor", "check this machine: driver, GPU, Docker, limits", run_doctor,
                          examples=["builder doctor", "builder doctor --gpu sm120 --json"])  # fmt: skip
    command.add_argument("--gpu", help="card or profile to build for (default: this machine's card)")
    add_output(command)
    _add_probe(commands)
    add_command(commands, "gpus", "list GPU profiles, the formats they run and their cards", run_gpus,
                examples=["builder gpus", "builder gpus --json"])  # fmt: skip
    command = add_command(
        commands, "explain", "explain a flag, an LLM argument or a rule", run_explain,
        examples=[
            "builder explain context_fmha",
            "builder explain kv_cache_config.dtype",
            "builder explain R26",
            "builder explain --rules",
        ],
    )  # fmt: skip
    command.add_argument("topic", metavar="FLAG|ARGUMENT|RULE", nargs="?",
                         help="a trtllm-build flag, an LLM argument, or a rule's id such as R26")  # fmt: skip
    command.add_argument("--rules", action="store_true", help="list every rule, also those that involve no flag")
    add_command(commands, "schema", "print the JSON Schema of a recipe file", run_schema, examples=["builder schema"])
    command = add_command(
        commands, "completion", "print a completion script for bash or zsh", run_completion,
        examples=[
            "builder completion bash > ~/.local/share/bash-completion/completions/builder",
            "builder completion zsh > ~/.zfunc/_builder    # a directory of $fpath",
        ],
    )  # fmt: skip
    command.add_argument("shell", choices=("bash", "zsh"), metavar="SHELL", help="bash or zsh")


def _add_probe(commands: Any) -> None:
    command = add_command(
        commands, "probe", "test which doubtful flags build on this machine's card", run_probe,
        examples=["builder probe", "builder probe --gpu sm120 --time-limit 600"],
    )  # fmt: skip
    command.add_argument("--gpu", default="auto", help="the profile or card that this machine must have (default: any)")
    command.add_argument("--only", metavar="QUESTION", action="append", default=[],
                         help="test only this question; repeatable")  # fmt: skip
    command.add_argument("--force", action="store_true", help="test again what was answered before")
    command.add_argument("--time-limit", type=int, metavar="SECONDS", help="for each engine (default: 1800)")
    add_output(command)


def run_doctor(arguments: argparse.Namespace, out: Output) -> int:
    """Exit code 3 if something on this machine does not fit."""
    from builder.machine import containers
    from builder.preflight import doctor
    from builder.recipe import schema

    version = schema.Engine().tensorrt_llm
    checks = doctor.examine(doctor.profile(arguments.gpu), version, arguments.output)
    return 0 if doctor.show(checks, containers.newest(version), out) else UnsupportedError.exit_code


def run_probe(arguments: argparse.Namespace, out: Output) -> int:
    """Asks the card what the tables leave in doubt. StageError (exit code 1) if a question stayed unanswered."""
    from builder.core.store import Store
    from builder.trtllm import probe

    store = Store(arguments.output, out)
    limit = arguments.time_limit or probe.TIME_LIMIT
    asking = probe.session(arguments.gpu, store, limit=limit, force=arguments.force)
    with store.in_use():
        found = probe.run(asking, probe.questions(asking, arguments.only))
    probe.show(asking, found)
    if open_ones := probe.unanswered(found):
        raise open_ones
    return 0


def run_gpus(arguments: argparse.Namespace, out: Output) -> int:
    """Lists the profiles, what runs on them and the cards behind them."""
    from builder.cli import gpus_view

    gpus_view.show(out)
    return 0


def run_explain(arguments: argparse.Namespace, out: Output) -> int:
    """Explains a flag, an LLM argument or a rule in every version; with --rules, lists the rules.

    UsageError for an unknown name, and without a name.
    """
    from builder.cli import explain

    if bool(arguments.topic) == arguments.rules:
        raise UsageError("explain takes one name, or --rules.", hint="builder explain context_fmha")
    if arguments.rules:
        explain.show_rules(explain.all_rules(), out)
    elif explain.is_rule(arguments.topic):
        explain.show_rule(explain.explain_rule(arguments.topic), out)
    else:
        explain.show(explain.explain(arguments.topic), out)
    return 0


def run_schema(arguments: argparse.Namespace, out: Output) -> int:
    """Prints the schema, as configs/recipe.schema.json holds it."""
    import json

    from builder.recipe import schema

    print(json.dumps(schema.schema(), indent=2))
    return 0


def run_completion(arguments: argparse.Namespace, out: Output) -> int:
    """Prints the completion script of a shell."""
    from builder.cli import completion

    script = completion.script(arguments.parser, arguments.shell)
    if out.mode == "json":
        out.result({"shell": arguments.shell, "script": script})
    else:
        print(script)
    return 0
