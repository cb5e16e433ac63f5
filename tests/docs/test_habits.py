"""What developers type: make targets, pre-commit hooks and extras are there, and hooks run what `make lint` runs."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path

import yaml

from builder.trtllm import flags as trtllm_flags

MAKEFILE = Path("Makefile").read_text()
TARGETS = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
HOOKS = yaml.safe_load(Path(".pre-commit-config.yaml").read_text())["repos"]


def make(*argv: str) -> subprocess.CompletedProcess[str]:
    """Runs make as from a shell, also where these tests run below `make test`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *argv], capture_output=True, text=True, env=environment)


def test_make_alone_lists_every_target_with_a_line_of_text() -> None:
    done = make()
    assert done.returncode == 0, done.stderr
    listed = dict(re.split(r"\s+", line, maxsplit=1) for line in done.stdout.splitlines())
    assert TARGETS
    assert {*listed, "$(LINTERS)"} == set(TARGETS[1].split())
    assert all(listed.values())


def test_a_packages_tests_are_chosen_by_its_name() -> None:
    assert make("-n", "test", "PACKAGE=quantize triton").stdout.endswith(" tests/quantize tests/triton\n")
    unknown = make("test", "PACKAGE=quantise")
    assert unknown.returncode == 2
    assert "There are no tests of quantise. Packages with tests: " in unknown.stderr
    assert " quantize " in unknown.stderr


def test_the_hooks_run_what_make_lint_runs_and_download_nothing() -> None:
    linters = re.search(r"^LINTERS := (.*)$", MAKEFILE, re.MULTILINE)
    assert linters
    [hooks] = [repo["hooks"] for repo in HOOKS if repo["repo"] == "local"]
    assert len(HOOKS) == 1
    assert [hook["id"] for hook in hooks] == linters[1].split()
    for hook in hooks:
        assert hook["entry"] == f"make --silent {hook['id']}"
        assert (hook["language"], hook["pass_filenames"]) == ("system", False)


def test_the_issue_template_asks_for_what_doctor_prints() -> None:
    template = yaml.safe_load(Path(".github/ISSUE_TEMPLATE/bug.yml").read_text())
    asked = {field["id"]: field for field in template["body"]}
    assert asked["doctor"]["attributes"]["label"] == "builder doctor --json"
    assert asked["doctor"]["validations"]["required"]


def test_the_extra_trtllm_is_the_newest_version_that_builds_engines() -> None:
    extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["trtllm"] == [f"tensorrt-llm=={trtllm_flags.versions()[-1]}"]
