"""A BOS token that the chat template writes is not added again, in calibration, evaluation and both served models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
from hypothesis import given
from hypothesis import strategies as st
from llmapi_stand_in import SAY, put_stand_in
from tokenizers import Tokenizer
from tritonclient.utils import InferenceServerException

from builder.calibration import rows as calibration_rows
from builder.checkpoint import huggingface, layouts
from builder.core.output import Output
from builder.evaluate import datasets
from builder.llmapi import arguments as llmapi_arguments
from builder.llmapi import repository as llmapi_repository
from builder.recipe import schema
from builder.serving.server import ServerOptions, serve
from builder.tokenizer import chat_template, special_tokens
from builder.tokenizer import files as tokenizer_files
from builder.tokenizer import loading as tokenizer_loading
from builder.triton import repository
from tests.llmapi.test_serving import CONFIG, post, resolved
from tests.tokenizer.test_files import add_token, edit
from tests.triton.test_models import ECHO, PREPROCESSING
from tests.triton.test_repository import write_engine

TINY = Path(__file__).parents[1] / "data" / "tiny-qwen3"
BOS, TEXT = 4087, "<|endoftext|>"
CHAT = [{"role": "user", "content": "Return the number of items"}, {"role": "assistant", "content": "It is a list"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
QUIET = Output("quiet")


def with_bos(directory: Path) -> Path:
    """The bundled tokenizer with a post-processor and a chat template that both write BOS, as for Llama 3."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in TINY.glob("*.json"):
        shutil.copyfile(file, directory / file.name)
    post = json.loads((TINY / "tokenizer.json").read_text())["post_processor"]
    bos = {"SpecialToken": {"id": TEXT, "type_id": 0}}
    sequences = [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")]
    template = {
        "type": "TemplateProcessing",
        "single": [bos, sequences[0]],
        "pair": [bos, *sequences],
        "special_tokens": {TEXT: {"id": TEXT, "ids": [BOS], "tokens": [TEXT]}},
    }
    edit(directory / "tokenizer.json", post_processor={"type": "Sequence", "processors": [post, template]})
    edit(directory / "tokenizer_config.json", bos_token=TEXT, chat_template=TEMPLATE)
    return directory


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_bos(tmp_path_factory.mktemp("bos") / "model")


@pytest.fixture(scope="module")
def expected(snapshot: Path) -> list[int]:
    """The ids of the conversation, with one BOS."""
    tokenizer = Tokenizer.from_file(str(snapshot / "tokenizer.json"))
    ids = tokenizer.encode(rendered(), add_special_tokens=False).ids
    assert ids.count(BOS) == 1
    assert tokenizer.encode(rendered()).ids == [BOS, *ids]  # what a tokenizer by itself makes of it
    return ids


def rendered() -> str:
    with chat_template.Renderer(chat_template.ChatTemplate(TEMPLATE, "", {"bos_token": TEXT})) as renderer:
        return renderer.render(CHAT)


def test_calibration_and_evaluation(snapshot: Path, expected: list[int], tmp_path: Path) -> None:
    """Messages, the same conversation as text, and text without a BOS of its own."""
    pytest.importorskip("transformers")
    tokenizer = tokenizer_loading.load(snapshot)
    rows = [{"messages": CHAT}, {"text": rendered()}, {"text": rendered().removeprefix(TEXT)}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    batches = calibration_rows.token_batches(file, tokenizer, seq_len=100, batch_size=1)
    assert [batch.tolist() for batch in batches] == [[expected]] * 3
    file.write_text("".join(json.dumps(row) + "\n" for row in rows[1:]))
    found = datasets.sequences(file, tokenizer, name="rows", min_tokens=2, max_tokens=100)
    assert [ids.tolist() for ids in found.ids] == [expected] * 2


def test_the_files_say_so(snapshot: Path) -> None:
    found = tokenizer_files.check(snapshot, CONFIG, str(snapshot))
    assert (found.prefix_ids, found.suffix_ids, found.prefix_in_template) == ((BOS,), (), True)
    assert tokenizer_files.read(TINY).prefix_ids == ()


def test_the_preprocessing_model(snapshot: Path, expected: list[int], tmp_path: Path) -> None:
    with_bos(tmp_path / "source")
    unknown = add_token(tmp_path / "source", "<image>")
    part = schema.Repository(end_ids=(7, 4089))
    facts = repository.write(tmp_path / "models", write_engine(tmp_path / "engine"), tmp_path / "source", part)
    assert (facts["end_id"], facts["end_ids"]) == (7, [7, 4089])
    assert '"[7, 4089]"' in (tmp_path / "models" / "preprocessing" / "config.pbtxt").read_text()
    with serve(
        tmp_path / "models", out=QUIET, log=tmp_path / "log", options=ServerOptions(engine_backend=ECHO)
    ) as server:
        for prompt in (rendered(), rendered().removeprefix(TEXT)):
            assert prompt_ids(server.grpc_url, prompt) == expected
        assert prompt_ids(server.grpc_url, TEXT + rendered()) == [BOS, *expected]  # what was written twice stays
        assert prompt_ids(server.grpc_url, TEXT) == [BOS]
        with pytest.raises(InferenceServerException, match="text_input contains '<image>'") as caught:
            prompt_ids(server.grpc_url, "see <image>")
        assert "4096" not in str(caught.value) or unknown == 4096
        assert prompt_ids(server.grpc_url, "see")[0] == BOS


def prompt_ids(url: str, prompt: str) -> list[int]:
    made = []
    for name, kind, value in (("QUERY", "BYTES", prompt.encode()), ("REQUEST_OUTPUT_LEN", "INT32", 4)):
        array = np.array([[value]], dtype=object if kind == "BYTES" else np.int32)
        made.append(grpcclient.InferInput(name, array.shape, kind))
        made[-1].set_data_from_numpy(array)
    with grpcclient.InferenceServerClient(url) as client:
        ids: list[int] = client.infer("preprocessing", made, client_timeout=30).as_numpy("INPUT_ID")[0].tolist()
    return ids


def test_the_llmapi_model(expected: list[int], tmp_path: Path) -> None:
    """The server accepts exactly as many tokens as the conversation has, so a second BOS would be too long. It stops at
    the recipe's end ids, which do not include the model's own."""
    list_id = Tokenizer.from_file(str(TINY / "tokenizer.json")).encode(" list").ids[0]
    exports.export(exports.quantized(TINY), tmp_path / "unified")
    huggingface.complete(tmp_path / "unified", TINY)
    layouts.write_tensorrt_llm(tmp_path / "unified", CONFIG, tmp_path / "tensorrt_llm")
    with_bos(tmp_path / "model")
    add_token(tmp_path / "model", "<image>")
    tokenizer_files.copy(tmp_path / "model", tmp_path / "unified")
    asked = resolved(**{"engine.max_input_len": len(expected), "repository.end_ids": [0, list_id]})
    arguments = llmapi_arguments.resolve(asked, CONFIG)
    facts = llmapi_repository.write(tmp_path / "models", tmp_path / "unified", tmp_path / "model", arguments, asked)
    assert facts["end_ids"] == [0, list_id]
    put_stand_in(tmp_path / "models")
    with serve(tmp_path / "models", out=QUIET, log=tmp_path / "log") as server:
        asked_for = {"sampling_param_max_tokens": 8, "sampling_param_exclude_input_from_output": True}
        answers = []
        for prompt in (rendered(), rendered().removeprefix(TEXT)):
            status, text = post(server, {"text_input": prompt, **asked_for})
            assert status == 200, text
            answers.append(json.loads(text)["text_output"])
        assert answers[0] == answers[1]
        status, text = post(server, {"text_input": f"{SAY}It is a list here", **asked_for})
        assert json.loads(text)["text_output"] == "It is a"
        status, text = post(server, {"text_input": TEXT + rendered(), **asked_for})
        assert status == 400
        assert f"the prompt has {len(expected) + 1} tokens" in text
        status, text = post(server, {"text_input": "see <image>", **asked_for})
        assert (status, "has token 4096" in text) == (400, True)


@given(front=st.lists(st.integers(0, 3), max_size=2), text=st.lists(st.integers(0, 3), max_size=6))
def test_what_is_taken_away_is_one_front(front: list[int], text: list[int]) -> None:
    """For any ids: the result begins with the prefix, and only a repeated prefix is removed."""
    ids = special_tokens.without_repeated_prefix([*front, *text], front)
    assert ids in ([*front, *text], text)
    assert ids[: len(front)] == front
    assert (ids == text) == (text[: len(front)] == front or not front)
    assert PREPROCESSING.without_repeated_prefix([*front, *text], front) == ids


@pytest.mark.parametrize(
    ("before", "after", "front"), [([], [], []), ([1], [], [1]), ([1, 2], [], [1, 2]), ([], [9], []), ([1], [9], [1])]
)
def test_what_a_tokenizer_adds_in_front(before: list[int], after: list[int], front: list[int]) -> None:
    def encode(text: str) -> Any:
        return [*before, *text.encode(), *after]

    assert special_tokens.prefix_ids(encode) == front
    assert PREPROCESSING.prefix_ids(encode) == front
