"""Which token ids end an answer and pad a prompt, as the model's own files say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from builder.model.files import json_object


def special_ids(snapshot: Path, end_ids: Sequence[int] | None = None) -> dict[str, Any]:
    """{"end_ids": [...], "pad_id": n} of a model's directory. `end_ids` is the recipe's choice and takes precedence.

    An id comes from the first file that has it: generation_config.json, config.json, tokenizer_config.json,
    special_tokens_map.json. Without a padding token, the first end id is used, or else 0. IntegrityError for a file
    that is not a JSON object.
    """
    end, pad = list(end_ids) if end_ids else _find(snapshot, "eos"), _find(snapshot, "pad")
    found = list(dict.fromkeys(end)) if isinstance(end, list) else [] if end is None else [end]
    if pad is None:
        pad = found[0] if found else 0
    return {"end_ids": found, "pad_id": pad}


def _find(snapshot: Path, kind: str) -> Any:
    """The value of `eos` or `pad`: an id, a list of ids, or None."""
    config = json_object(snapshot / "config.json")
    for source in (json_object(snapshot / "generation_config.json"), config, config.get("text_config") or {}):
        if source.get(f"{kind}_token_id") is not None:
            return source[f"{kind}_token_id"]
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = json_object(snapshot / name).get(f"{kind}_token")
        if token is not None:
            return _token_id(snapshot, token["content"] if isinstance(token, dict) else token)
    return None


def _token_id(snapshot: Path, token: str) -> int | None:
    """The id of a token in tokenizer.json, where it is an added token or, in some conversions of Llama 2, only part of
    the vocabulary. A Unigram model lists its vocabulary in the order of the ids."""
    tokenizer = json_object(snapshot / "tokenizer.json")
    added = {entry["content"]: int(entry["id"]) for entry in tokenizer.get("added_tokens", [])}
    vocab = tokenizer.get("model", {}).get("vocab", {})
    ids = vocab if isinstance(vocab, dict) else {piece[0]: id for id, piece in enumerate(vocab)}
    return added.get(token, ids.get(token))
