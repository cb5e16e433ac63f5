"""Conversations with tools are rendered as transformers renders them, with templates like those of common models.

The templates are our own, in the shapes that those of Qwen3, Llama 3.1 and Mistral have: what they read of messages,
calls and tools, and the filters and statements that they use.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from builder.gateway.requests import Message
from builder.gateway.tools import Tool
from builder.tokenizer.chat_template import ChatTemplate, Renderer
from tests.triton.test_repository import SNAPSHOT

TOOLS = [
    {"type": "function", "function": {
        "name": "weather", "description": "Tells the weather <today> & \"tomorrow\".",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}},
    {"function": {"strict": True, "name": "add"}, "type": "function"},
]  # fmt: skip


def call(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


ONE_CALL = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "name": "me", "content": [{"type": "text", "text": "How is the "},
                                               {"type": "text", "text": "Wetter?"}]},
    {"role": "assistant", "content": None, "tool_calls": [call("abcdefgh1", "weather", '{"city": "Zürich"}')]},
    {"role": "tool", "tool_call_id": "abcdefgh1", "name": "weather", "content": "☀ 20 °C"},
    {"role": "assistant", "content": "Sunny.", "reasoning_content": "The tool says so."},
    {"role": "user", "content": "And now?"},
]  # fmt: skip
TWO_CALLS = [
    {"role": "user", "content": "Both, please."},
    {"role": "assistant", "content": "I look.", "tool_calls": [call("abcdefgh1", "weather", '{"city": "Bern"}'),
                                                               call("abcdefgh2", "add", "{}")]},
    {"role": "tool", "tool_call_id": "abcdefgh1", "content": "1"},
    {"role": "tool", "tool_call_id": "abcdefgh2", "content": [{"type": "text", "text": "2"}]},
]  # fmt: skip

QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Functions in <tools></tools>:" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- '\\nAnswer with <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, searching=true) %}
{%- for message in messages[::-1] %}
    {%- if ns.searching and message.role == 'user' and message.content is string %}
        {%- set ns.searching = false %}{%- set ns.last = messages|length - 1 - loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if message.reasoning_content is defined and loop.index0 > ns.last %}
            {{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content.lstrip('\\n') }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if (loop.first and message.content) or not loop.first %}{{- '\\n' }}{%- endif %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}{%- else %}
                {{- tool_call.arguments | tojson }}
            {%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""
LLAMA3 = """{{- bos_token }}
{%- if tools is not none %}{{- '<|start_header_id|>system<|end_header_id|>\\n\\nEnvironment: ipython\\n' }}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- '\\n\\n' }}{%- endfor %}
    {{- '{"name": function, "parameters": dictionary}<|eot_id|>' }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
        {{- message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}{{- raise_exception('one call at a time') }}{%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if message.content is mapping or message.content is iterable %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
MISTRAL = """{{- bos_token }}
{%- set user_messages = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- if tools is not none and message == user_messages[-1] %}
            {{- '[AVAILABLE_TOOLS] [' }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}{{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != 'return' %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}{%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}{{- ', ' }}{%- endif %}
                {%- endfor %}
                {{- '}}' }}{%- if not loop.last %}{{- ', ' }}{%- else %}{{- ']' }}{%- endif %}
            {%- endfor %}
            {{- '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message['content'] + '[/INST]' }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- '[TOOL_CALLS] [' }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}{{- out[:-1] }}
            {%- if tool_call.id|length != 9 %}{{- raise_exception('9 letters') }}{%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}{{- ', ' }}{%- else %}{{- ']' + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message['role'] == 'assistant' %}{{- ' ' + message['content']|trim + eos_token }}
    {%- elif message['role'] == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message.content|string }}
        {{- ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- endif %}
{%- endfor %}"""
TEMPLATES = {"qwen3": QWEN3, "llama3": LLAMA3, "mistral": MISTRAL}


def messages(talk: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [Message.model_validate(message).for_template() for message in talk]


@pytest.fixture(scope="module")
def theirs() -> Any:
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(SNAPSHOT)
    tokenizer.bos_token = "<|endoftext|>"
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("tools", [None, TOOLS], ids=["no tools", "tools"])
@pytest.mark.parametrize("talk", [ONE_CALL, TWO_CALLS], ids=["one call", "two calls"])
def test_it_renders_what_transformers_renders(name: str, tools: Any, talk: Any, theirs: Any) -> None:
    template, asked = ChatTemplate(TEMPLATES[name], "x", theirs.special_tokens_map), messages(talk)
    offered = tools and [Tool.model_validate(tool).sent for tool in tools]
    assert json.dumps(offered) == json.dumps(tools), "keys are in the client's order"
    options: dict[str, Any] = {"enable_thinking": False, "tools": offered}
    with Renderer(template) as renderer:
        if name == "llama3" and talk is TWO_CALLS:
            with pytest.raises(Exception, match="one call at a time"):
                renderer.render(asked, add_generation_prompt=True, **options)
            return
        found = renderer.render(asked, add_generation_prompt=True, **options)
    expected = theirs.apply_chat_template(
        asked, chat_template=template.text, tokenize=False, add_generation_prompt=True, **options
    )
    assert found == expected
    assert json.dumps(messages(talk)) == json.dumps(asked), "rendering changes nothing"
    assert ("Zürich" if talk is ONE_CALL else "Bern") in found
    assert ('"required": ["city"]' in " ".join(found.split()).replace("[ ", "[").replace(" ]", "]")) == bool(tools)
