"""Text that is made token by token is the text of all tokens, for every kind of tokenizer."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers_of_kinds import KINDS

from builder.tokenizer.detokenizer import Detokenizer, Vocabulary

TEXTS = st.text(st.sampled_from(" aeinst.,\n'1Grüße世界🎉👩‍👩‍👧é́"), max_size=60) | st.text(max_size=20)


@cache
def vocabulary(kind: str) -> Vocabulary:
    return Vocabulary.of(KINDS[kind]())


def pieces(vocabulary: Vocabulary, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(vocabulary)
    return [*(detokenizer.add([id]) for id in ids), detokenizer.rest()]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_pieces_join_to_the_whole_text(kind: str, data: st.DataObject) -> None:
    """Of texts, and of any ids: a model may generate half a character, bytes that are none, and special tokens."""
    made = vocabulary(kind)
    ids = st.lists(st.integers(0, made.tokenizer.get_vocab_size() - 1), max_size=30)
    chosen = data.draw(ids | TEXTS.map(lambda text: list(made.tokenizer.encode(text, add_special_tokens=False).ids)))
    found = pieces(made, chosen)
    assert "".join(found) == made.text(chosen)
    for piece in found[:-1]:
        piece.encode("utf-8")  # no surrogates, which JSON could not carry


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
def test_a_character_is_sent_once_it_is_complete(kind: str, text: str) -> None:
    made = vocabulary(kind)
    ids = made.tokenizer.encode(text, add_special_tokens=False).ids
    if "\ufffd" not in made.text(ids):
        assert not any("\ufffd" in piece for piece in pieces(made, ids))


def test_a_llama_2_answer_keeps_its_leading_space() -> None:
    made = vocabulary("llama2")
    ids = made.tokenizer.encode("Hello world", add_special_tokens=False).ids
    assert "".join(pieces(made, ids)) == " Hello world"


@given(text=TEXTS)
def test_the_bytes_of_byte_level_tokens_are_those_of_the_text(text: str) -> None:
    made = vocabulary("byte-level")
    ids = made.tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(made.token_bytes(id) for id in ids).decode() == made.tokenizer.decode(ids)


def test_the_bytes_of_single_byte_tokens() -> None:
    made = vocabulary("llama2")
    id = made.tokenizer.token_to_id("<0xE4>")
    assert made.token_bytes(id) == b"\xe4"
    assert made.token_bytes(made.tokenizer.encode("Hello", add_special_tokens=False).ids[0]).startswith(b" ")


def test_a_token_that_only_looks_like_a_byte_is_text() -> None:
    tokenizer = Tokenizer(WordLevel({"<0x41>": 0, "<0xyz>": 1}, unk_token="<0xyz>"))
    tokenizer.decoder = Fuse()
    made = Vocabulary.of(tokenizer)
    assert (made.token_bytes(0), made.token_bytes(1)) == (b"A", b"<0xyz>")
    assert made.incomplete == {0}
