"""Any value in config.json or a recipe leads to a plan or to a clear error, quickly and in bounded memory."""

from __future__ import annotations

import json
import random
import resource
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from source_models import ALL, LLAMA, MOE, SHARDED, VARIANTS, copy, flags

from builder import plan
from builder.core.errors import BuilderError, UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.hub import snapshot
from builder.model import config_values, tensor_names
from builder.recipe import schema
from builder.recipe.schema import Model

ODD: tuple[Any, ...] = (
    None, "", "\ud800", -1, 0, 0.5, 3, 1e9, 10**9, 10**30, float("inf"), float("nan"),
    [], {}, True, [1], ["x"], {"a": {}},
)  # fmt: skip
# Keys that no bundled config.json has, and that this project or a served architecture reads.
MORE = (
    *config_values.SIZES, *config_values.NUMBERS, *config_values.SWITCHES, *config_values.WORDS, "dtype", "torch_dtype",
    *config_values.engine_fields(object),
    "quantization_config", "compression_config", "auto_map", "text_config", "layer_types", "architectures",
)  # fmt: skip
KINDS = ("linear", "yarn", "llama3", "longrope", None)
SECONDS = 2.0  # for one plan, on a busy machine


def odd_configs(config: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """config.json with one odd value, or without one of its keys."""
    for key in sorted({*config, *MORE}):
        yield f"no {key}", {name: value for name, value in config.items() if name != key}
        for value in ODD:
            yield f"{key}: {value!r}", {**config, key: value}
    for key in config_values.ROPES:
        for kind in KINDS:
            for name in (*config_values.ROPE_NUMBERS, "original_max_position_embeddings", "long_factor"):
                for value in (0, "x", float("nan"), 2.0, {}):
                    yield f"{key}: {kind} {name} {value!r}", {**config, key: {"rope_type": kind, name: value}}


def outcome(model: Path, out: Path, **more: Any) -> BuilderError | None:
    """The error that a plan for the model raises, if any."""
    try:
        resolved = schema.resolve(flags(model, **more))
        plan.plan(resolved, Store(out, Output("quiet"), dry=True))
    except BuilderError as error:
        str(error).encode()  # and it can be printed
        return error
    return None


# Thousands of plans for each model, all in make test-slow. By default one in eight, others each time, for a dense model
# and a mixture.
FUZZED = [pytest.param(one, 1, id=one.name, marks=pytest.mark.slow) for one in ALL]
FUZZED += [pytest.param(one, 8, id=f"{one.name}-eighth") for one in ALL if one.name in ("tiny-qwen3", "qwen3_moe")]


@pytest.mark.parametrize(("source", "share"), FUZZED)
def test_odd_values_lead_to_a_plan_or_to_a_clear_error(source: Path, share: int, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in source.iterdir():
        if file.name != "config.json":
            (model / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text())
    more: dict[str, Any] = {"gpu": "sm120", "engine.tp": 2}
    if not tensor_names.known(config):
        more |= {"target": "llmapi", "quantization.kv_cache_dtype": "auto"}
    planned, tried = 0, list(odd_configs(config))
    for name, odd in tried[random.randrange(share) :: share]:
        (model / "config.json").write_text(json.dumps(odd))
        began = time.monotonic()
        try:
            error = outcome(model, tmp_path / "out", **more)
        except Exception as unexpected:
            raise AssertionError(f"{source.name} with {name}") from unexpected
        planned += error is None
        assert time.monotonic() - began < SECONDS * 10, name
    served = not source.name.startswith("gemma2")  # which no target takes
    assert (planned > 50 / share) == served
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 4 << 20, "KiB"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_hidden_layers": 1e9}, r"num_hidden_layers is 1000000000\.0; expected: a whole number"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'"),
        ({"vocab_size": True}, "vocab_size is true"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor is missing for 'llama3'"),
        ({"rope_parameters": {"full_attention": {"factor": "x"}}}, r"rope_parameters\.full_attention\.factor is 'x'"),
        ({"dtype": "int8"}, "dtype is 'int8'; expected: bfloat16, float16, float32"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"hidden_size": 100, "num_attention_heads": 8}, "head_dim is missing"),
        ({"num_experts": 4, "num_experts_per_tok": 8}, "more than the number of experts, 4"),
        ({"vocab_size": 100, "pad_token_id": 100}, "pad_token_id 100 is outside"),
        ({"eos_token_id": [1, "x"]}, "eos_token_id is a list of 2"),
    ],
)
def test_invalid_values_are_named(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        config_values.check(config, "model")


def test_deeply_nested_json_is_rejected(tmp_path: Path, store: Store) -> None:
    model = copy(LLAMA, tmp_path / "model")
    (model / "config.json").write_text("[" * 100_000)
    with pytest.raises(UsageError, match="is not JSON"):
        snapshot.fetch(Model(id=str(model)), store=store)


NUMBERS = [
    key
    for key, value, _ in schema.resolve(flags(SHARDED)).explained()
    if isinstance(value, int | float) and not isinstance(value, bool)
]


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", [10**9, 10**30, -1, float("inf"), float("nan")])
def test_recipe_numbers_of_any_size_are_handled_quickly(key: str, value: float, tmp_path: Path) -> None:
    began = time.monotonic()
    for gpu, target in (("sm120", "engine"), ("sm120", "llmapi"), ("cpu", "reference")):
        outcome(SHARDED, tmp_path, **{"gpu": gpu, "target": target, key: value})
    assert time.monotonic() - began < 10 * SECONDS


def test_a_billion_gpus_are_rejected(tmp_path: Path) -> None:
    error = outcome(SHARDED, tmp_path, **{"gpu": "sm120", "engine.tp": 10**9})
    assert "engine.tp" in str(error)
    error = outcome(SHARDED, tmp_path, **{"gpu": "sm120", "engine.tp": 1024, "engine.pp": 1024})
    assert "1048576 GPUs" in str(error)


def test_each_architecture_with_a_table_has_exactly_its_tensors() -> None:
    from builder.core.safetensors_io import Tensors

    for source in (SHARDED, LLAMA, VARIANTS / "mistral", VARIANTS / "qwen2"):
        config = json.loads((source / "config.json").read_text())
        want = {name: one.shape for name, one in tensor_names.expected(config).items()}
        assert want == {name: info.shape for name, info in Tensors(source).items()}
    assert not tensor_names.known(json.loads((MOE / "config.json").read_text()))


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts"])  # Qwen, Mixtral, DeepSeek
def test_experts_are_counted_by_every_family_key(key: str) -> None:
    assert config_values.routed_experts({key: 8, "num_experts_per_tok": 2}) == 8
    assert config_values.routed_experts({key: None}) == 0
