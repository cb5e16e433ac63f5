"""A vocabulary whose tokens are single bytes, for grammars: tokens drawn at random are answers of the worst model."""

from __future__ import annotations

import json
from pathlib import Path

from builder.grammar.guides import TOKENIZER_STR
from builder.grammar.vocabulary_worker import ALPHABET, NEVER

END, SIZE = 256, 288  # the id that ends an answer; the width of the logits, some of which belong to no token


def write_info(file: Path) -> Path:
    """Writes the tokenizer information that the engine and its stand-in read."""
    vocabulary = ["" if byte in NEVER else ALPHABET[byte] for byte in range(256)]
    content = {"encoded_vocab": [*vocabulary, "</s>"], "tokenizer_str": TOKENIZER_STR, "stop_token_ids": [END]}
    file.write_text(json.dumps(content))
    return file
