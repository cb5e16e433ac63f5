"""Adapters served by the real Triton: through the gateway by name, through Triton's own models by tensors."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import Queue
from typing import Any

import adapters
import numpy as np
import openai
import pytest
import torch
import tritonclient.grpc as triton
from safetensors.torch import load_file
from tokenizers import Tokenizer

from builder import pipeline
from builder.core.output import Output
from builder.core.store import Store
from builder.gateway.engine import Engine
from builder.gateway.settings import Model, places, read_models
from builder.gateway.tensors import Sampling, Tensor, TokenRequest, read_adapter
from builder.lora.adapter import open_adapter
from builder.recipe import schema
from builder.reference.model import ReferenceModel
from builder.serving.client import Client
from builder.serving.gateway import gateway
from builder.serving.server import Server, serve
from builder.serving.smoke_checks import Checks
from builder.serving.smoke_prompts import NotChecked
from builder.triton.repository import Repository
from tests.reference.test_adapters import MODEL, merged

PROMPT, TOKENS = "Return the number of", 12
QUIET = Output("quiet")


@dataclass(frozen=True)
class Served:
    """A repository with two adapters and a cache for one, its server and its gateway's client. expected: the text of
    each model, by the name of its adapter, from merged weights."""

    repository: Repository
    server: Server
    client: openai.OpenAI
    name: str
    expected: dict[str, str]

    def complete(self, adapter: str, **options: Any) -> Any:
        model = f"{self.name}:{adapter}" if adapter else self.name
        options = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, **options}
        return self.client.completions.create(model=model, **options)

    def text(self, adapter: str) -> str:
        found: str = self.complete(adapter).choices[0].text
        return found


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    tmp = tmp_path_factory.mktemp("lora")
    places = {
        "sql": adapters.write(tmp / "sql", ("q_proj", "v_proj"), rank=4, lora_alpha=6),
        "law": adapters.write(tmp / "law", adapters.ALL, rank=2, lora_alpha=1, seed=2),
    }
    room = 2 * max(open_adapter(name, place).values for name, place in places.items())
    asked = {
        "model.id": str(MODEL), "gpu": "cpu", "quantization.format": "bf16", "quantization.kv_cache_dtype": "auto",
        "lora.adapters": [f"{name}={place}" for name, place in places.items()],
        "repository.parameters": {"lora_cache_host_memory_bytes": room},
    }  # fmt: skip
    built = pipeline.build(schema.resolve(asked), Store(tmp / "store", QUIET), until="repository")
    assert built.engine is not None
    assert built.repository is not None
    model = ReferenceModel.load(built.engine.path)
    models = {"": model, "sql": merged(model, places["sql"], 6 / 4), "law": merged(model, places["law"], 1 / 2)}
    expected = {name: generated(one) for name, one in models.items()}
    assert len(set(expected.values())) == 3
    with (
        serve(built.repository.models, out=QUIET, log=tmp / "triton.log") as server,
        gateway(built.repository.path, server.grpc_url, ("127.0.0.1", None), log=tmp / "gateway.log") as front,
        openai.OpenAI(base_url=front.url, api_key="none", max_retries=0) as client,
    ):
        name = next(one.id for one in client.models.list())
        yield Served(built.repository, server, client, name, expected)


def generated(model: ReferenceModel) -> str:
    """The greedy answer of a model, in this process."""
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    prompt = tokenizer.encode(PROMPT).ids
    kept, ids, new = model.new_cache(), torch.tensor(prompt), []
    for _ in range(TOKENS):
        new.append(int(model.forward(ids, kept)[-1].argmax()))
        ids = torch.tensor(new[-1:])
    text: str = tokenizer.decode(prompt + new)
    return text.removeprefix(tokenizer.decode(prompt))


def tensors(served: Served, adapter: str, *, weights: bool) -> list[triton.InferInput]:
    """The inputs of a request to one of Triton's text models."""
    one = served.repository.facts["adapter_files"][adapter]
    made = {
        "text_input": ("BYTES", np.array([[PROMPT.encode()]], object)),
        "max_tokens": ("INT32", np.array([[TOKENS]], np.int32)),
        "lora_task_id": ("UINT64", np.array([[one["task_id"]]], np.uint64)),
    }
    if weights:
        found = load_file(served.repository.models / "tensorrt_llm" / one["file"])
        made["lora_weights"] = ("BF16", found["lora_weights"][None].view(torch.int16).numpy())
        made["lora_config"] = ("INT32", found["lora_config"][None].numpy())
    inputs = []
    for name, (kind, array) in made.items():
        inputs.append(triton.InferInput(name, array.shape, kind))
        if kind == "BF16":  # of numpy with ml_dtypes alone, and of float32 before release 26.06
            inputs[-1]._raw_content = array.tobytes()
        else:
            inputs[-1].set_data_from_numpy(array)
    return inputs


