"""Asks the gateway through LangChain's ChatOpenAI, and prints what it returns. Runs in .venv-clients."""

from __future__ import annotations

import json
import sys

from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field

QUESTION = "Return the number of items in the list."


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=12)
    age: int = Field(ge=0, le=130)


url, model = sys.argv[1:]
chat = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, max_tokens=12, max_retries=0)
whole = chat.invoke(QUESTION)
pieces = list(chat.stream(QUESTION, stream_usage=True))
sampled = ChatOpenAI(base_url=url, api_key="none", model=model, seed=1, max_tokens=300, max_retries=0)
person = sampled.with_structured_output(Person, method="json_schema").invoke(QUESTION)
print(
    json.dumps(
        {
            "whole": whole.content,
            "finish_reason": whole.response_metadata["finish_reason"],
            "usage": whole.usage_metadata,
            "pieces": [piece.content for piece in pieces],
            "stream_usage": [piece.usage_metadata for piece in pieces if piece.usage_metadata],
            "person": person.model_dump(),
        }
    )
)
