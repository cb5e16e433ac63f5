"""The snapshot stage, with the real huggingface_hub against a local server with the Hub's API, and with directories."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest
from hub_server import Fault, Hub, Repo
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.core.errors import BuilderError, IntegrityError, StageError, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.safetensors_io import NewTensor, read_header, write
from builder.core.store import Store
from builder.hub import client
from builder.hub.snapshot import Snapshot, fetch, listing, local_directory, open_source
from builder.model import files as model_files
from builder.model import tensor_names
from builder.recipe.schema import Model

DATA = Path(__file__).parents[1] / "data"
SHARDED = DATA / "tiny-qwen3"
SMALL = DATA / "arch-variants" / "qwen2"
TOKEN = "hf_SesameOpenSesame"


def copy(source: Path, target: Path, **files: bytes | None) -> Path:
    """A copy of a model directory with some files written or (None) removed; "__" in a name stands for a dot."""
    shutil.copytree(source, target)
    for name, content in files.items():
        path = target / name.replace("__", ".")
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
    return target


def config(**changes: object) -> bytes:
    return json.dumps({**json.loads((SMALL / "config.json").read_text()), **changes}).encode()


def big_model(target: Path, megabytes: int = 26) -> Path:
    """A model whose weights exceed huggingface_hub's chunks of 10 MiB, so that a partial file can remain."""
    wide = config(
        intermediate_size=megabytes * 1_000_000 // (3 * 2 * 64 * 2) // 16 * 16
    )  # gate, up and down of 2 layers
    model = copy(SMALL, target, config__json=wide, model__safetensors=None)
    shapes = {name: want.shape for name, want in tensor_names.expected(json.loads(wide)).items()}
    write(model / "model.safetensors", [NewTensor(name, "BF16", s, [_bytes(s)]) for name, s in shapes.items()])
    return model


