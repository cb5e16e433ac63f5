"""Guided decoding with TensorRT-LLM's LLM class, if the recipe asks for it.

The class reads the vocabulary from the tokenizer itself (_xgrammar_tokenizer_info in tensorrt_llm/tokenizer and
llmapi/tokenizer.py), not from a file. It takes the tokens in the order of their ids without a place for an id that is
missing, and lets the tokenizer's eos_token alone end an answer. Its masks are wrong for tokenizers that need more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from builder.core.errors import UsageError
from builder.grammar import vocabulary
from builder.tokenizer import files as tokenizer_files
from builder.triton.guided_decoding import FILE

ARGUMENT, BACKEND = "guided_decoding_backend", "xgrammar"


def write(model: Path, snapshot: Path, end_ids: Sequence[int], vocab_size: int) -> dict[str, Any]:
    """Writes the vocabulary that the gateway compiles grammars with, and returns the fact that clients need.

    UsageError if the class would read the tokenizer wrongly. `model`: the model's directory.
    """
    eos, missing = tokenizer_files.read(snapshot).eos, vocabulary.missing_id(snapshot)
    if eos is None or eos[0] not in end_ids:
        raise _refused("The tokenizer's eos_token is none of the model's end ids, so a guided answer could not end.")
    if missing is not None:
        raise _refused(f"The tokenizer has no token for id {missing}, and TensorRT-LLM would shift those after it.")
    vocabulary.write(snapshot, model / FILE, vocab_size, [eos[0]])
    return {"file": FILE, "stop_token_ids": [eos[0]]}


def _refused(why: str) -> UsageError:
    return UsageError(
        "repository.guided_decoding can't be used with this model and the llmapi target.",
        why=why,
        hint="Omit guided_decoding.",
    )
