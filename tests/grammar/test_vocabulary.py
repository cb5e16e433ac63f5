"""The tokens of a model as bytes: for tokenizers of every family, they join to the text that was encoded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from builder.core.errors import IntegrityError
from builder.grammar import vocabulary
from builder.grammar.vocabulary_worker import ALPHABET
from builder.tokenizer.worker import load

TEXT = 'Grüße, 世界 🎉 {"a": [1, 2]}\n\tdef f(x):'
BYTE_OF = {char: byte for byte, char in ALPHABET.items()}
DATA = Path(__file__).parents[1] / "data"


def decoded(directory: Path) -> list[bytes]:
    return [bytes(BYTE_OF[char] for char in token) for token in vocabulary.encoded(directory)]


def byte_fallback() -> Tokenizer:
    """As Llama 2's: a space is a letter, and what is not in the vocabulary is bytes."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "d", "▁d"]
    vocab = {name: id for id, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab, [("▁", "d")], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """As T5's and others: no bytes, and the space is a letter, which xgrammar itself would not know."""
    pieces = [("<unk>", 0.0), *((char if char != " " else "▁", -1.0) for char in sorted(set(TEXT)))]
    tokenizer = Tokenizer(models.Unigram(pieces, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never", split=False)
    return tokenizer


@pytest.mark.parametrize("family", ["byte-level", "byte-fallback", "unigram"])
def test_tokens_join_to_the_text(family: str, tmp_path: Path) -> None:
    tokenizer = {"byte-level": lambda: load(DATA / "tiny-qwen3"), "byte-fallback": byte_fallback, "unigram": unigram}[
        family
    ]()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.add_tokens([AddedToken("<tool é>", special=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = decoded(tmp_path)
    assert b"".join(tokens[id] for id in tokenizer.encode(TEXT, add_special_tokens=False).ids).decode() == TEXT
    assert tokens[tokenizer.token_to_id("<|end|>")] == b"", "no part of a text"
    assert tokens[tokenizer.token_to_id("<tool é>")].decode() == "<tool é>"


def test_an_id_without_a_token_keeps_its_place(tmp_path: Path) -> None:
    content = json.loads((DATA / "tiny-qwen3" / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    last = max(vocab, key=lambda token: vocab[token])
    id = vocab[last]
    vocab[last] = id + 50
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, "added_tokens": []}))
    tokens = decoded(tmp_path)
    assert (tokens[id], tokens[id + 50]) == (b"", bytes(BYTE_OF[char] for char in last))


def test_the_file_is_cut_to_the_models_vocabulary(tmp_path: Path) -> None:
    vocabulary.write(DATA / "tiny-qwen3", tmp_path / "info.json", 100, [7])
    found = json.loads((tmp_path / "info.json").read_text())
    assert (len(found["encoded_vocab"]), found["stop_token_ids"]) == (100, [7])


def test_a_tokenizer_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(IntegrityError, match="can't be read"):
        vocabulary.encoded(tmp_path)
