"""Snapshot, Checkpoint -> Quality: the small check that every build makes before it publishes.

Measures perplexity, KL and agreement of the BF16 model and of the checkpoint on disk, on about 32 texts of at most 256
tokens, half of them calibration rows that were not used; and compares a few greedy answers. One worker process measures
both models. If the score is low it also estimates remedies on fewer texts, so that the message can suggest the next
command. `builder eval` measures more, and more precisely. Nothing heavy is imported here.
"""

from __future__ import annotations

import fnmatch
import json
import math
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from builder.architectures import names
from builder.calibration.rows import Use, calibrate, dump, local_file, read_jsonl
from builder.core import paths, process, workers
from builder.core.errors import NotMeasurable
from builder.core.output import size
from builder.core.store import Store, digest_of, sources_digest
from builder.evaluate import memory
from builder.evaluate.metrics import Estimate, measure, read
from builder.evaluate.variants import Models, Variant, runner_job
from builder.formats.algorithms import MAX
from builder.formats.assignment import to_keep
from builder.formats.base import NumberFormat
from builder.formats.kv_cache import KvCacheFormat
from builder.formats.registry import BF16
from builder.preflight import ways
from builder.preflight.memory import Machine
from builder.preflight.model_facts import ModelFacts
from builder.quality.answers import ANSWER_TOKENS, PROMPTS, Answer
from builder.quantize import exclude, modelopt
from builder.recipe.schema import Recipe

SOURCES = (
    "builder/quality/answers.py",
    "builder/quality/check.py",
    "builder/quality/worker.py",
    "builder/quality/remedies.py",
    "builder/evaluate/metrics.py",
)
USE = Use("texts", "--calib-data", "--set calibration.{key}={value}")
BUNDLED = "bundled"
HELD_OUT = "held-out"
MIN_TOKENS = 8
RESAMPLES, SEED = 300, 0
TOP = 1024  # as evaluation.top
# Layers that are tried in FP8 (or BF16: formats/assignment.py, to_keep) if the score is low, cheapest first.
KEPT = (("*.{down}",), ("*.{attention}.*",), ("*.{mlp}.*",), ("*.{mlp}.*", "*.{q}"))


@dataclass(frozen=True)
class Remedy:
    """Flags that would raise the score, the estimated score with them, and the bytes that they add."""

    flags: tuple[str, ...]
    score: float
    nbytes: int


@dataclass(frozen=True)
class Quality:
    """The result of the check.

    runner: what measured the quantized model. figures, bf16: by metric (metrics.measure), over all texts.
    unmeasured: why there are no figures. remedies: empty if the score is high. collapsed: whether the quantized model
    finds shuffled tokens as likely as text.
    """

    runner: str = ""
    figures: Mapping[str, Estimate] | None = None
    bf16: Mapping[str, Estimate] | None = None
    texts: Mapping[str, int] | None = None
    tokens: int = 0
    seconds: float = 0.0
    answers: tuple[Answer, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    collapsed: bool = False
    notes: tuple[str, ...] = ()
    unmeasured: str = ""
    digest: str = ""
    path: Path | None = None

    @property
    def score(self) -> float | None:
        return self.figures["score"].value if self.figures else None

    def failure(self, min_score: float) -> str:
        """Why the check fails, "" if it passes. A NaN score fails."""
        if self.score is None:
            return ""
        if self.collapsed:
            return "the checkpoint finds shuffled tokens as likely as text"
        return "" if self.score >= min_score else f"its score is {self.score:.2f}, below {min_score:g} (BF16 = 100)"

    @property
    def lost(self) -> str:
        """What its answers lack that BF16's have, in words; "" if nothing, or if nobody answered."""
        return "; ".join(f"it answers {one.prompt!r} without {one.lost}" for one in self.answers if one.lost)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "path": str(self.path) if self.path else None}


def read_quality(facts: Mapping[str, Any], digest: str = "", path: Path | None = None) -> Quality:
    """The result from a stored stage's facts."""

    def estimates(found: Mapping[str, Mapping[str, float]]) -> dict[str, Estimate]:
        return {name: Estimate(**one) for name, one in found.items()}

    if "unmeasured" in facts:
        return Quality(unmeasured=facts["unmeasured"], digest=digest, path=path)
    known = {**facts, "figures": estimates(facts["figures"]), "bf16": estimates(facts["bf16"])}
    known["answers"] = tuple(Answer(**one) for one in facts["answers"])
    known["remedies"] = tuple(Remedy(tuple(r["flags"]), r["score"], r["nbytes"]) for r in facts["remedies"])
    return Quality(**{**known, "notes": tuple(facts["notes"]), "digest": digest, "path": path})


