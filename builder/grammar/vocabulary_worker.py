"""The worker process that reads a tokenizer's vocabulary: python -m builder.grammar.vocabulary_worker DIRECTORY

Writes a line of JSON: {"tokens": [...], "missing": the first id without a token, or null}. `tokenizers` may panic at
an invalid file (see tokenizer/worker.py).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tokenizers import Tokenizer

from builder.tokenizer.chat_template_worker import die_with_parent, limit_memory, limit_time
from builder.tokenizer.detokenizer import BYTE_OF, Vocabulary
from builder.tokenizer.worker import MEMORY, SECONDS, load

ALPHABET = {byte: char for char, byte in BYTE_OF.items()}
NEVER = frozenset((0xC0, 0xC1, *range(0xF5, 0x100)))  # bytes that UTF-8 does not have


def tokens(tokenizer: Tokenizer) -> list[str]:
    """The tokens by id, written as vocabulary.py says."""
    vocabulary = Vocabulary.of(tokenizer)
    added = tokenizer.get_added_tokens_decoder()
    ids = [*tokenizer.get_vocab().values(), *added]
    found = [""] * (max(ids, default=-1) + 1)
    for id in set(ids):
        token = added.get(id)
        raw = vocabulary.token_bytes(id) if token is None else b"" if token.special else token.content.encode()
        found[id] = "" if NEVER & set(raw) else "".join(ALPHABET[byte] for byte in raw)
    return found


def main(directory: Path) -> int:
    """Writes the line."""
    die_with_parent()
    response = os.fdopen(os.dup(1), "w", encoding="utf-8")
    limit_memory(MEMORY)
    limit_time(SECONDS)
    try:
        tokenizer = load(directory)
        ids = {*tokenizer.get_vocab().values(), *tokenizer.get_added_tokens_decoder()}
        missing = next((id for id in range(max(ids, default=0)) if id not in ids), None)
        text = json.dumps({"tokens": tokens(tokenizer), "missing": missing})
    except BaseException as error:
        text = json.dumps({"error": "unreadable", "why": f"{type(error).__name__}: {error}"[:300]})
    response.write(text + "\n")
    response.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
