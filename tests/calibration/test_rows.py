"""calibrate: JSONL files, the bundled set, Hub datasets through the real `datasets` library, and token batches."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hub_server import Fault, Hub
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.calibration.rows import Calibration, calibrate, dump, read_jsonl, token_batches
from builder.core import paths
from builder.core.errors import BuilderError, IntegrityError, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.recipe.schema import Calibration as Part

DATA = Path(__file__).parents[1] / "data"
TOKEN = "hf_SesameOpenSesame"
DIALOGUE = [{"role": "user", "content": "Grüße?"}, {"role": "assistant", "content": "Grüße 🙂"}]


@pytest.fixture
def hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(DATA / "tiny-qwen3")


def jsonl(path: Path, *lines: object) -> Path:
    path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
    return path


def rows(found: Calibration) -> list[dict[str, Any]]:
    return [json.loads(line) for line in found.path.read_bytes().splitlines()]


def test_a_file(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = jsonl(
        tmp_path / "own.jsonl",
        b"\xef\xbb\xbf" + json.dumps({"text": "first"}).encode(),
        b"",
        {"messages": DIALOGUE, "prompt": "not this"},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        b"{half",
        {"text": "  "},
        {"url": "x"},
        {"text": "last"},
        {"text": "too many"},
    )
    found = calibrate(Part(data=str(file), samples=4), store=store)
    assert rows(found) == [
        {"text": "first"},
        {"messages": DIALOGUE},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"text": "last"},
    ]
    assert found.rows == 4
    assert found.text_sha256 == hashlib.sha256(found.path.read_bytes()).hexdigest()
    said = capsys.readouterr().err
    assert re.search(r"3 rows of .* skipped: row 5 is no JSON.*row 6 has an empty 'text'; row 7 has no", said)

    assert calibrate(Part(data=str(file), samples=4), store=store) == found
    assert "found" in capsys.readouterr().err
    assert calibrate(Part(data=str(file), samples=9), store=store).rows == 5
    assert "has only 5 of the 9 requested rows" in capsys.readouterr().err
    # The same content under another name is the same calibration; another content under the same name is not.
    moved = file.rename(tmp_path / "moved.jsonl")
    assert calibrate(Part(data=str(moved), samples=4), store=store).path == found.path
    jsonl(moved, {"text": "other"})
    assert calibrate(Part(data=str(moved), samples=4), store=store).text_sha256 != found.text_sha256


def test_a_named_column(store: Store, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "c.jsonl", {"text": "a", "body": "b"}, {"text": "a"}, {"body": DIALOGUE})
    found = calibrate(Part(data=str(file), column="body"), store=store)
    assert rows(found) == [{"text": "b"}, {"messages": DIALOGUE}]


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "It is empty"),
        ([b"\xff\xfe"], "row 1 is not UTF-8"),
        ([b"[" * 100_000], "row 1 is no JSON"),
        ([[1], 2, None], "row 1 is a JSON list.*row 2 is a JSON int.*row 3 is a JSON NoneType"),
        ([{"text": 5}], "row 1 has a int as 'text'"),
        ([{"text": None}], "NoneType as 'text'"),
        ([{"a": 1}, {}], 'row 1 has no "text" or "messages", only a; row 2 .* only nothing'),
        ([b'{"text": "\\ud800"}'], "half of a surrogate pair"),
        ([{"messages": []}], "has a list as 'messages'"),
        ([{"messages": [{"role": "user"}]}], "message without"),
        ([{"messages": [{"role": "user", "content": ["a"]}]}], "message without"),
        ([{"messages": ["hello"]}], "message without"),
    ],
)
def test_no_usable_row(lines: list[object], says: str, store: Store, tmp_path: Path) -> None:
    file = jsonl(tmp_path / "bad.jsonl", *lines)
    with pytest.raises(UsageError) as caught:
        calibrate(Part(data=str(file)), store=store)
    assert "has no usable row" in caught.value.what
    assert re.search(says, caught.value.why), caught.value.why
    assert "calibration.column" in caught.value.hint
    assert not list((store.root / "calibration").glob("*"))


@pytest.mark.parametrize(
    "data", ["./no.jsonl", "no.jsonl", "/etc", "a b", "x\ny", "builtin:none", "../../etc/passwd", "\0"]
)
def test_what_is_no_calibration_set(data: str, store: Store) -> None:
    with pytest.raises(UsageError) as caught:
        calibrate(Part(data=data), store=store)
    assert "\n" not in caught.value.what
    assert "builtin:python-docs" in caught.value.hint
    assert not store.root.exists()


@settings(max_examples=150)
@given(
    st.binary(max_size=200)
    | st.lists(
        st.recursive(
            st.none() | st.booleans() | st.floats() | st.text(max_size=8),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(["text", "messages", "role", "content", "from", "value", "x"]), inner, max_size=3
                )
            ),
            max_leaves=8,
        ),
        max_size=5,
    ).map(lambda values: "\n".join(json.dumps(v) for v in values).encode())
)
def test_any_bytes_are_rows_or_reasons(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_bytes(content)
    found = read_jsonl(file, 10, None)
    written = dump(found.usable)
    assert [json.loads(line) for line in written.splitlines()] == found.usable
    assert dump(json.loads(line) for line in written.decode().split("\n") if line) == written
    assert len(found.usable) + len(found.unusable) == sum(bool(line.strip()) for line in content.split(b"\n"))


def grams(text: str, n: int = 13) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def words_of(row: dict[str, Any]) -> str:
    return row["text"] if "text" in row else "\n".join(m["content"] for m in row["messages"])


def test_the_bundled_set_is_none_of_the_evaluation_texts(store: Store) -> None:
    found = calibrate(Part(data="builtin:python-docs"), store=store)
    ours = rows(found)
    assert len(ours) == 64
    assert sum("text" in row for row in ours) == 32
    evaluated: set[tuple[str, ...]] = set()
    for name in ("chat.jsonl", "prose.jsonl"):
        for line in (DATA / "eval" / name).read_text(encoding="utf-8").splitlines():
            evaluated |= grams(words_of(json.loads(line)))
    assert len(evaluated) > 10_000
    assert not [row for row in ours if grams(words_of(row)) & evaluated]


def test_the_bundled_set_can_be_made_again(tmp_path: Path) -> None:
    script = paths.data("configs", "calibration", "make.py")
    subprocess.run([sys.executable, str(script), str(tmp_path / "again.jsonl")], check=True)
    again = read_jsonl(tmp_path / "again.jsonl", 100, None)
    bundled = read_jsonl(paths.data("configs", "calibration", "python-docs.jsonl"), 100, None)
    assert len(again.usable) == 64
    assert not again.unusable
    # Other releases of Python have other docstrings here and there.
    assert len({dump([r]) for r in again.usable} & {dump([r]) for r in bundled.usable}) >= 32


def dataset(hub: Hub, directory: Path, *, rows: int = 20, parquet: bool = False) -> str:
    directory.mkdir()
    table = [{"id": i, "article": f"The article\u2028number\u0085{i}."} for i in range(rows)]
    if parquet:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(table), directory / "train-00000-of-00001.parquet", row_group_size=5)
    else:
        jsonl(directory / "train.jsonl", *table)
    return hub.add("news/articles", directory, repo_type="dataset")


@pytest.mark.parametrize("parquet", [False, True])
def test_a_hub_dataset(parquet: bool, hub: Hub, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = dataset(hub, tmp_path / "source", parquet=parquet)
    found = calibrate(Part(data="news/articles", samples=7), store=store)
    assert rows(found) == [{"text": f"The article\u2028number\u0085{i}."} for i in range(7)]
    facts = store.done[-1].facts
    assert facts["commit"] == commit
    assert not any(r.authorization for r in hub.requests if r.path.startswith("/cdn/"))
    assert not [p for p in store.root.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]

    # The branch moves on: another calibration. The commit that was named stays what it was, without a network.
    jsonl(tmp_path / "source" / "train.jsonl", {"text": "news"})
    (tmp_path / "source" / "train-00000-of-00001.parquet").unlink(missing_ok=True)
    if not parquet:
        dataset_commit = hub.add("news/articles", tmp_path / "source", repo_type="dataset")
        assert dataset_commit != commit
        assert rows(calibrate(Part(data="news/articles", samples=7), store=store)) == [{"text": "news"}]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = len(hub.requests)
    pinned = Part(data="news/articles", samples=7, revision=commit)
    assert calibrate(pinned, store=store).text_sha256 == found.text_sha256
    with pytest.raises(UsageError, match=r"calibration\.revision=COMMIT"):
        calibrate(Part(data="news/articles", samples=7), store=store)
    assert len(hub.requests) == before


@pytest.mark.any_version
def test_a_hub_dataset_s_damaged_card_is_fetched_again(hub: Hub, store: Store, tmp_path: Path) -> None:
    """`datasets` parses the YAML at its head, and takes it from the cache without looking."""
    dataset(hub, tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: mit\n---\nNews.\n")
    hub.add("news/articles", tmp_path / "source", repo_type="dataset")
    part = Part(data="news/articles", samples=3)
    first = calibrate(part, store=store)
    (card,) = (Path(os.environ["HF_HOME"]) / "hub").rglob("README.md")
    card.resolve().write_bytes(b"---\nlicense: [[[\n\xff")
    again = calibrate(part, store=Store(tmp_path / "other", Output("quiet")))
    assert again.text_sha256 == first.text_sha256
    assert card.read_text().startswith("---\nlicense: mit")


def test_a_hub_dataset_s_etag_is_no_path(hub: Hub, store: Store, tmp_path: Path) -> None:
    dataset(hub, tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("---\nlicense: mit\n---\n")
    hub.add("news/articles", tmp_path / "source", repo_type="dataset")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    hub.fail(Fault("README.md", "headers", 10**6, "HEAD", headers={"ETag": f'"{victim}"'}))
    with pytest.raises(IntegrityError, match="is not a hash"):
        calibrate(Part(data="news/articles", samples=3), store=store)
    assert victim.read_text() == "precious"
    assert {p.name for p in tmp_path.iterdir()} <= {"hf", "source", "store", "victim"}


@pytest.mark.parametrize(
    ("part", "error", "says"),
    [
        ({"data": "news/article"}, UsageError, "has no dataset news/article.*Did you mean news/articles"),
        ({"data": "news/articles", "split": "test"}, UsageError, r"can't be read.*test.*calibration\.split"),
        ({"data": "news/articles", "config": "de"}, UsageError, r"can't be read.*de.*calibration\.config"),
        ({"data": "news/articles", "column": "body"}, UsageError, r"no usable row.*'body', only id, article"),
        ({"data": "news/script"}, (UnsupportedError, UsageError), "script|no files"),
        ({"data": "news/gated"}, UsageError, r"gated.*datasets/news/gated"),
    ],
)
def test_what_a_dataset_lacks(
    part: dict[str, Any], error: type[BuilderError], says: str, hub: Hub, store: Store, tmp_path: Path
) -> None:
    dataset(hub, tmp_path / "source", rows=3)
    (tmp_path / "script").mkdir()
    (tmp_path / "script" / "script.py").write_text("raise SystemExit('this must never run')")
    hub.add("news/script", tmp_path / "script", repo_type="dataset")
    hub.add("news/gated", tmp_path / "source", repo_type="dataset")
    hub.repos["dataset", "news/gated"].gated = True
    with pytest.raises(error) as caught:
        calibrate(Part(**part), store=store)
    assert re.search(says, str(caught.value), re.DOTALL), str(caught.value)
    assert caught.value.hint
    assert not list((store.root / "calibration").glob("*"))


def test_a_dataset_from_a_hub_that_stumbles(hub: Hub, store: Store, tmp_path: Path) -> None:
    dataset(hub, tmp_path / "source")
    hub.fail(Fault("/resolve/.*/train.jsonl", "status", status=503))
    hub.fail(Fault("/api/datasets/", "status", status=429, headers={"Retry-After": "1"}))
    assert calibrate(Part(data="news/articles", samples=5), store=store).rows == 5


def tokenized(path: Path, tokenizer: Any, seq_len: int) -> list[tuple[int, ...]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text = row["text"] if "text" in row else tokenizer.apply_chat_template(row["messages"], tokenize=False)
        found.append(tuple(tokenizer.encode(text, add_special_tokens="text" in row)[:seq_len]))
    return found


@pytest.mark.parametrize(("seq_len", "batch_size"), [(2048, 1), (16, 1), (16, 4), (300, 3)])
def test_token_batches(seq_len: int, batch_size: int, tokenizer: Any) -> None:
    import torch

    path = paths.data("configs", "calibration", "python-docs.jsonl")
    batches = token_batches(path, tokenizer, seq_len=seq_len, batch_size=batch_size)
    assert all(b.dtype == torch.int64 and b.ndim == 2 for b in batches)
    assert all(len(b) <= batch_size and b.shape[1] <= seq_len for b in batches)
    got = [tuple(ids) for batch in batches for ids in batch.tolist()]
    assert Counter(got) == Counter(tokenized(path, tokenizer, seq_len))
    if batch_size == 1:
        assert got == tokenized(path, tokenizer, seq_len)
    # No row is padded, yet the forward passes are fewer where lengths are equal.
    assert len(batches) <= -(-64 // batch_size) + len({len(ids) for ids in got})


def test_token_batches_of_messages(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = jsonl(tmp_path / "rows.jsonl", {"messages": DIALOGUE})
    (batch,) = token_batches(file, tokenizer, seq_len=100, batch_size=1)
    expected = "<|im_start|>user\nGrüße?<|im_end|>\n<|im_start|>assistant\nGrüße 🙂<|im_end|>\n"
    assert tokenizer.decode(batch[0]) == expected

    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('Roles must alternate') }}")
    with pytest.raises(UsageError, match=r"row 1.*\n.*Roles must alternate"):
        token_batches(file, tokenizer, seq_len=100, batch_size=1)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(UsageError, match="no chat template"):
        token_batches(file, tokenizer, seq_len=100, batch_size=1)
