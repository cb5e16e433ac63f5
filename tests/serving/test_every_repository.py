"""Every kind of repository that is rendered loads in the real Triton and answers: each target, streaming or not, the
settings of each preset, one model and several. The smoke test asks each model in every way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import exports
import pytest
from llmapi_stand_in import put_stand_in

from builder import pipeline
from builder.checkpoint import huggingface, layouts
from builder.core import paths
from builder.core.output import Output
from builder.core.store import Store
from builder.llmapi import arguments as llmapi_arguments
from builder.llmapi import repository as llmapi_repository
from builder.recipe import schema
from builder.serving.client import Client, Request
from builder.serving.server import ServerOptions, serve
from builder.serving.smoke import smoke_models
from builder.serving.smoke_checks import Checks
from builder.triton import repository
from builder.triton.combined import Member, combine
from builder.triton.lint.run import lint
from builder.triton.repository import Repository
from tests.triton.test_models import ECHO, echo
from tests.triton.test_repository import SNAPSHOT, write_engine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
QUIET = Output("quiet")
PRESETS = sorted(path.stem for path in paths.data("configs", "presets").glob("*.yaml"))
CONFIG = json.loads((SNAPSHOT / "config.json").read_text())
LIMITS = {"engine.max_input_len": 128, "engine.max_seq_len": 256, "engine.max_batch_size": 8}
MORE: list[dict[str, Any]] = [  # what no preset sets
    {"preprocessing_instances": 2, "postprocessing_instances": 3, "bls_instances": 2},
    {"exclude_input_in_output": False, "add_special_tokens": True, "guided_decoding": False},
    {"max_queue_delay_microseconds": 5000, "kv_cache_free_gpu_mem_fraction": 0.3},
]
Render = Callable[[Store, str, schema.Resolved], Repository]


def asked(target: str) -> Iterator[tuple[str, schema.Resolved]]:
    """Each recipe of a target, with a name."""
    card = {"engine": "sm120", "llmapi": "sm100", "reference": "cpu"}[target]
    flags = {"model.id": str(SNAPSHOT), "gpu": card, "target": target, **LIMITS}
    for decoupled in (True, False):
        stream = {"repository.decoupled": decoupled}
        for preset in PRESETS:
            if target == "engine":
                yield f"{preset}, {decoupled}", schema.resolve(flags | stream, preset=preset)
        for number, part in enumerate([{}, *MORE] if target != "llmapi" else [{}]):
            own = {f"repository.{key}": value for key, value in part.items()}
            yield f"own {number}, {decoupled}", schema.resolve(flags | stream | own)


def of_engine(store: Store, name: str, resolved: schema.Resolved) -> Repository:
    engine = write_engine(store.root.parent / "engines" / "one")

    def make(directory: Path) -> dict[str, Any]:
        return repository.write(directory / "models", engine, SNAPSHOT, resolved.recipe.repository)

    return repository.open_repository(store.stage("repository", {"of": name}, make).path)


def of_llmapi(store: Store, name: str, resolved: schema.Resolved) -> Repository:
    unified = store.root.parent / "checkpoint" / "unified"
    if not unified.exists():
        exports.export(exports.quantized(SNAPSHOT), unified)
        huggingface.complete(unified, SNAPSHOT)
        layouts.write_tensorrt_llm(unified, CONFIG, unified.parent / "tensorrt_llm")
    arguments = llmapi_arguments.resolve(resolved, CONFIG)

    def make(directory: Path) -> dict[str, Any]:
        facts = llmapi_repository.write(directory / "models", unified, SNAPSHOT, arguments, resolved)
        put_stand_in(directory / "models")
        return facts

    return repository.open_repository(store.stage("repository", {"of": name}, make).path)


def of_reference(store: Store, name: str, resolved: schema.Resolved) -> Repository:
    recipe = resolved.recipe.repository.model_dump(exclude_defaults=True)
    flags = {"model.id": str(SNAPSHOT), "gpu": "cpu", "quantization.format": "bf16", "quality.check": False, **LIMITS}
    flags |= {f"repository.{key}": value for key, value in recipe.items()}
    made = pipeline.build(schema.resolve(flags), store, until="repository").link
    assert made is not None
    return repository.open_repository(made.resolve())


RENDER: dict[str, tuple[Render, Path | None]] = {
    "engine": (of_engine, ECHO),  # the templates are those of the C++ backend, for which a stand-in echoes
    "llmapi": (of_llmapi, None),
    "reference": (of_reference, None),
}


def answers(found: Repository, backend: Path | None, log: Path) -> None:
    """Serves the repository, and asks each of its models in every way. lint has nothing to say about it."""
    assert lint(found.path).findings == ()
    options = ServerOptions(engine_backend=backend) if backend else ServerOptions()
    with serve(found.models, out=QUIET, log=log, options=options) as server:
        if not backend:
            smoke_models(server.http_url, server.grpc_url, found, out=QUIET).check()
            return
        for facts in found.members.values():
            client = Client.for_repository(server.http_url, server.grpc_url, facts, 60)
            checks = Checks(client, facts)
            assert checks.ready()
            texts = {ask(Request("Hello there", 9)).text for ask in checks.endpoints.values()}
            assert texts == {echo("Hello there", 9)}


def digest(models: Path) -> str:
    """Of the models' configuration and code: repositories with the same are loaded once."""
    files = sorted(path for path in models.rglob("*") if path.suffix in {".pbtxt", ".py", ".yaml"})
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


@pytest.mark.parametrize("target", RENDER)
def test_it_loads_and_answers_in_every_way(target: str, tmp_path: Path) -> None:
    render, backend = RENDER[target]
    store, loaded, models = Store(tmp_path / "store", QUIET), set(), {}
    for name, resolved in asked(target):
        found = render(store, name, resolved)
        models[name] = found
        if (key := digest(found.models)) not in loaded:
            loaded.add(key)
            answers(found, backend, tmp_path / "log")
    assert len(loaded) >= 2
    streaming, whole = (next(one for name, one in models.items() if name.endswith(end)) for end in ("True", "False"))
    members = {"chat": Member(streaming, "chat", 0.4), "code.v2": Member(whole, "code.v2", 0.3)}
    if target == "reference":
        members = {name: Member(member.repository, name) for name, member in members.items()}
    answers(combine(members, store=store), backend, tmp_path / "log")
