"""Loads a tokenizer.json that somebody else wrote, with limits: python -m builder.tokenizer.worker DIRECTORY

The job is JSON on stdin: {"tokens": names to look up, "template", "variables", "messages"}. It answers with two lines
of JSON: what the tokenizer is, then what the chat template makes of the messages. `tokenizers` is Rust: what it can't
take may end in a panic, which prints to stderr and is no Exception; so it runs here, not in the user's own command.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from builder.tokenizer.chat_template_worker import (
    Template,
    check_length,
    die_with_parent,
    error_response,
    limit_memory,
    limit_time,
)
from builder.tokenizer.special_tokens import prefix_ids

SECONDS = 60  # of CPU time; the largest tokenizers take about 3
MEMORY = 8 << 30  # bytes of address space; the largest tokenizers take about 1 GiB
SAMPLE = "Return the number of items in the list.\n\nif x == 1:\n    print('Grüße, 世界')"


def load(directory: Path) -> Tokenizer:
    """The tokenizer, as the served repository loads it."""
    tokenizer = Tokenizer.from_str((directory / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def describe(tokenizer: Tokenizer, file: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """What the files around it and the model are compared with. Ids of `tokens`; None for an unknown one."""
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    listed = [(token["content"], token["id"]) for token in file.get("added_tokens", [])]
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    front = prefix_ids(lambda text: tokenizer.encode(text).ids)
    return {
        "largest": max([*vocabulary.values(), *added], default=-1),
        "largest_base": max((id for id in vocabulary.values() if id not in added), default=-1),
        "beyond": sorted((id, token.content) for id, token in added.items())[-20:],
        "moved": [[content, id] for content, id in listed if tokenizer.token_to_id(content) != id][:1000],
        "front": front,
        "behind": tokenizer.encode("a").ids[len(front) + len(bare) :],
        "sample": tokenizer.encode(SAMPLE).ids,
        "ids": {token: tokenizer.token_to_id(token) for token in tokens},
    }


def conversation(tokenizer: Tokenizer, job: dict[str, Any]) -> dict[str, Any]:
    """What the template makes of the messages: their ids, and the special tokens behind the last message's text."""
    messages = job["messages"]
    text = check_length(Template(job["template"], job["variables"]).render(messages))
    _, found, tail = text.rpartition(messages[-1]["content"])
    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    behind = tokenizer.encode(tail, add_special_tokens=False).ids if found else []
    return {
        "ids": tokenizer.encode(text, add_special_tokens=False).ids,
        "ends": [[id, tokenizer.id_to_token(id)] for id in behind if id in special],
        "shows_answer": bool(found),
    }


def main(directory: Path, job: dict[str, Any]) -> int:
    """Writes the two lines. A panic of `tokenizers` ends the process before the first."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    limit_memory(MEMORY)
    limit_time(SECONDS)
    try:
        tokenizer = load(directory)
        file = json.loads((directory / "tokenizer.json").read_bytes())
        told = describe(tokenizer, file, job["tokens"])
    except BaseException as error:
        told = {"error": "unreadable", "why": f"{type(error).__name__}: {error}"[:300]}
    answers.write(json.dumps(told) + "\n")
    answers.flush()
    if "error" in told or not job.get("template"):
        return 0
    limit_memory()
    limit_time()
    try:
        told = conversation(tokenizer, job)
    except Exception as error:
        told = error_response(error)
    answers.write(json.dumps(told) + "\n")
    answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.load(sys.stdin.buffer)))
