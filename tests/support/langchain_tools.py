"""Lets LangChain's ChatOpenAI read the tool calls of a given answer, and prints them. Runs in .venv-clients."""

from __future__ import annotations

import json
import sys

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool
def weather(city: str) -> str:
    """The weather in a city."""
    return f"Sunny in {city}."


url, model, answer = sys.argv[1:]
extra = {"chat_template_kwargs": {"answer": answer}}
chat = ChatOpenAI(base_url=url, api_key="none", model=model, max_tokens=200, max_retries=0, extra_body=extra)
bound = chat.bind_tools([weather])
whole = bound.invoke("The weather in Bern?")
first, *others = bound.stream("The weather in Bern?")
for piece in others:
    first += piece
# As an agent goes on: the call's result follows it in the conversation.
results = [weather.invoke(call) for call in whole.tool_calls]
after = chat.invoke([("human", "The weather in Bern?"), whole, *results])


def calls(message):  # type: ignore[no-untyped-def]
    return [[call["name"], call["args"]] for call in message.tool_calls]


print(
    json.dumps(
        {
            "whole": calls(whole),
            "streamed": calls(first),
            "results": [one.content for one in results],
            "after": after.content,
        }
    )
)
