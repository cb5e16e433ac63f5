"""Stop words, bad words and answers with tokenizers that put a space in front of every text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from tokenizers_of_kinds import KINDS, byte_level, llama2, unigram, write_snapshot

from builder.core.output import Output
from builder.recipe import schema
from builder.serving.server import Server, ServerOptions, serve
from builder.triton import repository
from tests.triton.test_models import BLS, ECHO, PREPROCESSING, generate, infer, load, read_word_lists, stream
from tests.triton.test_repository import write_engine

POSTPROCESSING = load("postprocessing")
ANSWER = "Hello the world.\nUser: the ### end (the)"
WORDS = ["the", " the", "\nUser:", "User:", "###", "world", ".", "\n", "(the", "llo", "end ("]


def preprocessing(kind: str) -> Any:
    model = PREPROCESSING.TritonPythonModel()
    model.tokenizer = KINDS[kind]()
    model.vocab_size = model.tokenizer.get_vocab_size()
    return model


def occurs(ids: list[int], words: list[list[int]]) -> bool:
    return any(ids[i : i + len(word)] == word for word in words for i in range(len(ids)))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tmp = tmp_path_factory.mktemp("llama2")
    snapshot = write_snapshot(tmp / "snapshot", llama2(), "</s>")
    engine = write_engine(tmp / "engine", pretrained={"vocab_size": llama2().get_vocab_size()})
    repository.write(tmp / "models", engine, snapshot, schema.Repository(bls_instances=1))
    # It repeats the prompt's tokens without <s>, because no answer begins with <s>.
    echo = tmp / "echo.py"
    echo.write_text(ECHO.read_text().replace('inputs["input_lengths"].flat[0]].tolist()', "99].tolist()[1:]"))
    with serve(
        tmp / "models", out=Output("quiet"), log=tmp / "log", options=ServerOptions(engine_backend=echo)
    ) as server:
        yield server


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("word", WORDS)
def test_a_word_is_found_at_any_place(kind: str, word: str) -> None:
    model = preprocessing(kind)
    if kind == "unigram" and ("\n" in word or "#" in word):
        pytest.skip("its vocabulary has no such character")
    answer = model.tokenizer.encode(ANSWER, add_special_tokens=False).ids
    if word == "llo" and kind != "llama2":
        return  # it is part of a token, so no list of token ids matches it
    if word == "llo":
        assert not occurs(answer, model.variants(word))
        return
    assert occurs(answer, model.variants(word)), (word, model.variants(word))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_variant_contains_the_word(kind: str) -> None:
    """No variant stops an answer without the word, and none is redundant."""
    model = preprocessing(kind)
    for word in WORDS:
        variants = model.variants(word)
        assert len(variants) <= PREPROCESSING.MAX_VARIANTS
        for ids in variants:
            text = BLS.Vocabulary(model.tokenizer, False).text_after(BLS.context_ids(model.tokenizer), ids)
            assert word.strip(" ") in text, (word, text)
            assert not any(other is not ids and PREPROCESSING.contains(ids, other) for other in variants)


def test_a_word_that_the_vocabulary_lacks_is_never_the_unknown_token() -> None:
    model = preprocessing("unigram")
    unknown = unigram().token_to_id("<unk>")
    assert all([unknown] not in model.variants(word) for word in ("🎉", "\n", "世界"))
    with pytest.raises(ValueError, match="contains '🎉', which this model does not know"):
        model.biased_ids("🎉")


def test_a_bias_excludes_the_space_that_the_tokenizer_adds() -> None:
    model, space = preprocessing("llama2"), llama2().token_to_id("▁")
    assert space not in model.biased_ids("###")
    assert set(model.biased_ids("the")) == {llama2().token_to_id("▁the"), llama2().token_to_id("the")}
    assert model.biased_ids(" the") == [llama2().token_to_id("▁the")]
    assert space not in model.biased_ids("🎉")
    assert preprocessing("byte-level").biased_ids(" the") == byte_level().encode(" the").ids


@pytest.mark.parametrize("word", ["the", " the", "world", "\nUser:", "###"])
def test_every_endpoint_stops_at_stop_words(server: Server, word: str) -> None:
    prompt = "Hello the world.\nUser: the ###"
    request = {"text_input": prompt, "max_tokens": 60, "stop_words": word}
    end = (prompt.index(word) if word in prompt else 0) + len(word)
    expected = " " + prompt[:end]
    assert generate(server, "ensemble", **request) == expected
    assert infer(server, "ensemble_infer", **request) == expected
    assert "".join(stream(server, **request, stream=True)) == expected


def test_an_answer_keeps_its_leading_space(server: Server) -> None:
    request = {"text_input": "world", "max_tokens": 2}
    for model in ("ensemble", "ensemble_infer", "tensorrt_llm_bls"):
        assert generate(server, model, **request) == " world world"
    assert "".join(stream(server, **request, stream=True)) == " world world"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_prompt_and_answer_make_up_the_text(kind: str) -> None:
    """With the prompt in the output there is no leading space; without it, prompt + answer is the same text."""
    tokenizer = KINDS[kind]()
    model = POSTPROCESSING.TritonPythonModel()
    model.vocabulary, model.exclude_input = POSTPROCESSING.Vocabulary(tokenizer, True), True
    model.prefix = POSTPROCESSING.prefix_ids(lambda text: tokenizer.encode(text).ids)
    model.context = POSTPROCESSING.context_ids(tokenizer)
    ids = tokenizer.encode("Hello the world").ids
    cut = len(tokenizer.encode("Hello").ids)
    assert "Hello" + model.text(ids[cut:]) == "Hello the world"
    model.exclude_input = False  # the leading <s> tells it as well
    assert model.text(ids) == "Hello the world"


def test_the_engine_reads_the_variants_from_the_word_list() -> None:
    model = preprocessing("llama2")
    rows = model.words(np.array([["the", ""]], dtype=object), "stop_words", 1)
    packed = PREPROCESSING.word_lists(rows)
    assert read_word_lists(packed[0]) == model.variants("the")


def test_a_very_long_word_is_rejected() -> None:
    with pytest.raises(ValueError, match="stop_words has a word of 5000 characters; the limit is 1000"):
        preprocessing("llama2").words(np.array([["x" * 5000]], dtype=object), "stop_words", 1)
