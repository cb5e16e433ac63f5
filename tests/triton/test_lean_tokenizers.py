"""The text models keep their tokenizers in less memory than the library does, and they read and write the same."""

from __future__ import annotations

import functools
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers_of_kinds import DATA, TEXTS, byte_level, llama2, unigram

from builder.core import paths
from builder.serving.installation import find_server
from tests.triton.test_models import BLS, PREPROCESSING

ODD = "Grüße 世界 🎉 👩‍👩‍👧 x\u0301 \u200d हिन्दी <s> </s> <|im_end|> <|New|>  <0x41> \n\n\t end"


def added() -> Tokenizer:
    """With added tokens of every kind: special or not, normalized or not, in the vocabulary or beyond it."""
    made = Tokenizer.from_str(llama2().to_str())
    made.add_tokens([AddedToken("<|new|>", normalized=True), AddedToken("▁the", normalized=False, lstrip=True)])
    made.add_special_tokens([AddedToken("<|im_end|>", rstrip=True), AddedToken("end", single_word=True)])
    made.normalizer = normalizers.Sequence([normalizers.Lowercase(), made.normalizer])
    return made


def suffixed() -> Tokenizer:
    """Like GPT-1 and CLIP: the end of a word is part of its tokens, unknown characters have a token, no decoder."""
    words = ["<unk>", "a</w>", "b", "ab</w>", "b</w>", "a", "<s>"]
    model = models.BPE(
        {word: i for i, word in enumerate(words)},
        [("a", "b</w>")],
        unk_token="<unk>",
        end_of_word_suffix="</w>",
    )
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<s>"])
    return made


def word_piece() -> Tokenizer:
    """Like BERT."""
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, ".": 3, "[SEP]": 4}, unk_token="[UNK]"))
    made.decoder = decoders.WordPiece()
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["[SEP]"])
    return made


def with_gaps() -> Tokenizer:
    """With ids that no token has."""
    made = Tokenizer(models.WordLevel({"a": 0, "b": 7, "c": 5000, "?": 8}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return made


def of_file(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path))


FILES = [DATA / "tiny-qwen3", *sorted((DATA / "arch-variants").iterdir())]
MADE = (byte_level, llama2, unigram, added, suffixed, word_piece, with_gaps)
KINDS: dict[str, Callable[[], Tokenizer]] = {one.__name__: functools.cache(one) for one in MADE} | {
    file.name: functools.cache(functools.partial(of_file, file / "tokenizer.json"))
    for file in FILES
    if (file / "tokenizer.json").is_file()
}


@pytest.fixture(scope="module")
def lean(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    """Preprocessing's tokenizer of a kind."""
    directory = tmp_path_factory.mktemp("kinds")

    @functools.cache
    def read(kind: str) -> Tokenizer:
        path = directory / f"{kind}.json"
        KINDS[kind]().save(str(path))
        made = PREPROCESSING.read_tokenizer(path)
        assert made.to_str() == Tokenizer.from_file(str(path)).to_str()
        return made

    return read


@pytest.mark.parametrize("kind", KINDS)
def test_preprocessing_reads_the_same_tokenizer(kind: str, lean: Callable[[str], Tokenizer]) -> None:
    for text in (ODD, ODD.upper(), *TEXTS[:20]):
        for special in (True, False):
            got, expected = (one.encode(text, add_special_tokens=special) for one in (lean(kind), KINDS[kind]()))
            assert got.ids == expected.ids


@settings(max_examples=150)
@given(kind=st.sampled_from(sorted(KINDS)), text=st.text() | st.text("aб 🎉\n<|end>sthe▁x", max_size=40))
def test_any_text_has_the_same_tokens(kind: str, text: str, lean: Callable[[str], Tokenizer]) -> None:
    assert lean(kind).encode(text).ids == KINDS[kind]().encode(text).ids


def test_merges_in_the_older_form_and_models_of_unknown_kinds_are_read(tmp_path: Path) -> None:
    """One string for a merge, as files from before tokenizers 0.20 have it; a key that is not known."""
    content = json.loads(llama2().to_str())
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    older, unknown = tmp_path / "older.json", tmp_path / "unknown.json"
    older.write_text(json.dumps(content))
    content["model"]["new_option"] = True
    unknown.write_text(json.dumps(content))
    for path in (older, unknown):
        assert PREPROCESSING.read_tokenizer(path).to_str() == llama2().to_str()


@functools.cache
def vocabulary(kind: str, skip: bool) -> Any:
    return BLS.Vocabulary(KINDS[kind](), skip)


@settings(max_examples=300)
@given(kind=st.sampled_from(sorted(KINDS)), skip=st.booleans(), data=st.data())
def test_any_ids_have_the_same_text(kind: str, skip: bool, data: st.DataObject) -> None:
    """Also ids that no token has, and special ones."""
    known = vocabulary(kind, skip)
    last, count = known.ids[-1], len(known.ids)
    index = st.integers(0, count - 1) | st.integers(max(0, count - 60), count - 1) | st.integers(0, min(300, count) - 1)
    ids = data.draw(st.lists(st.builds(known.ids.__getitem__, index) | st.integers(last - 2, last + 2)))
    assert known.text(ids) == KINDS[kind]().decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_texts_are_the_same_in_pieces(kind: str) -> None:
    for skip in (True, False):
        tokenizer, known = KINDS[kind](), vocabulary(kind, skip)
        detokenizer = BLS.Detokenizer(known, BLS.incomplete_ids(tokenizer, skip), [])
        ids = tokenizer.encode(ODD + TEXTS[0]).ids
        pieces = [*(detokenizer.add([id]) for id in ids), detokenizer.rest()]
        assert "".join(pieces) == known.text(ids) == tokenizer.decode(ids, skip_special_tokens=skip)
        assert all("\ufffd" not in piece for piece in pieces)


MEASURE = """
import ctypes, importlib.util, sys
sys.path[:0] = [{utils!r}]
spec = importlib.util.spec_from_file_location("model", {model!r})
model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model)
def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))
before = private()
kept = {read}
model.release_memory()
print(private() - before)
"""


def kilobytes(model: str, read: str) -> int:
    """The memory that a text model's process keeps after reading something."""
    utils = next(file for file in find_server().python_backend if file.name == "triton_python_backend_utils.py")
    source = paths.data("triton_templates", "1.2", model, "1", "model.py")
    code = MEASURE.format(utils=str(utils.parent), model=str(source), read=read)
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_the_models_keep_less_memory_than_the_library(tmp_path: Path) -> None:
    """With 40,000 tokens. What only decodes keeps a fifth at most, and what encodes nine tenths."""
    choose, content = random.Random(0), json.loads(byte_level().to_str())
    known = content["model"]["vocab"]
    tokens = [token for token in known if len(token) < 4]
    while len(known) < 40_000:
        first, second = choose.choice(tokens), choose.choice(tokens)
        if first + second not in known:
            known[first + second] = 10_000 + len(known)
            tokens.append(first + second) if len(first + second) < 7 else None
            content["model"]["merges"].append([first, second])
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(content))
    whole = kilobytes("preprocessing", f"model.Tokenizer.from_file({str(path)!r})")
    encodes = kilobytes("preprocessing", f"model.read_tokenizer(model.Path({str(path)!r}))")
    decodes = kilobytes("postprocessing", f"model.Vocabulary(model.Tokenizer.from_file({str(path)!r}), True)")
    assert encodes < whole * 0.9, (whole, encodes)
    assert decodes < whole * 0.2, (whole, decodes)
