"""What README.md and docs/ tell people to type exists and parses; fast commands run."""

from __future__ import annotations

import functools
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import documents
import pytest
import yaml

from builder.cli import main

# Programs that a shell block may name; a new one is added here on purpose.
PROGRAMS = {
    "builder", "make", "docker", "docker/base-cpu", "python", "python3", "pip", "curl", "export", "source", "git",
    "pre-commit", "cp", "cd", "sed", "ray", "sbatch",
}  # fmt: skip
# What needs no model, no server and no network, and changes nothing.
FAST = ("gpus", "explain", "schema", "--help", "--version", "completion")


def lines(program: str) -> list[str]:
    return sorted({command for _, command in documents.commands(program)})


@functools.cache
def services() -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load((documents.ROOT / "docker-compose.yml").read_text())["services"]
    return found


def test_every_program_in_a_shell_block_is_one_that_these_tests_know() -> None:
    strange = [(place, line) for place, line in documents.commands() if line.split()[0] not in PROGRAMS]
    assert not strange


def test_shell_blocks_name_their_language() -> None:
    """Otherwise their commands would not be tested."""
    unmarked = [
        block.place
        for page in documents.documents()
        for block in documents.blocks(page)
        if block.language not in documents.SHELLS and re.search(r"^(builder|make|docker) \w", block.text, re.M)
    ]
    assert not unmarked


@pytest.mark.parametrize("line", lines("builder"))
def test_a_builder_command_parses(line: str) -> None:
    argv = shlex.split(line)[1:]
    if argv in (["--help"], ["--version"], []):
        return
    if argv[-1] != "--help":
        assert main.parser().parse_args(argv).run


@pytest.mark.parametrize("line", [line for line in lines("builder") if any(word in line.split() for word in FAST)])
def test_a_fast_builder_command_runs(line: str, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "builder", *shlex.split(line)[1:]]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=documents.ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("line", lines("make"))
def test_a_make_target_exists(line: str) -> None:
    makefile = (documents.ROOT / "Makefile").read_text()
    for word in shlex.split(line)[1:]:
        if "=" in word:
            assert word.partition("=")[0] in makefile
        else:
            assert re.search(rf"^{re.escape(word)}:", makefile, re.M)


@pytest.mark.parametrize("line", lines("docker compose"))
def test_a_compose_command_names_services_and_arguments_that_exist(line: str) -> None:
    words = shlex.split(line)[2:]
    while words[0].startswith("--"):  # --profile NAME
        words = words[2:]
    verb, *rest = words
    assert verb in ("run", "up", "build", "down", "logs")
    if verb == "up":
        assert not [word for word in rest if not word.startswith("-") and word not in services()]
        return
    while rest and rest[0].startswith("--"):  # --volume A:B
        rest = rest[2:]
    service, *arguments = rest
    assert service in services()
    if verb == "run" and service in ("build", "eval"):
        assert main.parser().parse_args([service, *arguments]).run


@pytest.mark.parametrize("line", [*lines("python"), *lines("python3")])
def test_a_python_file_or_module_exists(line: str) -> None:
    words = shlex.split(line)[1:]
    if words[0] == "-m":
        top = words[1].split(".")[0]
        module = documents.ROOT.joinpath(*words[1].split("."))
        assert top in ("http", "pytest", "venv") or module.with_suffix(".py").is_file() or module.is_dir()
    else:
        assert (documents.ROOT / words[0]).is_file()


NAMED = r"`((?:builder|configs|docker|docs|examples|tests|triton_templates|benchmarks)/[\w./-]+)`"


@pytest.mark.parametrize(
    ("page", "path"),
    [(page.name, path) for page in documents.documents() for path in sorted(set(re.findall(NAMED, page.read_text())))],
)
def test_a_file_that_a_page_names_exists(page: str, path: str) -> None:
    assert (documents.ROOT / path).exists() or path.startswith("docs/reference")


def test_every_link_between_documents_leads_somewhere() -> None:
    """README.md and CONTRIBUTING.md are not part of the site, whose build checks the other links."""
    for page in documents.documents():
        for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", page.read_text()):
            if "reference/" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_command_of_the_builder_is_in_some_page() -> None:
    [commands] = [action for action in main.parser()._actions if action.dest == "command"]
    text = "\n".join(page.read_text() for page in documents.documents())
    shown = {choice.dest for choice in commands._choices_actions}
    missing = {name for name in shown if f"builder {name}" not in text}
    assert missing <= {"fetch", "quantize"}


def test_extras_that_pages_install_exist() -> None:
    extras = tomllib.loads((documents.ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = "\n".join(page.read_text() for page in documents.documents())
    named = {name for group in re.findall(r"(?:\.|trtllm-builder)\[([\w,]+)\]", text) for name in group.split(",")}
    assert named
    assert named <= extras.keys()
