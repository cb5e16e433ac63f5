"""Two models in one repository behind the real server and the gateway."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import exports
import openai
import pytest
from printed_json import first_object

from builder import pipeline
from builder.core import supervisor
from builder.core.output import Output
from builder.core.store import Store
from builder.recipe import schema
from builder.serving import health, updating
from builder.serving.client import Client, Request
from builder.triton.repository import open_repository

PROMPT = "Return the number of"


@contextmanager
def command(*argv: str, log: Path = Path("/dev/null")) -> Iterator[dict[str, Any]]:
    """A running command's first JSON object. `log`: gets its stderr."""
    with open(log, "wb") as sink, subprocess.Popen(
        [sys.executable, "-m", "builder", *argv, "--json"],
        stdout=subprocess.PIPE, stderr=sink, text=True, start_new_session=True,
    ) as child:  # fmt: skip
        try:
            yield {**first_object(child), "command": child.pid}
        finally:
            child.terminate()
            child.wait(60)


def build(root: Path, model: str, name: str) -> Path:
    """Publishes a model of the reference executor, which is not quantized."""
    recipe = {"model.id": str(exports.MODELS[model]), "gpu": "cpu", "name": name, "quantization.format": "bf16",
              "quality.check": False}  # fmt: skip
    link = pipeline.build(schema.resolve(recipe), Store(root, Output("quiet")), until="repository").link
    assert link is not None
    return link


def builder(*argv: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "builder", *argv, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the models `a` and `b`, and `both` with the two of them, called `chat` and `code`."""
    root = tmp_path_factory.mktemp("several") / "artifacts"
    a, b = build(root, "qwen3", "a"), build(root, "llama", "b")
    builder("combine", "both", "--add", f"{a}=chat", "--add", f"{b}=code", "--output", str(root))
    return root


def completion(url: str, model: str) -> str:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        asked: Any = {"model": model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0}
        return client.completions.create(**asked).choices[0].text


def test_each_model_is_served_by_its_name(root: Path) -> None:
    """The gateway calls the engine models, the ensembles and tensorrt_llm_bls call each other: all answer alike."""
    with command("serve", str(root / "models" / "both")) as found:
        with openai.OpenAI(base_url=found["openai"], api_key="none") as client:
            assert [model.id for model in client.models.list()] == ["chat", "code"]
        texts = {model: completion(found["openai"], model) for model in ("chat", "code")}
        assert texts["chat"] != texts["code"]
        with pytest.raises(openai.NotFoundError):
            completion(found["openai"], "a")
        for name, facts in open_repository(root / "models" / "both").members.items():
            direct = Client.for_repository(found["http"], found["grpc"], facts, 60)
            request = Request(PROMPT, 16)
            assert {direct.grpc_stream(request).text, direct.http_generate(request).text} == {texts[name]}
        assert health.fault(found["http"]) == ""  # it asks the models of both
        assert {"chat_ensemble", "code_tensorrt_llm_bls"} <= {*health.text_models(found["http"])}


class Clients:
    """Clients that stream one answer after the other, without retries, until they are stopped."""

    def __init__(self, url: str, model: str, count: int) -> None:
        self.url, self.model = url, model
        self.texts: list[str] = []
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, text: str) -> None:
        """Waits until the newest answers of all clients are this text."""
        deadline = time.monotonic() + 240
        while self.texts[-2 * len(self._threads) :] != [text] * 2 * len(self._threads):
            assert time.monotonic() < deadline, self.texts[-8:]
            assert not self.errors
            time.sleep(0.1)

    def _run(self) -> None:
        with openai.OpenAI(base_url=self.url, api_key="none", max_retries=0) as client:
            asked: Any = {"model": self.model, "prompt": PROMPT, "max_tokens": 16, "temperature": 0, "stream": True}
            while not self._stop.is_set():
                try:
                    self.texts.append("".join(event.choices[0].text for event in client.completions.create(**asked)))
                except Exception as error:
                    self.errors.append(repr(error))


def triton_ports(pid: int) -> list[int]:
    """The HTTP ports of the Triton servers below a process."""
    found = []
    for child in supervisor.descendants(pid):
        with suppress(OSError):
            words = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
            if Path(words[0]).name == "tritonserver":
                found += [int(word.partition("=")[2]) for word in words if word.startswith("--http-port=")]
    return found


def may_load(port: int) -> int:
    """The status of a request to load a model."""
    connection = http.client.HTTPConnection(f"127.0.0.1:{port}", timeout=5)
    try:
        connection.request("POST", "/v2/repository/models/tensorrt_llm/load", "{}")
        return connection.getresponse().status
    finally:
        connection.close()


def eventually(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def replaced(found: dict[str, Any], version: str, log: Path) -> bool:
    """Whether the watchdog of the server's `builder serve` has replaced a process, by stderr and the metrics."""
    metrics = urllib.request.urlopen(found["openai"].removesuffix("/v1") + "/metrics").read().decode()
    events = [f"version {version}: postprocessing: answers", f"version {version}: The process of postprocessing has"]
    return "\nwatchdog_replaced_total 1.0\n" in metrics and all(event in log.read_text() for event in events)


def test_a_new_version_and_the_way_back_lose_no_request(root: Path, tmp_path: Path) -> None:
    """Three clients stream all the time while the link moves to a new version, back, and to one that can't be served.

    Each answer is whole and of one version. Nobody can load models into any of the servers. What the watchdog of a
    server does is shown and counted.
    """
    link, log = build(root, "qwen3", "live"), tmp_path / "log"
    first = link.resolve().name
    served = command("serve", str(link), "--auto-update", log=log)
    with served as found, Clients(found["openai"], "live", 3) as clients:
        while len(clients.texts) < 6:
            assert not clients.errors
            time.sleep(0.1)
        for pid in supervisor.descendants(found["command"]):
            if b"/postprocessing/" in Path(f"/proc/{pid}/cmdline").read_bytes():  # which the gateway does not need
                os.kill(pid, signal.SIGKILL)
        eventually(lambda: replaced(found, first, log))
        old = clients.texts[0]
        build(root, "llama", "live")
        ports: set[int] = set()
        while len(set(clients.texts)) == 1:
            assert not clients.errors
            for port in set(triton_ports(found["command"])) - ports:
                with suppress(OSError):  # it does not listen yet
                    assert may_load(port) == 403
                    ports.add(port)
            time.sleep(0.1)
        assert len(ports) == 2
        [new] = set(clients.texts) - {old}
        clients.wait_for(new)
        assert builder("rollback", "live", "--output", str(root))["to"] == first
        clients.wait_for(old)
        link.unlink()
        link.symlink_to("../repository/0123456789abcdef")
        count, end = len(clients.texts), time.monotonic() + 4 * updating.LOOK_SECONDS  # it looks at the link
        while len(clients.texts) < count + 6 or time.monotonic() < end:
            time.sleep(0.1)
    assert clients.errors == []
    assert set(clients.texts) == {old, new}
