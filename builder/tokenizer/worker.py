"""The worker process that loads an untrusted tokenizer.json, with limits: python -m builder.tokenizer.worker DIRECTORY

Reads a job as JSON from stdin: {"tokens": texts to look up, "template", "variables", "messages"}. Answers with two
lines of JSON on stdout: a description of the tokenizer, then of the rendered conversation. `tokenizers` is written in
Rust, and invalid input may end in a panic, which prints to stderr and is not an Exception; so it runs in a process of
its own.
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
    """Loads the tokenizer as the served repository does: without truncation and padding."""
    tokenizer = Tokenizer.from_str((directory / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def describe(tokenizer: Tokenizer, file: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """The description of a tokenizer, with the fields of tokenizer.files.Tokenizer. `file`: the parsed tokenizer.json.

    "ids" maps each of `tokens` to its id, or to None if it has none; "sample" holds the ids of SAMPLE. Lists are cut
    to a size that a message can show.
    """
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    listed = [(token["content"], token["id"]) for token in file.get("added_tokens", [])]
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    prefix = prefix_ids(lambda text: tokenizer.encode(text).ids)
    return {
        "max_id": max([*vocabulary.values(), *added], default=-1),
        "max_base_id": max((id for id in vocabulary.values() if id not in added), default=-1),
        "highest_added": sorted((id, token.content) for id, token in added.items())[-20:],
        "reassigned": [[content, id] for content, id in listed if tokenizer.token_to_id(content) != id][:1000],
        "prefix_ids": prefix,
        "suffix_ids": tokenizer.encode("a").ids[len(prefix) + len(bare) :],
        "sample": tokenizer.encode(SAMPLE).ids,
        "ids": {token: tokenizer.token_to_id(token) for token in tokens},
    }


def conversation(tokenizer: Tokenizer, job: dict[str, Any]) -> dict[str, Any]:
    """Renders the job's messages: {"ids": of the text, "ends": special tokens after the last message as [id, text]}.

    "shows_answer" is false if the template leaves out the last message. Raises what jinja2 raises.
    """
    messages = job["messages"]
    text = check_length(Template(job["template"], job["variables"]).render(messages))
    _, found, tail = text.rpartition(messages[-1]["content"])
    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    after = tokenizer.encode(tail, add_special_tokens=False).ids if found else []
    return {
        "ids": tokenizer.encode(text, add_special_tokens=False).ids,
        "ends": [[id, tokenizer.id_to_token(id)] for id in after if id in special],
        "shows_answer": bool(found),
    }


def main(directory: Path, job: dict[str, Any]) -> int:
    """Writes the two lines. If `tokenizers` panics, the process exits before the first."""
    die_with_parent()
    responses = os.fdopen(os.dup(1), "w", encoding="utf-8")
    limit_memory(MEMORY)
    limit_time(SECONDS)
    try:
        tokenizer = load(directory)
        file = json.loads((directory / "tokenizer.json").read_bytes())
        response = describe(tokenizer, file, job["tokens"])
    except BaseException as error:
        response = {"error": "unreadable", "why": f"{type(error).__name__}: {error}"[:300]}
    responses.write(json.dumps(response) + "\n")
    responses.flush()
    if "error" in response or not job.get("template"):
        return 0
    limit_memory()  # from here on the limits of a chat template, which are lower
    limit_time()
    try:
        response = conversation(tokenizer, job)
    except Exception as error:
        response = error_response(error)
    responses.write(json.dumps(response) + "\n")
    responses.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.load(sys.stdin.buffer)))
