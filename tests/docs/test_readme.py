"""What the README promises a newcomer, in 150 lines. Its commands are tested with all documents (test_documents.py)."""

from __future__ import annotations

import re
from pathlib import Path

import documents
import yaml

from builder.architectures import catalog
from builder.trtllm import versions

README = Path("README.md")
TEXT = README.read_text()
COMMANDS = [line.strip() for block in documents.blocks(README.absolute()) if block.language == "bash"
            for line in block.text.splitlines()]  # fmt: skip


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) < 150


def test_the_two_commands_come_first_and_ci_runs_them() -> None:
    assert COMMANDS[:2] == ["make demo", "make test"]
    for command in COMMANDS[:2]:
        assert command in Path(".ci/run").read_text()


def test_the_three_commands_for_a_gpu_machine_come_next() -> None:
    words = [line.split()[2:4] for line in COMMANDS[2:5]]
    assert words == [["run", "build"], ["up", "-d"], ["run", "smoke"]]


def test_it_names_every_page_for_users() -> None:
    pages = [page for page in documents.documents() if "quickstart" in page.parts or "guides" in page.parts]
    assert all(str(page.relative_to(documents.ROOT)) in TEXT for page in pages)


def test_the_models_and_versions_that_it_names_are_those_of_the_code() -> None:
    ranges = yaml.safe_load(Path("configs/trtllm/llmapi.yaml").read_text())["versions"]
    for row in ranges:
        assert row["first"] in TEXT
        assert row["last"] in TEXT
    for version in versions.versions():
        assert version.removesuffix(".0") in TEXT
    said = re.sub(r"[^a-z0-9]", "", TEXT.lower())
    for name in {*catalog.served_by("engine"), *catalog.served_by("llmapi")}:
        title = re.split(r" \(|, | and ", catalog.find({"architectures": [name]}).title)[0]
        assert re.sub(r"[^a-z0-9]", "", title.lower()) in said, title
