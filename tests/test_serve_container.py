"""What can be said about a container without an engine; tests/docker has the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from builder import serve_container
from builder.errors import ServingError, UnsupportedError


def connect(before: str = "", **environment: str) -> str:
    """What connect() says in a process of its own: the SDK leaves a socket open where no engine answers."""
    code = (
        f"import sys\n{before}\nfrom builder import serve_container\n"
        "try: serve_container.connect()\n"
        "except serve_container.UsageError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_no_engine_is_one_clear_message(tmp_path: Path) -> None:
    said = connect(DOCKER_HOST=f"unix://{tmp_path}/no.sock")
    assert said.startswith("No Docker engine answers.\n")
    assert "systemctl start docker" in said


def test_the_sdk_is_asked_for_only_where_it_is_needed() -> None:
    assert "pip install 'trtllm-builder[container]'" in connect("sys.modules['docker'] = None")


@pytest.mark.parametrize(
    ("said", "kind", "what"),
    [
        ('could not select device driver "nvidia" with capabilities: [[gpu]]', UnsupportedError, "no GPU to give"),
        ("driver failed ...: Bind for 127.0.0.1:8000 failed: port is already allocated", ServingError, "is in use"),
        ("no space left on device", ServingError, "does not start"),
    ],
)
def test_the_engine_s_words_become_a_message(said: str, kind: type[Exception], what: str) -> None:
    error = serve_container._start_error(said)
    assert type(error) is kind
    assert what in error.what
    assert said in error.why


def test_the_store_lies_where_the_repository_says() -> None:
    assert serve_container._inside({"engine": "/artifacts/engine/abc"}) == Path("/artifacts")
    assert serve_container._inside({"checkpoint": "/artifacts/checkpoint/abc/unified"}) == Path("/artifacts")


def test_a_process_is_told_from_a_later_one_of_the_same_id() -> None:
    child = subprocess.Popen(["sleep", "100"])
    started = serve_container._start_time(child.pid)
    child.kill()
    child.wait()
    assert started.isdigit()
    assert serve_container._start_time(child.pid) != started
    pid, own, namespace = serve_container._us().split(".")
    assert (int(pid), own) == (os.getpid(), serve_container._start_time(os.getpid()))
    assert namespace.isdigit()
