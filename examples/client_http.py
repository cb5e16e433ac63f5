"""Sends a prompt to a served repository over HTTP and prints the answer. Standard library only.

builder serve artifacts/models/tiny-qwen3-cpu-nvfp4 --http-port 8000
python examples/client_http.py "Return the number of" --max-tokens 32
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from typing import Any


def generate(url: str, prompt: str, max_tokens: int, **sampling: Any) -> str:
    """The answer to a prompt. `sampling`: temperature, top_k, top_p, seed, stop_words, ...

    Raises RuntimeError with the server's message if it rejects the request.
    """
    body = json.dumps({"text_input": prompt, "max_tokens": max_tokens, **sampling}).encode()
    request = urllib.request.Request(
        f"{url}/v2/models/ensemble/generate", data=body, headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        raise RuntimeError(json.load(error)["error"]) from error
    if "error" in answer:  # a model that streams reports errors with status 200
        raise RuntimeError(answer["error"])
    return str(answer["text_output"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Send a prompt over HTTP.")
    parser.add_argument("prompt")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--max-tokens", type=int, default=32)
    arguments = parser.parse_args()
    try:
        # top_k 1 is greedy: the same prompt gives the same answer.
        print(generate(arguments.url, arguments.prompt, arguments.max_tokens, top_k=1))
    except (RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