def check_quality(models: Models, model: ModelFacts, recipe: Recipe, host: Machine, *, store: Store) -> Quality:
    """Runs the check, or reads it from the store.

    If it can't be measured (memory, no runner for the model, unknown language), `unmeasured` of the result says why.
    """
    part = recipe.quality
    if recipe.quantization.as_it_is:
        return Quality(unmeasured="nothing is quantized")
    device = ways.device(host)
    dtype, found, way = _way(model, recipe, device)
    least = found.whole if way == "whole" else found.low
    if not device.gpu and least > host.memory:
        return Quality(unmeasured=f"it needs {size(least)} of memory, and this machine has {size(host.memory)}")
    texts = _texts(recipe, store)
    cache = recipe.quantization.cache_format
    # What was quantized elsewhere or without calibration can't be simulated, and its formats can't be chosen anew.
    made_here = models.calibration is not None and (
        models.checkpoint is None or "imported" not in models.checkpoint.facts
    )
    # ModelOpt simulates with the whole model in memory, and the rounding of max alone.
    simulates = made_here and way == "whole" and recipe.quantization.algorithm == MAX.name
    names = ("bf16", "checkpoint", "simulated") if simulates else ("bf16", "checkpoint")
    variants = [runner_job(Variant(name, name, cache), models, recipe, store) for name in names]
    jobs = [{**variant.job, "dtype": dtype, "memory": way} for variant in variants]
    positions = int(models.snapshot.config.get("max_position_embeddings") or part.max_tokens)
    asked = {
        "lengths": {"min_tokens": MIN_TOKENS, "max_tokens": min(part.max_tokens, positions)},
        "top": TOP,
        "seed": SEED,
        "answer_tokens": ANSWER_TOKENS,
        "prompts": PROMPTS,
        "remedies": _candidates(model, cache) if made_here else [],
    }
    ingredients = {
        "of": [models.snapshot.digest, models.checkpoint.digest if models.checkpoint else ""],
        "texts": {name: digest_of(rows) for name, rows in texts.items()},
        "asked": asked,
        "variants": [{**variant.ingredients, "dtype": dtype} for variant in variants],
        "sources": sources_digest(*SOURCES),
    }

    needs = size(least)

    def make(directory: Path) -> dict[str, Any]:
        return _measure(directory, {"variants": jobs, "needs": needs, **asked}, texts, store)

    try:
        made = store.stage("quality", ingredients, make)
    except NotMeasurable as error:
        return Quality(unmeasured=" ".join(f"{error.what} {error.why}".split()))
    except process.Failed as error:
        if error.code != -signal.SIGKILL:
            error.hint += "\nTo build without this check: --no-quality-check"
            raise
        return Quality(unmeasured=f"its process was killed, probably because memory ran out; it needs about {needs}")
    return read_quality(made.facts, made.digest, made.path)


def cost(model: ModelFacts, recipe: Recipe, host: Machine) -> tuple[float, int]:
    """The estimated seconds on this machine, and bytes of memory.

    SmolLM2-135M took about 100 s of CPU time for 6,460 tokens and both models: 7e10 operations per second on two cores.
    A GPU's time is that of reading the weights twice (not measured). Remedies, which take as long again, are excluded.
    """
    part, gpu = recipe.quality, bool(modelopt.gpus())
    weights = sum(math.prod(shape) for _, shape in model.tensors.values())
    tokens = part.texts * part.max_tokens
    rate = 2e14 if gpu else 7e10
    loading = 2 * 2 * weights / 1e9
    _, found, way = _way(model, recipe, ways.device(host))
    needs = found.whole if way == "whole" else found.low
    return 10 + loading + 2 * 2 * weights * tokens / rate, needs


def _way(model: ModelFacts, recipe: Recipe, device: ways.Device) -> tuple[str, memory.Needs, memory.Way]:
    """The dtype of computation, what it takes, and whether the model is measured whole or layer by layer.

    The dtype is float32 on a CPU (evaluation's auto), unless only BF16 fits. A whole model in BF16 is faster than one
    in float32 that is read layer by layer.
    """
    tokens = recipe.quality.max_tokens
    half, single = memory.needs(model, tokens), memory.needs(model, tokens, float32=True)
    way = memory.way(recipe, half, device.memory)
    if device.gpu:
        return "auto", half, way
    roomy = (single.whole if way == "whole" else single.low) <= (device.memory or 0)
    return ("auto", single, way) if roomy else ("bfloat16", half, way)


