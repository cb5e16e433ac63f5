"""A store in a bucket: whole or absent after a kill anywhere, the same bytes for everybody, errors before the work."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import s3_server
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.core import bucket, environment
from builder.core.bucket import Bucket
from builder.core.errors import StageError, UsageError
from builder.core.manifest import FORMAT, MANIFEST, content_digest, file_problems, key_of, load, seal, sha256
from builder.core.output import Output
from builder.core.store import Store

CONTENTS = st.dictionaries(
    st.sampled_from(["config.json", "unified/model.safetensors", "1/model.py", "a/b/c"]), st.binary(max_size=40),
    min_size=1, max_size=4,
)  # fmt: skip


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


class Dying(MemoryFileSystem):  # type: ignore[misc]
    """Objects in memory, as in S3: each put is whole or not at all. Dies before the put with this number."""

    store: dict[str, Any]
    pseudo_dirs: list[str]
    cachable = False

    def __init__(self, left: float = float("inf")) -> None:
        super().__init__()
        self.store, self.pseudo_dirs, self.left = {}, [""], left

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_: Any) -> None:
        if self.left < 1:
            raise Killed
        self.left -= 1
        super().pipe_file(path, value, mode=mode)


def artifact(root: Path, contents: Mapping[str, bytes], stage: str = "checkpoint", **facts: Any) -> Path:
    """A finished artifact, with an empty directory as Triton's repositories have."""
    ingredients = {"model": "m"}
    directory = root / stage / key_of(stage, ingredients)
    for name, data in contents.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)
    (directory / "ensemble" / "1").mkdir(parents=True)
    files = {name: {"size": len(data), "sha256": sha256(directory / name)} for name, data in contents.items()}
    found: dict[str, Any] = {"format": FORMAT, "stage": stage, "key": directory.name, "ingredients": ingredients,
                             "files": files, "facts": facts, "started": 1.0, "seconds": 2.0}  # fmt: skip
    found["digest"] = content_digest(found)
    (directory / MANIFEST).write_text(json.dumps(seal(found), indent=1))
    return directory


def tree(directory: Path) -> dict[str, bytes | None]:
    found = directory.rglob("*")
    return {str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in found}


@settings(max_examples=40, deadline=None)
@given(CONTENTS, st.integers(0, 6))
def test_a_push_that_dies_anywhere_leaves_nothing_or_all(
    tmp_path_factory: pytest.TempPathFactory, contents: dict[str, bytes], writes: int
) -> None:
    place = tmp_path_factory.mktemp("bucket")
    made, files = artifact(place / "one", contents), Dying(writes)
    try:
        Bucket(files, "b").push(made, load(made))
    except Killed:
        assert Bucket(files, "b").pull("checkpoint", made.name, place / "other") is None
        assert Bucket(files, "b").glimpse("checkpoint", made.name) is None
        assert not list((place / "other").glob("checkpoint/*"))
    else:
        assert writes > len(contents), "the manifest is the last of all"
    files.left = 99
    Bucket(files, "b").push(made, load(made))
    assert Bucket(files, "b").pull("checkpoint", made.name, place / "other") == place / "other/checkpoint" / made.name
    assert tree(place / "other/checkpoint" / made.name) == tree(made)
    assert not list((place / "other/pulled").iterdir())


@settings(max_examples=30, deadline=None)
@given(CONTENTS, CONTENTS, st.integers(0, 6))
def test_of_two_that_push_one_key_everybody_has_the_first_ones_bytes(
    tmp_path_factory: pytest.TempPathFactory, one: dict[str, bytes], two: dict[str, bytes], writes: int
) -> None:
    """The second one begins after some writes of the first."""
    place, files = tmp_path_factory.mktemp("bucket"), Dying(writes)
    first, second = artifact(place / "one", one), artifact(place / "two", two)
    try:
        Bucket(files, "b").push(first, load(first))
        expected = first
    except Killed:
        expected = second
    files.left = 99
    held = Bucket(files, "b").push(second, load(second))
    assert Bucket(files, "b").push(first, load(first)).digest == held.digest == load(expected)["digest"]
    Bucket(files, "b").pull("checkpoint", first.name, place / "three")
    assert tree(place / "three/checkpoint" / first.name) == tree(expected)


@settings(max_examples=30, deadline=None)
@given(CONTENTS, st.data())
def test_a_damaged_object_is_never_taken_and_is_replaced(
    tmp_path_factory: pytest.TempPathFactory, contents: dict[str, bytes], data: st.DataObject
) -> None:
    place, files = tmp_path_factory.mktemp("bucket"), Dying()
    made = artifact(place / "one", contents)
    Bucket(files, "b").push(made, load(made))
    name = data.draw(st.sampled_from(sorted(files.store)))
    files.pipe_file(name, data.draw(st.sampled_from([b"", b"{}", b"[", b"other"])) + b" ")
    used = Bucket(files, "b")
    assert used.pull("checkpoint", made.name, place / "other") is None
    assert not list((place / "other").glob("checkpoint/*"))
    used.push(made, load(made))
    pulled = Bucket(files, "b").pull("checkpoint", made.name, place / "other")
    assert pulled
    assert not list(file_problems(pulled, load(pulled)))


