"""The examples run: clients against a served repository, recipes through `builder plan` for models of the real size."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import documents
import pytest
import sparse_models
import yaml

EXAMPLES = documents.ROOT / "examples"
BUILDER = [sys.executable, "-m", "builder"]
RECIPES = {
    "rtx5090": (sparse_models.QWEN3_8B, "RTX 5090"),
    "b200": (sparse_models.LLAMA_70B, "B200"),
    "two-gpus": (sparse_models.QWEN3_32B, "RTX 5090"),
}


def run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, cwd=documents.ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_recipe_has_its_test() -> None:
    assert {file.stem for file in (EXAMPLES / "recipes").glob("*.yaml")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_on_the_card_that_it_is_for(name: str, tmp_path: Path) -> None:
    config, card = RECIPES[name]
    recipe: dict[str, Any] = yaml.safe_load((EXAMPLES / "recipes" / f"{name}.yaml").read_text())
    model = sparse_models.write(config, tmp_path / str(recipe["model"]["id"]).rpartition("/")[2])
    recipe["model"]["id"] = str(model)
    recipe["calibration"] = {"data": "builtin:python-docs"}  # no network here
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    planned = run(
        *BUILDER, "plan", "--recipe", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "o"), "--json"
    )
    found = {row["card"]: row for row in _rows(json.loads(planned))}
    assert found[card]["fits"]


def _rows(plan: Any) -> Iterator[Mapping[str, Any]]:
    """Every object of the plan that judges a card, wherever it stands."""
    if isinstance(plan, Mapping):
        if {"card", "fits"} <= plan.keys():
            yield plan
        for value in plan.values():
            yield from _rows(value)
    elif isinstance(plan, list):
        for value in plan:
            yield from _rows(value)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model, built quickly: few rows, no quality check, no smoke test."""
    output = tmp_path_factory.mktemp("examples") / "artifacts"
    rows = ["--calib-data", "builtin:python-docs", "--calib-samples", "8", "--calib-seq-len", "128"]
    model = ["--model", "tests/data/tiny-qwen3", "--gpu", "cpu", "--output", str(output)]
    built = run(*BUILDER, "build", *model, *rows, "--no-quality-check", "--no-smoke", "--json")
    return Path(json.loads(built)["repository"])


@pytest.fixture(scope="module")
def server(repository: Path) -> Iterator[Mapping[str, str]]:
    """{"http", "grpc"}: addresses of the served repository."""
    argv, pipe = [*BUILDER, "serve", str(repository), "--until-eof"], subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout
        assert process.stdin
        said, found = "", {}
        for line in process.stdout:
            said += line
            found |= dict(re.findall(r"^(http|grpc)\s+([\d.]+:\d+)$", line.strip()))
            if len(found) == 2:
                break
        assert len(found) == 2, said
        yield found
        process.stdin.close()
        process.stdout.read()


def test_the_http_client_prints_an_answer(server: Mapping[str, str]) -> None:
    argv = [sys.executable, str(EXAMPLES / "client_http.py"), "Return the number of", "--max-tokens", "8"]
    assert run(*argv, "--url", f"http://{server['http']}").strip()


def test_the_http_client_says_what_the_server_rejects(server: Mapping[str, str]) -> None:
    argv = [sys.executable, str(EXAMPLES / "client_http.py"), "Return", "--max-tokens", "0"]
    done = subprocess.run([*argv, "--url", f"http://{server['http']}"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "max_tokens" in done.stderr


def test_the_stream_gives_the_same_answer_as_http(server: Mapping[str, str]) -> None:
    argv = ["Return the number of", "--max-tokens", "8", "--url"]
    streamed = run(sys.executable, str(EXAMPLES / "client_grpc_stream.py"), *argv, server["grpc"])
    whole = run(sys.executable, str(EXAMPLES / "client_http.py"), *argv, f"http://{server['http']}")
    assert streamed.strip() == whole.strip()


def test_chat_prints_question_and_answer(repository: Path, server: Mapping[str, str]) -> None:
    argv = [sys.executable, str(EXAMPLES / "chat.py"), str(repository), "What is a list?", "--max-tokens", "8"]
    printed = run(*argv, "--url", server["grpc"]).splitlines()
    assert printed[0] == "Question: What is a list?"
    assert re.match(r"Answer:   .", printed[1])
    assert printed[-1].endswith(f"chat.py {repository}")


def test_chat_keeps_the_conversation_and_stops_its_server(repository: Path) -> None:
    argv = [sys.executable, str(EXAMPLES / "chat.py"), str(repository), "--max-tokens", "4"]
    done = subprocess.run(argv, input="One?\n\nTwo?\n", capture_output=True, text=True, cwd=documents.ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Answer:") == 2
    assert "Ready after" in done.stderr


def test_chat_reports_why_a_repository_is_not_served(tmp_path: Path) -> None:
    argv = [sys.executable, str(EXAMPLES / "chat.py"), str(tmp_path), "Hello?"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=documents.ROOT)
    assert done.returncode not in (0, -9)
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr


def test_the_plan_of_the_quickstart_is_what_is_printed(tmp_path: Path) -> None:
    page = documents.ROOT / "docs" / "quickstart" / "rtx.md"
    [block] = [block for block in documents.blocks(page) if block.text.startswith("decision ")]
    sparse_models.write(sparse_models.QWEN3_8B, tmp_path / "Qwen" / "Qwen3-8B")
    argv = ["plan", "--model", "Qwen/Qwen3-8B", "--gpu", "RTX 5090", "--output", str(tmp_path / "o")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(documents.ROOT)}
    done = subprocess.run([*BUILDER, *argv], capture_output=True, text=True, cwd=tmp_path, env=environment)
    printed = {line.split("\t")[0]: line for line in reversed(done.stdout.splitlines())}  # the first table wins
    for line in block.text.splitlines()[1:]:
        decision, value, origin = re.split(r"  +", line.strip())
        assert printed[decision] == f"{decision}\t{value}\t{origin}"
