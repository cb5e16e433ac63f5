"""LangChain's and LlamaIndex's OpenAI classes, each in a process of their own environment. See `make test-clients`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exports
import openai
import pytest
from printed_json import first_object

from builder import pipeline
from builder.core.output import Output
from builder.core.store import Store
from builder.recipe import schema
from tests.gateway.conftest import MODEL, Serve
from tests.gateway.test_chat_parts import TEMPLATE

pytestmark = pytest.mark.clients

PYTHON = Path(".venv-clients/bin/python").absolute()
QUESTION: Any = [{"role": "user", "content": "Return the number of items in the list."}]
PROMPT = "Return the number of"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `builder serve` serves the bundled model."""
    store = Store(tmp_path_factory.mktemp("clients") / "artifacts", Output("quiet"))
    recipe = schema.resolve({"model.id": str(exports.MODELS["qwen3"]), "gpu": "cpu", "quality.check": False,
                             "calibration.samples": 0})  # fmt: skip
    built = pipeline.build(recipe, store, until="repository").repository
    assert built is not None
    argv = [sys.executable, "-m", "builder", "serve", str(built.path), "--model-name", MODEL, "--json"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        try:
            yield first_object(child)["openai"]
        finally:
            child.terminate()
            child.wait(60)


def printed(client: str, url: str, *arguments: str) -> Any:
    """What a script in tests/support/ prints."""
    argv = [str(PYTHON), f"tests/support/{client}.py", url, MODEL, *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def expected(url: str) -> tuple[str, str, Any]:
    """The openai package's answers to the conversation and the prompt, and the usage of the former."""
    with openai.OpenAI(base_url=url, api_key="none") as client:
        chat = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=12, temperature=0)
        text = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=12, temperature=0)
    return chat.choices[0].message.content or "", text.choices[0].text, chat.usage


def test_langchain(url: str) -> None:
    text, _, usage = expected(url)
    found = printed("langchain_client", url)
    assert text
    assert found["whole"] == text
    assert found["finish_reason"] == "length"
    assert len(found["pieces"]) > 3
    assert "".join(found["pieces"]) == text
    for one in (found["usage"], *found["stream_usage"]):
        assert (one["input_tokens"], one["output_tokens"]) == (usage.prompt_tokens, 12)
    assert len(found["stream_usage"]) == 1
    assert len(found["person"]["name"]) <= 12
    assert 0 <= found["person"]["age"] <= 130


def test_langchain_reads_tool_calls(serve_with: Serve) -> None:
    """The bundled model's template has none, so here an engine says what it is told to."""
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>'
    found = printed("langchain_tools", f"{serve_with(TEMPLATE).url}/v1", f"I look.\n{call}")
    assert found["whole"] == found["streamed"] == [["weather", {"city": "Bern"}]]
    assert found["results"] == ["Sunny in Bern."]
    assert found["after"].startswith("I look.")


def test_llamaindex(url: str) -> None:
    chat, text, _ = expected(url)
    found = printed("llamaindex_client", url)
    assert text
    assert found["complete"] == "".join(found["stream_complete"]) == text
    assert found["chat"] == "".join(found["stream_chat"]) == chat
    assert len(found["stream_chat"]) > 3
