"""Several models in one repository: names, references, settings, and what can't be combined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builder.core.errors import UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.store import Store, verify
from builder.recipe import schema
from builder.triton import combined, repository
from builder.triton.combined import Member, combine
from builder.triton.lint.run import lint
from builder.triton.repository import Repository
from builder.trtllm import compatibility
from tests.triton.test_repository import SNAPSHOT, configs, parameters, write_engine

ROLES = ("ensemble", "ensemble_infer", "postprocessing", "preprocessing", "tensorrt_llm", "tensorrt_llm_bls")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", Output("quiet"))


def rendered(store: Store, key: str, part: dict[str, Any] | None = None, **engine: Any) -> Repository:
    """A repository of one model in the store."""
    made = write_engine(store.root.parent / f"engine-{key}", **engine)

    def make(directory: Path) -> dict[str, Any]:
        return repository.write(directory / "models", made, SNAPSHOT, schema.Repository(**part or {}))

    return repository.open_repository(store.stage("repository", {"of": key}, make).path)


def test_each_models_triton_models_call_each_other(store: Store) -> None:
    made = combine({name: Member(rendered(store, name), name) for name in ("chat", "code.v2")}, store=store)
    found = configs(made.models)
    assert sorted(found) == sorted(f"{name}_{role}" for name in ("chat", "code.v2") for role in ROLES)
    for name in ("chat", "code.v2"):
        steps = {step.model_name for step in found[f"{name}_ensemble"].ensemble_scheduling.step}
        assert steps == {f"{name}_{role}" for role in ("preprocessing", "tensorrt_llm", "postprocessing")}
        for role in ("ensemble_infer", "tensorrt_llm_bls"):
            of = parameters(found[f"{name}_{role}"])
            assert of["preprocessing_model_name"] == f"{name}_preprocessing"
            assert of["tensorrt_llm_model_name"] == f"{name}_tensorrt_llm"
            assert (made.models / of["tokenizer_dir"] / "tokenizer.json").is_file()
        assert parameters(found[f"{name}_tensorrt_llm"])["gpt_model_path"].endswith(f"engine-{name}")
    assert made.members["chat"]["models"]["stream"] == "chat_tensorrt_llm_bls"
    assert (made.facts["target"], made.facts["world_size"]) == ("reference", 1)
    assert lint(made.path).findings == ()
    assert compatibility.prefixes(made.models) == ["chat_", "code.v2_"]
    assert not any(verify_all := verify(store.root, store.out).values()), verify_all


def test_a_fault_in_one_of_several_is_found(store: Store) -> None:
    """`lint` and the check before serving look at every model, not at the one that has no prefix."""
    made = combine({name: Member(rendered(store, name), name) for name in ("a", "b")}, store=store)
    config = made.models / "b_postprocessing" / "config.pbtxt"
    config.write_text(config.read_text().replace("b_preprocessing/1/tokenizer", "a_preprocessing/1/tokenizer"))
    engine = made.models / "b_tensorrt_llm" / "config.pbtxt"
    engine.write_text(engine.read_text().replace("max_batch_size: 8", "max_batch_size: 9"))
    found = " ".join(f"{one.file} {one.what}" for one in lint(made.models).findings)
    assert "b_postprocessing/config.pbtxt" in found
    assert "tokenizer_dir is a_preprocessing/1/tokenizer, and that of b_preprocessing b_preproc" in found
    assert "built for 8" in found
    served = compatibility.read_served(made.models, "b_")
    assert served is not None
    assert (
        "built for 8"
        in compatibility.mismatches(served, compatibility.read_engine(served.engine), compatibility.Runtime())[0].what
    )


def test_a_share_of_the_memory_of_its_own(store: Store) -> None:
    members = {"a": Member(rendered(store, "a"), "a", 0.4), "b": Member(rendered(store, "b"), "b")}
    found = configs(combine(members, store=store).models)
    values = [parameters(found[f"{name}_tensorrt_llm"])[combined.FRACTION] for name in "ab"]
    assert values == ["0.4", str(schema.Repository().kv_cache_free_gpu_mem_fraction)]
    assert [combined.fraction_of(member) for member in members.values()] == [float(value) for value in values]


def test_it_is_cached_and_made_from_its_members(store: Store) -> None:
    members = {"a": Member(rendered(store, "a"), "a")}
    first = combine(members, store=store)
    assert combine(members, store=store).path == first.path
    assert combine({"a": Member(members["a"].repository, "a", 0.5)}, store=store).path != first.path


@pytest.mark.parametrize("name", ["", "a b", "a/b", ".hidden", "x" * 101, "é", "-a"])
def test_names_that_triton_can_not_have(name: str) -> None:
    with pytest.raises(UsageError, match="can't be the name of a model"):
        combined.check_names({name: None})


def test_names_that_differ_by_case_only() -> None:
    with pytest.raises(UsageError, match="Chat and chat differ by case only"):
        combined.check_names({"chat": None, "Chat": None})


def facts(**values: Any) -> Repository:
    return Repository(Path("nowhere"), "", {"target": "engine", "tensorrt_llm": "1.2.1", "world_size": 1, **values})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"tensorrt_llm": "1.1.0"}, r"more than one TensorRT-LLM version: a 1\.2\.1, b 1\.1\.0"),
        ({"target": "llmapi"}, "more than one target: a engine, b llmapi"),
        ({"world_size": 2}, "b has 2 ranks"),
    ],
)
def test_what_one_server_can_not_serve(other: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        combined.check_compatible({"a": facts(), "b": facts(**other)})


def test_engines_for_different_cards(store: Store) -> None:
    members = {name: rendered(store, name) for name in ("a", "b")}
    for name, sm in (("a", 90), ("b", 120)):
        built = {"target": "engine", "tensorrt": "10", "sm": sm, "gpu": "x"}
        (store.root.parent / f"engine-{name}" / compatibility.BUILT_WITH).write_text(json.dumps(built))
    with pytest.raises(UnsupportedError, match="different GPUs: a sm90, b sm120"):
        combined.check_compatible(members)
