"""A real Triton server with a stand-in for the engine, and gateways in front of it, each a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

from builder.core.output import Output
from builder.core.store import Store
from builder.recipe import schema
from builder.serving.server import Server, ServerOptions, serve
from builder.triton import repository
from tests.triton.test_repository import SNAPSHOT, write_engine

ECHO = Path(__file__).parents[1] / "support" / "echo_backend.py"
MODEL = "tiny"
MAX_INPUT_LEN, MAX_SEQ_LEN = 256, 8192
# As `builder gateway` runs it, but with limits that no user needs to set.
SCRIPT = """
import json, sys
from builder.gateway import server
from builder.gateway.limits import Limits
from builder.gateway.listener import listen
from builder.gateway.settings import Place, Settings
path, grpc, name, limits, keys = json.loads(sys.argv[1])
listener = listen("127.0.0.1", None)
ready = lambda: print(listener.getsockname()[1], flush=True)
settings = Settings((Place(name, path, "", grpc),), Limits(**limits), tuple(keys))
server.run(settings, listener, drain=3, ready=ready)
"""


@dataclass
class Running:
    """A gateway: its URL without /v1, its process, and the lines of its log so far."""

    url: str
    child: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)

    def client(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)


@contextmanager
def running(
    path: Path, grpc: str, *, keys: tuple[str, ...] = (), env: Mapping[str, str] | None = None, **limits: Any
) -> Iterator[Running]:
    """A gateway. `env`: further variables of its environment."""
    job = json.dumps([str(path), grpc, MODEL, limits, keys])
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, job],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | (env or {}),
    ) as child:  # fmt: skip
        assert child.stdout is not None
        assert child.stderr is not None
        port = child.stdout.readline().strip()
        assert port, child.stderr.read()
        found = Running(f"http://127.0.0.1:{port}", child)

        def read() -> None:
            assert child.stderr is not None
            for line in child.stderr:
                found.lines.append(json.loads(line) if line.startswith("{") else {"text": line})

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            yield found
        finally:
            child.terminate()
            child.wait(30)
            reader.join(5)


def write_repository(
    tmp: Path, part: schema.Repository, snapshot: Path = SNAPSHOT, **build: int
) -> repository.Repository:
    """A finished repository for an engine that does not exist. `build`: other limits of the engine."""
    limits = {"max_batch_size": 64, "max_input_len": MAX_INPUT_LEN, "max_seq_len": MAX_SEQ_LEN, "max_beam_width": 1}
    config = {**limits, **build, "plugin_config": {"use_paged_context_fmha": False}}
    engine = write_engine(tmp / "engine", build_config=config)

    def make(directory: Path) -> dict[str, Any]:
        return repository.write(directory / "models", engine, snapshot, part)

    return repository.open_repository(Store(tmp / "store", Output("quiet")).stage("repository", {}, make).path)


@pytest.fixture(scope="module")
def echo_repository(tmp_path_factory: pytest.TempPathFactory) -> repository.Repository:
    return write_repository(tmp_path_factory.mktemp("gateway"), schema.Repository(bls_instances=1))


@pytest.fixture(scope="module")
def triton(echo_repository: repository.Repository, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("triton") / "log"
    with serve(
        echo_repository.models, out=Output("quiet"), log=log, options=ServerOptions(engine_backend=ECHO)
    ) as server:
        yield server


@pytest.fixture(scope="module")
def gateway(echo_repository: repository.Repository, triton: Server) -> Iterator[Running]:
    with running(echo_repository.path, triton.grpc_url) as found:
        yield found


@pytest.fixture(scope="module")
def client(gateway: Running) -> Iterator[openai.OpenAI]:
    with gateway.client() as client:
        yield client


Serve = Callable[..., Running]


@pytest.fixture(scope="module")
def serve_with(triton: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts a gateway with another chat template, and other tokens in the tokenizer, in front of the same server."""
    with ExitStack() as stack:

        def start(template: str, tokens: dict[str, str] | None = None, **part: Any) -> Running:
            tmp = tmp_path_factory.mktemp("repository")
            snapshot = write_snapshot(tmp / "snapshot", template, tokens or {})
            made = write_repository(tmp, schema.Repository(**part), snapshot)
            return stack.enter_context(running(made.path, triton.grpc_url))

        yield start


def write_snapshot(directory: Path, template: str, tokens: dict[str, str]) -> Path:
    """The fixture's tokenizer with this template. `tokens`: added tokens to rename and to mark as special."""
    shutil.copytree(SNAPSHOT, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    (directory / "chat_template.jinja").write_text(template)
    file = json.loads((directory / "tokenizer.json").read_text())
    for token in file["added_tokens"]:
        if token["content"] in tokens:
            token |= {"content": tokens[token["content"]], "special": True}
    (directory / "tokenizer.json").write_text(json.dumps(file))
    return directory