def _bytes(shape: tuple[int, ...]) -> bytes:
    """Content of a BF16 tensor of this shape."""
    n = 2 * prod(shape)
    return (bytes(range(250)) * (n // 250 + 1))[:n]


def weights(hub: Hub) -> str:
    """A pattern for the CDN's URL of model.safetensors."""
    (commit,) = next(iter(hub.repos.values())).commits.values()
    return f"/cdn/{commit['model.safetensors'].sha256}"


def assert_same(snapshot: Snapshot, source: Path) -> None:
    for name in snapshot.files:
        assert (snapshot.path / name).read_bytes() == (source / name).read_bytes(), name


def test_downloads_only_the_model_and_then_nothing(
    hub: Hub, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = {
        "pytorch_model__bin": b"pickle",
        "README__md": b"#",
        "modeling__py": b"1",
        "consolidated__safetensors": b"x",
    }
    source = copy(SHARDED, tmp_path / "source", **extra)
    (source / "original").mkdir()
    (source / "original" / "model.safetensors").write_bytes(b"x")
    commit = hub.add("tiny/qwen3", source, ref="v1")
    hub.repos["model", "tiny/qwen3"].gated = True
    hub.tokens.add(TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    model = Model(id="tiny/qwen3", revision="v1")

    plan = listing(model, store=store)
    assert plan["commit"] == commit
    assert plan["missing"] == sum(p.stat().st_size for p in SHARDED.glob("*.safetensors"))  # the rest was checked
    assert not hub.downloads("model-00001-of-00003.safetensors")

    snapshot = fetch(model, store=store)
    assert snapshot.revision == commit
    assert snapshot.config["model_type"] == "qwen3"
    assert snapshot.files == sorted(p.name for p in SHARDED.iterdir())
    assert_same(snapshot, SHARDED)
    assert snapshot.digest == fetch(Model(id=str(SHARDED)), store=store).digest
    assert not any(hub.downloads(n.replace("__", ".")) for n in [*extra, "original/model.safetensors"])
    assert listing(model, store=store)["missing"] == 0

    assert all(r.authorization == f"Bearer {TOKEN}" for r in hub.requests if "/resolve/" in r.path)
    assert not any(r.authorization for r in hub.requests if r.path.startswith("/cdn/"))
    said = capsys.readouterr()
    assert commit in said.err
    assert TOKEN not in said.err + said.out
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not [p for p in written if TOKEN.encode() in p.read_bytes()]
    assert not list(tmp_path.rglob("*.incomplete"))

    before = len(hub.requests)
    assert fetch(model, store=store).artifact.cached
    assert {r.path for r in hub.requests[before:]} <= {"/api/models/tiny/qwen3/revision/v1", "/api/agent-harnesses"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = len(hub.requests)
    assert fetch(model, store=store).artifact.cached
    assert fetch(model, store=Store(tmp_path / "other", Output("quiet"))).digest == snapshot.digest
    assert len(hub.requests) == before


def test_a_commit_that_the_store_has_needs_no_process(
    hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commit = hub.add("tiny/qwen2", SMALL)
    model = Model(id="tiny/qwen2", revision=commit)
    first = fetch(model, store=store)
    monkeypatch.setattr(client.process, "run", lambda *_, **__: pytest.fail("a child was started"))
    assert fetch(model, store=store).digest == first.digest


def test_a_directory_that_changes_after_it_was_opened_is_no_snapshot(store: Store, tmp_path: Path) -> None:
    """A plan and a build decide by the config.json and the headers that they read, so these must be the files' own."""
    directory = copy(SHARDED, tmp_path / "model")
    model = Model(id=str(directory))
    source = open_source(model, store=store)
    changed = {**json.loads((directory / "config.json").read_text()), "rope_theta": 5.0}
    (directory / "config.json").write_text(json.dumps(changed))
    with pytest.raises(IntegrityError, match="changed while it was read"):
        fetch(model, store=store, source=source)
    assert not list((store.root / "snapshot").glob("[0-9a-f]*"))
    assert fetch(model, store=store).config["rope_theta"] == 5.0


@pytest.mark.parametrize("kind", ["cut", "reset"])
def test_resumes_where_the_connection_broke(kind: str, hub: Hub, store: Store, tmp_path: Path) -> None:
    source = big_model(tmp_path / "source")
    hub.add("tiny/big", source)
    hub.fail(Fault(weights(hub), kind, after=15_000_000))  # type: ignore[arg-type]
    assert_same(fetch(Model(id="tiny/big"), store=store), source)
    first, second = hub.downloads("model.safetensors")
    assert first.range is None
    assert second.range == "bytes=10485760-"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_download_that_was_ended_is_finished_by_the_next_run(
    how: signal.Signals, hub: Hub, store: Store, tmp_path: Path
) -> None:
    source = big_model(tmp_path / "source")
    hub.add("tiny/big", source)
    hub.fail(Fault(weights(hub), "hang", after=15_000_000))
    code = (
        "import sys; from pathlib import Path; from builder.hub.snapshot import *; "
        f"fetch(Model(id='tiny/big'), store=Store(Path({str(store.root)!r}), Output('quiet')))"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 30
    while not (hub.downloads("model.safetensors") and hub.downloads("tokenizer.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    asked = time.monotonic()
    child.send_signal(how)
    assert child.wait(20) != 0
    assert time.monotonic() - asked < 5
    assert not list((store.root / "snapshot").glob("[0-9a-f]*"))

    snapshot = fetch(Model(id="tiny/big"), store=store)
    assert_same(snapshot, source)
    assert len(hub.downloads("tokenizer.json")) == 1, "a whole file was downloaded twice"
    left = list(tmp_path.rglob("*.incomplete"))
    assert not left or (how == signal.SIGKILL and all(re.search(r"\.[0-9a-f]{8}\.", p.name) for p in left))


def test_a_stuck_transfer_is_begun_again(
    hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(client, "STALL_SECONDS", 0.6)
    hub.add("tiny/qwen2", SMALL)
    hub.fail(Fault(weights(hub), "hang", after=1000))
    assert_same(fetch(Model(id="tiny/qwen2"), store=store), SMALL)
    assert "restarting the transfer" in capsys.readouterr().err
    hub.fail(Fault("/cdn/", "hang", times=2))
    shutil.rmtree(os.environ["HF_HOME"])
    with pytest.raises(StageError, match="stuck"):
        fetch(Model(id="tiny/qwen2"), store=Store(store.root / "again", Output("quiet")))


def gated(hub: Hub) -> None:
    hub.repos["model", "tiny/qwen2"].gated = True


def claims_a_petabyte(hub: Hub) -> None:
    hub.repos["model", "tiny/qwen2"].sizes["tokenizer.json"] = 10**15


def fails(*faults: Fault) -> Callable[[Hub], None]:
    return lambda hub: hub.faults.extend(faults)


MODEL = Model(id="tiny/qwen2")
FOREVER = 10**6


@pytest.mark.parametrize(
    ("model", "token", "prepare", "error", "says"),
    [
        (MODEL, "", gated, UsageError, r"is gated.*Accept the licence at http://127\S+/tiny/qwen2.*export HF_TOKEN"),
        (MODEL, TOKEN, gated, UsageError, r"this HF_TOKEN has no access.*Accept the licence"),
        (MODEL, "hf_invalid", None, UsageError, r"refused the token \(401\).*new token"),
        (Model(id="tiny/qwen"), "", None, UsageError, r"has no model tiny/qwen,.*Did you mean tiny/qwen2.*HF_TOKEN"),
        (Model(id="tiny/qwen2", revision="v2"), "", None, UsageError, r"no revision v2.*It has main"),
        (MODEL, "", fails(Fault("/api/", "status", FOREVER, status=503)), StageError, r"answered 503.*Try again"),
        (
            MODEL,
            "",
            fails(Fault("/api/", "status", FOREVER, status=429, headers={"Retry-After": "5000"})),
            StageError,
            r"wait another 5000 s.*HF_TOKEN",
        ),
        (MODEL, "", fails(Fault("/resolve/.*/tokenizer.json", "status", FOREVER, status=404)), StageError, "404"),
        (MODEL, "", claims_a_petabyte, IntegrityError, r"tokenizer\.json of .* has 1000\.00 TB; the limit is 256"),
        (MODEL, "", fails(Fault("/cdn/", "wrong-bytes", FOREVER)), IntegrityError, r"model\.safetensors.*Run the same"),
        (
            MODEL,
            "",
            fails(Fault("/config.json", "wrong-bytes", FOREVER)),
            IntegrityError,
            r"^config\.json of.*Run the same",
        ),
        (
            MODEL,
            "",
            fails(Fault("tokenizer.json", "wrong-bytes", FOREVER)),
            IntegrityError,
            r"^tokenizer\.json of.*Run the same",
        ),
        (MODEL, "", fails(Fault("/cdn/", "short", FOREVER)), IntegrityError, "is not the one that the Hub lists"),
    ],
)
def test_what_the_hub_refuses_is_said_plainly(
    model: Model,
    token: str,
    prepare: Callable[[Hub], None] | None,
    error: type[BuilderError],
    says: str,
    hub: Hub,
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.add("tiny/qwen2", SMALL)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    if prepare:
        prepare(hub)
    with pytest.raises(error) as caught:
        fetch(model, store=store)
    assert re.search(says, str(caught.value), re.DOTALL), str(caught.value)
    assert not token or token not in str(caught.value)
    assert not list((store.root / "snapshot").glob("*"))
    logs = [p.read_text() for p in (store.root / "logs").glob("*")]
    assert not token or not any(token in text for text in logs)

    # Nothing bad is left: once the Hub behaves, the same command works.
    hub.faults.clear()
    hub.repos["model", "tiny/qwen2"] = Repo(**{**vars(hub.repos["model", "tiny/qwen2"]), "gated": False, "sizes": {}})
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if error in (IntegrityError, StageError) or prepare is gated:
        assert_same(fetch(MODEL, store=store), SMALL)


def test_waits_and_repeats(hub: Hub, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    hub.add("tiny/qwen2", SMALL)
    # The first is met by resolving. huggingface_hub 0.36 asks for the model's facts once more when it downloads, and
    # returns an incomplete snapshot as if all were well when that fails: the second is met there.
    hub.fail(Fault("/api/models/[^/]*/[^/]*$", "status", status=429, headers={"Retry-After": "1"}))
    hub.fail(Fault("/api/models/[^/]*/[^/]*/revision/", "status", status=500))
    hub.fail(Fault("/tree/", "status", 2, status=502))
    hub.fail(Fault("/cdn/", "status", status=429, headers={"Retry-After": "1"}))
    hub.fail(Fault("/cdn/", "short"))
    assert_same(fetch(MODEL, store=store), SMALL)
    said = capsys.readouterr().err
    assert "limits the rate; retrying in 1 s" in said
    assert "answered 502; retrying in" in said


def test_nobody_there(hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://someone:secret@127.0.0.1:9")
    with pytest.raises(StageError, match=r"Can't reach the Hub at http://127\.0\.0\.1:9") as caught:
        fetch(MODEL, store=store)
    assert "secret" not in str(caught.value) + "".join(p.read_text() for p in (store.root / "logs").iterdir())
    assert "HF_HUB_OFFLINE" in caught.value.hint
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="not in the cache"):
        fetch(MODEL, store=store)


def test_a_mirrors_password_is_in_no_log(hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint.replace("//", "//someone:secret@"))
    hub.add("tiny/qwen2", SMALL)
    hub.fail(Fault("/resolve/.*/tokenizer.json", "cut", after=100))
    hub.fail(Fault("/cdn/", "wrong-bytes", 2))
    with pytest.raises(IntegrityError):
        fetch(MODEL, store=store)
    (log,) = (store.root / "logs").iterdir()
    assert "model.safetensors" in log.read_text()
    assert "secret" not in log.read_text()
    assert_same(fetch(MODEL, store=store), SMALL)
    assert not [p for p in store.root.rglob("*") if p.is_file() and b"secret" in p.read_bytes()]


def test_places_that_can_not_be(hub: Hub, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("tiny/qwen2", SMALL)
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"Can't write to the Hub's cache .*/file/hub"):
        fetch(MODEL, store=store)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with pytest.raises(UsageError, match="is not a revision"):
        fetch(Model(id="tiny/qwen2", revision="../../../etc/passwd"), store=store)
    repo = hub.repos["model", "tiny/qwen2"]
    repo.commits["../../elsewhere"] = repo.commits[repo.refs["main"]]
    repo.refs["main"] = "../../elsewhere"
    with pytest.raises(IntegrityError, match="is not a commit"):
        fetch(MODEL, store=store)


def test_a_damaged_cache_is_noticed_offline(
    hub: Hub, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("tiny/qwen2", SMALL)
    path = fetch(MODEL, store=store).path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.resolve().write_bytes(content)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(IntegrityError, match=r"model\.safetensors"):
        fetch(MODEL, store=Store(tmp_path / "other", Output("quiet")))


@pytest.mark.any_version
def test_a_snapshot_of_an_incomplete_cache_is_not_taken_for_the_whole_model(
    hub: Hub, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline, only the cache can be listed, which may be incomplete. Online, or with more files, it is made again."""
    hub.add("tiny/qwen2", SMALL)
    whole = fetch(MODEL, store=Store(tmp_path / "other", Output("quiet")))
    generation = whole.path / "generation_config.json"
    assert generation.name in whole.files
    target = os.readlink(generation)
    generation.unlink()
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")  # as good as the Hub's own variable, which is used from here on
    part = fetch(MODEL, store=store)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert generation.name not in part.files
    assert fetch(MODEL, store=store).artifact.cached
    generation.symlink_to(target)
    assert fetch(MODEL, store=store).digest == whole.digest
    generation.unlink()
    assert fetch(MODEL, store=store).digest == part.digest
    monkeypatch.delenv("HF_HUB_OFFLINE")
    online = fetch(MODEL, store=store)
    assert (online.digest, online.artifact.cached) == (whole.digest, False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    again = fetch(MODEL, store=store)
    assert (again.digest, again.artifact.cached) == (whole.digest, True), "what was whole once is found offline too"


def test_a_file_of_the_cache_with_other_content_is_noticed(hub: Hub, store: Store) -> None:
    """Even if the size is unchanged."""
    hub.add("tiny/qwen2", SMALL)
    before = fetch(MODEL, store=store)
    path = before.path / "config.json"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.resolve().write_bytes(content)
    healed = fetch(MODEL, store=store)
    assert healed.digest == before.digest
    healed.source.check_unchanged()
    assert (healed.path / "config.json").read_bytes() == (SMALL / "config.json").read_bytes()


def test_weights_that_the_disk_has_no_room_for_are_refused_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from builder.hub import cache

    monkeypatch.setattr(cache.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    job = cache.Job(job="download", repo="tiny/qwen2", commit="0" * 40)
    with pytest.raises(StageError, match=r"tiny/qwen2 needs 1000\.00 TB more on the disk") as caught:
        cache.check_space(job, {"model.safetensors": cache.HubFile(10**15, "1" * 64, None)})
    assert "HF_HOME" in caught.value.hint


SHARD = "model-00002-of-00003.safetensors"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4725600\n"
FEW = (SMALL / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("source", "files", "error", "says"),
    [
        (SMALL, {"config__json": None}, UsageError, "has no config.json.*It has .*tokenizer.json"),
        (SMALL, {"config__json": b"{"}, UsageError, "is not JSON"),
        (SMALL, {"config__json": b"[]"}, UsageError, "is a list"),
        (SMALL, {"config__json": config(architectures=["BertForMaskedLM"])}, UnsupportedError, "BertForMaskedLM.*Qwen"),
        (
            SMALL,
            {"config__json": config(architectures=["T5ForConditionalGeneration"])},
            UnsupportedError,
            "not a causal",
        ),
        (SMALL, {"config__json": config(architectures=None)}, UnsupportedError, "not a causal"),
        (SMALL, {"config__json": config(is_encoder_decoder=True)}, UnsupportedError, "encoder-decoder"),
        (
            SMALL,
            {"config__json": config(quantization_config={"quant_method": "awq"})},
            UnsupportedError,
            "AWQ.*original model",
        ),
        (SMALL, {"config__json": config(auto_map={"A": "m.A"}, model_type="new")}, UnsupportedError, "--trust-remote"),
        (SMALL, {"model__safetensors": None}, UsageError, "no model.safetensors"),
        (SMALL, {"model__safetensors": None, "pytorch_model__bin": b"x"}, UnsupportedError, "pickles.*save_pretrained"),
        (
            SMALL,
            {"model__safetensors": None, "adapter_config__json": b"{}"},
            UsageError,
            r"an adapter \(LoRA\).*Merge it",
        ),
        (SMALL, {"model__safetensors": FEW[:-100]}, IntegrityError, "not a complete safetensors.*truncated"),
        (SMALL, {"model__safetensors": FEW[:5]}, IntegrityError, "not a complete safetensors"),
        (SMALL, {"model__safetensors": b""}, IntegrityError, "not a complete safetensors"),
        (SMALL, {"model__safetensors": b"\xff" * 100}, IntegrityError, "not a complete safetensors"),
        (SMALL, {"model__safetensors": POINTER}, IntegrityError, "Git LFS pointer of 132 bytes.*lfs pull"),
        (SMALL, {"tokenizer__json": POINTER}, IntegrityError, "Git LFS pointer"),
        (SMALL, {"tokenizer__json": None}, UnsupportedError, "no tokenizer.json.*AutoTokenizer"),
        (SHARDED, {SHARD: None}, IntegrityError, f"lacks 1 of the 3.*{SHARD}"),
        (SHARDED, {"model__safetensors__index__json": b"{}"}, IntegrityError, "not an index"),
        (
            SHARDED,
            {"model__safetensors__index__json": b'{"weight_map": {"w": "../../etc/x.safetensors"}}'},
            IntegrityError,
            "refers to files",
        ),
    ],
)
def test_bad_directories(
    source: Path, files: dict[str, bytes | None], error: type[BuilderError], says: str, store: Store, tmp_path: Path
) -> None:
    directory = copy(source, tmp_path / "model", **files)
    with pytest.raises(error) as caught:
        fetch(Model(id=str(directory)), store=store)
    assert re.search(says, str(caught.value), re.DOTALL), str(caught.value)
    assert caught.value.hint
    assert not store.root.exists()


@pytest.mark.parametrize("says", ["no safetensors", "pickles", "encoder", "code"])
def test_bad_repositories_are_refused_before_their_weights(says: str, hub: Hub, store: Store, tmp_path: Path) -> None:
    files: dict[str, dict[str, bytes | None]] = {
        "no safetensors": {"model__safetensors": None},
        "pickles": {"model__safetensors": None, "pytorch_model__bin": b"x"},
        "encoder": {"config__json": config(architectures=["T5ForConditionalGeneration"])},
        "code": {"config__json": config(auto_map={"A": "m.A"}, model_type="new")},
    }
    hub.add("tiny/bad", copy(SMALL, tmp_path / "source", **files[says]))
    with pytest.raises((UsageError, UnsupportedError)):
        fetch(Model(id="tiny/bad"), store=store)
    assert not [r for r in hub.requests if r.path.startswith("/cdn/") and not r.header]


def test_what_the_caller_checks_is_checked_before_any_weight(hub: Hub, store: Store) -> None:
    hub.add("tiny/qwen3", SHARDED)

    def refuse() -> None:
        raise UnsupportedError("too long for this engine")

    with pytest.raises(UnsupportedError, match="too long"):
        fetch(Model(id="tiny/qwen3"), store=store, before=refuse)
    assert not [r for r in hub.requests if r.path.startswith("/cdn/") and not r.header]
    with pytest.raises(UnsupportedError, match="too long"):
        fetch(Model(id=str(SHARDED)), store=store, before=refuse)


def test_a_plan_reads_headers_and_no_weights(hub: Hub, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """`builder plan` gets the shapes of all tensors from a few kilobytes."""
    hub.add("tiny/qwen3", SHARDED)
    source = open_source(Model(id="tiny/qwen3"), store=store)
    config, tensors = source.config, source.tensors
    assert config["num_hidden_layers"] == 6
    local = {
        name: (i.dtype, i.shape) for file in SHARDED.glob("*.safetensors") for name, i in read_header(file).items()
    }
    assert tensors == local
    weights = [r for r in hub.requests if r.path.startswith("/cdn/") and r.method == "GET"]
    assert len(weights) >= 3
    assert all(r.range for r in weights)
    assert not list((Path(os.environ["HF_HOME"]) / "hub").rglob("*.safetensors"))
    fetch(Model(id="tiny/qwen3"), store=store)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert open_source(Model(id="tiny/qwen3"), store=store) == source


def test_a_known_model_type_needs_no_code_of_the_model(store: Store, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    files = {"config__json": config(auto_map={"AutoModel": "m.A"}), "modeling__py": b"raise SystemExit"}
    directory = copy(SMALL, tmp_path / "model", **files)
    assert "modeling.py" not in fetch(Model(id=str(directory)), store=store).files
    assert "modeling.py" in fetch(Model(id=str(directory), trust_remote_code=True), store=store).files


def test_an_unchanged_directory_is_not_hashed_again(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy(SMALL, tmp_path / "model")
    hashed = []
    real = model_files.hash_files
    monkeypatch.setattr(model_files, "hash_files", lambda *a: hashed.append(a[1]) or real(*a))
    first = fetch(Model(id=str(directory)), store=store)
    assert fetch(Model(id=f"{directory}/../model"), store=store).artifact.cached
    assert len(hashed) == 1

    # The same size and the same time of change, as `cp -p` or a restored backup leaves them: noticed all the same.
    weights, was = directory / "model.safetensors", (directory / "model.safetensors").stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert fetch(Model(id=str(directory)), store=store).digest != first.digest
    assert len(hashed) == 2


@pytest.mark.parametrize(
    "name",
    [
        "../../etc",
        "a b",
        "x;rm -rf",
        "x\nexport HF_TOKEN=",
        "/nowhere/at/all",
        "~nobody-of-that-name/x",
        "org/../../x",
        "a/b/c",
        "-x",
        "x" * 300,
        "x" * 5000,
        "\0",
        "./" + "y" * 300,
        "org/na--me",
        "https://hub.example/org/name",
    ],
)
def test_hostile_names(name: str, store: Store) -> None:
    with pytest.raises(UsageError) as caught:
        fetch(Model(id=name), store=store)
    assert "\n" not in caught.value.what
    assert caught.value.hint
    assert not store.root.exists()


@settings(max_examples=200)
@given(st.text(min_size=1, max_size=60))
def test_any_text_is_a_directory_an_id_or_a_usage_error(text: str) -> None:
    said = ""
    try:
        found = local_directory(Model(id=text))
    except UsageError as error:
        found, said = None, error.what
    assert said.isascii()
    assert said.isprintable()
    assert said or found or re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)?", text)


def test_links(store: Store, tmp_path: Path) -> None:
    directory = copy(SMALL, tmp_path / "model")
    linked = tmp_path / "linked"
    linked.symlink_to(directory)
    assert fetch(Model(id=str(linked)), store=store).path == directory
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(UsageError, match=r"broken link|can't be opened"):
        fetch(Model(id=str(loop)), store=store)
    (directory / "config.json").unlink()
    (directory / "config.json").symlink_to("config.json")
    with pytest.raises(UsageError, match="broken link"):
        fetch(Model(id=str(directory)), store=store)
    with pytest.raises(UsageError, match=r"Did you mean .*/model\?"):
        fetch(Model(id=str(tmp_path / "modell")), store=store)
    with pytest.raises(UsageError, match="has no revisions"):
        fetch(Model(id=str(directory), revision="main"), store=store)
