"""A real chat model (SmolLM2-135M-Instruct, `make test-real`) fills JSON schemas and calls functions over the gateway.

In BF16, served by the reference executor. Its own template has no tools; the copy's template has those of Hermes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest

from builder import pipeline
from builder.core.output import Output
from builder.core.store import Store
from builder.recipe import schema
from tests.gateway.test_serve import PARAMETERS, command, form, function

pytestmark = [pytest.mark.real, pytest.mark.timeout(3600)]
NAME = "smollm2"
TEMPLATE = (
    "{% if tools %}<|im_start|>system\nYou can call functions:\n{{ tools | tojson }}\nTo call one, answer with "
    '<tool_call>{"name": ..., "arguments": {...}}</tool_call><|im_end|>\n{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CITY: Any = {
    "type": "object",
    "properties": {
        "capital": {"type": "string", "maxLength": 30},
        "continent": {"enum": ["Africa", "America", "Asia", "Europe", "Oceania"]},
        "population_millions": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["capital", "continent", "population_millions"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    tmp = tmp_path_factory.mktemp("real")
    model = tmp / "model"
    shutil.copytree(os.environ["REAL_MODEL"], model, copy_function=os.link)
    (model / "chat_template.jinja").unlink()
    (model / "chat_template.jinja").write_text(TEMPLATE)
    recipe = schema.resolve({"model.id": str(model), "gpu": "cpu", "quality.check": False,
                             "quantization.format": "bf16", "quantization.kv_cache_dtype": "auto"})  # fmt: skip
    made = pipeline.build(recipe, Store(tmp / "artifacts", Output("quiet")), until="repository").repository
    assert made is not None
    with (
        command("serve", str(made.path), "--model-name", NAME) as (found, _),
        openai.OpenAI(base_url=found["openai"], api_key="none", max_retries=0, timeout=600) as made_client,
    ):
        yield made_client


def test_a_json_answer_is_valid_and_right(client: openai.OpenAI) -> None:
    question = "What is the capital of France, on which continent is it, and how many millions live there? Use JSON."
    asked: Any = {"model": NAME, "messages": [{"role": "user", "content": question}], "max_tokens": 80}
    asked |= {"temperature": 0, "response_format": form(CITY)}
    found = client.chat.completions.create(**asked).choices[0]
    print(found.message.content)
    assert found.finish_reason == "stop"
    answer = json.loads(found.message.content or "")
    jsonschema.validate(answer, CITY)
    assert (answer["capital"], answer["continent"]) == ("Paris", "Europe")
    events = client.chat.completions.create(**asked, stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in events) == found.message.content


def test_sampled_json_answers_are_valid(client: openai.OpenAI) -> None:
    question: Any = [{"role": "user", "content": "Name a capital, its continent and its population. Use JSON."}]
    made = client.chat.completions.create(
        model=NAME, messages=question, max_tokens=80, n=4, seed=1, temperature=1.0, response_format=form(CITY)
    ).choices
    for choice in made:
        print(choice.message.content)
        jsonschema.validate(json.loads(choice.message.content or ""), CITY)


def test_a_required_call_is_complete(client: openai.OpenAI) -> None:
    """So small a model gets the number of days right, but not the city."""
    question: Any = [{"role": "user", "content": "What will the weather be in Zürich for the next 3 days?"}]
    asked: Any = {"model": NAME, "messages": question, "max_tokens": 80, "temperature": 0}
    made = client.chat.completions.create(
        **asked, tools=[function("weather")], tool_choice="required", parallel_tool_calls=False
    ).choices[0]
    [call] = made.message.tool_calls or []
    assert call.type == "function"
    print(call.function.arguments)
    arguments = json.loads(call.function.arguments)
    jsonschema.validate(arguments, PARAMETERS)
    assert arguments["days"] == 3
