"""Special tokens and sampling defaults: values of the recipe that the text models use."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers_of_kinds import llama2, write_snapshot

from builder.core.errors import IntegrityError
from builder.core.output import Output
from builder.recipe import schema
from builder.serving.server import ServerOptions, serve
from builder.tokenizer.sampling_defaults import sampling_defaults
from builder.triton import repository
from tests.triton.test_models import ECHO, PREPROCESSING, TINY, generate, infer, stream
from tests.triton.test_repository import SNAPSHOT, write_engine, written

SAMPLING = ("temperature", "runtime_top_p", "runtime_top_k", "repetition_penalty")
# What the engine is sent, in the server's log: {name: values} of each request.
SHOWN = f"""
import json
_answer = TritonPythonModel.answer
def answer(self, request_id, inputs, sender):
    print("got", json.dumps({{n: inputs[n].reshape(-1).tolist() for n in {SAMPLING!r} if n in inputs}}), flush=True)
    _answer(self, request_id, inputs, sender)
TritonPythonModel.answer = answer
"""


def part(**values: Any) -> schema.Repository:
    return schema.Repository.model_validate(values)


def test_defaults_come_from_the_recipe_before_the_models_file(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}))
    assert sampling_defaults(tmp_path, schema.SamplingDefaults()) == {}
    own = {"temperature": 0.6, "top_p": 1.0, "top_k": 20, "repetition_penalty": 1.1}
    assert sampling_defaults(tmp_path, schema.SamplingDefaults(from_model=True)) == own
    both = schema.SamplingDefaults(from_model=True, temperature=0.2)
    assert sampling_defaults(tmp_path, both) == own | {"temperature": 0.2}
    assert sampling_defaults(tmp_path, schema.SamplingDefaults(presence_penalty=0.5)) == {"presence_penalty": 0.5}
    file.write_text(json.dumps({"do_sample": False, "temperature": 0.6, "repetition_penalty": 1.1}))
    assert sampling_defaults(tmp_path, schema.SamplingDefaults(from_model=True)) == {"repetition_penalty": 1.1}


@pytest.mark.parametrize(("name", "value"), [("temperature", "hot"), ("top_p", 1.5), ("top_k", -1), ("top_k", 0.5)])
def test_a_value_of_the_models_file_that_is_none_is_named(tmp_path: Path, name: str, value: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(IntegrityError, match=f"generation_config.json has {name} {re.escape(repr(value))}"):
        sampling_defaults(tmp_path, schema.SamplingDefaults(from_model=True))


def test_the_facts_name_the_values_for_clients(tmp_path: Path) -> None:
    _, facts = written(tmp_path, add_special_tokens=False, sampling_defaults={"temperature": 0.5})
    assert facts["sampling_defaults"] == {"temperature": 0.5, "top_p": 1.0, "top_k": 0}
    names = ("add_special_tokens", "skip_special_tokens", "parse_special_tokens")
    assert [facts[name] for name in names] == [False, True, "prompts"]


def test_every_way_to_the_engine_has_the_defaults_and_the_clients_values_come_first(tmp_path: Path) -> None:
    defaults = {"temperature": 0.5, "top_k": 20, "repetition_penalty": 1.25}
    repository.write(tmp_path / "models", write_engine(tmp_path / "engine"), SNAPSHOT, part(sampling_defaults=defaults))
    backend = tmp_path / "shown.py"
    backend.write_text(ECHO.read_text() + SHOWN)
    options = ServerOptions(engine_backend=backend)
    with serve(tmp_path / "models", out=Output("quiet"), log=tmp_path / "log", options=options) as server:
        before = len(sent(server.log))
        ask = {"text_input": "Hello", "max_tokens": 2}
        generate(server, "ensemble", **ask)
        infer(server, "ensemble_infer", **ask)
        stream(server, **ask, stream=True)
        stream(server, **ask, temperature=0.0, stream=True)
        generate(server, "ensemble", **ask, temperature=0.75, top_k=3, top_p=0.5, repetition_penalty=1.5)
        # A row of a batch has its own values.
        rows = {"text_input": [["Hello"], ["there"]], "max_tokens": [[2], [2]], "temperature": [[0.25], [0.75]]}
        stream(server, "ensemble", **rows)
        found = sent(server.log)[before:]
    plain = {"temperature": [0.5], "runtime_top_p": [1.0], "runtime_top_k": [20], "repetition_penalty": [1.25]}
    greedy = plain | {"temperature": [0.0], "runtime_top_k": [1]}
    own = {"temperature": [0.75], "runtime_top_p": [0.5], "runtime_top_k": [3], "repetition_penalty": [1.5]}
    assert found[:5] == [plain, plain, plain, greedy, own]
    assert found[5:] == [{name: values * 2 for name, values in plain.items()} | {"temperature": [0.25, 0.75]}]


def sent(log: Path) -> list[dict[str, list[float]]]:
    return [json.loads(line.partition("got ")[2]) for line in log.read_text().splitlines() if "got {" in line]


def model(tokenizer: Any, **values: Any) -> Any:
    made = PREPROCESSING.TritonPythonModel()
    made.tokenizer = tokenizer
    made.add_special_tokens, made.parse_special_tokens = True, True
    for name, value in values.items():
        setattr(made, name, value)
    return made


def test_special_tokens_are_added_only_if_the_recipe_says_so(tmp_path: Path) -> None:
    assert model(llama2()).encode("Hello")[0] == llama2().token_to_id("<s>")
    assert model(llama2(), add_special_tokens=False).encode("Hello") == llama2().encode("Hello").ids[1:]
    snapshot = write_snapshot(tmp_path / "snapshot", llama2(), "</s>")
    repository.write(tmp_path / "models", write_engine(tmp_path / "engine"), snapshot, part(add_special_tokens=False))
    for name in ("preprocessing", "postprocessing"):
        text = (tmp_path / "models" / name / "config.pbtxt").read_text()
        assert 'key: "add_special_tokens" value: { string_value: "false" }' in text


@given(st.lists(st.sampled_from(["<|im_end|>", "<|endoftext|>", "a", " ", "<|im_", "end|>", "é"]), max_size=8))
def test_text_that_looks_like_a_control_token_stays_text(pieces: list[str]) -> None:
    """Without parsing, no prompt has a special id, and the prompt's text comes back from its ids."""
    text = "".join(pieces)
    special = {id for id, token in TINY.get_added_tokens_decoder().items() if token.special}
    ids = model(TINY, parse_special_tokens=False).encode(text)
    assert not special & set(ids)
    assert TINY.decode(ids) == text
    assert model(TINY).encode(text) == TINY.encode(text).ids, "and the next request is not affected"


