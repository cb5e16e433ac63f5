"""The transform stage in a build: cached, complete or absent, known to everything after it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import source_models
import torch
from source_models import QWEN2, SHARDED

from builder import pipeline, plan
from builder.cli import plan_view
from builder.core import store as stores
from builder.core.errors import IntegrityError, UsageError
from builder.core.output import Output
from builder.core.safetensors_io import NewTensor, Tensors
from builder.core.store import Store
from builder.evaluate.runners import local
from builder.hub.snapshot import Snapshot, fetch
from builder.preflight.prepare import prepare
from builder.publish import links
from builder.recipe import schema
from builder.recipe.transform import Transform
from builder.report import gather
from builder.transform import writing
from builder.transform.rotations import random_rotations
from builder.transform.stage import transformed

QUIET = Output("quiet")
ROTATED = Transform(name="spinquant")
RECIPE = {"model.id": str(QWEN2), "gpu": "cpu", "transform.name": "spinquant", "calibration.samples": 0,
          "quality.check": False}  # fmt: skip


def resolved(**more: Any) -> schema.Resolved:
    return schema.resolve({**RECIPE, **more})


def snapshot_of(model: Path, store: Store) -> Snapshot:
    return fetch(schema.Model(id=str(model)), store=store)


def test_it_is_a_model_with_its_own_digest_and_the_other_files(tmp_path: Path) -> None:
    store = Store(tmp_path, QUIET)
    source = snapshot_of(QWEN2, store)
    made = transformed(source, ROTATED, store=store)
    assert (made.model_id, made.revision, made.path.parent.name) == (source.model_id, None, "transform")
    assert made.digest not in ("", source.digest)
    assert [name for name in source.files if name not in ("config.json", "model.safetensors")] == [
        name for name in made.files if name not in ("config.json", "model.safetensors")
    ]
    assert (made.path / "tokenizer.json").read_bytes() == (QWEN2 / "tokenizer.json").read_bytes()
    assert made.config == {**source.config, "tie_word_embeddings": False}
    assert json.loads((made.path / "config.json").read_text())["tie_word_embeddings"] is False
    assert made.artifact.facts["rotations"] == {
        "r1": "random Hadamard matrix of order 64",
        "r2": "random Hadamard matrix of order 16",
    }
    made.source.check_unchanged()
    (made.path / "model.safetensors").write_bytes(b"other")
    with pytest.raises(IntegrityError, match=r"changed after its files were hashed: model\.safetensors"):
        made.source.check_unchanged()


def test_it_is_cached_and_every_value_makes_another_one(tmp_path: Path) -> None:
    store = Store(tmp_path, QUIET)
    source = snapshot_of(QWEN2, store)

    def digest(**part: Any) -> str:
        return transformed(source, Transform(name="spinquant", **part), store=store).digest

    first = digest()
    assert not store.done[-1].cached
    assert digest() == digest(rotations=("r2", "r1")) == digest(rotations="r1, r2") == first
    assert store.done[-1].cached
    assert len({first, digest(seed=1), digest(kind="orthogonal"), digest(rotations="r1"), digest(rotations="r2")}) == 5
    assert transformed(source, Transform(), store=store) is source


def test_a_sharded_model_is_written_in_shards_that_say_the_same(tmp_path: Path) -> None:
    names = [path.name for path in SHARDED.iterdir()]
    rotations = random_rotations(json.loads((SHARDED / "config.json").read_text()), ROTATED)
    for directory, most in ((tmp_path / "one", 10**9), (tmp_path / "many", 2_000_000)):
        directory.mkdir()
        writing.write(SHARDED, names, rotations, directory, QUIET, shard_bytes=most)
    one, many = Tensors(tmp_path / "one"), Tensors(tmp_path / "many")
    assert len(one.files) == 1
    assert len(many.files) > 3
    assert {name: one.read(name) for name in one} == {name: many.read(name) for name in many}
    assert {name: i.dtype for name, i in one.items()} == {name: i.dtype for name, i in Tensors(SHARDED).items()}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.0.self_attn.v_proj.bias",
        "model.layers.1.input_layernorm.weight",
        "model.norm.weight",
    ],
)
def test_weights_that_are_not_finite_are_named_and_nothing_stays(name: str, tmp_path: Path) -> None:
    def spoilt(tensor: NewTensor) -> list[NewTensor]:
        data = b"".join(bytes(chunk) for chunk in tensor.chunks)  # type: ignore[arg-type]
        data = data[:-2] + b"\xc0\x7f" if tensor.name == name else data
        return [NewTensor(tensor.name, tensor.dtype, tensor.shape, [data])]

    model = source_models.copy(QWEN2, tmp_path / "model", spoilt)
    store = Store(tmp_path / "out", QUIET)
    with pytest.raises(IntegrityError, match=f"^{name} holds NaN or Inf"):
        transformed(snapshot_of(model, store), ROTATED, store=store)
    assert list((tmp_path / "out" / "transform").iterdir()) == []


def test_values_that_are_too_large_once_they_are_rotated_are_told_from_damage(tmp_path: Path) -> None:
    """Weights of 6e4 in FP16, times those of a norm."""

    def large(tensor: NewTensor) -> list[NewTensor]:
        count = math.prod(tensor.shape)
        value = 6e4 if tensor.name in ("model.norm.weight", "model.embed_tokens.weight") else 0.01
        return [NewTensor(tensor.name, "F16", tensor.shape, [np.full(count, value, np.float16).tobytes()])]

    model = source_models.copy(QWEN2, tmp_path / "model", large, torch_dtype="float16", dtype="float16")
    store = Store(tmp_path / "out", QUIET)
    with pytest.raises(IntegrityError, match=r"weight has values that F16 can't hold once they are rotated") as error:
        transformed(snapshot_of(model, store), ROTATED, store=store)
    assert "Download" not in error.value.hint


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_refused(tmp_path: Path) -> None:
    model = source_models.copy(SHARDED, tmp_path / "model", tie_word_embeddings=True)
    store = Store(tmp_path / "out", QUIET)
    with pytest.raises(IntegrityError, match=r"its lm_head\.weight differs from its model\.embed_tokens\.weight"):
        transformed(snapshot_of(model, store), ROTATED, store=store)


def test_a_build_quantizes_the_rotated_model_and_compares_with_the_original(tmp_path: Path) -> None:
    store = Store(tmp_path, QUIET)
    built = pipeline.build(resolved(), store, until="checkpoint")
    assert built.original is not None
    assert built.snapshot.path.parent.name == "transform"
    assert built.models.snapshot is built.original
    assert built.models.transformed is built.snapshot
    assert built.checkpoint is not None
    [checkpoint] = [done for done in store.done if done.stage == "checkpoint"]
    assert checkpoint.manifest["ingredients"]["snapshot"] == built.snapshot.digest
    assert "lm_head.weight" in Tensors(built.checkpoint.unified)
    needed = {artifact.stage for artifact in stores.upstream([checkpoint], stores.artifacts(tmp_path))}
    assert needed == {"snapshot", "transform", "checkpoint"}, "what `builder clean` keeps for a checkpoint"
    plain = pipeline.build(resolved(**{"transform.name": "none"}), store, until="checkpoint")
    assert (plain.original, plain.models.transformed) == (None, None)
    assert plain.checkpoint is not None
    assert plain.checkpoint.digest != built.checkpoint.digest


@pytest.mark.parametrize("memory", ["whole", "low"])
def test_a_checkpoint_is_measured_with_the_head_that_a_tied_model_got(memory: str, tmp_path: Path) -> None:
    more = {"quantization.format": "w8a16_int8", "quantization.kv_cache_dtype": "auto"}
    built = pipeline.build(resolved(**more), Store(tmp_path, QUIET), until="checkpoint")
    assert built.checkpoint is not None
    assert json.loads((QWEN2 / "config.json").read_text())["tie_word_embeddings"]
    job = {"model": str(QWEN2), "unified": str(built.checkpoint.unified), "trust_remote_code": False, "memory": memory}
    job |= {"kv_cache_dtype": "auto", "dtype": "float32", "batch_tokens": 64}
    texts, found = [[5, 9, 200, 31, 7, 77, 12, 40]], []
    for runner in (local.bf16, local.checkpoint):
        with torch.inference_mode(), runner(job) as opened:
            [logits] = opened.logits(texts)
            found.append(logits.float().log_softmax(-1))
    bf16, rotated = found
    assert float((bf16.exp() * (bf16 - rotated)).sum(-1).max()) < 1e-3


def test_the_record_and_the_report_say_what_was_rotated(tmp_path: Path) -> None:
    built = pipeline.build(resolved(), Store(tmp_path, QUIET), until="repository")
    assert built.link is not None
    assert built.link.name == "qwen2-cpu-nvfp4-spinquant"
    report = gather.gather(built.link)
    assert report.model.format == "NVFP4, FP8 KV cache, weights rotated (SpinQuant R1 and R2)"
    assert ("transform.name", "spinquant") in [(key, value) for key, value, _ in report.values]
    assert "transform" in [stage.name for stage in report.stages]
    assert dict(report.size.disk)["Model with rotated weights"] > dict(report.size.disk)["Model as downloaded"]


def test_the_sizes_of_the_plan_are_those_of_the_files(tmp_path: Path) -> None:
    store = Store(tmp_path, QUIET)
    sizes = prepare(resolved(), store).sizes
    built = pipeline.build(resolved(), store, until="checkpoint")
    assert built.checkpoint is not None

    def total(directory: Path) -> int:
        return sum(info.nbytes for info in Tensors(directory).values())

    assert sizes.disk["transform"] == total(built.snapshot.path)
    assert sizes.download == total(QWEN2)
    assert sizes.unified == total(built.checkpoint.unified)
    assert sizes.checkpoint == total(built.checkpoint.tensorrt_llm)
    assert sizes.disk["transform"] > sizes.download, "the output layer is not tied any more"


def test_the_plan_lists_the_stage_and_warns_where_rotations_cost_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = resolved(**{"calibration.samples": 4, "calibration.data": "builtin:python-docs"})
    found = plan.plan(asked, Store(tmp_path, QUIET, dry=True))
    assert [row[0] for row in found.stages][:4] == ["snapshot", "transform", "calibration", "checkpoint"]
    plan_view.show(found, Output("human"))
    said = capsys.readouterr()
    assert "SpinQuant R1 and R2, random Hadamard matrices (seed 0)" in said.out
    assert "rotations cost accuracy in NVFP4" in said.err
    for other in ({"quantization.format": "fp8"}, {"transform.name": "none"}):
        found = plan.plan(resolved(**other), Store(tmp_path, QUIET, dry=True))
        assert "rotations cost accuracy" not in str(found.notes)


def test_a_quantized_model_is_not_rotated(tmp_path: Path) -> None:
    store = Store(tmp_path, QUIET)
    built = pipeline.build(resolved(**{"transform.name": "none"}), store, until="checkpoint")
    assert built.checkpoint is not None
    asked = schema.resolve({"model.id": str(built.checkpoint.unified), "gpu": "cpu", "transform.name": "spinquant"})
    with pytest.raises(UsageError, match="is quantized already, and --transform would rotate its weights"):
        pipeline.build(asked, store, until="checkpoint")


def test_builds_with_and_without_it_have_links_of_their_own() -> None:
    assert links.base_name(resolved().recipe, "cpu") == "qwen2-cpu-nvfp4-spinquant"
    assert links.identity(resolved()) != links.identity(resolved(**{"transform.seed": 1}))


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ({"transform.name": "quarot"}, "transform.name: Input should be 'none' or 'spinquant'"),
        ({"transform.rotations": "r3"}, "transform.rotations.0: Input should be 'r1' or 'r2'"),
        ({"transform.rotations": []}, "transform.rotations: Tuple should have at least 1 item"),
        ({"transform.kind": "butterfly"}, "transform.kind: Input should be 'hadamard', 'orthogonal' or 'learned'"),
        ({"transform.kind": "learned"}, "transform.kind learned reads calibration rows, and there are none"),
        ({"transform.learning.steps": 5}, "values of learning have no effect with kind hadamard; use kind learned"),
        ({"transform.seed": -1}, "transform.seed: Input should be greater than or equal to 0"),
    ],
)
def test_values_that_are_none_are_refused(value: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError) as error:
        resolved(**value)
    assert why in error.value.what
