"""Trials of the llmapi target and in a container: what is rendered, served and kept. A stand-in for the LLM class
serves in the real Triton, and one for AIPerf asks it once; neither Docker nor TensorRT-LLM runs here."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from llmapi_stand_in import render_with_stand_in

from builder.aiperf.environment import Environment
from builder.aiperf.workload import Load, Workload
from builder.cli.bench import with_route
from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.output import Output
from builder.core.store import Store
from builder.llmapi import arguments as llmapi_arguments
from builder.recipe import schema
from builder.recipe.schema import Resolved
from builder.serving import container
from builder.serving.server import Server, serve
from builder.triton.repository import Repository
from builder.tune import search
from builder.tune.search import Request
from builder.tune.space import space

EXPORT = Path("tests/data/aiperf/profile_export_aiperf.json").resolve()
QUIET = Output("quiet")
WORKLOAD = Workload((Load(concurrency=1),), requests=1, input_tokens=24, output_tokens=8)
# AIPerf's part: one real request to the gateway. Optuna's: the first values that were not tried.
STAND_IN = """#!{python}
import json, pathlib, shutil, sys, urllib.request
words = sys.argv[1:]
if words[0] != "-m":
    told = json.load(sys.stdin)
    tried = [trial["indices"] for trial in told["trials"]]
    for index in range(8):
        found = {{name: min(index, size - 1) for name, size in told["sizes"].items()}}
        if found not in tried:
            break
    print(json.dumps({{"indices": found if found not in tried else None}}))
    sys.exit()
value = lambda name: words[words.index(name) + 1]
body = {{"model": value("--model"), "max_tokens": 4, "temperature": 0}}
body["messages"] = [{{"role": "user", "content": "Return"}}]
asked = urllib.request.Request(value("--url") + "/v1/chat/completions", json.dumps(body).encode())
asked.add_header("Content-Type", "application/json")
with urllib.request.urlopen(asked, timeout=60) as answer:
    assert json.load(answer)["usage"]["completion_tokens"] == 4
results = pathlib.Path(value("--output-artifact-dir"))
results.mkdir()
shutil.copy("{export}", results)
"""


@pytest.fixture
def place(tmp_path: Path) -> Environment:
    made = Environment(tmp_path / "aiperf")
    made.python.parent.mkdir(parents=True)
    made.python.write_text(STAND_IN.format(python=sys.executable, export=EXPORT))
    made.python.chmod(0o755)
    return made


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("tune") / "out", QUIET)


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in for the LLM class beside each model that is rendered."""
    render_with_stand_in(monkeypatch)


def resolved(**more: object) -> Resolved:
    flags = {"model.id": "tests/data/tiny-qwen3", "gpu": "sm120", "target": "llmapi", "calibration.samples": 0,
             "quantization.kv_cache_dtype": "auto", "quality.check": False, "engine.max_input_len": 64,
             "engine.max_seq_len": 128, "engine.max_num_tokens": 256, "engine.max_batch_size": 4}  # fmt: skip
    return schema.resolve({**flags, **more})


def asked(user: Resolved, *parameters: str, trials: int = 2, image: str = "") -> Request:
    def route(workload: Workload, repository: Repository) -> Any:
        return with_route(workload, None, repository)

    return Request(space(user.recipe, parameters), WORKLOAD, trials, route, image)


@pytest.mark.usefixtures("llm")
def test_each_trial_of_the_llm_class_has_its_arguments(
    place: Environment, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llmapi_arguments, "check_machine", lambda resolved: None)
    user = resolved()
    request = asked(user, "stream_interval=1,4", "max_batch_size=4,2", trials=3)
    search.check(user, request, store)
    trials = search.search(user, request, place, store=store)
    assert [trial.settings for trial in trials] == [
        {"stream_interval": 1, "max_batch_size": 4},
        {"stream_interval": 4, "max_batch_size": 2},
    ], "the recipe's own first, then all that is suggested"
    assert all(trial.value for trial in trials)
    written = [path.read_text() for path in store.root.glob("repository/*/models/tensorrt_llm/1/model.yaml")]
    assert sorted(("\nstream_interval: 4\n" in text, "\nmax_batch_size: 2\n" in text) for text in written) == [
        (False, False),
        (True, True),
    ]
    assert len(list(store.root.glob("checkpoint/*"))) == 1, "no other argument makes another checkpoint"


def client(label: str, image: str = "sha256:1") -> Any:
    images = SimpleNamespace(get=lambda name: SimpleNamespace(labels={container.TENSORRT_LLM: label}, id=image))
    return SimpleNamespace(images=images, close=lambda: None)


@pytest.mark.usefixtures("llm")
def test_a_container_serves_each_trial_and_is_part_of_its_key(
    place: Environment, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = []

    @contextmanager
    def in_container(repository: Repository, *, out: Output, image: str) -> Iterator[Server]:
        served.append(image)
        with serve(repository.models, out=out) as server:
            yield server

    monkeypatch.setattr(container, "serve_container", in_container)
    user = resolved()
    request = asked(user, "max_num_tokens=256", trials=1, image="trtllm-builder")
    version = user.recipe.engine.tensorrt_llm
    for identity in ("sha256:1", "sha256:1", "sha256:2"):
        monkeypatch.setattr(container, "connect", lambda identity=identity: client(version, identity))
        search.check(user, request, store)  # no TensorRT-LLM is needed on this machine
        [trial] = search.search(user, request, place, store=store)
        assert trial.value
    assert served == ["sha256:1", "sha256:2"], "by its id, and the second search measured nothing again"
    kept = [json.loads(path.read_text()) for path in store.root.glob("tuning/*/manifest.json")]
    images = [one["ingredients"]["image"] for one in kept if "image" in one["ingredients"]]
    assert sorted(images) == ["sha256:1", "sha256:2"]


def test_without_tensorrt_llm_a_container_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="TensorRT-LLM is not installed") as caught:
        search.check(resolved(), asked(resolved()), Store(tmp_path, QUIET))
    assert "--container" in caught.value.hint


def test_an_image_that_can_t_serve_is_refused_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, store = resolved(), Store(tmp_path, QUIET)
    monkeypatch.setattr(container, "connect", lambda: client("0.9.0"))
    with pytest.raises(IntegrityError, match=r"has TensorRT-LLM 0\.9\.0"):
        search.check(user, asked(user, image="trtllm-builder"), store)
    assert not list(tmp_path.iterdir())
