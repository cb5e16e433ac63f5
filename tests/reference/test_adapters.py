"""The reference executor's LoRA: an adapter equals merged weights, and the cache is TensorRT-LLM's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import adapters
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from builder import pipeline
from builder.core.output import Output
from builder.core.store import Store
from builder.lora import tensors
from builder.lora.adapter import open_adapter
from builder.lora.modules import MODULES
from builder.recipe import schema
from builder.reference.adapters import Adapter, AdapterCache, AdapterLimits
from builder.reference.model import Layer, Linear, ReferenceModel
from builder.reference.sampling import RequestError

MODEL = Path(__file__).parents[1] / "data" / "tiny-qwen3"
CONFIG = json.loads((MODEL / "config.json").read_text())
IDS = torch.tensor([7, 300, 11, 42, 1000, 3])


def engine_config(*, rank: int = 8) -> dict[str, Any]:
    lora = {"lora_target_modules": [one.name for one in MODULES], "max_lora_rank": rank}
    return {
        "pretrained_config": CONFIG,
        "build_config": {"plugin_config": {"lora_plugin": "auto"}, "lora_config": lora},
    }


def given(directory: Path, task: int = 1, dtype: str = "float32") -> dict[str, np.ndarray[Any, Any]]:
    """A request's tensors for an adapter, as Triton passes them."""
    file = directory / "made.safetensors"
    tensors.write(open_adapter("sql", directory), dtype, file)
    made = {name: tensor[None].float().numpy() if name == "lora_weights" else tensor[None].numpy()
            for name, tensor in load_file(file).items()}  # fmt: skip
    return {**made, "lora_task_id": np.array([[task]], np.uint64)}


def cache(limit: int = 1 << 30, **options: Any) -> AdapterCache:
    return AdapterCache(AdapterLimits.read(engine_config(**options)), limit)


def taken(found: AdapterCache, request: Mapping[str, Any]) -> Adapter:
    one = found.take(request, 0)
    assert one is not None
    return one[1]


# ---- the same as merged weights


def merged(model: ReferenceModel, directory: Path, scale: float) -> ReferenceModel:
    """The model with the adapter's products added to its weights."""
    added = adapters.products(directory, scale)

    def linear(one: Linear, *products: torch.Tensor | None) -> Linear:
        sizes = one.weight.shape[0] - sum(len(p) for p in products if p is not None)
        parts = [torch.zeros(sizes, one.weight.shape[1]) if p is None else p for p in products]
        return replace(one, weight=one.weight + torch.cat(parts))

    def layer(index: int, one: Layer) -> Layer:
        q, k, v = (added.get((index, kind), torch.zeros(adapters.SIZES[kind][::-1])) for kind in adapters.ALL[:3])
        rest = {"dense": "o_proj", "fc": "gate_proj", "gate": "up_proj", "proj": "down_proj"}
        changed = {
            name: linear(getattr(one, name), added.get((index, kind), torch.zeros(adapters.SIZES[kind][::-1])))
            for name, kind in rest.items()
        }
        return replace(one, qkv=linear(one.qkv, q, k, v), **changed)

    made = object.__new__(ReferenceModel)
    made.__dict__ |= {**model.__dict__, "layers": [layer(index, one) for index, one in enumerate(model.layers)]}
    return made


def greedy(model: ReferenceModel, adapter: Adapter | None = None) -> tuple[list[int], torch.Tensor]:
    """Eight tokens, and the logits of the prompt."""
    kept, ids = model.new_cache(), []
    logits = first = model.forward(IDS, kept, adapter)
    for _ in range(8):
        ids.append(int(logits[-1].argmax()))
        logits = model.forward(torch.tensor(ids[-1:]), kept, adapter)
    return ids, first


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ReferenceModel:
    """The bundled model in BF16, whose layers round no inputs: a merged one would round others than an adapter."""
    asked = {"model.id": str(MODEL), "gpu": "cpu", "quantization.format": "bf16", "quantization.kv_cache_dtype": "auto"}
    store = Store(tmp_path_factory.mktemp("store"), Output("quiet"))
    built = pipeline.build(schema.resolve(asked), store, until="checkpoint")
    assert built.checkpoint is not None
    return ReferenceModel.load(built.checkpoint.tensorrt_llm)