def test_stop_words_may_be_control_tokens_even_if_prompts_may_not() -> None:
    made = model(TINY, parse_special_tokens=False, vocab_size=TINY.get_vocab_size())
    made.encode("Hello")
    assert [TINY.token_to_id("<|im_end|>")] in made.variants("<|im_end|>")


def test_an_array_of_the_wrong_number_type_is_the_engines(tmp_path: Path) -> None:
    """top_k is an integer for the engine, and the others are not, also where the recipe writes 1 for 1.0."""
    configs, _ = written(tmp_path, sampling_defaults={"temperature": 1, "top_k": 1})
    values = json.loads(configs["preprocessing"].parameters["sampling_defaults"].string_value)
    assert {name: type(value) for name, value in values.items()} == {"TEMPERATURE": float, "TOP_P": float, "TOP_K": int}
    assert np.result_type(values["TEMPERATURE"]).kind == "f"


def test_a_copy_of_the_files_renders_the_same(tmp_path: Path) -> None:
    """Nothing of generation_config.json is used unless the recipe says so."""
    copy = shutil.copytree(SNAPSHOT, tmp_path / "copy")
    repository.write(tmp_path / "one", write_engine(tmp_path / "engine"), copy, part())
    (copy / "generation_config.json").write_text(
        json.dumps({**json.loads((SNAPSHOT / "generation_config.json").read_text()), "temperature": 0.3})
    )
    repository.write(tmp_path / "two", tmp_path / "engine", copy, part())
    text = [(tmp_path / name / "preprocessing" / "config.pbtxt").read_text() for name in ("one", "two")]
    assert text[0] == text[1]
