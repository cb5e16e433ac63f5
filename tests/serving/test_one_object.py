"""--json prints one object on stdout for every command: the result, and the error if the command failed after it."""

from __future__ import annotations

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from builder.cli import main
from builder.core.output import Output
from builder.core.safetensors_io import read_header
from builder.core.store import Store
from builder.hub.snapshot import fetch
from builder.recipe import schema
from builder.triton import repository

TINY = Path(__file__).parents[1] / "data" / "tiny-qwen3"


def one_object(*argv: str, code: int, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The object that a command prints, which must be the only output on stdout."""
    assert main.main([*argv, "--json"]) == code
    printed = capsys.readouterr()
    found: dict[str, Any] = json.loads(printed.out)
    assert ("error" in found) is (code != 0)
    if code:
        assert found["exit_code"] == code
        assert f"error: {found['error']['what'].splitlines()[0]}" in printed.err
    return found


def test_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = shutil.copytree(TINY, tmp_path / "model")
    fetch(schema.Model(id=str(model)), store=Store(tmp_path / "out", Output("quiet")))
    argv = ["verify", "--output", str(tmp_path / "out")]
    [name] = one_object(*argv, code=0, capsys=capsys)["artifacts"]
    (model / "merges.txt").write_bytes(b"#")
    found = one_object(*argv, code=6, capsys=capsys)
    assert found["artifacts"][name]


def test_inspect(checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = shutil.copytree(checkpoints["qwen3"], tmp_path / "checkpoint")
    assert one_object("inspect", str(checkpoint), code=0, capsys=capsys)["findings"] == []
    rank = checkpoint / "tensorrt_llm" / "rank0.safetensors"
    content = bytearray(rank.read_bytes())
    norm = read_header(rank)["transformer.ln_f.weight"]
    content[norm.begin : norm.end] = b"\xff" * norm.nbytes
    rank.write_bytes(content)
    found = one_object("inspect", str(checkpoint), code=6, capsys=capsys)
    assert found["findings"]
    assert set(found["layouts"]) == {"unified", "tensorrt_llm"}


def test_a_plan_that_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--model", str(TINY), "--gpu", "sm120", "--output", str(tmp_path)]
    assert one_object(*argv, code=0, capsys=capsys)["refusal"] is None
    huge = ["--max-batch-size", "60000", "--max-input-len", "1024", "--max-seq-len", "2048"]
    found = one_object(*argv, *huge, code=3, capsys=capsys)
    assert found["error"]["what"] == found["refusal"]
    assert found["sizes"]["parameters"]


def test_a_smoke_test_that_fails(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a server that answers every request with status 503."""

    class Busy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(503)

        do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    def make(directory: Path) -> dict[str, Any]:
        (tmp_path / "engine").mkdir()
        shutil.copy(checkpoints["qwen3"] / "tensorrt_llm" / "config.json", tmp_path / "engine")
        config = json.loads((tmp_path / "engine" / "config.json").read_text())
        build = {"max_batch_size": 2, "max_input_len": 64, "max_seq_len": 128, "max_beam_width": 1}
        built = {"version": "1.2.1", "pretrained_config": config, "build_config": {**build, "plugin_config": {}}}
        (tmp_path / "engine" / "config.json").write_text(json.dumps(built))
        return {**repository.write(directory / "models", tmp_path / "engine", TINY, schema.Repository())}

    link = Store(tmp_path / "out", Output("quiet")).stage("repository", {}, make).path
    with ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"127.0.0.1:{server.server_port}"
        found = one_object("smoke", str(link), "--http", where, "--grpc", where, code=5, capsys=capsys)
        server.shutdown()
    assert found["passed"] is False
    assert found["checks"]


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["plan", "--model", "./absent", "--gpu", "cpu"], 2),
        (["report", "./absent"], 2),
        (["inspect", "."], 2),
        (["explain", "no_such_flag_at_all"], 2),
        (["clean", "--all", "--output", "/dev/null/x"], 2),
    ],
)
def test_a_failure_alone(argv: list[str], code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(one_object(*argv, code=code, capsys=capsys)) == {"error", "exit_code"}


def test_a_result_that_is_printed_early_is_printed_once(capsys: pytest.CaptureFixture[str]) -> None:
    """`serve` prints its addresses at once. A later error is only on stderr."""
    out = Output("json")
    out.result({"http": "127.0.0.1:8000"})
    out.finish()
    assert json.loads(capsys.readouterr().out) == {"http": "127.0.0.1:8000"}
    out.result({"error": {}})
    out.finish()
    assert capsys.readouterr().out == ""
