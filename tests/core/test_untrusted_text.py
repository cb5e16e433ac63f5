"""Hostile JSON and YAML ends in a ValueError within limits, and in a recipe in an error message."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from builder.calibration.rows import read_jsonl
from builder.checkpoint import layouts
from builder.core import safetensors_io, untrusted_text
from builder.core.errors import BuilderError, IntegrityError, UsageError
from builder.core.untrusted_text import check_yaml, parse_json, parse_yaml, read_regular
from builder.evaluate import tasks
from builder.model import files as model_files
from builder.recipe import schema, sources

DEEP = "[" * 100_000 + "]" * 100_000
DEEP_OBJECT = '{"a":' * 100_000 + "1" + "}" * 100_000
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

BAD_JSON = [
    (DEEP, "nested more than"),
    (DEEP_OBJECT, "nested more than"),
    ("[" * 200 + "]" * 200, "nested more than 100 levels"),
    ('{"a": 1, "a": 2}', "'a' occurs twice"),
    ('{"x": {"a": 1, "b": 2, "a": [1]}}', "'a' occurs twice"),
    ("\ufeff{}", "byte order mark"),
    (b"\xff\xfe{\x00}\x00", "utf-8"),
    (b'{"a": "\xe9"}', "utf-8"),
    ("", "Expecting value"),
    ("{}\0", "Extra data"),
    ('{"a": "\0"}', "Invalid control character"),
    ("9" * 10_000, "digits"),
    ("{} {}", "Extra data"),
]


@pytest.mark.parametrize(("text", "says"), BAD_JSON)
def test_bad_json(text: str | bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_json(text if isinstance(text, bytes) else text.encode())


def test_json_as_transformers_writes_it() -> None:
    assert parse_json('{"time_step_limit": [0.0, Infinity], "a": 1, "a": 1}') == {
        "time_step_limit": [0.0, float("inf")],
        "a": 1,
    }
    assert parse_json('{"a": NaN, "a": NaN}')["a"] != 0
    with pytest.raises(ValueError, match="twice"):
        parse_json('{"a": 1, "a": 1}', unique=True)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda s: st.lists(s) | st.dictionaries(st.text(), s)
    )
)
def test_other_json_is_read_as_python_reads_it(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=True).encode()) == value


@given(st.binary(max_size=60))
def test_any_bytes_are_a_value_or_a_value_error(data: bytes) -> None:
    for parse in (parse_json, parse_yaml):
        with suppress(ValueError):
            parse(data)


BAD_YAML = [
    (LAUGHS, "more than 100000 values, aliases included"),
    ("a: &a [*a]", "contains itself"),
    ("&a {a: *a}", "contains itself"),
    ("a: &a\n  <<: *a\n", "contains itself"),
    ("model: {id: x}\ngpu: cpu\nmodel: {id: y}", r"'model' occurs twice \(line 3\)"),
    ("engine:\n  tp: 1\n  pp: 1\n  tp: 2\n", r"'tp' occurs twice \(line 4\)"),
    ("a: [{b: 1, 'b': 1}]", "'b' occurs twice"),
    (DEEP, "nested more than"),
    ("[" * 150 + "]" * 150, "nested more than"),
    ("a: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ("a: !!timestamp x", "can't be read"),
    ("a: !!int x", "int"),
    ("a: 2026-99-99", "month"),
    ("a: " + "9" * 5000, "digits"),
    ("{}: 1\n? [a]\n: 2", "unhashable"),
    ("a: 1\n---\nb: 2", "another document"),
    ("a: \0", "special characters are not allowed"),
    (b"a: \xff", "utf-8"),
    ("x" * 1_000_001, "larger than"),
]


@pytest.mark.parametrize(("text", "says"), BAD_YAML)
def test_bad_yaml(text: str | bytes, says: str, tmp_path: Path) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=says):
        parse_yaml(text)
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UsageError, match=f"(?s){says}"):
        schema.resolve({"model.id": "x", "gpu": "cpu"}, recipe_file=file)
    assert time.process_time() - start < 20


def test_yaml_as_people_write_it() -> None:
    text = "a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a\nd: *a\n"
    assert parse_yaml(text) == yaml.safe_load(text)
    assert parse_yaml("\ufeffa: 1".encode()) == {"a": 1}
    assert parse_yaml("") is None
    check_yaml("a: !function utils.f\nb: !include other.yaml")
    with pytest.raises(ValueError, match="twice"):
        check_yaml("a: !function utils.f\na: 2")


def test_our_own_configurations_hold_no_key_twice() -> None:
    files = sorted(Path("configs").rglob("*.yaml"))
    assert len(files) > 10
    for file in files:
        assert parse_yaml(file.read_bytes()) == yaml.safe_load(file.read_text()), file


@pytest.mark.parametrize("value", ["&a [*a]", "[" * 1000, "{a: 1, a: 2}", "!!timestamp x", "9" * 5000])
def test_a_bad_value_of_set(value: str) -> None:
    with pytest.raises(UsageError, match="is not valid YAML"):
        schema.resolve({"model.id": "x", "gpu": "cpu"}, sets=[f"engine.tp={value}"])


@pytest.mark.parametrize(
    "text",
    [
        "gpu: [1]",
        "gpu: {a: 1}",
        "gpu: 1",
        "gpu: null",
        "gpu: ''",
        "gpu: ../../etc/passwd",
        "model: x",
        "model: [x]",
        "model: {1: 2}",
        "model.id.x: 1",
        "'': 1",
        "'.': 1",
        "engine: null",
        "engine: {tp: .nan}",
        "engine: {tp: .inf}",
        "evaluation: {texts: {a: 1}}",
        "quantization: {exclude: {a: 1}}",
        "1: 2",
        "[]",
        "text",
        "null",
    ],
)
def test_odd_recipes_are_usage_errors(text: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(BuilderError):
        schema.resolve({"model.id": "x"}, recipe_file=file)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    """None of them may block."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(ValueError, match=r"a directory|not a regular file"):
            read_regular(path)
        with pytest.raises(UsageError):
            sources.load_yaml(path)
        with pytest.raises(IntegrityError):
            layouts.read_json(path)
    (tmp_path / "big").write_bytes(b"x" * 1000)
    with pytest.raises(ValueError, match="larger than 999 bytes"):
        read_regular(tmp_path / "big", 999)


