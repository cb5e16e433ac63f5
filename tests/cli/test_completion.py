"""Shell completion: the generated script is valid, and offers commands, values and paths."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from builder.cli import completion, main

# Completes the words that follow, as bash would on Tab, and prints what it would offer.
COMPLETE = """
source /dev/stdin <<< "$SCRIPT"
COMP_WORDS=("$@")
COMP_CWORD=$(( $# - 1 ))
_shtab_builder
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script() -> str:
    return completion.script(main.parser(), "bash")


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("builder qua", {"quantize"}),
        ("builder build --gpu sm12", {"sm120", "sm120-fmha", "sm121"}),
        ("builder build --gpu b", {"b200", "b300"}),
        ("builder plan --preset l", {"latency"}),
        ("builder build --force qua", {"quantize", "quality"}),
        ("builder build --target l", {"llmapi"}),
        ("builder eval --runner s", {"simulated", "served"}),
        ("builder build --recipe configs/recipes/de", {"configs/recipes/demo.yaml"}),
        ("builder build --output builder/cl", {"builder/cli", "builder/clean"}),
        ("builder serve tests/dat", {"tests/data"}),
        ("builder explain use_fused", {"use_fused_mlp"}),
        ("builder explain R4", {f"R{n}" for n in range(40, 50)}),
        ("builder bench --conc", {"--concurrency"}),
        ("builder bench --clie", set()),
        ("builder loa", {"load"}),
    ],
)
def test_bash_offers(script: str, typed: str, offered: set[str]) -> None:
    done = subprocess.run(
        ["bash", "-c", COMPLETE, "complete", *typed.split()],
        capture_output=True, text=True, check=True, env={**os.environ, "SCRIPT": script},
    )  # fmt: skip
    assert set(done.stdout.split()) == offered, done.stderr


def test_paths_can_be_completed_further(script: str) -> None:
    """`filenames` makes bash add a slash to a directory instead of a space."""
    assert "complete -o filenames -o bashdefault -F _shtab_builder builder" in script


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_script_is_valid(shell: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "builder", "completion", shell], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "_shtab_builder" in done.stdout
    if shutil.which(shell):
        (tmp_path / "script").write_text(done.stdout)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True)


def test_the_script_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["completion", "bash", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["shell"] == "bash"
    assert "_shtab_builder" in printed["script"]
