"""Asks the gateway through LlamaIndex's OpenAILike, and prints what it returns. Runs in .venv-clients."""

from __future__ import annotations

import json
import sys

from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

QUESTION = "Return the number of items in the list."
PROMPT = "Return the number of"

url, model = sys.argv[1:]
options = {"api_base": url, "api_key": "none", "model": model, "temperature": 0, "max_tokens": 12, "max_retries": 0}
chat, plain = OpenAILike(**options, is_chat_model=True), OpenAILike(**options, is_chat_model=False)
messages = [ChatMessage(role="user", content=QUESTION)]
print(
    json.dumps(
        {
            "complete": plain.complete(PROMPT).text,
            "chat": chat.chat(messages).message.content,
            "stream_chat": [one.delta or "" for one in chat.stream_chat(messages)],
            "stream_complete": [one.delta or "" for one in plain.stream_complete(PROMPT)],
        }
    )
)
