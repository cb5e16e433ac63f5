"""Several models behind one gateway, and their replacement while requests are answered."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import openai
import pytest
from printed_json import first_object

from builder.gateway.routes import LOOK_SECONDS, Routes, State, read
from builder.gateway.settings import Place
from builder.serving.server import Server
from builder.triton.repository import Repository

SLOW = "! x"  # echo_backend.py waits 0.05 s before each token


@contextmanager
def following(file: Path) -> Iterator[openai.OpenAI]:
    """A gateway that serves what the file names."""
    argv = [sys.executable, "-m", "builder", "gateway", "--routes", str(file), "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        try:
            with openai.OpenAI(base_url=first_object(child)["url"], api_key="none", max_retries=0) as client:
                yield client
        finally:
            child.terminate()
            child.wait(30)


def until(is_so: Callable[[State], bool], file: Path) -> State:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        state = State.read(file)
        if state and is_so(state):
            return state
        time.sleep(0.05)
    raise AssertionError(State.read(file))


@pytest.fixture
def places(echo_repository: Repository, triton: Server) -> list[Place]:
    """The same model twice, and once more as if behind another server."""
    port = triton.grpc_url.rpartition(":")[2]
    other = f"localhost:{port}"
    names = (("a", triton.grpc_url), ("b", triton.grpc_url), ("a", other))
    return [Place(name, echo_repository.path, "", grpc) for name, grpc in names]


def answer(client: openai.OpenAI, model: str) -> str:
    return client.completions.create(model=model, prompt="x y z", max_tokens=4, temperature=0).choices[0].text


def test_routes_are_what_was_written(tmp_path: Path, places: list[Place]) -> None:
    routes = Routes(3, tuple(places))
    routes.write(tmp_path / "routes")
    assert read(tmp_path / "routes") == routes


def test_each_model_has_its_name_and_what_cannot_be_served_replaces_none(tmp_path: Path, places: list[Place]) -> None:
    file = tmp_path / "routes"
    Routes(0, tuple(places[:2])).write(file)
    with following(file) as client:
        assert [model.id for model in client.models.list()] == ["a", "b"]
        assert client.models.retrieve("b").id == "b"
        assert answer(client, "a") == answer(client, "b") != ""
        with pytest.raises(openai.NotFoundError, match=r"'c' does not exist; this server has 'a', 'b'"):
            answer(client, "c")
        Routes(1, (Place("a", tmp_path / "nothing", "", places[0].grpc),)).write(file)
        state = until(lambda state: state.number == 1, file)
        assert "is not a finished repository" in state.fault
        assert answer(client, "b")
        Routes(2, (replace(places[0], member="nothing"),)).write(file)
        assert until(lambda state: state.number == 2, file).fault == "KeyError('nothing')"
        file.write_text("{")
        time.sleep(3 * LOOK_SECONDS)
        Routes(3, tuple(places[:1])).write(file)
        assert until(lambda state: state.number == 3, file).fault == ""
        assert [model.id for model in client.models.list()] == ["a"]


def test_a_request_ends_where_it_began(tmp_path: Path, places: list[Place]) -> None:
    """A replaced server counts as in use until the last stream from it has ended; new requests go to the new one."""
    file, (old, gone, new) = tmp_path / "routes", places
    Routes(0, (old, gone)).write(file)
    with following(file) as client:
        stream = client.completions.create(model="a", prompt=SLOW, max_tokens=100, temperature=0, stream=True)
        events = iter(stream)
        next(events)
        Routes(1, (new,)).write(file)
        state = until(lambda state: state.number == 1, file)
        assert state.fault == ""
        assert state.in_use == {old.grpc, new.grpc}
        assert answer(client, "a")
        with pytest.raises(openai.NotFoundError):
            answer(client, "b")
        assert list(events)[-1].choices[0].finish_reason == "length"
        assert until(lambda state: state.in_use == {new.grpc}, file).fault == ""
        assert answer(client, "a")
