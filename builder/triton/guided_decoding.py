"""Guided decoding of an engine's repository: whether the engine can, and what it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from builder.core.errors import UsageError
from builder.grammar import vocabulary
from builder.recipe import schema
from builder.tokenizer import files as tokenizer_files

FILE = f"1/{vocabulary.FILE}"  # relative to the model's directory, so that the model can be renamed
OFF = {"tokenizer_dir": "", "guided_decoding_backend": "", "xgrammar_tokenizer_info_path": ""}
LOGITS = ("float32", "float16")  # of which GuidedDecoder::execute masks (batch_manager/guidedDecoder.cpp@000a01de)


def stop_token_ids(directory: Path, end_ids: Sequence[int], vocab_size: int) -> list[int]:
    """The ids that may follow a complete answer: the end ids, and what the chat template ends a turn with."""
    turn = tokenizer_files.read(directory).end_of_turn
    found = dict.fromkeys([*end_ids, *([turn[0]] if turn else [])])
    return [id for id in found if id < vocab_size]


def check(part: schema.Repository, config: Mapping[str, Any], stops: Sequence[int]) -> bool:
    """Whether the repository has guided decoding: if the recipe does not say, if the engine can.

    UsageError if the recipe asks for it and the engine can't. `config` is the engine's config.json.
    """
    why = _why_not(config, stops)
    if why and part.guided_decoding:
        raise UsageError(
            "repository.guided_decoding can't be used with this engine.", why=why, hint="Omit guided_decoding."
        )
    return not why and part.guided_decoding is not False


def parameters(on: bool) -> Mapping[str, str]:
    """The parameters of the model. The C++ backend reads the three without a default: empty means unset, but if one is
    missing, the model does not load (getGuidedDecodingConfigFromParams in model_instance_state.cc@c8c6df08)."""
    return {**OFF, "guided_decoding_backend": "xgrammar", "xgrammar_tokenizer_info_path": FILE} if on else OFF


def _why_not(config: Mapping[str, Any], stops: Sequence[int]) -> str:
    pretrained, build = config["pretrained_config"], config["build_config"]
    if not stops:
        return "No file of the model names an end id, so a complete answer could not end."
    if pretrained["logits_dtype"] not in LOGITS:
        return f"Its logits are {pretrained['logits_dtype']}; TensorRT-LLM masks {' and '.join(LOGITS)} only."
    if build.get("speculative_decoding_mode") not in (None, 1, "NONE"):
        return "It was built for speculative decoding."
    return ""
