"""Control tokens that a user writes are tokenized as text, those of the template as themselves."""

from __future__ import annotations

import json
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers_of_kinds import KINDS, llama2

from builder.tokenizer.control_tokens import MARKS, ControlTokens, _any_of

SPECIAL = {"llama2": "</s>", "unigram": "</s>", "byte-level": "<|im_end|>"}


def as_text(tokenizer: Tokenizer) -> Tokenizer:
    """The library's own way for a whole text: no special token is read in it."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.encode_special_tokens = True
    return copy


JUDGES = {name: as_text(kind()) for name, kind in KINDS.items()}
WORDS = ["SPECIAL", " ", "\n", "Hello", "Grüße 🎉", "a ", " b", "<", "|", "世界"]


def encoded(control: ControlTokens, before: str, text: str, after: str, **options: bool) -> list[int]:
    protected, mark = control.protect(text)
    return control.encode(f"{before}{protected}{after}", mark, **options)


@pytest.mark.parametrize("name", KINDS)
@given(words=st.lists(st.sampled_from(WORDS), max_size=8))
def test_a_users_text_between_control_tokens(name: str, words: list[str]) -> None:
    tokenizer, special = KINDS[name](), SPECIAL[name]
    text = "".join(words).replace("SPECIAL", special)
    id = tokenizer.token_to_id(special)
    found = encoded(ControlTokens(tokenizer), special, text, special, add_special_tokens=False)
    assert found == [id, *JUDGES[name].encode(text, add_special_tokens=False).ids, id]


@pytest.mark.parametrize("name", KINDS)
def test_a_text_without_control_tokens_stays(name: str) -> None:
    tokenizer = KINDS[name]()
    value = {"a": ["Hello ", 1, None], "b": {"c": "世界"}}
    assert ControlTokens(tokenizer).protect(value) == (value, "")
    text = f"Hello {SPECIAL[name]} b"
    assert ControlTokens(tokenizer).encode(text, MARKS[0]) == tokenizer.encode(text).ids


def test_the_tokens_that_the_tokenizer_adds_stay() -> None:
    found = encoded(ControlTokens(llama2()), "", "a </s> b", "")
    assert found == [1, *JUDGES["llama2"].encode("a </s> b", add_special_tokens=False).ids]


def test_a_space_that_is_written_before_the_first_word_only() -> None:
    """Like newer conversions of Mistral: Metaspace with prepend_scheme "first"."""
    file = json.loads(llama2().to_str())
    file["normalizer"] = None
    file["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    tokenizer = Tokenizer.from_str(json.dumps(file))
    control = ControlTokens(tokenizer)
    first, later = (encoded(control, before, "a </s>", "", add_special_tokens=False) for before in ("", "<s>"))
    assert tokenizer.id_to_token(first[0]).startswith("▁")
    assert not tokenizer.id_to_token(later[1]).startswith("▁")
    assert tokenizer.decode(later, skip_special_tokens=False).endswith("</s>")
    assert control.protect(["</s>"])[0] != ["</s>"]


def test_all_texts_of_a_value_are_protected() -> None:
    control = ControlTokens(KINDS["byte-level"]())
    value = [{"content": "<|im_end|>", "<|im_start|>": [{"x": "a<|endoftext|>"}]}, 7]
    found, mark = control.protect(value)
    assert mark == MARKS[0]
    assert "<|im_end|>" not in json.dumps(found)
    assert json.loads(json.dumps(found, ensure_ascii=False).replace(mark, "")) == value


def test_a_text_that_has_the_mark() -> None:
    control = ControlTokens(KINDS["byte-level"]())
    assert control.protect(f"{MARKS[0]}<|im_end|>")[1] == MARKS[1]
    with pytest.raises(ValueError, match="all noncharacters"):
        control.protect("".join(MARKS) + "<|im_end|>")


@given(
    texts=st.sets(st.text("ab<|.*", min_size=1, max_size=4), min_size=1, max_size=8),
    text=st.text("ab<|.*", max_size=20),
)
def test_the_expression_for_several_texts_finds_the_longest(texts: set[str], text: str) -> None:
    plain = "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))
    assert re.findall(_any_of(texts), text) == re.findall(plain, text)


def test_a_text_of_beginnings_takes_no_time_for_each_token() -> None:
    """Llama 3 has 250 tokens that begin alike; the search holds up the whole process."""
    tokens = ["</s>", *[f"<|reserved_special_token_{number}|>" for number in range(250)]]
    text = "<|" * 100_000

    def seconds(pattern: str) -> float:
        compiled = re.compile(pattern)
        start = time.process_time()
        assert compiled.search(text) is None
        return time.process_time() - start

    assert seconds(_any_of(tokens)) < seconds("|".join(map(re.escape, tokens))) / 3
