"""Asks a chat model questions: a repository is served, and each question is written as the model's chat template asks.

pip install 'tritonclient[grpc]' transformers
python examples/chat.py artifacts/models/demo-chat "What is the capital of France?"
python examples/chat.py artifacts/models/demo-chat        # reads questions until Ctrl-D, and keeps the conversation

The server runs as long as this program does. With --url HOST:PORT it asks a running server, on its gRPC port.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from client_grpc_stream import stream
from tritonclient.utils import InferenceServerException

TOKENIZER = "models/preprocessing/1/tokenizer"  # in a repository: tokenizer and chat template of the model


@contextlib.contextmanager
def served(repository: Path) -> Iterator[str]:
    """The gRPC address of a server that runs until the block ends."""
    print(f"Starting Triton with {repository} ...", file=sys.stderr, flush=True)
    argv = [sys.executable, "-m", "builder", "serve", str(repository), "--no-gateway", "--until-eof", "--json"]
    start = time.monotonic()
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        printed = ""
        for line in process.stdout:  # one JSON object: the addresses when the server is ready, or an error
            printed += line
            if line == "}\n":
                break
        addresses = json.loads(printed or "{}")
        if "grpc" not in addresses:
            sys.exit(process.wait())  # what is wrong is on stderr
        print(f"Ready after {time.monotonic() - start:.0f} s.\n", file=sys.stderr, flush=True)
        yield str(addresses["grpc"])
        process.stdin.close()
        process.stdout.read()


def chat(url: str, tokenizer_directory: Path, questions: Iterator[str], max_tokens: int) -> None:
    """Prints the answer to each question as the model generates it. Later questions see the conversation so far."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    conversation: list[dict[str, str]] = []
    for question in questions:
        conversation.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
        print("Answer:   ", end="", flush=True)
        answer = ""
        for piece in stream(url, prompt, max_tokens):
            print(piece, end="", flush=True)
            answer += piece
        print("\n", flush=True)
        conversation.append({"role": "assistant", "content": answer})


def echoed(questions: list[str]) -> Iterator[str]:
    """The questions of the command line, printed before each is asked."""
    for question in questions:
        print(f"Question: {question}", flush=True)
        yield question


def typed() -> Iterator[str]:
    """Questions from the terminal, until Ctrl-D."""
    with contextlib.suppress(EOFError):
        while True:
            if question := input("Question: ").strip():
                yield question
    print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ask a chat model questions.")
    parser.add_argument("repository", type=Path, help="for example artifacts/models/demo-chat")
    parser.add_argument("question", nargs="*", help="default: read questions from the terminal")
    parser.add_argument("--url", help="gRPC address of a running server; default: start one")
    parser.add_argument("--max-tokens", type=int, default=128, help="longest answer (default: 128)")
    arguments = parser.parse_args()
    questions = echoed(arguments.question) if arguments.question else typed()
    try:
        with contextlib.nullcontext(arguments.url) if arguments.url else served(arguments.repository) as url:
            chat(url, arguments.repository / TOKENIZER, questions, arguments.max_tokens)
    except InferenceServerException as error:
        sys.exit(f"error: {error.message()}")
    if arguments.question:
        print(f"Next, ask your own questions: {sys.executable} {sys.argv[0]} {arguments.repository}")
