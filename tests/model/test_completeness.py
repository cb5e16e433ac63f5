"""Incomplete and mislabeled source models are rejected by plan and fetch, before any weight is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import Hub
from source_models import (
    ALL,
    GEMMA2,
    INDEX,
    LLAMA,
    MOE,
    PHI3,
    QWEN2,
    SHARDED,
    WEIGHTS,
    also,
    copy,
    flags,
    renamed,
    set_config,
    typed,
    without,
)

from builder import plan
from builder.core.errors import BuilderError, IntegrityError, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.hub.snapshot import fetch, open_source
from builder.preflight import checks
from builder.recipe import schema
from builder.recipe.schema import Model

UP = "model.layers.3.mlp.up_proj.weight"
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"


@pytest.mark.parametrize("source", ALL, ids=lambda path: path.name)
def test_the_bundled_models_are_complete(source: Path, store: Store) -> None:
    facts = checks.read_model(Model(id=str(source)), store)
    assert fetch(Model(id=str(source)), store=store).config == facts.config


Make = Callable[[Path], Path]


def in_two_shards(target: Path) -> Path:
    model = copy(SHARDED, target)
    index = json.loads((model / INDEX).read_text())["weight_map"]
    other = next(file for file in sorted(set(index.values())) if file != index[UP])
    taken = next(name for name, file in index.items() if file == other)
    made = copy(SHARDED, target.with_name("twice"), also(taken, UP, "BF16", (768, 256)))
    (made / INDEX).write_text((model / INDEX).read_text())
    return made


def two_sets(target: Path) -> Path:
    model = copy(SHARDED, target)
    (model / WEIGHTS).write_bytes((LLAMA / WEIGHTS).read_bytes())
    return model


def index_of_another_save(target: Path) -> Path:
    model = copy(SHARDED, target)
    index = json.loads((model / INDEX).read_text())
    first, *_, last = sorted(index["weight_map"].values())
    index["weight_map"][UP] = first if index["weight_map"][UP] != first else last
    (model / INDEX).write_text(json.dumps(index))
    return model


def not_in_the_index(target: Path) -> Path:
    model = copy(SHARDED, target)
    index = json.loads((model / INDEX).read_text())
    del index["weight_map"][UP]
    (model / INDEX).write_text(json.dumps(index))
    return model


def made(source: Path, change: object = None, **config: object) -> Make:
    return lambda target: copy(source, target, change, **config)  # type: ignore[arg-type]


REJECTED: dict[str, tuple[Make, type[BuilderError], str]] = {
    "a tensor is missing": (made(SHARDED, without(UP)), IntegrityError, f"1 tensors missing.*{UP}"),
    "saved through torch.compile": (made(SHARDED, renamed("", "_orig_mod.")), IntegrityError, "wrapper.*_orig_mod"),
    "saved through DataParallel": (made(LLAMA, renamed("", "module.")), IntegrityError, "wrapper.*module"),
    "saved through PEFT": (made(LLAMA, renamed("", "base_model.model.")), IntegrityError, "wrapper.*base_model.model"),
    "compiled inside": (made(GEMMA2, renamed("model.", "model._orig_mod.")), IntegrityError, "wrapper.*_orig_mod"),
    "an unknown prefix": (made(QWEN2, renamed("", "student.")), IntegrityError, "no tensor of|missing.*unexpected"),
    "a base model's names": (made(QWEN2, renamed("model.", "")), IntegrityError, "base model"),
    "two sets of weights": (two_sets, IntegrityError, "two sets of weights.*Remove"),
    "a tensor in two shards": (in_two_shards, IntegrityError, f"more than one file.*{UP}"),
    "the index of another save": (index_of_another_save, IntegrityError, f"index.*disagree.*{UP}"),
    "a tensor beside the index": (not_in_the_index, IntegrityError, f"not in the index: {UP}"),
    "fewer layers than stored": (made(SHARDED, num_hidden_layers=2), IntegrityError, "num_hidden_layers 2.*up to 5"),
    "more layers than stored": (made(SHARDED, num_hidden_layers=7), IntegrityError, "num_hidden_layers 7.*layer 6"),
    "fewer layers, no table": (made(PHI3, num_hidden_layers=1), IntegrityError, "num_hidden_layers 1.*up to 1"),
    "a billion layers": (made(SHARDED, num_hidden_layers=10**9), UsageError, "num_hidden_layers is 1000000000"),
    "another hidden size": (made(LLAMA, hidden_size=128), IntegrityError, r"hidden_size.*|misshapen"),
    "another head size": (made(LLAMA, head_dim=16), IntegrityError, "heads x head size"),
    "more rows than words": (made(SHARDED, vocab_size=4094), IntegrityError, r"\[4096, 256\].*vocab_size.*vocab_size"),
    "more words than rows": (made(PHI3, vocab_size=4098), IntegrityError, r"embed_tokens.*\[4098, 64\]"),
    "no head, not tied": (made(LLAMA, without(HEAD)), IntegrityError, f"{HEAD}.*tie_word_embeddings to true"),
    "a bias that the architecture does not have": (
        made(LLAMA, also(NORM, "model.layers.0.self_attn.q_proj.bias", "BF16", (128,))),
        IntegrityError,
        "unexpected.*q_proj.bias",
    ),
    "no bias where Qwen2 has one": (
        made(QWEN2, without("model.layers.1.self_attn.k_proj.bias")),
        IntegrityError,
        "missing.*k_proj.bias",
    ),
    "an expert is missing": (made(MOE, without(EXPERT)), IntegrityError, f"missing.*{EXPERT}"),
    "fewer experts": (made(MOE, num_experts=3), IntegrityError, r"unexpected.*experts\.3"),
    "FP8 by type alone": (made(SHARDED, typed(UP, "F8_E4M3")), UnsupportedError, "quantized by a tool.*F8_E4M3"),
    "packed by type alone": (made(PHI3, typed("model.layers.0.mlp.down_proj.weight", "U8")), UnsupportedError, "U8"),
    "weights in float64": (made(LLAMA, typed(Q, "F64")), UnsupportedError, "F64.*Supported dtypes: BF16"),
}  # fmt: skip


@pytest.mark.parametrize("name", REJECTED)
def test_plan_and_fetch_reject_a_model_alike(name: str, tmp_path: Path, store: Store) -> None:
    make, error, says = REJECTED[name]
    model = make(tmp_path / "model")
    with pytest.raises(error, match="(?s)" + says) as planned:
        plan.plan(schema.resolve(flags(model)), Store(tmp_path / "out", Output("quiet"), dry=True))
    with pytest.raises(error) as fetched:
        fetch(Model(id=str(model)), store=store)
    assert str(planned.value) == str(fetched.value)
    assert not list((store.root / "snapshot").glob("[0-9a-f]*"))


@pytest.mark.parametrize("name", ["a tensor is missing", "FP8 by type alone", "a tensor in two shards"])
def test_the_hubs_are_rejected_before_a_weight_is_downloaded(name: str, hub: Hub, store: Store, tmp_path: Path) -> None:
    make, error, says = REJECTED[name]
    hub.add("tiny/model", make(tmp_path / "model"))
    for use in (lambda: open_source(Model(id="tiny/model"), store=store), lambda: fetch(MODEL, store=store)):
        with pytest.raises(error, match="(?s)" + says):
            use()
    assert not [r for r in hub.requests if r.path.startswith("/cdn/") and r.method == "GET" and not r.header]


MODEL = Model(id="tiny/model")


def test_headers_on_the_hub_are_validated_as_strictly_as_local_ones(hub: Hub, store: Store, tmp_path: Path) -> None:
    model = copy(LLAMA, tmp_path / "model")
    content = (model / WEIGHTS).read_bytes()
    (model / WEIGHTS).write_bytes(content.replace(b'"BF16"', b'"BF61"', 1))
    hub.add("tiny/model", model)
    for use in (lambda: fetch(MODEL, store=store), lambda: fetch(Model(id=str(model)), store=store)):
        with pytest.raises(IntegrityError, match="BF61"):
            use()


VALID: dict[str, Make] = {
    "a tied head is stored": made(QWEN2, also(EMBEDDING, HEAD)),
    "rotary frequencies": made(LLAMA, also(NORM, "model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (16,))),
    "an index of one file": lambda target: _with_index(copy(LLAMA, target)),
    "biases that config.json names": made(
        LLAMA,
        lambda t: [t, _zeros(t.name.replace("weight", "bias"), t.shape[0])] if ".self_attn." in t.name else [t],
        attention_bias=True,
    ),
    "a rope of transformers 4": made(LLAMA, rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}),
}


def _zeros(name: str, n: int) -> object:
    from builder.core.safetensors_io import NewTensor

    return NewTensor(name, "BF16", (n,), [bytes(2 * n)])


def _with_index(model: Path) -> Path:
    from builder.core.safetensors_io import read_header

    (model / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(read_header(model / WEIGHTS), WEIGHTS)}))
    return model


@pytest.mark.parametrize("name", VALID)
def test_a_valid_model_is_accepted(name: str, store: Store, tmp_path: Path) -> None:
    model = VALID[name](tmp_path / "model")
    plan.plan(schema.resolve(flags(model)), Store(tmp_path / "out", Output("quiet"), dry=True))
    assert fetch(Model(id=str(model)), store=store).files


def test_a_config_without_a_size_is_rejected(tmp_path: Path, store: Store) -> None:
    model = copy(SHARDED, tmp_path / "model")
    set_config(model, intermediate_size=None)
    with pytest.raises(UsageError, match="intermediate_size is missing"):
        fetch(Model(id=str(model)), store=store)
