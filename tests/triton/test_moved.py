"""A repository has no absolute path: the directory that it was rendered in can be moved, and it serves the same."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.cli.main import main
from builder.core.errors import IntegrityError
from builder.core.output import Output
from builder.core.store import Store, verify
from builder.recipe import schema
from builder.serving.server import Server, ServerOptions, serve
from builder.triton import repository
from builder.trtllm import compatibility, references
from tests.triton.test_models import ECHO, echo, generate
from tests.triton.test_repository import SNAPSHOT, write_engine


def written(root: Path) -> Path:
    """A repository beside its engine, as in an output directory."""
    engine = write_engine(root / "engine" / "key")
    (engine / "rank0.safetensors").write_bytes(b"")
    models = root / "repository" / "key" / "models"
    facts = repository.write(models, engine, SNAPSHOT, schema.Repository())
    assert facts["engine"] == "../../engine/key"
    return models


def texts(directory: Path) -> dict[str, str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_text(encoding="utf-8") for path in files}


def test_no_file_names_the_place_where_it_was_rendered(tmp_path: Path) -> None:
    models = written(tmp_path / "unlikely-name")
    assert not [name for name, text in texts(models).items() if "unlikely-name" in text]
    configs = {name: text for name, text in texts(models).items() if name.endswith("config.pbtxt")}
    assert not [name for name, text in configs.items() if 'string_value: "/' in text]
    assert configs == {
        name: text
        for name, text in texts(written(tmp_path / "another" / "and-deeper")).items()
        if name.endswith("config.pbtxt")
    }


def answers(models: Path, log: Path) -> list[str]:
    options = ServerOptions(engine_backend=ECHO)
    with serve(models, out=Output("quiet"), log=log, options=options) as server:
        return [asked(server, model) for model in ("ensemble", "tensorrt_llm_bls")]


def asked(server: Server, model: str) -> str:
    return generate(server, model, text_input="Hello there", max_tokens=9)


def test_a_moved_output_directory_serves_the_same(tmp_path: Path) -> None:
    models = written(tmp_path / "first")
    before = answers(models, tmp_path / "log1")
    assert before == [echo("Hello there", 9)] * 2
    shutil.move(tmp_path / "first", tmp_path / "second")
    moved = tmp_path / "second" / "repository" / "key" / "models"
    assert answers(moved, tmp_path / "log2") == before
    link = tmp_path / "link"  # as those in models/
    link.symlink_to(moved.parent)
    for place in (moved, link / "models"):
        served = compatibility.read_served(place)
        assert served is not None
        assert served.engine == tmp_path / "second" / "engine" / "key"


def test_a_repository_without_its_engine_says_where_it_looked(tmp_path: Path) -> None:
    models = written(tmp_path / "first")
    alone = shutil.copytree(models.parent, tmp_path / "elsewhere" / "repository" / "key")
    looked = tmp_path / "elsewhere" / "engine" / "key"
    with pytest.raises(IntegrityError, match="There is no engine at") as caught:
        compatibility.check(alone / "models")
    assert str(looked) in caught.value.what
    shutil.copytree(tmp_path / "first" / "engine" / "key", looked)
    compatibility.check(alone / "models")


def test_a_relative_engine_is_found_by_plain_triton_in_the_models_directory(tmp_path: Path) -> None:
    """The C++ backend looks from its working directory, so the path leads there from the engine model's directory."""
    models = written(tmp_path)
    config = compatibility.parse(models / "tensorrt_llm" / "config.pbtxt")
    path = config.parameters["gpt_model_path"].string_value
    found = subprocess.run(
        [sys.executable, "-c", "import os, sys; print(os.path.exists(sys.argv[1]))", path],
        cwd=models / "tensorrt_llm", capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout == "True\n"


NAMES = st.lists(st.sampled_from(["a", "b", "engine", "c d"]), min_size=1, max_size=4)


@given(NAMES, NAMES, NAMES)
def test_a_reference_leads_back_wherever_both_are_moved(target: list[str], origin: list[str], place: list[str]) -> None:
    first, second = Path("/first"), Path("/second", *place)
    reference = references.relative(first.joinpath(*target), first.joinpath(*origin))
    assert not os.path.isabs(reference)
    assert references.resolved(reference, second.joinpath(*origin)) == second.joinpath(*target)
    assert references.resolved("/absolute/engine", second) == Path("/absolute/engine"), "as rendered before"


def test_the_facts_lead_to_the_engine(tmp_path: Path) -> None:
    models = written(tmp_path)
    facts: dict[str, Any] = {"engine": "../../engine/key", "target": "engine"}
    found = repository.Repository(models.parent, "0" * 64, facts)
    assert json.loads((found.path_of("engine") / "config.json").read_text())["version"] == "1.2.1"


def test_what_is_exported_serves_where_it_is_moved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The repository with its engine, without the output directory that it comes from; whole or not at all."""
    store = Store(tmp_path / "store", Output("quiet"))
    engine = store.stage("engine", {}, lambda made: write_engine(made) and {}).path
    (link := store.root / "models" / "live").parent.mkdir()

    def make(directory: Path) -> dict[str, Any]:
        facts = repository.write(directory / "models", engine, SNAPSHOT, schema.Repository())
        return {**facts, "adapters": ["law"]}  # as of --target llmapi

    link.symlink_to(store.stage("repository", {}, make).path)
    assert main(["export", str(link), str(tmp_path / "out")]) == 0
    assert main(["export", str(link), str(tmp_path / "out")]) == 0, "what is there stays"
    printed = capsys.readouterr()
    assert "builder serve" in printed.out
    assert "not copied: the LoRA adapters law" in printed.err
    assert main(["export", str(link), str(store.root / "models" / "out")]) == 2, "into the output directory itself"
    assert not (store.root / "models" / "out").exists()
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    shutil.rmtree(store.root)
    moved = tmp_path / "elsewhere" / "models" / "live"
    found = repository.open_repository(moved)
    assert found.path_of("engine").is_relative_to(tmp_path / "elsewhere")
    assert (found.path_of("engine") / "config.json").is_file()
    assert not any(verify(tmp_path / "elsewhere", Output("quiet")).values())
    assert main(["export", str(moved), str(tmp_path / "elsewhere")]) == 2, "onto itself"
    (found.path_of("engine") / "rank0.safetensors").write_bytes(b"")
    compatibility.check(found.models)
    assert answers(found.models, tmp_path / "log") == [echo("Hello there", 9)] * 2
