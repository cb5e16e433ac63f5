"""Data sets to evaluate on: rows of text, and the token sequences that are scored.

The rules are the recipe's (`evaluation`): the first texts that are not empty, those of few tokens dropped, the others
cut, messages as lines `role: content`. A sequence's first token is context only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from builder.calibration.rows import Use, calibrate
from builder.core.errors import UsageError
from builder.core.store import Store
from builder.recipe import schema
from builder.recipe.evaluation import Evaluation
from builder.tokenizer.special_tokens import encoder

USE = Use("texts", "--data", "--set 'evaluation.data=[{{data: ID, {key}: {value}}}]'")
Ids = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Texts:
    """The rows of one data set: `path` is a JSONL file. `name` is unique within an evaluation."""

    name: str
    path: Path
    digest: str


@dataclass(frozen=True)
class Sequences:
    """Token ids of the kept texts in order, and how many texts were read, dropped and cut."""

    ids: list[Ids]
    read: int
    dropped: int
    cut: int

    @property
    def starts(self) -> list[int]:
        """Where each text's scored tokens begin among all of the data set's, and at the end their number."""
        return [0, *np.cumsum([len(ids) - 1 for ids in self.ids]).tolist()]


def read_texts(part: Evaluation, *, store: Store) -> list[Texts]:
    """The data sets of a recipe, each a stage of the store. UsageError for one without a usable text."""
    found: list[Texts] = []
    for number, one in enumerate(part.data):
        rows = schema.Calibration(**one.model_dump(), samples=part.texts)
        name = Path(one.data).stem if one.data.endswith((".jsonl", ".json", ".ndjson")) else one.data.split("/")[-1]
        name += f"-{number + 1}" if name in {texts.name for texts in found} else ""
        made = calibrate(rows, store=store, use=USE)
        found.append(Texts(name, made.path, made.digest))
    return found


def longest(part: Evaluation, positions: int, engine: schema.Engine) -> int:
    """Tokens of a text at most, so that every runner can take it: `reserve` less than the model's length, and where the
    served model is measured too no more than its prompts may have."""
    limit = min(engine.max_seq_len, positions) - part.reserve
    if "served" in part.runners:
        limit = min(limit, engine.max_input_len)
    limit = min(limit, part.max_tokens or limit)
    if limit < part.min_tokens:
        raise UsageError(
            f"Texts would be cut at {limit} tokens, and shorter ones than {part.min_tokens} are dropped: none is left.",
            hint="Leave more room: --max-seq-len, --set evaluation.reserve=0 or --set evaluation.min_tokens=2",
        )
    return limit


def text_of(row: Mapping[str, Any]) -> str:
    """A row's text; messages as lines `role: content`."""
    if "text" in row:
        return str(row["text"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in row["messages"])


def sequences(texts: Path, tokenizer: Any, *, name: str, min_tokens: int, max_tokens: int) -> Sequences:
    """The kept texts as token ids. UsageError if none has `min_tokens`."""
    ids: list[Ids] = []
    read = dropped = cut = most = 0
    encode = encoder(tokenizer)
    for text in _lines(texts):
        found = encode(text)
        read, most = read + 1, max(most, len(found))
        if len(found) < min_tokens:
            dropped += 1
            continue
        cut += len(found) > max_tokens
        ids.append(np.array(found[:max_tokens], dtype=np.int32))
    if not ids:
        raise UsageError(
            f"All {read} texts of {name} are too short.",
            why=f"The longest has {most} tokens, and texts with less than {min_tokens} are dropped.",
            hint="Take longer texts with --data, or --set evaluation.min_tokens=2",
        )
    return Sequences(ids, read, dropped, cut)


def shuffled(ids: Sequence[Ids], seed: int) -> list[Ids]:
    """The same tokens of each text in another order: what a model of the language must find less likely."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(one) for one in ids]


def _lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            yield text_of(json.loads(line))
