"""The tokens of a model as the bytes that a grammar reads, in the file that TensorRT-LLM calls tokenizer information.

The file has the fields of upstream's generate_xgrammar_tokenizer_info.py (examples/, TensorRT-LLM 1.2), which the C++
backend reads: encoded_vocab, tokenizer_str, stop_token_ids. Three differences, each because the grammar must see the
text that the gateway will make of the tokens:

- Every vocabulary is written byte for byte in GPT-2's alphabet, and tokenizer_str says only so. xgrammar itself knows
  byte-level and byte-fallback vocabularies, and takes the ▁ of others for a letter.
- Special tokens are empty, which xgrammar never allows: they are no part of the text, but upstream's file allows
  <|im_start|> inside a JSON string. So are tokens with a byte that UTF-8 does not have.
- An id without a token keeps its place; upstream's file moves all later tokens down.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from builder.core import workers
from builder.core.errors import IntegrityError
from builder.grammar.guides import TOKENIZER_STR
from builder.model.files import SAVE_AGAIN
from builder.tokenizer import chat_template

FILE = "xgrammar_tokenizer_info.json"
SECONDS = 600.0


def write(tokenizer: Path, file: Path, vocab_size: int, stop_token_ids: Sequence[int]) -> None:
    """Writes the file for the tokenizer in a directory. stop_token_ids: those that may follow a complete answer.

    IntegrityError if the tokenizer can't be read.
    """
    content = {
        "encoded_vocab": encoded(tokenizer)[:vocab_size],
        "tokenizer_str": TOKENIZER_STR,
        "stop_token_ids": list(stop_token_ids),
    }
    file.write_text(json.dumps(content), encoding="utf-8")


def encoded(tokenizer: Path) -> list[str]:
    """The tokens by id, their bytes in GPT-2's alphabet."""
    return [str(token) for token in _read(tokenizer)["tokens"]]


def missing_id(tokenizer: Path) -> int | None:
    """The first id, below the largest, that has no token."""
    found: int | None = _read(tokenizer)["missing"]
    return found


def _read(tokenizer: Path) -> dict[str, Any]:
    """What a worker process says of the tokenizer, which is not trusted."""
    child = chat_template.start_worker(workers.VOCABULARY, str(tokenizer.absolute()), stdin=subprocess.DEVNULL)
    try:
        response = chat_template.read_response(child, wall=SECONDS)
    finally:
        child.kill()
        child.communicate()
    if "error" in response:
        raise IntegrityError(f"The vocabulary of {tokenizer} can't be read.", why=str(response["why"]), hint=SAVE_AGAIN)
    return response
