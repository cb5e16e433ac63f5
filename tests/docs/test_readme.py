"""What the README tells people to type exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from builder.cli import main

README = Path("README.md").read_text()
BLOCKS = re.findall(r"(?:^    .*\n)+", README, re.M)
LINES = [line.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [line.partition("#")[0].strip() for line in LINES]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("builder ")])
def test_a_builder_command_parses(line: str) -> None:
    assert main.parser().parse_args(shlex.split(line.partition(" > ")[0])[1:]).run


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_a_make_target_exists(line: str) -> None:
    assert re.search(rf"^{line.split()[1]}:", Path("Makefile").read_text(), re.M)


def test_the_two_commands_come_first_and_ci_runs_them() -> None:
    assert [line for line in COMMANDS if line.startswith("make ")][:2] == ["make demo", "make test"]
    for command in ("make demo", "make test"):
        assert command in Path(".ci/run").read_text()


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("docker compose ")])
def test_a_compose_command_names_services_and_arguments_that_exist(line: str) -> None:
    words = shlex.split(line)
    services = yaml.safe_load(Path("docker-compose.yml").read_text())["services"]
    assert {"run", "up"} & set(words)
    for name in ("build", "smoke", "triton"):
        assert name not in words or name in services
    if "build" in words:
        assert main.parser().parse_args(["build", *words[words.index("build") + 1 :]]).run


def test_the_three_commands_come_first() -> None:
    assert [line.split()[2:4] for line in COMMANDS[:3]] == [["run", "build"], ["up", "-d"], ["run", "smoke"]]


@pytest.mark.parametrize(
    "path", re.findall(r"`((?:builder|configs|docker|tests|triton_templates|benchmarks)/[\w./-]+)`", README)
)
def test_a_file_that_it_names_exists(path: str) -> None:
    assert Path(path).exists()


def test_exit_codes_are_those_of_the_code() -> None:
    from builder.core import errors

    named = {int(n) for n in re.findall(r"(\d+) [a-z]", README.partition("## Exit codes")[2].partition("##")[0])}
    codes = {kind.exit_code for kind in errors.BuilderError.__subclasses__()}
    assert codes <= named


def test_every_command_of_the_help_is_in_the_readme() -> None:
    [commands] = [action for action in main.parser()._actions if action.dest == "command"]
    missing = [name for name in commands.choices or () if f"builder {name}" not in README and f"`{name}`" not in README]
    assert set(missing) <= {"fetch", "quantize", "engine", "render", "load"}
