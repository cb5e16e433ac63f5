"""One row for each model of a comparison (`builder eval --against`): what it is, its bytes, and what it lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from builder.checkpoint.description import Description, describe_directory
from builder.checkpoint.layouts import Checkpoint
from builder.core.output import Output, size
from builder.evaluate.gate import OVERALL
from builder.evaluate.metrics import Estimate
from builder.evaluate.variants import Models
from builder.formats.kv_cache import KvCacheFormat
from builder.recipe.schema import Recipe

OURS = "checkpoint"  # the runner that measures the recipe's own checkpoint, which candidates are compared with
RATIO = "kl_ratio"  # the metric: KL of a candidate over that of the recipe's own checkpoint
COLUMNS = ["model", "formats", "made by", "weights", "PPL", "score", "KL to BF16", "KL / ours", "same top token"]


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to measure.

    label: its row in tables. place: the directory as given. cache: the KV cache that it is measured with.
    """

    label: str
    place: str
    checkpoint: Checkpoint
    cache: KvCacheFormat
    tool: str
    formats: str


@dataclass(frozen=True)
class Compared:
    """A model of the comparison. nbytes: of its safetensors files. place: the directory, "" for the recipe's own."""

    formats: str
    tool: str
    nbytes: int
    place: str = ""


def compared(models: Models, recipe: Recipe, candidates: Sequence[Candidate]) -> dict[str, Compared]:
    """The models of a comparison by their labels: BF16, the recipe's own checkpoint, the candidates."""
    files = models.snapshot.artifact.facts["external"]["files"]
    found = {"bf16": Compared("BF16", "", sum(f["size"] for n, f in files.items() if n.endswith(".safetensors")))}
    if models.checkpoint is not None:
        found[OURS] = _own(models.checkpoint, recipe)
    for one in candidates:
        found[one.label] = Compared(one.formats, one.tool, _nbytes(one.checkpoint.unified), one.place)
    return found


def _own(checkpoint: Checkpoint, recipe: Recipe) -> Compared:
    """The recipe's own checkpoint, by what its files say: an imported one has other formats than the recipe."""
    nbytes, imported = _nbytes(checkpoint.unified), checkpoint.facts.get("imported")
    if recipe.quantization.as_it_is and not imported:
        return Compared("BF16", "this recipe, unquantized", nbytes)
    way = "data-free" if recipe.calibration.data_free else "calibrated"
    tool = imported["tool"] if imported else f"this recipe, {way}"
    return Compared(formats_of(describe_directory(checkpoint.unified)), tool, nbytes)


def formats_of(found: Description) -> str:
    """The formats of the quantized layers and of the KV cache, as words."""
    titles = dict.fromkeys(one.title for one in found.layers.values() if one.quant_algo is not None)
    cache = found.served_cache
    return ", ".join([*titles, *([cache.title] if cache.quantized else [])])


def as_dict(models: Mapping[str, Compared]) -> dict[str, Any]:
    """For JSON."""
    return {label: asdict(one) for label, one in models.items()}


def show(
    models: Mapping[str, Compared], measured: Mapping[str, Mapping[str, Mapping[str, Estimate]]], out: Output
) -> None:
    """Prints one row for each model that was measured, over all data sets."""
    rows = []
    for label, one in models.items():
        if label in measured:
            figures = overall(measured[label])
            cells = [str(figures[name]) if name in figures else "-" for name in ("ppl", "score", "kl", RATIO)]
            same = f"{100 * figures['agreement'].value:.2f} %" if "agreement" in figures else "-"
            rows.append((label, one.formats, one.tool or "-", size(one.nbytes), *cells, same))
    out.table("compared on the same texts (95 % intervals)", COLUMNS, rows)


def overall(sets: Mapping[str, Mapping[str, Estimate]]) -> Mapping[str, Estimate]:
    """The figures over all data sets: of the only one, if there is one."""
    return sets.get(OVERALL) or next(iter(sets.values()))


def _nbytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
