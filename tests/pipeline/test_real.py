"""A real chat model (SmolLM2-135M-Instruct): plain NVFP4 ruins it, the build says so, and its advice mends it.

`make test-real` writes the model to REAL_MODEL first. Some minutes on two cores.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]
RECIPE = ["--gpu", "cpu", "--calib-data", "builtin:python-docs", "--calib-samples", "32", "--calib-seq-len", "512"]


def builder(*argv: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run([sys.executable, "-m", "builder", *argv, "--json"], capture_output=True, text=True)
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real") / "artifacts"


@pytest.fixture(scope="module")
def failed(output: Path) -> tuple[int, dict[str, Any], str]:
    return builder("build", "--model", os.environ["REAL_MODEL"], *RECIPE, "--output", str(output))


def test_plain_nvfp4_fails_the_quality_check_and_is_not_published(
    failed: tuple[int, dict[str, Any], str], output: Path
) -> None:
    code, said, error = failed
    assert code == 4, error
    figures = said["quality"]["figures"]
    print({name: round(figure["value"], 4) for name, figure in figures.items()})
    assert 55 < figures["score"]["value"] < 80
    assert 0.3 < figures["kl"]["value"] < 0.7
    [capital, *_] = said["quality"]["answers"]
    assert capital["bf16"].startswith("The capital of France is Paris.")
    assert capital["quantized"] != capital["bf16"]
    assert (said["repository"], said["verdict"]["status"]) == (None, "failed")
    assert not (output / "engine").exists(), "it ends before the engine"
    assert not (output / "models").exists()


def test_what_the_message_names_first_is_enough(failed: tuple[int, dict[str, Any], str], output: Path) -> None:
    _, said, error = failed
    [first, *_] = [line.partition("#")[0] for line in error.splitlines() if line.startswith("  builder build")]
    print(first)
    code, mended, error = builder(*shlex.split(first)[1:])
    assert code == 0, error
    print(mended["quality"]["figures"]["score"], mended["quality"]["answers"][0])
    assert mended["quality"]["figures"]["score"]["value"] >= 90
    assert mended["quality"]["figures"]["kl"]["value"] < said["quality"]["figures"]["kl"]["value"] / 2
    assert "Paris" in mended["quality"]["answers"][0]["quantized"]
    assert mended["smoke"]["passed"]
    assert Path(mended["repository"]).parent == output / "models"
