"""Files of a stage are hashed while others are made."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.core import hashes as module
from builder.core.hashes import Hashes
from builder.core.manifest import sha256


@pytest.mark.parametrize("size", [0, 1, (4 << 20) - 1, 4 << 20, (8 << 20) + 7])
def test_a_file_of_any_size_has_the_hash_of_its_bytes(tmp_path: Path, size: int) -> None:
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "file").write_bytes(content[:size])
    assert sha256(tmp_path / "file") == hashlib.sha256(content[:size]).hexdigest()


def test_files_are_added_while_others_are_made(tmp_path: Path) -> None:
    (tmp_path / "one" / "deep").mkdir(parents=True)
    (tmp_path / "one" / "deep" / "a").write_bytes(b"a")
    with Hashes(tmp_path) as hashes:
        hashes.add(tmp_path / "one")
        (tmp_path / "b").write_bytes(b"b")
        hashes.add(tmp_path)
        found = hashes.finish()
    assert found == {"b": hashlib.sha256(b"b").hexdigest(), "one/deep/a": hashlib.sha256(b"a").hexdigest()}


def test_known_hashes_are_kept_and_their_files_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"a")
    flushed: list[Path] = []
    monkeypatch.setattr(module.atomic, "fsync", flushed.append)
    with Hashes(tmp_path, {"a": "known", "absent": "ignored"}) as hashes:
        hashes.add(tmp_path)
        assert hashes.finish() == {"a": "known"}
    assert flushed == [tmp_path / "a"]


def test_a_disk_that_refuses_to_flush_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_bytes(b"a")
    monkeypatch.setattr(module.atomic, "fsync", full)
    with Hashes(tmp_path) as hashes:
        hashes.add(tmp_path)
        with pytest.raises(OSError, match="No space"):
            hashes.finish()


def test_an_error_ends_the_threads_at_once(tmp_path: Path) -> None:
    with open(tmp_path / "large", "wb") as file:
        file.truncate(1 << 40)  # a hole, which takes many minutes to hash
    start = time.monotonic()
    with suppress(KeyboardInterrupt), Hashes(tmp_path) as hashes:
        hashes.add(tmp_path)
        raise KeyboardInterrupt
    assert time.monotonic() - start < 30


@given(st.lists(st.binary(max_size=40), max_size=8), st.booleans())
def test_a_file_is_hashed_while_it_is_written(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], told: bool
) -> None:
    root = tmp_path_factory.mktemp("root")
    with Hashes(root) as hashes:
        with hashes.following(root / "file") as done, open(root / "file", "wb", buffering=0) as file:
            for part in parts:
                file.write(part)
                if told:
                    done(file.tell())
        hashes.add(root)
        assert hashes.finish() == {"file": hashlib.sha256(b"".join(parts)).hexdigest()}


def test_a_file_that_is_never_written_has_no_hash(tmp_path: Path) -> None:
    with Hashes(tmp_path) as hashes:
        with hashes.following(tmp_path / "file"):
            pass
        assert hashes.finish() == {}


def test_a_followed_file_is_flushed_once_it_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[Path] = []
    monkeypatch.setattr(module.atomic, "fsync", flushed.append)
    with Hashes(tmp_path) as hashes:
        with hashes.following(tmp_path / "file"):
            (tmp_path / "file").write_bytes(b"content")
        hashes.finish()
        assert not flushed
        hashes.add(tmp_path)
        hashes.add(tmp_path)
        assert hashes.finish() == {"file": hashlib.sha256(b"content").hexdigest()}
    assert flushed == [tmp_path / "file"]


def test_what_is_not_written_yet_is_not_read(tmp_path: Path) -> None:
    """Bytes that are there but not told may still change."""
    with Hashes(tmp_path) as hashes:
        with hashes.following(tmp_path / "file") as done, open(tmp_path / "file", "wb", buffering=0) as file:
            file.write(b"told, and more")
            done(4)
            time.sleep(0.1)
            os.pwrite(file.fileno(), b" or less", 4)
        found = hashes.finish()
    assert found == {"file": sha256(tmp_path / "file")}


def test_a_failure_while_a_file_is_written_ends_what_follows_it(tmp_path: Path) -> None:
    before = threading.active_count()
    with suppress(ValueError), Hashes(tmp_path) as hashes, hashes.following(tmp_path / "file") as done:
        (tmp_path / "file").write_bytes(b"half")
        done(2)
        raise ValueError
    assert threading.active_count() == before
