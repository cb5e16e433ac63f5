"""How many streams a repository carries at once follows the engine's batch, up to a limit that the plan states."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from builder.cli.main import main
from builder.core.output import Output
from builder.recipe import schema
from builder.serving.server import ServerOptions, serve
from builder.triton import repository, stream_capacity
from tests.triton.test_models import ECHO, stream
from tests.triton.test_repository import SNAPSHOT, configs, write_engine


@pytest.mark.parametrize(
    ("batch", "asked", "wanted"), [(8, None, 8), (32, None, 32), (64, None, 32), (64, 48, 48), (8, 2, 2)]
)
def test_the_instances_follow_the_batch(tmp_path: Path, batch: int, asked: int | None, wanted: int) -> None:
    limits = {"max_batch_size": batch, "max_input_len": 128, "max_seq_len": 256, "plugin_config": {}}
    engine = write_engine(tmp_path / "engine", build_config=limits)
    facts = repository.write(tmp_path / "models", engine, SNAPSHOT, schema.Repository(bls_instances=asked))
    assert facts["bls_instances"] == wanted
    assert configs(tmp_path / "models")["tensorrt_llm_bls"].instance_group[0].count == wanted


def test_as_many_clients_stream_at_once_as_the_engine_has_places(tmp_path: Path) -> None:
    """The stand-in takes 0.05 s for a token: 20 take a second, and eight clients no longer than one."""
    repository.write(tmp_path / "models", write_engine(tmp_path / "engine"), SNAPSHOT, schema.Repository())
    with serve(
        tmp_path / "models", out=Output("quiet"), log=tmp_path / "log", options=ServerOptions(engine_backend=ECHO)
    ) as server:
        first: list[float] = []

        def ask() -> None:
            start = time.monotonic()
            stream(server, text_input="! wait", max_tokens=60, stream=True)
            first.append(time.monotonic() - start)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(first) == 8
    assert max(first) < 2 * 60 * 0.05, first  # with four instances the last ones would take twice as long as the first


def test_the_plan_says_how_many_and_what_they_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--model", str(SNAPSHOT), "--output", str(tmp_path)]
    assert main([*argv, "--gpu", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["streams"]
    assert found == {"at_once": 8, "bytes": stream_capacity.memory(8, 4096), "why": "max_batch_size 8"}
    assert main([*argv, "--gpu", "cpu", "--max-batch-size", "256"]) == 0
    assert "32 (max_batch_size 256, at most 32), a process each: " in capsys.readouterr().out
    assert main([*argv, "--gpu", "sm100", "--target", "llmapi", "--json"]) in (0, 3)
    assert json.loads(capsys.readouterr().out)["streams"] is None