def test_a_glimpse_has_no_large_file_and_files_elsewhere_are_not_invented(tmp_path: Path) -> None:
    files = Dying()
    made = artifact(tmp_path / "one", {"weights": bytes(bucket.GLIMPSED + 1), "config.json": b"{}"})
    Bucket(files, "b").push(made, load(made))
    seen = Bucket(files, "b").glimpse("checkpoint", made.name)
    assert seen is not None
    assert bucket.place_of(seen / "unified", tmp_path / "x") == tmp_path / "x" / "checkpoint" / made.name / "unified"
    assert bucket.place_of(made, tmp_path / "x") == made, "not one that was glimpsed"
    assert seen
    assert {path.name for path in seen.iterdir()} == {"config.json", "ensemble", MANIFEST}
    outside = {"root": str(tmp_path / "hub"), "files": {"model": {"size": 1, "sha256": "0" * 64}}}
    model = artifact(tmp_path / "one", {"x": b"x"}, "snapshot", external=outside)
    Bucket(files, "b").push(model, load(model))
    assert Bucket(files, "b").pull("snapshot", model.name, tmp_path / "other") is None
    assert Bucket(files, "b").glimpse("snapshot", model.name), "but a dry run knows its digest"


@pytest.mark.parametrize(
    "change",
    [
        lambda commit: b"",
        lambda commit: b"[]",
        lambda commit: json.dumps({**commit, "format": 9}).encode(),
        lambda commit: json.dumps({**commit, "manifest": 1}).encode(),
        lambda commit: json.dumps({**commit, "directories": 1}).encode(),
        lambda commit: json.dumps({**commit, "directories": [1]}).encode(),
        lambda commit: json.dumps({**commit, "directories": ["a\0b"]}).encode(),
        lambda commit: json.dumps({**commit, "directories": ["../../x"]}).encode(),
    ],
)
def test_a_manifest_that_is_none_of_ours_is_as_absent(tmp_path: Path, change: Any) -> None:
    files = Dying()
    made = artifact(tmp_path / "one", {"x": b"x"})
    Bucket(files, "b").push(made, load(made))
    name = f"/b/checkpoint/{made.name}.json"
    files.pipe_file(name, change(json.loads(files.cat_file(name))))
    assert Bucket(files, "b").find("checkpoint", made.name) is None
    assert Bucket(files, "b").push(made, load(made)).digest == load(made)["digest"], "it is replaced"


def test_another_artifacts_manifest_is_not_taken_for_this_key(tmp_path: Path) -> None:
    files = Dying()
    made = artifact(tmp_path / "one", {"x": b"x"})
    Bucket(files, "b").push(made, load(made))
    text = files.cat_file(f"/b/checkpoint/{made.name}.json")
    for stage, key in (("engine", made.name), ("checkpoint", "0" * 16)):
        files.pipe_file(f"/b/{stage}/{key}.json", text)
        assert Bucket(files, "b").find(stage, key) is None


def test_a_file_of_another_size_is_not_downloaded_and_a_changed_one_is_not_glimpsed(tmp_path: Path) -> None:
    files = Dying()
    made = artifact(tmp_path / "one", {"x": b"12345"})
    Bucket(files, "b").push(made, load(made))
    found = Bucket(files, "b").find("checkpoint", made.name)
    assert found
    name = f"/b/checkpoint/{made.name}/{found.digest}/x"
    files.pipe_file(name, b"54321")
    assert Bucket(files, "b").glimpse("checkpoint", made.name) is None
    files.pipe_file(name, bytes(1 << 20))
    assert not Bucket(files, "b")._download(found, tmp_path / "two", ["x"])
    assert sum(path.stat().st_size for path in (tmp_path / "two").rglob("*") if path.is_file()) == 0


def test_a_full_disk_is_named_as_such_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = Dying()
    made = artifact(tmp_path / "one", {"x": b"x"})
    Bucket(files, "b").push(made, load(made))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "get_file", full)
    with pytest.raises(StageError, match="is full"):
        Bucket(files, "b").pull("checkpoint", made.name, tmp_path / "two")
    assert not list((tmp_path / "two" / "pulled").iterdir())


