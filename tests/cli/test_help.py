"""`builder --help`, the help of each command, and the examples in them."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys

import pytest

from builder.cli import main

HIDDEN = {"transform", "calibrate"}  # steps of a sweep


def commands() -> dict[str, argparse.ArgumentParser]:
    [action] = [a for a in main.parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


def examples() -> list[str]:
    """Every example in a help text, without a comment at its end."""
    texts = [main.parser().epilog or "", *(command.epilog or "" for command in commands().values())]
    lines = [line.strip() for text in texts for line in text.splitlines()]
    found = [line.partition("    #")[0].rstrip() for line in lines if line.startswith("builder ")]
    return sorted({line for line in found if "COMMAND" not in line})


def test_builder_alone_prints_help() -> None:
    alone, asked = (
        subprocess.run([sys.executable, "-m", "builder", *argv], capture_output=True, text=True)
        for argv in ([], ["--help"])
    )
    assert (alone.returncode, alone.stderr) == (0, "")
    assert alone.stdout == asked.stdout


def test_help_is_one_screen_with_every_command_in_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = main.parser().format_help().splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 80
    titles = [line.removesuffix(":") for line in lines if re.fullmatch(r"\w+:", line)]
    assert titles == ["build", "measure", "serve", "keep", "machine", "options", "examples"]
    listed = [line.split()[0] for line in lines if re.match(r"  [a-z]", line) and not line.startswith("  builder")]
    assert set(listed) == set(commands()) - HIDDEN


def test_help_lists_the_exit_codes() -> None:
    from builder.core import errors

    text = main.parser().format_help().partition("exit codes:")[2]
    codes = {kind.exit_code for kind in errors.BuilderError.__subclasses__()} | {0, 130}
    assert {int(code) for code in re.findall(r"(\d+) [a-z]", text)} == codes


@pytest.mark.parametrize("name", sorted(set(commands()) - HIDDEN))
def test_every_command_has_an_example_of_its_own(name: str) -> None:
    assert any(line.split()[1] == name for line in (commands()[name].epilog or "").splitlines()[1:])


@pytest.mark.parametrize("line", examples())
def test_an_example_parses(line: str) -> None:
    assert main.parser().parse_args(shlex.split(line.partition(" > ")[0])[1:]).run


# Those that need neither the Hub, nor a GPU, nor an earlier build.
RUNNABLE = [line for line in examples() if line.split()[1] in ("gpus", "explain", "schema", "completion")]
RUNNABLE += [line for line in examples() if line.startswith("builder plan --model tests/")]


@pytest.mark.parametrize("line", RUNNABLE)
def test_an_example_runs(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(shlex.split(line.partition(" > ")[0])[1:]) == 0
    assert capsys.readouterr().out


@pytest.mark.parametrize("command", ["load", "bench"])
def test_old_names_work_with_a_warning(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """--clients: no repository is served here, so the command ends with a usage error after the warning."""
    assert main.main([command, "tests/data", "--clients", "2"]) == 2
    assert "--clients is now --concurrency" in capsys.readouterr().err
    assert main.main([command, "tests/data", "--concurrency", "2"]) == 2
    assert "is now" not in capsys.readouterr().err
    arguments = main.parser().parse_args([command, "tests/data", "--clients", "2", "--clients", "4"])
    assert (arguments.clients, arguments.concurrency) == ([2, 4], [])


def test_what_bench_measured_before_is_found_under_its_new_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["bench", "tests/data", "--http", "localhost:8000", "--grpc", "localhost:8001"]) == 2
    assert "`builder load` with the same options" in capsys.readouterr().err
