"""The examples for contributors work: every block of the page is executed, in order, in a copy of the project."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import documents
import pytest

pytestmark = pytest.mark.slow

PAGE = documents.ROOT / "docs" / "contributing" / "extending.md"
COPIED = ("builder", "configs", "triton_templates", "tests/data/tiny-qwen3", "tests/data/arch-variants")
BLOCKS = [block for block in documents.blocks(PAGE) if block.title or block.language in documents.SHELLS]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, with a `builder` command that runs it."""
    copy = tmp_path_factory.mktemp("project")
    for name in COPIED:
        shutil.copytree(documents.ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = copy / "bin" / "builder"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m builder "$@"\n')
    command.chmod(0o755)
    return copy


def test_the_page_has_an_example_of_each_kind() -> None:
    files = [block.title for block in BLOCKS if block.title]
    assert any(name.startswith("configs/gpus/") for name in files)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.title or block.place for block in BLOCKS])
def test_a_block_works(block: documents.Block, project: Path) -> None:
    if block.title:
        file = project / block.title
        assert not file.exists(), "an example adds files; it does not replace one"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.text + "\n")
        return
    environment = {**os.environ, "PATH": f"{project / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(project)}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.text], cwd=project, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
