"""Only files that were hashed are loaded, and every tensor is used. With real transformers and ModelOpt."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from source_models import (
    GEMMA2,
    LLAMA,
    MOE,
    QWEN2,
    SHARDED,
    WEIGHTS,
    also,
    copy,
    flags,
    renamed,
    set_config,
    without,
)

from builder import pipeline
from builder.core.errors import BuilderError, IntegrityError, UnsupportedError
from builder.core.output import Output, Progress
from builder.core.store import Store, verify
from builder.hub.snapshot import Snapshot, fetch
from builder.model import loading as model_loading
from builder.model.hashed_files import SourceFiles
from builder.preflight import checks
from builder.recipe import schema
from builder.recipe.schema import Model

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' and ModelOpt's own

NORM = "model.norm.weight"


def job(model: Path) -> dict[str, Any]:
    return {"model": str(model), "trust_remote_code": False}


def snapshot_job(snapshot: Snapshot) -> dict[str, Any]:
    return {**snapshot.source.as_job(), "trust_remote_code": False}


@pytest.mark.parametrize("source", [SHARDED, LLAMA, QWEN2, GEMMA2, MOE], ids=lambda path: path.name)
def test_a_complete_model_loads(source: Path, store: Store) -> None:
    snapshot = fetch(Model(id=str(source)), store=store)
    model = model_loading.load(snapshot_job(snapshot), dtype="auto")
    assert model.config._name_or_path == str(source)
    assert model.dtype == torch.bfloat16


WRONG = {
    "missing": (GEMMA2, without("model.layers.0.pre_feedforward_layernorm.weight"), {}, "pre_feedforward_layernorm"),
    "a table's missing": (LLAMA, without(NORM), {}, f"Missing.*{NORM}"),
    "an expert is missing": (MOE, without("model.layers.0.mlp.experts.1.up_proj.weight"), {}, "experts"),
    "prefixed": (SHARDED, renamed("", "_orig_mod."), {}, "Missing.*Unexpected.*_orig_mod"),
    "unexpected": (GEMMA2, also(NORM, "model.extra.weight", "BF16", (4, 4)), {}, "Unexpected.*model.extra.weight"),
    "fewer layers": (LLAMA, None, {"num_hidden_layers": 1}, r"Unexpected.*layers\.1"),
    "misshapen": (QWEN2, None, {"vocab_size": 4098}, r"shape.*embed_tokens"),
    "misshapen experts": (MOE, None, {"moe_intermediate_size": 32}, "experts"),
}


@pytest.mark.parametrize("name", WRONG)
def test_loading_names_tensors_that_transformers_would_initialize_or_ignore(name: str, tmp_path: Path) -> None:
    source, change, config, says = WRONG[name]
    model = copy(source, tmp_path / "model", change, **config)
    with pytest.raises(IntegrityError, match="(?s)" + says) as caught:
        model_loading.load(job(model), dtype="auto")
    assert caught.value.exit_code == 6
    assert str(model) in caught.value.what


def test_a_config_that_transformers_cannot_read_is_rejected(tmp_path: Path) -> None:
    model = copy(LLAMA, tmp_path / "model", model_type="no such type")
    with pytest.raises(UnsupportedError, match="no causal language model"):
        model_loading.load(job(model), dtype="auto")


def test_headers_show_that_a_model_without_a_table_is_incomplete(tmp_path: Path, store: Store) -> None:
    """In a worker, on the meta device, before a weight is downloaded or read."""
    sound = Model(id=str(GEMMA2))
    checks.check_architecture(sound, checks.read_model(sound, store), store)
    model = copy(GEMMA2, tmp_path / "model", without("model.layers.1.post_feedforward_layernorm.weight"))
    torn = Model(id=str(model))
    with pytest.raises(IntegrityError, match=r"layers\.1\.post_feedforward_layernorm"):
        checks.check_architecture(torn, checks.read_model(torn, store), store)


def test_only_the_files_that_were_hashed_are_loaded(tmp_path: Path, store: Store) -> None:
    model = copy(SHARDED, tmp_path / "model")
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "/nowhere", "peft_type": "LORA"}')
    (model / "pytorch_model.bin").write_bytes(b"no pickle")
    (model / "model-00009-of-00009.safetensors").write_bytes(b"of another save")
    snapshot = fetch(Model(id=str(model)), store=store)
    shutil.copy(LLAMA / WEIGHTS, model / WEIGHTS)  # afterwards: transformers would prefer it to the index
    loaded = model_loading.load(snapshot_job(snapshot), dtype="auto")
    plain = model_loading.load(job(SHARDED), dtype="auto")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), plain.parameters(), strict=True))


def change(model: Path) -> None:
    """Changes a weight but neither the size nor the modification time of the file."""
    file = model / WEIGHTS
    was = file.stat()
    with open(file, "r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)[0]
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last ^ 1]))
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))


def test_weights_that_changed_since_they_were_hashed_are_not_loaded(tmp_path: Path, store: Store) -> None:
    model = copy(LLAMA, tmp_path / "model")
    snapshot = fetch(Model(id=str(model)), store=store)
    change(model)
    with pytest.raises(IntegrityError, match=r"changed after its files were hashed: model\.safetensors"):
        model_loading.load(snapshot_job(snapshot), dtype="auto")
    (model / WEIGHTS).unlink()
    with pytest.raises(IntegrityError, match="changed"):
        snapshot.source.check_unchanged()


def test_a_file_with_the_same_content_and_another_time_is_unchanged(tmp_path: Path, store: Store) -> None:
    model = copy(LLAMA, tmp_path / "model")
    snapshot = fetch(Model(id=str(model)), store=store)
    os.utime(model / WEIGHTS)
    snapshot.source.check_unchanged()
    (model / "another file").touch()
    snapshot.source.check_unchanged()


def test_a_changed_file_in_the_hubs_cache_is_detected(hub: Any, tmp_path: Path, store: Store) -> None:
    hub.add("tiny/model", LLAMA)
    snapshot = fetch(Model(id="tiny/model"), store=store)
    snapshot.source.check_unchanged()
    change(snapshot.path)
    with pytest.raises(IntegrityError, match="changed"):
        snapshot.source.check_unchanged()


class Watching(Output):
    """Calls back when a progress bar of this label begins."""

    def __init__(self, label: str, call: Any) -> None:
        super().__init__("quiet")
        self._label, self._call = label, call

    @contextmanager
    def progress(self, label: str, *more: Any, **options: Any) -> Iterator[Progress]:
        with super().progress(label, *more, **options) as bar:
            yield Told(bar, self._label, self._call)  # type: ignore[misc]


class Told:
    def __init__(self, bar: Progress, label: str, call: Any) -> None:
        self._bar, self._label, self._call = bar, label, call

    def update(self, *values: Any, **named: Any) -> None:
        self._bar.update(*values, **named)
        if named.get("label") == self._label and self._call:
            self._call, call = None, self._call
            call()


def build(model: Path, store: Store) -> BuilderError | None:
    asked = schema.resolve(flags(model, **{"calibration.samples": 4, "calibration.seq_len": 64}))
    try:
        pipeline.build(asked, store, until="checkpoint")
    except BuilderError as error:
        return error
    return None


@pytest.mark.any_version
def test_weights_that_change_during_calibration_are_not_stored(tmp_path: Path) -> None:
    model = copy(LLAMA, tmp_path / "model")
    store = Store(tmp_path / "out", Watching("calibrating", lambda: change(model)))
    error = build(model, store)
    assert isinstance(error, IntegrityError), error
    assert "changed after its files were hashed" in error.what
    assert not list((store.root / "checkpoint").glob("[0-9a-f]*"))
    assert any(verify(store.root, Output("quiet")).values())  # the snapshot's files are no longer what was hashed
    again = fetch(Model(id=str(model)), store=Store(store.root, Output("quiet")))
    assert not again.artifact.cached
    assert len(list((store.root / "snapshot").glob("[0-9a-f]*"))) == 2  # the next build has another key


def rewrite(model: Path) -> None:
    """Truncates the file, as a new copy does first: a worker that has it mapped is killed by SIGBUS."""
    (model / WEIGHTS).write_bytes((model / WEIGHTS).read_bytes()[:-2] + b"xy")


@pytest.mark.any_version
def test_weights_that_are_rewritten_during_loading_are_named(tmp_path: Path) -> None:
    model = copy(LLAMA, tmp_path / "model")
    store = Store(tmp_path / "out", Watching("loading the model", lambda: rewrite(model)))
    error = build(model, store)
    assert isinstance(error, IntegrityError), error
    assert not list((store.root / "checkpoint").glob("[0-9a-f]*"))


def test_weights_that_change_during_evaluation_are_detected(tmp_path: Path, store: Store) -> None:
    from builder.evaluate.runners import local

    model = copy(LLAMA, tmp_path / "model")
    snapshot = fetch(Model(id=str(model)), store=store)
    asked = {**snapshot_job(snapshot), "dtype": "auto", "batch_tokens": 512}
    with pytest.raises(IntegrityError, match="changed"), local.bf16(asked):
        change(model)


def test_a_build_of_an_incomplete_model_exits_with_6_and_stores_nothing(tmp_path: Path) -> None:
    for name, made in (
        ("missing", copy(SHARDED, tmp_path / "missing", without("model.layers.3.mlp.up_proj.weight"))),
        ("compiled", copy(SHARDED, tmp_path / "compiled", renamed("", "_orig_mod."))),
        ("norm", copy(GEMMA2, tmp_path / "norm", without("model.layers.1.post_feedforward_layernorm.weight"))),
    ):
        store = Store(tmp_path / f"out-{name}", Output("quiet"))
        error = build(made, store)
        assert error is not None
        assert error.exit_code == 6 or "no TensorRT-LLM layout" in error.what, error
        assert not list(store.root.glob("checkpoint/[0-9a-f]*"))


def test_a_checkpoint_that_lacks_a_tensor_is_not_measured(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    from exports import rewrite

    from builder.evaluate.runners import local

    unified = checkpoints["llama"] / "unified"
    asked = {**job(LLAMA), "dtype": "auto", "batch_tokens": 512, "kv_cache_dtype": "auto"}
    with local.checkpoint({**asked, "unified": str(unified)}):
        pass
    lacking = rewrite(unified, tmp_path / "lacking", {NORM: None})
    with pytest.raises(IntegrityError, match=f"(?s)Missing.*{NORM}"), local.checkpoint({**asked, "unified": lacking}):
        pass


def test_nothing_is_left_in_the_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    source = SourceFiles.of_job(job(LLAMA))
    with source.linked() as directory:
        assert sorted(path.name for path in directory.iterdir()) == sorted(path.name for path in LLAMA.iterdir())
        assert directory.is_relative_to(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_stored_tied_head_must_equal_the_embedding(tmp_path: Path) -> None:
    same = copy(QWEN2, tmp_path / "same", also("model.embed_tokens.weight", "lm_head.weight"))
    model_loading.load(job(same), dtype="auto")
    other = copy(QWEN2, tmp_path / "other", also("model.embed_tokens.weight", "lm_head.weight", "BF16", (4096, 64)))
    with pytest.raises(IntegrityError, match=r"tie_word_embeddings.*lm_head\.weight"):
        model_loading.load(job(other), dtype="auto")
    set_config(other, tie_word_embeddings=False)
    model_loading.load(job(other), dtype="auto")