def test_a_recipe_may_come_through_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `--recipe <(command)`; a pipe without a writer must not block forever."""
    read, write = os.pipe()

    def slowly() -> None:
        for piece in (b"engine:\n", b"  tp: 2\n"):
            time.sleep(0.1)
            os.write(write, piece)
        os.close(write)

    writer = threading.Thread(target=slowly)
    writer.start()
    assert sources.load_yaml(Path(f"/dev/fd/{read}")) == {"engine": {"tp": 2}}
    writer.join()
    os.close(read)
    monkeypatch.setattr(untrusted_text, "PIPE_SECONDS", 0.2)
    read, write = os.pipe()
    with pytest.raises(UsageError, match="sent nothing"):
        sources.load_yaml(Path(f"/dev/fd/{read}"))
    os.close(read)
    os.close(write)


def test_every_reader_of_foreign_json_survives_deep_nesting(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(DEEP_OBJECT)
    with pytest.raises(UsageError, match="nested"):
        model_files.parse_config(file.read_bytes(), "here")
    with pytest.raises(IntegrityError, match="nested"):
        model_files.shards_of(file.read_bytes(), [], "here")
    with pytest.raises(IntegrityError, match="nested"):
        layouts.read_json(file)
    header = DEEP_OBJECT.encode()
    shard = tmp_path / "x.safetensors"
    shard.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(IntegrityError, match="nested"):
        safetensors_io.read_header(shard)
    (tmp_path / "rows.jsonl").write_text(DEEP + '\n{"text": "a", "text": "b"}\n{"text": "good"}\n')
    rows = read_jsonl(tmp_path / "rows.jsonl", 8, None)
    assert rows.usable == [{"text": "good"}]
    assert "nested" in rows.unusable[1]
    assert "twice" in rows.unusable[2]


def test_task_files_are_checked_before_lm_eval_reads_them(tmp_path: Path) -> None:
    tasks._check_files(Path("tests/data"))
    (tmp_path / "folder").mkdir()
    good = tmp_path / "folder" / "good.yaml"
    good.write_text("task: a\nprocess_docs: !function utils.f\n")
    tasks._check_files(tmp_path)
    bad = tmp_path / "folder" / "bad.yaml"
    for text, says in (
        ("task: a\ntask: b\n", "'task' occurs twice"),
        ("a: &a [*a]", "contains itself"),
        (LAUGHS, "aliases"),
    ):
        bad.write_text(text)
        with pytest.raises(UsageError, match=f"(?s)bad.yaml.*{says}"):
            tasks._check_files(tmp_path)
    bad.unlink()
    os.mkfifo(tmp_path / "folder" / "fifo")  # hashing it would wait for ever
    with pytest.raises(UsageError, match="not a regular file"):
        tasks._check_files(tmp_path)


def test_a_row_without_an_end_is_not_read_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.calibration.rows.LONGEST_ROW", 100)
    file = tmp_path / "rows.jsonl"
    long = json.dumps({"text": "x" * 1000})
    just = json.dumps({"text": "x" * (100 - len('{"text": ""}'))})
    file.write_text(f'{long}\n{just}\n{{"text": "good"}}\n{long}')
    rows = read_jsonl(file, 8, None)
    assert [len(row["text"]) for row in rows.usable] == [88, 4]
    assert rows.unusable == {1: "is longer than 100 bytes", 4: "is longer than 100 bytes"}
