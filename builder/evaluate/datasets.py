"""Data sets to evaluate on: rows of text, and the token sequences that are scored.

The recipe (`evaluation`) sets how many texts are read, which are dropped as too short and where the others are cut.
Messages become lines `role: content`. The first token of a sequence is context and is not scored.
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
    """Token ids of the scored texts, in order, and how many texts were read, dropped as too short, and cut."""

    ids: list[Ids]
    read: int
    dropped: int
    cut: int

    @property
    def starts(self) -> list[int]:
        """Offsets of each text's scored tokens among all of the data set's, [texts + 1]; the last is their number."""
        return [0, *np.cumsum([len(ids) - 1 for ids in self.ids]).tolist()]


def read_texts(part: Evaluation, *, store: Store) -> list[Texts]:
    """The data sets of a recipe; each is a stage of the store. UsageError if one has no usable text."""
    found: list[Texts] = []
    for number, one in enumerate(part.data):
        rows = schema.Calibration(**one.model_dump(), samples=part.texts)
        name = Path(one.data).stem if one.data.endswith((".jsonl", ".json", ".ndjson")) else one.data.split("/")[-1]
        name += f"-{number + 1}" if name in {texts.name for texts in found} else ""
        made = calibrate(rows, store=store, use=USE)
        found.append(Texts(name, made.path, made.digest))
    return found


def longest(part: Evaluation, positions: int, engine: schema.Engine) -> int:
    """The largest number of tokens of a text that every runner accepts: the model's length less `reserve`, and no more
    than max_input_len if the served model is measured. UsageError if that is less than `min_tokens`."""
    limit = min(engine.max_seq_len, positions) - part.reserve
    if "served" in part.runners:
        limit = min(limit, engine.max_input_len)
    limit = min(limit, part.max_tokens or limit)
    if limit < part.min_tokens:
        raise UsageError(
            f"No text would be left: texts are cut at {limit} tokens, and texts below {part.min_tokens} are dropped.",
            hint="Allow longer texts: --max-seq-len, --set evaluation.reserve=0 or --set evaluation.min_tokens=2",
        )
    return limit


def text_of(row: Mapping[str, Any]) -> str:
    """A row's text; messages as lines `role: content`."""
    if "text" in row:
        return str(row["text"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in row["messages"])


def sequences(texts: Path, tokenizer: Any, *, name: str, min_tokens: int, max_tokens: int) -> Sequences:
    """Tokenizes the texts of a JSONL file, drops short ones and cuts long ones. UsageError if none is left."""
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
            why=f"The longest has {most} tokens; texts with fewer than {min_tokens} are dropped.",
            hint="Use longer texts with --data, or --set evaluation.min_tokens=2",
        )
    return Sequences(ids, read, dropped, cut)


def shuffled(ids: Sequence[Ids], seed: int) -> list[Ids]:
    """The tokens of each text in random order, which a model that knows the language must find less likely."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(one) for one in ids]


def _lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            yield text_of(json.loads(line))