def test_two_that_need_one_artifact_at_once_download_it_once(tmp_path: Path) -> None:
    """Processes of one machine over one store: a second download would take the first one's files from its reader."""
    files, taken = Dying(), list[str]()
    made = artifact(tmp_path / "one", {"x": b"x"})
    Bucket(files, "b").push(made, load(made))

    class Slow(Dying):
        def get_file(self, rpath: str, *more: Any, **options: Any) -> None:
            taken.append(rpath)
            time.sleep(0.3)
            super().get_file(rpath, *more, **options)

    slow = Slow()
    slow.store = files.store

    def find(_: int) -> Path | None:
        store = Store(tmp_path / "two", Output("quiet"))
        store.bucket = Bucket(slow, "b")
        found = store.find("checkpoint", made.name)
        return found.path if found else None

    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(find, range(2))] == [tmp_path / "two" / "checkpoint" / made.name] * 2
    assert len(taken) == 1


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "READ_SECONDS", 0.2)
    monkeypatch.setattr(bucket, "ATTEMPTS", 1)
    monkeypatch.delenv("AWS_MAX_ATTEMPTS", raising=False)
    bucket.opened.cache_clear()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for name, value in {"ENDPOINT_URL": address, "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        with pytest.raises(StageError, match="can't be reached"):
            bucket.opened("s3://models/x").find("parts", "0" * 16)
    bucket.opened.cache_clear()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with s3_server.running(tmp_path_factory.mktemp("s3")) as variables:
        yield variables


@pytest.fixture
def s3(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    for name, value in {**server, environment.STORE: f"{s3_server.ADDRESS}/{time.monotonic_ns()}"}.items():
        monkeypatch.setenv(name, value)
    bucket.opened.cache_clear()
    yield server
    bucket.opened.cache_clear()


def make(text: str) -> Any:
    def fill(directory: Path) -> dict[str, Any]:
        (directory / "sub").mkdir()
        (directory / "sub" / "file").write_text(text)
        return {"said": text}

    return fill


def test_two_machines_share_what_one_of_them_made(s3: dict[str, str], tmp_path: Path) -> None:
    quiet = Output("quiet")
    one, two = Store(tmp_path / "one", quiet), Store(tmp_path / "two", quiet)
    assert one.bucket
    one.bucket.check()
    assert Store(tmp_path / "two", quiet, dry=True).find("parts", key_of("parts", {"a": 1})) is None
    made = one.stage("parts", {"a": 1}, make("first"))
    dry = Store(tmp_path / "dry", quiet, dry=True).stage("parts", {"a": 1}, make("never"))
    assert (dry.path / "sub/file").read_text() == "first"
    assert not (tmp_path / "dry").exists()
    pulled = two.stage("parts", {"a": 1}, make("second"))
    assert (pulled.digest, pulled.cached, pulled.path) == (made.digest, True, tmp_path / "two/parts" / made.path.name)
    forced = Store(tmp_path / "two", quiet, force=["parts"]).stage("parts", {"a": 1}, make("third"))
    bucket.opened.cache_clear()
    assert Store(tmp_path / "one", quiet).stage("parts", {"a": 1}, make("never")).digest == forced.digest


def test_what_was_made_without_the_bucket_goes_there_when_it_is_used(
    s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = os.environ[environment.STORE]
    monkeypatch.delenv(environment.STORE)
    Store(tmp_path / "one", Output("quiet")).stage("parts", {"a": 1}, make("first"))
    monkeypatch.setenv(environment.STORE, address)
    Store(tmp_path / "one", Output("quiet")).stage("parts", {"a": 1}, make("never"))
    assert Store(tmp_path / "two", Output("quiet")).find("parts", key_of("parts", {"a": 1}))


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({environment.STORE: "s3://no-such-bucket/x"}, "does not exist"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "can't be reached"),
        ({environment.STORE: "s3://key:secret@bucket/x"}, "is not the address of a bucket"),
        ({environment.STORE: "s3://key:a/secret@bucket/x"}, "is not the address of a bucket"),
        ({environment.STORE: "/mnt/disk"}, "is not the address of a bucket"),
    ],
)
def test_a_store_that_can_not_be_used_is_named(
    s3: dict[str, str], monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], said: str
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def check() -> None:
        used = bucket.named()
        assert used
        used.check()

    with pytest.raises((UsageError, StageError)) as found:
        check()
    assert said in found.value.what
    assert "secret" not in str(found.value)


def test_a_bucket_without_permission_and_one_without_credentials_are_named(
    s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with s3_server.strict(s3):
        used = bucket.named()
        assert used
        with pytest.raises(UsageError, match="does not allow this"):
            used.check()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    bucket.opened.cache_clear()
    used = bucket.named()
    assert used
    with pytest.raises(UsageError, match="needs credentials"):
        used.check()


def test_only_our_own_commands_get_the_buckets_keys() -> None:
    given_ = {environment.STORE: "s3://b/p", "AWS_SECRET_ACCESS_KEY": "x", "AWS_PROFILE": "y", "PATH": "/bin"}
    assert environment.child_environment("step", given_) == given_
    for kind in ("work", "hub", "public", "docker", "gateway"):
        assert environment.child_environment(kind, given_) == {"PATH": "/bin"}, kind  # type: ignore[arg-type]