@pytest.mark.parametrize("kinds", [("q_proj", "v_proj"), ("down_proj",), ("o_proj", "gate_proj"), adapters.ALL])
def test_an_adapter_equals_merged_weights(kinds: tuple[str, ...], model: ReferenceModel, tmp_path: Path) -> None:
    directory = adapters.write(tmp_path, kinds, rank=4, lora_alpha=6)
    adapter = taken(cache(), given(directory))
    with_adapter, logits = greedy(model, adapter)
    with_merged, wanted = greedy(merged(model, directory, 6 / 4))
    assert with_adapter == with_merged
    assert torch.allclose(logits, wanted, atol=1e-3)
    assert not torch.allclose(logits, greedy(model)[1], atol=0.1)


# ---- the cache


def test_weights_come_once_then_the_number_is_enough(tmp_path: Path) -> None:
    found, request = cache(), given(adapters.write(tmp_path))
    number = {"lora_task_id": request["lora_task_id"]}
    with pytest.raises(RequestError, match=r"LoRA task 1 not found in cache\. Please send LoRA weights with request"):
        found.take(number, 0)
    assert taken(found, request) is taken(found, number)
    assert found.take({}, 0) is None


def test_adapters_in_use_stay_and_the_oldest_other_one_goes(tmp_path: Path) -> None:
    requests = [given(adapters.write(tmp_path / str(n), seed=n), task=n) for n in (1, 2, 3)]
    size = taken(cache(), requests[0]).nbytes
    found = cache(2 * size)
    for request in requests[:2]:
        taken(found, request)
    with pytest.raises(RequestError, match=r"PEFT Cache is full\. Could not store taskId=3"):
        found.take(requests[2], 0)
    found.release(2)
    assert set(found._users) == {1}  # numbers that clients have chosen are not kept
    taken(found, requests[2])
    taken(found, {"lora_task_id": requests[0]["lora_task_id"]})
    with pytest.raises(RequestError, match="task 2 not found"):
        found.take({"lora_task_id": requests[1]["lora_task_id"]}, 0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda request: request.pop("lora_task_id"), "lora_task_id must be set"),
        (lambda request: request.pop("lora_config"), "must have both"),
        (lambda request: request.update(lora_weights=request["lora_weights"][0]), "Invalid shape"),
        (lambda request: request.update(lora_config=request["lora_config"][:, 1:]), "the same size"),
        (lambda request: request.update(lora_config=request["lora_config"][:, :, :2]), "dim2 of lora_keys"),
        (
            lambda request: request.update(
                lora_config=np.pad(request["lora_config"], [(0, 0), (0, 0), (0, 1)], constant_values=1)
            ),
            "does not support DoRA",
        ),
        (lambda request: request["lora_config"].__setitem__((0, 0, 0), 9), "lora module 9 not enabled"),
        (lambda request: request["lora_config"].__setitem__((0, 0, 1), 6), "layerId"),
        (lambda request: request["lora_config"].__setitem__((0, 0, 2), 0), "adapterSize to be > 0"),
        (lambda request: request["lora_config"].__setitem__((0, 0, 2), 99), r"Invalid low_rank \(99\)"),
        (lambda request: request["lora_config"].__setitem__((0, 0, 2), 8), "to few values for q_proj"),
    ],
)
def test_tensors_that_do_not_fit_are_rejected(change: Any, says: str, tmp_path: Path) -> None:
    request = {name: array.copy() for name, array in given(adapters.write(tmp_path)).items()}
    change(request)
    with pytest.raises(RequestError, match=says):
        cache().take(request, 0)


def test_an_engine_without_adapters_rejects_them(tmp_path: Path) -> None:
    config = engine_config()
    config["build_config"]["plugin_config"]["lora_plugin"] = None
    assert AdapterLimits.read(config) is None
    with pytest.raises(RequestError, match="takes no LoRA adapters"):
        AdapterCache(None, 1).take(given(adapters.write(tmp_path)), 0)