def _texts(recipe: Recipe, store: Store) -> dict[str, list[dict[str, Any]]]:
    """Rows by set: the calibration data's first rows after those that were used, and bundled texts for the rest."""
    rows, part = recipe.calibration, recipe.quality
    wanted = part.texts // 2
    file = local_file(rows.data, USE)
    if wanted and file is not None:
        held_out = read_jsonl(file, rows.samples + wanted, rows.column).usable[rows.samples :]
    elif wanted:
        more = rows.model_copy(update={"samples": rows.samples + wanted})
        lines = calibrate(more, store=store, use=USE).path.read_text(encoding="utf-8").splitlines()
        held_out = [json.loads(line) for line in lines[rows.samples :]]
    else:
        held_out = []
    bundled = read_jsonl(paths.data("configs", "quality", "texts.jsonl"), part.texts - len(held_out), None).usable
    return {name: found for name, found in ((BUNDLED, bundled), (HELD_OUT, held_out)) if found}


def _candidates(model: ModelFacts, cache: KvCacheFormat) -> list[dict[str, Any]]:
    """The remedies to try: flags, the linear layers in FP8, the KV cache's format, and the bytes they add."""
    architecture = model.architecture
    known = [name for name in exclude.linears(model.written, architecture) if name not in model.single]
    found: list[dict[str, Any]] = []
    if cache.quantized:
        found.append(
            {
                "flags": ["--kv-cache-dtype", "auto"],
                "modules": [],
                "format": BF16.name,
                "kv_cache_dtype": "auto",
                "nbytes": 0,
            }
        )
    if model.number_format.scales_inputs:  # norms hold scales that the BF16 model's weights must not be multiplied by
        return found
    parts, kept = names.parts(architecture), to_keep(model.number_format)
    for patterns in ([pattern.format(**parts) for pattern in row] for row in KEPT):
        if not all(fnmatch.filter(known, pattern) for pattern in patterns):
            continue
        members = {name for pattern in patterns for name in fnmatch.filter(known, pattern)}
        groups = exclude.groups(known, architecture)
        together = [group for group in groups.values() if members.intersection(group)]
        modules = [name for group in together for name in group]
        if len(modules) < len(known):
            flags = [word for pattern in patterns for word in (f"--keep-{kept.name}", pattern)]
            more = sum(_price(model, name, kept) for name in modules)
            found.append(
                {
                    "flags": flags,
                    "modules": modules,
                    "format": kept.name,
                    "kv_cache_dtype": cache.name,
                    "nbytes": more,
                }
            )
    if cache.quantized and len(found) > 1:  # the most that can be done
        flags = [*found[-1]["flags"], "--kv-cache-dtype", "auto"]
        found.append({**found[-1], "flags": flags, "kv_cache_dtype": "auto"})
    return found


def _price(model: ModelFacts, name: str, kept: NumberFormat) -> int:
    """Bytes that a layer in another format takes beyond those in the model's, without the scales that both have."""
    shape = model.written[f"{name}.weight"][1]
    return kept.own_bytes(shape) - model.number_format.own_bytes(shape)


def _measure(
    directory: Path, job: Mapping[str, Any], texts: Mapping[str, Sequence[Mapping[str, Any]]], store: Store
) -> dict[str, Any]:
    """Runs the worker and computes the figures from its column files, which are then deleted."""
    work = directory / "work"
    work.mkdir()
    sets = {}
    for name, rows in texts.items():
        sets[name] = str(work / f"{name}.jsonl")
        (work / f"{name}.jsonl").write_bytes(dump(rows))
    events, finished = process.run_job(
        workers.QUALITY,
        {**job, "sets": sets, "work": str(work)},
        log=store.log("quality"),
        bar=process.Bar(store.out, "quality: starting", "tokens"),
        env=modelopt.ENVIRONMENT,
    )
    summary: dict[str, Any] = events["summary"]
    if "unmeasured" in summary:
        shutil.rmtree(work)
        return summary
    bf16 = [read(work / "bf16" / name, None) for name in summary["texts"]]
    ours = [read(work / "quantized" / name, work / "bf16" / name) for name in summary["texts"]]
    figures = {name: measure(sums, resamples=RESAMPLES, seed=SEED) for name, sums in (("bf16", bf16), ("ours", ours))}
    shutil.rmtree(work)
    facts = {
        **summary,
        "figures": {name: asdict(one) for name, one in figures["ours"].items()},
        "bf16": {name: asdict(one) for name, one in figures["bf16"].items()},
    }
    (directory / "quality.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return {**facts, "seconds": round(finished.seconds, 3)}
