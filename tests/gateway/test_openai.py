"""The gateway with the real openai client and a real Triton, where a stand-in for the engine repeats the prompt."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel
from tokenizers import Tokenizer

from tests.gateway.conftest import MAX_SEQ_LEN, MODEL, Running
from tests.triton.test_repository import SNAPSHOT

TINY = Tokenizer.from_file(str(SNAPSHOT / "tokenizer.json"))
TEXT = "Grüße, 世界 🎉 and é"
TALK: Any = [{"role": "user", "content": TEXT}]


def echo(prompt: str, tokens: int) -> str:
    ids = TINY.encode(prompt).ids
    return str(TINY.decode((ids * tokens)[:tokens], skip_special_tokens=True))


def known_only(value: Any) -> None:
    """Every field of a response is one of the openai package's types, which keep unknown ones, too."""
    if isinstance(value, BaseModel):
        assert not value.model_extra, (type(value), value.model_extra)
        value.__class__.model_validate(value.model_dump(mode="json"), strict=False)
        for name in type(value).model_fields:
            known_only(getattr(value, name))
    elif isinstance(value, list):
        for one in value:
            known_only(one)


def completion(client: openai.OpenAI, prompt: Any = TEXT, **options: Any) -> Completion:
    found = client.completions.create(model=MODEL, prompt=prompt, **options)
    assert isinstance(found, Completion)
    known_only(found)
    return found


def chat(client: openai.OpenAI, messages: Any = TALK, **options: Any) -> ChatCompletion:
    found = client.chat.completions.create(model=MODEL, messages=messages, **options)
    assert isinstance(found, ChatCompletion)
    known_only(found)
    return found


def events(client: openai.OpenAI, **options: Any) -> list[ChatCompletionChunk]:
    found = list(client.chat.completions.create(model=MODEL, messages=TALK, stream=True, **options))
    for one in found:
        known_only(one)
    return found


def content(found: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for event in found for choice in event.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")


def test_a_completion(client: openai.OpenAI) -> None:
    found = completion(client, max_tokens=40)
    [choice] = found.choices
    assert (choice.text, choice.finish_reason) == (echo(TEXT, 40), "length")
    assert found.usage is not None
    prompt = len(TINY.encode(TEXT).ids)
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (prompt, 40)
    assert found.usage.total_tokens == prompt + 40


def test_a_streamed_completion_is_the_same(client: openai.OpenAI) -> None:
    stream = client.completions.create(model=MODEL, prompt=TEXT, max_tokens=40, stream=True)
    found = list(stream)
    assert "".join(event.choices[0].text for event in found) == echo(TEXT, 40)
    assert [event.choices[0].finish_reason for event in found][-1] == "length"
    assert len(found) > 20, "one event for nearly each token"


def test_several_prompts_and_answers_of_each(client: openai.OpenAI) -> None:
    ids = TINY.encode("as ids").ids
    found = completion(client, ["first one", "second one"], n=2, max_tokens=5)
    texts = [echo("first one", 5)] * 2 + [echo("second one", 5)] * 2
    assert [(choice.index, choice.text) for choice in found.choices] == list(enumerate(texts))
    assert found.usage is not None
    assert found.usage.completion_tokens == 20
    for prompt in (ids, [ids]):
        assert completion(client, prompt, max_tokens=4).choices[0].text == echo("as ids", 4)
    assert completion(client, [ids, ids], max_tokens=4).choices[1].text == echo("as ids", 4)


def test_echo_puts_the_prompt_before_the_answer(client: openai.OpenAI) -> None:
    assert completion(client, max_tokens=3, echo=True).choices[0].text == TEXT + echo(TEXT, 3)
    stream = client.completions.create(model=MODEL, prompt=TEXT, max_tokens=3, echo=True, stream=True)
    assert "".join(event.choices[0].text for event in stream) == TEXT + echo(TEXT, 3)


def test_a_conversation_goes_through_the_chat_template(client: openai.OpenAI) -> None:
    found = chat(client, max_completion_tokens=60)
    [choice] = found.choices
    # The stand-in repeats the rendered conversation, and stops at its <|im_end|>, with which the template ends a turn.
    assert (choice.message.content, choice.finish_reason) == (f"user\n{TEXT}", "stop")
    whole = chat(client, max_completion_tokens=60, extra_body={"ignore_eos": True}).choices[0]
    assert whole.finish_reason == "length"
    assert (whole.message.content or "").startswith(f"user\n{TEXT}\nassistant\n")


def test_parts_of_a_message_are_joined_and_developer_is_system(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "Grüße, "}, {"type": "text", "text": "世界"}]
    assert chat(client, [{"role": "user", "content": parts}]).choices[0].message.content == "user\nGrüße, 世界"
    [choice] = chat(client, [{"role": "developer", "content": "Be brief."}, *TALK]).choices
    assert choice.message.content == "system\nBe brief."


