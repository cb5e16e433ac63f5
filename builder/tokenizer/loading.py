"""The tokenizer of a model directory in transformers, 4.57 or 5, for processes that calibrate or measure.

What is served is tokenizer.json. transformers decides by tokenizer_config.json which class reads it, and its versions
do not read each other's: 4.57 knows no TokenizersBackend, which 5 saves, and 5 builds some classes anew from their
vocabulary. Where the class can't be had or makes other tokens than tokenizer.json, the file is loaded by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builder.core.errors import IntegrityError
from builder.core.process import emit
from builder.model.files import json_object
from builder.tokenizer.worker import SAMPLE

ALONE = "the tokenizer is loaded from tokenizer.json alone, as it is served"


def load(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """A tokenizer of transformers that makes the tokens that the served model gets. IntegrityError if none loads."""
    import transformers
    from tokenizers import Tokenizer

    options = {"local_files_only": True, **_overrides(directory, transformers.__version__)}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            directory, trust_remote_code=trust_remote_code, **options
        )
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        emit(info=f"transformers {transformers.__version__}: {why} So {ALONE}.")
        return _alone(directory, options)
    if type(tokenizer).__module__.startswith("transformers_modules"):  # the model's own code, which the user trusts
        return tokenizer
    served = Tokenizer.from_file(str(directory / "tokenizer.json"))
    served.no_truncation()
    served.no_padding()
    if list(tokenizer(SAMPLE, verbose=False)["input_ids"]) == served.encode(SAMPLE).ids:
        return tokenizer
    emit(info=f"{type(tokenizer).__name__} makes other tokens than tokenizer.json: {ALONE}")
    return _alone(directory, options)


def _alone(directory: Path, options: dict[str, Any]) -> Any:
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast.from_pretrained(directory, **options)
    except Exception as error:
        raise IntegrityError(
            f"transformers can't load the tokenizer of {directory}.",
            why=f"{type(error).__name__}: {error}",
            hint="Write its files again: AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIRECTORY)",
        ) from None


def _overrides(directory: Path, version: str) -> dict[str, Any]:
    """What transformers 4 has to be given in place of what 5 saved: it takes `extra_special_tokens` for a mapping."""
    extra = json_object(directory / "tokenizer_config.json").get("extra_special_tokens")
    if int(version.split(".")[0]) >= 5 or not isinstance(extra, list):
        return {}
    return {"extra_special_tokens": {}, "additional_special_tokens": extra}
