"""Loads a model's tokenizer with transformers 4.57 or 5, for workers that calibrate or evaluate.

The served model uses tokenizer.json. transformers picks a class by tokenizer_config.json, and versions 4 and 5 can't
always load each other's: 4.57 lacks TokenizersBackend, which 5 saves, and 5 rebuilds some classes from their
vocabulary. If the class is missing or produces other tokens than tokenizer.json, that file is loaded on its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builder.core.errors import IntegrityError
from builder.core.worker import emit
from builder.model.files import json_object
from builder.tokenizer.worker import SAMPLE

ALONE = "loading tokenizer.json on its own, as the served model does"


def load(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """A transformers tokenizer that produces the same tokens as the served model's. IntegrityError if none loads."""
    import transformers
    from tokenizers import Tokenizer

    options = {"local_files_only": True, **_overrides(directory, transformers.__version__)}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, **options
        )
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        emit(info=f"transformers {transformers.__version__} can't load the tokenizer's class ({why}): {ALONE}")
        return _alone(directory, options)
    if type(tokenizer).__module__.startswith("transformers_modules"):
        return tokenizer  # the model's own code, which the user trusts (--trust-remote-code)
    served = Tokenizer.from_file(str(directory / "tokenizer.json"))
    served.no_truncation()
    served.no_padding()
    if list(tokenizer(SAMPLE, verbose=False)["input_ids"]) == served.encode(SAMPLE).ids:
        return tokenizer
    emit(info=f"{type(tokenizer).__name__} produces other tokens than tokenizer.json: {ALONE}")
    return _alone(directory, options)


class ServedTokenizer:
    """tokenizer.json alone, called as a transformers tokenizer is: {"input_ids": ...} of a text. Without a chat
    template, and without the time that importing transformers takes."""

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def __call__(self, text: str, *, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}


def _alone(directory: Path, options: dict[str, Any]) -> Any:
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(directory, **options)
    except Exception as error:
        raise IntegrityError(
            f"transformers can't load the tokenizer of {directory}.",
            why=f"{type(error).__name__}: {error}",
            hint="Save its files again: AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIRECTORY)",
        ) from None


def _overrides(directory: Path, version: str) -> dict[str, Any]:
    """Options that let transformers 4 load what 5 saved: it expects `extra_special_tokens` to be a mapping."""
    extra = json_object(directory / "tokenizer_config.json").get("extra_special_tokens")
    if int(version.split(".")[0]) >= 5 or not isinstance(extra, list):
        return {}
    return {"extra_special_tokens": {}, "additional_special_tokens": extra}