def test_the_model_continues_an_answer(client: openai.OpenAI) -> None:
    messages = [*TALK, {"role": "assistant", "content": "It is"}]
    body = {"continue_final_message": True, "ignore_eos": True}
    text = chat(client, messages, max_tokens=60, extra_body=body).choices[0].message.content or ""
    prompt = f"user\n{TEXT}\nassistant\nIt is"
    assert text.startswith(prompt + "user"), "the prompt ends within the answer"


def test_streamed_events(client: openai.OpenAI) -> None:
    found = events(client, max_tokens=60)
    assert content(found) == f"user\n{TEXT}"
    first, last = found[0].choices[0], found[-1].choices[0]
    assert (first.delta.role, first.delta.content) == ("assistant", "")
    assert (last.delta.content, last.finish_reason) == (None, "stop")
    assert len({event.id for event in found}) == 1
    assert all(event.usage is None for event in found)


def test_the_usage_of_a_stream(client: openai.OpenAI) -> None:
    *others, last = events(client, max_tokens=60, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage == chat(client, max_tokens=60).usage
    assert all(event.usage is None and event.choices for event in others)


def test_several_streamed_answers(client: openai.OpenAI) -> None:
    found = events(client, n=3, max_tokens=60)
    assert [content(found, index) for index in range(3)] == [f"user\n{TEXT}"] * 3


@pytest.mark.parametrize("stop", ["界 🎉", ["never", "界 "], "Grüße, 世界 🎉 and é", "u"])
def test_stop_strings_across_tokens(client: openai.OpenAI, stop: Any) -> None:
    answer = f"user\n{TEXT}"
    expected = min((answer.partition(one)[0] for one in ([stop] if isinstance(stop, str) else stop)), key=len)
    [choice] = chat(client, stop=stop).choices
    assert (choice.message.content, choice.finish_reason) == (expected, "stop")
    assert content(events(client, stop=stop)) == expected


def test_stop_token_ids(client: openai.OpenAI) -> None:
    id = TINY.encode(" and").ids[0]
    found = completion(client, max_tokens=40, extra_body={"stop_token_ids": [id]}).choices[0]
    assert (found.text, found.finish_reason) == (TEXT.partition(" and")[0], "stop")


def test_log_probabilities_of_the_chosen_tokens(client: openai.OpenAI) -> None:
    """The stand-in's are -1/8 for the first token, -2/8 for the second, and so on."""
    found = chat(client, max_tokens=9, logprobs=True, temperature=0).choices[0]
    assert found.logprobs is not None
    tokens = found.logprobs.content or []
    assert [token.logprob for token in tokens] == [-(n + 1) / 8 for n in range(9)]
    joined = b"".join(bytes(token.bytes or []) for token in tokens).decode("utf-8", "ignore")
    assert joined.startswith("<|im_start|>user\nG"), "each token's own text, also of one that is left out of the answer"
    streamed = [
        token.logprob
        for event in events(client, max_tokens=9, logprobs=True)
        for choice in event.choices
        if choice.logprobs
        for token in choice.logprobs.content or []
    ]
    assert streamed == [token.logprob for token in tokens]
    log_probs = completion(client, max_tokens=3, logprobs=0).choices[0].logprobs
    assert log_probs is not None
    assert log_probs.token_logprobs == [-0.125, -0.25, -0.375]
    assert log_probs.text_offset is not None
    assert log_probs.text_offset[0] == 0


def test_every_token_has_a_log_probability(client: openai.OpenAI) -> None:
    """Also one at the end without a text of its own: a special token, and a part of a character."""
    special = chat(client, max_tokens=1, logprobs=True).choices[0]
    assert special.message.content == ""
    assert special.logprobs is not None
    assert [token.token for token in special.logprobs.content or []] == ["<|im_start|>"]
    first, streamed, last = events(client, max_tokens=1, logprobs=True)
    assert (first.choices[0].delta.role, last.choices[0].finish_reason) == ("assistant", "length")
    assert streamed.choices[0].logprobs is not None
    assert [token.logprob for token in streamed.choices[0].logprobs.content or []] == [-0.125]
    tokens = len(TINY.encode("🎉").ids)
    assert tokens > 1
    for n in range(1, tokens + 1):
        log_probs = completion(client, "🎉", max_tokens=n, logprobs=0).choices[0].logprobs
        assert log_probs is not None
        assert len(log_probs.tokens or []) == n


def test_an_answer_has_as_many_tokens_as_fit_by_default(client: openai.OpenAI) -> None:
    found = chat(client, extra_body={"ignore_eos": True})
    assert found.usage is not None
    assert found.usage.total_tokens == MAX_SEQ_LEN
    assert found.choices[0].finish_reason == "length"
    assert completion(client).usage.completion_tokens == 16  # type: ignore[union-attr]


def test_concurrent_answers_do_not_mix(gateway: Running) -> None:
    async def ask(client: openai.AsyncOpenAI, number: int) -> bool:
        prompt = f"{number} Grüße 🎉 {number}"
        stream = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=30, stream=True)
        text = "".join([event.choices[0].text async for event in stream])
        return text == echo(prompt, 30)

    async def all_of_them() -> list[bool]:
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(48)))

    assert all(asyncio.run(all_of_them()))


