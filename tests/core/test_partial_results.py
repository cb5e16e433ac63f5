"""What an interrupted stage leaves is there for the next run, and another build's is left alone."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from builder.core.output import Output
from builder.core.partial_results import PartialResults
from builder.core.store import Store, key_of

INGREDIENTS = {"a": 1}
KEY = key_of("checkpoint", INGREDIENTS)
FILES = (f"checkpoint-{KEY}.jsonl", f"checkpoint-{KEY}-3.safetensors", f".checkpoint-{KEY}.safetensors.7.tmp")
OTHERS = (f"checkpoint-{KEY[::-1]}.jsonl", f"checkpoint-{KEY}0.jsonl")


def results(root: Path, force: tuple[str, ...] = ()) -> PartialResults:
    return PartialResults(Store(root, Output("quiet"), force=force), "checkpoint", KEY)


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    directory = tmp_path / "partial"
    directory.mkdir()
    for name in (*FILES, *OTHERS):
        (directory / name).write_text("{}\n")
    return directory


def left(partial: Path) -> set[str]:
    return {path.name for path in partial.iterdir()}


def test_they_survive_until_the_stage_is_complete(tmp_path: Path, partial: Path) -> None:
    one = results(tmp_path)
    one.begin()
    assert left(partial) == {*FILES, *OTHERS}
    one.end()
    assert left(partial) == set(OTHERS)


def test_a_forced_stage_starts_without_them(tmp_path: Path, partial: Path) -> None:
    results(tmp_path, ("engine",)).begin()
    assert left(partial) == {*FILES, *OTHERS}
    results(tmp_path, ("checkpoint",)).begin()
    assert left(partial) == set(OTHERS)


def test_those_that_another_build_is_writing_are_left(tmp_path: Path, partial: Path) -> None:
    """Without waiting for it."""
    locked, done = threading.Event(), threading.Event()

    def another() -> None:
        with Store(tmp_path, Output("quiet")).locked("checkpoint", KEY):
            locked.set()
            done.wait(30)

    thread = threading.Thread(target=another)
    thread.start()
    try:
        assert locked.wait(30)
        results(tmp_path).end()
        assert left(partial) == {*FILES, *OTHERS}
    finally:
        done.set()
        thread.join()
    results(tmp_path).end()
    assert left(partial) == set(OTHERS)


def test_a_complete_stage_in_a_store_that_is_read_only_needs_no_lock(tmp_path: Path) -> None:
    results(tmp_path / "store").end()
    assert not (tmp_path / "store").exists()
