"""Compares the number formats on one model: python benchmarks/formats.py [--model DIR] [--texts 40] [--format NAME]

Builds the checkpoint of every format and scheme that a recipe can choose, evaluates it on texts that it was not
calibrated on, and prints one table: bytes of the Hugging Face layout, bits per weight of the linear layers, and, for
the checkpoint on disk, the simulation and the reference executor, perplexity, score (BF16 = 100), KL from BF16 and how
often the most likely token is the same. A format that this installation or the model cannot take has the reason in its
row. The KV cache is in the model's type, so that weights and activations alone differ.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from builder.core.errors import BuilderError
from builder.core.output import Output, size
from builder.core.store import Store
from builder.formats import schemes
from builder.pipeline import measure
from builder.recipe import schema

MODEL = "tests/data/tiny-qwen3"
TEXTS = ("tests/data/eval/prose.jsonl", "tests/data/eval/chat.jsonl")
RUNNERS = ("checkpoint", "simulated", "reference")
METRICS = ("ppl", "score", "kl", "agreement")
COLUMNS = ["format", "bytes", "bits", "measured by", "PPL", "score", "KL", "same top token"]


def recipe(name: str, asked: argparse.Namespace) -> schema.Resolved:
    """The recipe that builds and evaluates one format."""
    return schema.resolve(
        {
            "model.id": asked.model,
            "gpu": "cpu",
            "quantization.format": name,
            "quantization.kv_cache_dtype": "auto",
            "calibration.data": "builtin:python-docs",
            "calibration.samples": asked.rows,
            "calibration.seq_len": 256,
            "evaluation.runners": ["bf16", *(asked.runner or RUNNERS)],
            "evaluation.data": list(TEXTS),
            "evaluation.texts": asked.texts,
            "evaluation.max_tokens": 256,
        }
    )


def rows(name: str, asked: argparse.Namespace, store: Store) -> list[dict[str, Any]]:
    """One row for each way to measure a format; a single one with the reason where it can't be built."""
    try:
        found = measure(recipe(name, asked), store)
    except BuilderError as error:
        return [{"format": name, "why": " ".join(error.what.split())}]
    checkpoint = next(one for one in store.done if one.stage == "checkpoint")
    unified = checkpoint.path / "unified"
    inspected = checkpoint.facts.get("inspection", {}).get("layouts", {}).get("unified", {})
    facts = {
        "format": name,
        "bytes": sum(file.stat().st_size for file in unified.glob("*.safetensors")),
        "bits": inspected.get("effective_bits", 16.0),
    }
    made = [
        {**facts, "runner": runner, **{metric: overall(sets)[metric].value for metric in METRICS}}
        for runner, sets in found.measured.items()
        if runner != "bf16" and overall(sets)
    ]
    return made + [{**facts, "runner": runner, "why": why} for runner, why in found.not_measured.items()]


def overall(sets: Any) -> Any:
    """The figures of all data sets together."""
    return sets.get("overall") or next(iter(sets.values()))


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    if "runner" not in row:
        return (row["format"], "-", "-", "-", row["why"], "", "", "")
    first = (row["format"], size(row["bytes"]), f"{row['bits']:.2f}", row["runner"])
    if "why" in row:
        return (*first, row["why"], "", "", "")
    return (
        *first, f"{row['ppl']:.2f}", f"{row['score']:.2f}", f"{row['kl']:.4f}", f"{100 * row['agreement']:.1f} %"
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--texts", type=int, default=40, help="of each data set")
    parser.add_argument("--rows", type=int, default=32, help="to calibrate on")
    parser.add_argument("--format", action="append", choices=schemes.names(), help="default: all")
    parser.add_argument("--runner", action="append", choices=RUNNERS, help="default: all")
    parser.add_argument("--output", help="keep the checkpoints here")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    asked = parser.parse_args()
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in asked.format or schemes.names():
            start = time.monotonic()
            found += rows(name, asked, Store(Path(asked.output or scratch), Output("quiet")))
            print(f"{name}: {time.monotonic() - start:.0f} s", file=sys.stderr)
            if asked.json:
                asked.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    Output("human").table(f"number formats on {asked.model}", COLUMNS, [cells(row) for row in found])


if __name__ == "__main__":
    main()
