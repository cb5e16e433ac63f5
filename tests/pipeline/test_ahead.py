"""A model is quantized data-free while it is downloaded, or hashed, with the bytes of the ordinary way."""

from __future__ import annotations

import math
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import source_models
from hub_server import Fault, Hub, Request

from builder import pipeline
from builder.clean.leftovers import find_leftovers
from builder.core import temporary
from builder.core.errors import BuilderError, IntegrityError
from builder.core.output import Output
from builder.core.safetensors_io import NewTensor
from builder.core.store import Artifact, Store
from builder.model import files
from builder.preflight import checks
from builder.quantize.ahead import Ahead
from builder.recipe import schema

SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
NAME = "tiny/qwen3"


class Spy:
    """The `Ahead` of a build, and whether what it wrote was used."""

    made: Ahead | None = None
    used = False


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    found, ahead_of, take = Spy(), pipeline.ahead_of, Ahead.take

    def spied(*arguments: Any, **named: Any) -> Ahead:
        found.made = ahead_of(*arguments, **named)
        return found.made

    def taken(ahead: Ahead, *arguments: Any) -> dict[str, Any] | None:
        facts = take(ahead, *arguments)
        found.used = facts is not None
        return facts

    monkeypatch.setattr(pipeline, "ahead_of", spied)
    monkeypatch.setattr(Ahead, "take", taken)
    # It starts a process with transformers, and has tests of its own.
    monkeypatch.setattr(checks, "check_architecture", lambda *arguments: None)
    return found


def build(model: str, root: Path, **values: str) -> Artifact:
    asked = {"model.id": model, "gpu": "cpu", "quantization.format": "nvfp4", "calibration.samples": 0, **values}
    store = Store(root, Output("quiet"))
    pipeline.build(schema.resolve(asked), store, until="checkpoint")
    return store.done[-1]


def same(one: Artifact, other: Artifact) -> bool:
    return (one.digest, one.manifest["files"]) == (other.digest, other.manifest["files"])


def content(hub: Hub, name: str) -> str:
    """The path of a file of weights at the CDN."""
    (commit,) = hub.repos["model", NAME].commits.values()
    return f"/cdn/{commit[name].sha256}"


def nothing_left(root: Path) -> bool:
    places = [path.name for path in (root / "checkpoint").iterdir()]
    return not any(name.startswith((".", temporary.PREFIX)) for name in places)


def test_shards_are_written_while_the_last_one_is_still_to_come(
    hub: Hub, spy: Spy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.add(NAME, source_models.SHARDED)
    last, record, begun = content(hub, SHARDS[-1]), hub.record, []

    def recorded(request: Request) -> None:
        """Holds the last shard back until something of the others has been written."""
        record(request)
        if request.path == last and request.method == "GET" and not request.header:
            deadline = time.monotonic() + 30
            while not (spy.made and spy.made.done) and time.monotonic() < deadline:
                time.sleep(0.01)
            begun.append(spy.made is not None and spy.made.done > 0)

    monkeypatch.setattr(hub, "record", recorded)
    made = build(NAME, tmp_path / "hub", **{"model.revision": commit})
    assert begun == [True]
    assert spy.used
    assert nothing_left(tmp_path / "hub")
    assert same(made, build(str(source_models.SHARDED), tmp_path / "local"))


def test_a_download_that_fails_leaves_nothing_and_the_next_one_makes_the_same(
    hub: Hub, spy: Spy, tmp_path: Path
) -> None:
    commit = hub.add(NAME, source_models.SHARDED)
    hub.fail(Fault(content(hub, SHARDS[1]), "status", times=1, status=403))
    with pytest.raises(BuilderError):
        build(NAME, tmp_path / "hub", **{"model.revision": commit})
    assert spy.made
    assert not list((tmp_path / "hub" / "checkpoint").iterdir())
    left = temporary.create(tmp_path / "hub" / "checkpoint")  # as after SIGKILL, when the kernel releases the lock
    left.release()
    assert left.path in [entry.path for what, entry in find_leftovers(tmp_path / "hub", None) if what == "remove"]
    made = build(NAME, tmp_path / "hub", **{"model.revision": commit})
    assert spy.used
    assert nothing_left(tmp_path / "hub")
    assert same(made, build(str(source_models.SHARDED), tmp_path / "local"))


def test_a_damaged_shard_is_not_read_before_it_is_downloaded_again(hub: Hub, spy: Spy, tmp_path: Path) -> None:
    commit = hub.add(NAME, source_models.SHARDED)
    hub.fail(Fault(content(hub, SHARDS[0]), "wrong-bytes"))
    made = build(NAME, tmp_path / "hub", **{"model.revision": commit})
    assert len(hub.downloads(SHARDS[0])) == 2
    assert spy.used
    assert same(made, build(str(source_models.SHARDED), tmp_path / "local"))


def test_a_model_with_a_layer_of_zeros_is_written_anew(hub: Hub, spy: Spy, tmp_path: Path) -> None:
    def zeroed(tensor: NewTensor) -> list[NewTensor]:
        if tensor.name != "model.layers.1.mlp.down_proj.weight":
            return [tensor]
        return [NewTensor(tensor.name, tensor.dtype, tensor.shape, [bytes(2 * math.prod(tensor.shape))])]

    model = source_models.copy(source_models.SHARDED, tmp_path / "model", zeroed)
    made = build(NAME, tmp_path / "hub", **{"model.revision": hub.add(NAME, model)})
    assert spy.made
    assert not spy.used
    assert made.facts["zero_layers"] == ["model.layers.1.mlp.down_proj"]
    assert nothing_left(tmp_path / "hub")
    assert same(made, build(str(model), tmp_path / "local"))


def test_a_model_whose_head_is_tied_is_checked_once_it_is_there(hub: Hub, spy: Spy, tmp_path: Path) -> None:
    commit = hub.add(NAME, source_models.QWEN2)
    build(NAME, tmp_path / "hub", **{"model.revision": commit})
    assert spy.used


def test_a_directory_is_quantized_while_it_is_hashed(spy: Spy, tmp_path: Path) -> None:
    made = build(str(source_models.SHARDED), tmp_path)
    assert spy.used
    assert nothing_left(tmp_path)
    shutil.rmtree(made.path)
    again = build(str(source_models.SHARDED), tmp_path)  # the snapshot is in the store, so nothing is hashed
    assert not spy.used
    assert nothing_left(tmp_path)
    assert same(made, again)


def test_a_directory_that_changes_while_it_is_hashed_leaves_nothing(
    spy: Spy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, real = source_models.copy(source_models.SHARDED, tmp_path / "model"), files.hash_files

    def changing(root: Path, *rest: Any) -> Any:
        found = real(root, *rest)
        (root / SHARDS[1]).touch()
        return found

    monkeypatch.setattr(files, "hash_files", changing)
    with pytest.raises(IntegrityError, match="changed while it was read"):
        build(str(model), tmp_path / "out")
    assert spy.made
    assert not list((tmp_path / "out" / "checkpoint").iterdir())


def test_a_checkpoint_in_the_store_ends_what_began_for_a_copy_of_its_model(spy: Spy, tmp_path: Path) -> None:
    made = build(str(source_models.SHARDED), tmp_path)
    found = build(str(shutil.copytree(source_models.SHARDED, tmp_path / "copy")), tmp_path)
    assert found.cached
    assert found.path == made.path
    assert nothing_left(tmp_path)
