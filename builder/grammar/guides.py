"""What guides an answer: a kind and a text, as TensorRT-LLM's inputs have them.

Source: inflight_batcher_llm/src/utils.cc@19290813, getGuidedDecodingParamsFromTensors.
"""

from __future__ import annotations

import json
from typing import Literal, NamedTuple, get_args

Kind = Literal["json", "json_schema", "regex", "ebnf_grammar"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# How vocabulary.py writes tokens, as the decoder of a tokenizer.json.
TOKENIZER_STR = json.dumps({"decoder": {"type": "ByteLevel"}})


class Guide(NamedTuple):
    """A grammar for one answer. text: empty for `json`, which is any JSON value."""

    kind: Kind
    text: str