def through_triton(served: Served, model: str, inputs: list[triton.InferInput]) -> str:
    """The text of a model of Triton's, over a gRPC stream."""
    responses: Queue[Any] = Queue()
    with triton.InferenceServerClient(served.server.grpc_url) as client:
        client.start_stream(lambda result, error: responses.put(error or result))
        client.async_stream_infer(model, inputs, enable_empty_final_response=True)
        found, final = b"", False
        while not final:
            result = responses.get(timeout=60)
            if isinstance(result, Exception):
                raise result
            text = result.as_numpy("text_output")
            found += b"" if text is None else text.item()
            final = result.get_response().parameters["triton_final_response"].bool_param
        client.stop_stream()
    return found.decode()


def test_each_adapter_is_a_model_and_answers_as_merged_weights(served: Served) -> None:
    assert [one.id for one in served.client.models.list()] == [served.name, f"{served.name}:sql", f"{served.name}:law"]
    for name in ("", "sql", "", "law", "sql"):  # each adapter drives the other one out of the cache
        assert served.text(name) == served.expected[name], name
    with pytest.raises(openai.NotFoundError):
        served.text("other")


def test_an_evicted_adapter_is_sent_again(served: Served) -> None:
    """What the gateway does about: the engine asks for the weights of an adapter that it has no more."""
    assert served.text("sql") == served.expected["sql"]
    known = tensors(served, "sql", weights=False)
    assert through_triton(served, "tensorrt_llm_bls", known) == served.expected["sql"]
    assert served.text("law") == served.expected["law"]
    with pytest.raises(triton.InferenceServerException, match=r"not found in cache\. Please send LoRA weights"):
        through_triton(served, "ensemble", known)
    assert served.text("sql") == served.expected["sql"]


def test_one_of_many_requests_brings_the_adapter(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them holding hundreds of MB would be too much for the gateway and for Triton."""
    found = places(served.repository, {"": served.name}, served.server.grpc_url)
    model = next(model for _, model in read_models(found) if model.adapter == "sql")
    ids = model.vocabulary.tokenizer.encode(PROMPT).ids
    request = TokenRequest(ids, TOKENS, Sampling(temperature=0), (), streaming=True)
    brought: list[str] = []

    def read(model: Model) -> list[Tensor]:
        brought.append(model.adapter)
        return read_adapter(model)

    async def ask(engine: Engine, number: int) -> str:
        found: list[int] = []
        await engine.generate(request, f"many {number}", lambda step: found.extend(step.ids) or True)
        return model.vocabulary.tokenizer.decode(found)

    async def ask_often() -> list[str]:
        engine = Engine(served.server.grpc_url, model)
        try:
            return await asyncio.gather(*(ask(engine, number) for number in range(8)))
        finally:
            await engine.close()

    monkeypatch.setattr("builder.gateway.engine.read_adapter", read)
    assert served.text("law")
    assert asyncio.run(ask_often()) == [served.expected["sql"]] * 8
    assert brought == ["sql"]


@pytest.mark.parametrize("model", ["ensemble", "tensorrt_llm_bls"])
def test_tritons_models_pass_an_adapter_on(model: str, served: Served) -> None:
    assert served.text("law")
    assert through_triton(served, model, tensors(served, "sql", weights=True)) == served.expected["sql"]
    assert through_triton(served, model, tensors(served, "sql", weights=False)) == served.expected["sql"]
    assert through_triton(served, model, tensors(served, "sql", weights=False)[:2]) == served.expected[""]


def test_requests_with_and_without_an_adapter_run_together(served: Served) -> None:
    names = ["", "sql"] * 6
    with ThreadPoolExecutor(len(names)) as pool:
        assert list(pool.map(served.text, names)) == [served.expected[name] for name in names]


def test_the_smoke_test_uses_each_adapter(served: Served) -> None:
    made = served.repository
    checks = Checks(Client.for_repository(served.server.http_url, served.server.grpc_url, made.facts, 60), made.facts)
    name = "the engine takes each LoRA adapter"
    with pytest.raises(NotChecked, match="not on this machine"):
        checks.named()[name]()
    assert replace(checks, models=made.models).named()[name]() == "sql, law"


def test_an_adapter_waits_for_room_that_others_use(served: Served) -> None:
    """The client is told to try again, and can once the other answer has ended."""
    stream = served.complete("sql", max_tokens=400, stream=True)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError, match="All adapters that the model server has room for are in use"):
        served.text("law")
    stream.close()
    for _ in range(100):
        try:
            assert served.text("law") == served.expected["law"]
            break
        except openai.RateLimitError:
            continue
    else:
        pytest.fail("the adapter's room is never given back")
