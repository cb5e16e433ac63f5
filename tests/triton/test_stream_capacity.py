"""One process carries as many streams as the engine's max_batch_size, up to a limit that the plan states."""

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
    ("batch", "processes", "threads", "expected"),
    [(8, 1, 16, 8), (256, 1, 512, 256), (1024, 1, 512, 512), (1024, 2, 512, 1024), (8, 2, 16, 8)],
)
def test_streams_follow_the_batch_size(tmp_path: Path, batch: int, processes: int, threads: int, expected: int) -> None:
    limits = {"max_batch_size": batch, "max_input_len": 128, "max_seq_len": 256, "plugin_config": {}}
    engine = write_engine(tmp_path / "engine", build_config=limits)
    facts = repository.write(tmp_path / "models", engine, SNAPSHOT, schema.Repository(bls_instances=processes))
    assert facts["streams"] == expected
    config = configs(tmp_path / "models")["tensorrt_llm_bls"]
    assert config.instance_group[0].count == processes
    assert config.parameters["threads"].string_value == str(threads)


def test_max_batch_size_streams_run_concurrently(tmp_path: Path) -> None:
    """The stand-in engine takes 0.05 s per token. Eight concurrent streams take no longer than one."""
    repository.write(tmp_path / "models", write_engine(tmp_path / "engine"), SNAPSHOT, schema.Repository())
    with serve(
        tmp_path / "models", out=Output("quiet"), log=tmp_path / "log", options=ServerOptions(engine_backend=ECHO)
    ) as server:
        first: list[float] = []

        def run() -> None:
            start = time.monotonic()
            stream(server, text_input="! wait", max_tokens=60, stream=True)
            first.append(time.monotonic() - start)

        threads = [threading.Thread(target=run) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(first) == 8
    assert max(first) < 2 * 60 * 0.05, first  # with four at a time, the last ones would take twice as long as the first


def test_the_plan_shows_the_streams_and_their_memory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--model", str(SNAPSHOT), "--output", str(tmp_path)]
    assert main([*argv, "--gpu", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["streams"]
    assert found == {"at_once": 8, "bytes": stream_capacity.memory(1, 4096), "why": "max_batch_size 8"}
    assert main([*argv, "--gpu", "cpu", "--max-batch-size", "1024"]) == 0
    assert "512 (512 for each of repository.bls_instances, 1): " in capsys.readouterr().out
    assert main([*argv, "--gpu", "sm100", "--target", "llmapi", "--json"]) in (0, 3)
    assert json.loads(capsys.readouterr().out)["streams"] is None