BAD: list[tuple[dict[str, Any], str, str | None]] = [
    ({"temperature": 3}, "temperature: Input should be less than or equal to 2", "temperature"),
    ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1", "max_tokens"),
    ({"max_tokens": 10**6}, "max_tokens can be 81", "max_tokens"),
    ({"n": True}, "n: Input should be a valid integer", "n"),
    ({"top_logprobs": 5, "logprobs": True}, "so it must be 0", "top_logprobs"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "does not support tools with this model", "tools"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is missing", "response_format"),
    ({"response_format": {"type": "grammar"}}, "response_format.type", "response_format"),
    ({"response_format": {"type": "json_object"}, "extra_body": {"ignore_eos": True}}, "ignore_eos", "ignore_eos"),
    ({"response_format": {"type": "json_object"}, "extra_body": {"min_tokens": 3}}, "min_tokens can't", "min_tokens"),
    ({"extra_body": {"temperatur": 1}}, "Unrecognized request argument supplied: temperatur. Did you mean temperature?",
     "temperatur"),
    ({"logit_bias": {"4096": 1}}, "keys must be token ids below 4096", "logit_bias"),
    ({"stop": [""]}, "stop", "stop"),
    ({"messages": []}, "messages", "messages"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages.0.role", "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0",
     "messages"),
    ({"messages": [{"role": "user", "content": "long " * 400}]}, "this model takes 256 tokens", "messages"),
    ({"messages": [{"role": "user", "content": "long " * 40000}]}, "200", "messages"),
    ({"extra_body": {"chat_template_kwargs": {"messages": []}}}, "can't set messages", "chat_template_kwargs"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "says", "param"), BAD)
def test_a_bad_request_is_named(client: openai.OpenAI, change: dict[str, Any], says: str, param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**{"model": MODEL, "messages": TALK, **change})
    assert says in raised.value.message
    assert raised.value.param == param
    assert raised.value.type == "invalid_request_error"


def test_what_is_ignored_and_what_asks_for_nothing_is_accepted(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "user": "me", "metadata": {"a": "b"}, "store": False, "tools": [], "tool_choice": "none",
        "response_format": {"type": "text"}, "seed": None, "parallel_tool_calls": False,
    }  # fmt: skip
    assert chat(client, extra_body=options).choices[0].message.content == f"user\n{TEXT}"


def test_any_other_variable_of_the_template_is_passed_on(client: openai.OpenAI) -> None:
    """Also one with the name of a parameter of ours."""
    body = {"chat_template_kwargs": {"continue_final": True, "enable_thinking": False}}
    assert chat(client, extra_body=body).choices[0].message.content == f"user\n{TEXT}"


def test_another_models_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        client.completions.create(model="gpt", prompt="x")
    assert raised.value.code == "model_not_found"
