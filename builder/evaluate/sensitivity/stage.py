"""Snapshot, Calibration -> Sensitivity: the loss of each linear layer, and which to exclude for a KL budget.

The unit is a group of layers that a server multiplies as one: q, k and v; gate and up; the output projection; down.
A worker process (worker.py) measures everything against BF16, on the recipe's texts.

Why not ModelOpt's AutoQuantize (0.47.0, quantization/algorithms.py): it optimizes for a size (`effective_bits`), not
for a loss, and never measures the mixture that it selects. Its gradient method needs gradients of all weights. Its KL
method is this measurement with a threshold that ignores bytes; it also searches lm_head and loses all results if
interrupted.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.architectures import catalog, names
from builder.calibration.rows import Calibration, Use, calibrate
from builder.core import process, workers
from builder.core.errors import UsageError
from builder.core.output import Output, size
from builder.core.partial_results import PartialResults
from builder.core.store import Store, key_of, library_versions, replace_file, sources_digest
from builder.formats import algorithms
from builder.formats.algorithms import Algorithm
from builder.hub.snapshot import Snapshot
from builder.model.dtypes import written_bytes
from builder.model.hashed_files import SourceFiles
from builder.model.source_tensors import open_tensors
from builder.quantize import exclude, modelopt
from builder.recipe.evaluation import DataSet
from builder.recipe.schema import Calibration as Rows
from builder.recipe.schema import Recipe

SOURCES = (
    "builder/evaluate/sensitivity/stage.py",
    "builder/evaluate/sensitivity/worker.py",
    "builder/evaluate/sensitivity/results.py",
    "builder/evaluate/sensitivity/weight_error.py",
    "builder/evaluate/sensitivity/searched_weights.py",
    "builder/quantize/exclude.py",
    "builder/evaluate/datasets.py",
    "builder/evaluate/runners/worker.py",
    "builder/evaluate/runners/language.py",
    "builder/evaluate/runners/layered.py",
    "builder/evaluate/runners/local.py",
    "builder/evaluate/runners/scoring.py",
    "builder/quantize/simulation.py",
    "builder/quantize/stored_model.py",
    "builder/quantize/expert_inputs.py",
    "builder/model/dense.py",
    "builder/model/rope.py",
    "builder/model/streamed.py",
    "builder/model/joined_experts.py",
    "builder/model/streamed_embedding.py",
    "builder/model/streamed_weights.py",
    *modelopt.SOURCES,
)
if TYPE_CHECKING:
    from builder.preflight.model_facts import ModelFacts

USE = Use("texts", "--sensitivity-data", "--set sensitivity.data='{{data: ID, {key}: {value}}}'")
WHOLE, KV_CACHE = "whole model", "KV cache"  # as worker.py names them


@dataclass(frozen=True)
class Loss:
    """The loss of one group of layers: quantized alone, with everything else in BF16. None: not measured.

    kl: KL divergence from BF16 at the output, nats per token. agreement: share of positions with the same top token.
    weight_error, output_error: ||y - quantized y|| / ||y|| of the weights, and of the decoder layer's output.
    proxy: the output error, or the weight error if that was not measured.
    bytes: what keeping the group in BF16 adds to the TensorRT-LLM layout.
    """

    name: str
    layer: str
    kl: float | None
    agreement: float | None
    proxy: float
    weight_error: float
    output_error: float | None
    bytes: int


@dataclass(frozen=True)
class Sensitivity:
    """`losses` in layer order. `whole`, `kv_cache`: KL with everything quantized, and with only the KV cache.

    `correlation`: Spearman's rank correlation of each proxy with the KL. `rounded_by`: the algorithm.
    """

    losses: tuple[Loss, ...]
    whole: float | None
    kv_cache: float | None
    tokens: int
    correlation: Mapping[str, float]
    path: Path
    digest: str
    rounded_by: str = algorithms.MAX.name

    @property
    def worst(self) -> list[Loss]:
        """The losses, largest first."""
        return sorted(self.losses, key=lambda loss: -(loss.proxy if loss.kl is None else loss.kl))


def sensitivity(
    snapshot: Snapshot,
    calibration: Calibration,
    model: ModelFacts,
    recipe: Recipe,
    *,
    store: Store,
    proxy: bool = False,
) -> Sensitivity:
    """Measures each group alone; an interrupted run resumes. UsageError if the recipe names no texts.

    proxy: measure output errors only, in one pass over the texts that runs each decoder layer once more per group.
    """
    job, ingredients = _job(snapshot, calibration, model, recipe, store)
    return _sensitivity(job, ingredients, model, store, proxy)


def _sensitivity(
    job: Mapping[str, Any], ingredients: Mapping[str, Any], model: ModelFacts, store: Store, proxy: bool = False
) -> Sensitivity:
    stage = "proxy" if proxy else "sensitivity"
    partial = PartialResults(store, stage, key_of(stage, ingredients))

    def make(tmp: Path) -> dict[str, Any]:
        partial.begin()
        results = str(partial.path.with_suffix(".jsonl"))
        summary = _run({**job, "proxy": proxy, "results": results, "scratch": str(tmp)}, model, store)
        rows = [asdict(loss) for loss in _losses(model, job["groups"], summary)]
        whole, cache = (summary["results"].get(name, {}).get("kl") for name in (WHOLE, KV_CACHE))
        facts = {"layers": rows, "whole": whole, "kv_cache": cache, "tokens": summary["tokens"]}
        facts["correlation"] = {} if proxy else _correlation(rows)
        (tmp / "sensitivity.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        return facts

    artifact = store.stage(stage, ingredients, make)
    partial.end()
    facts = artifact.facts
    return Sensitivity(
        losses=tuple(Loss(**row) for row in facts["layers"]),
        **{name: facts[name] for name in ("whole", "kv_cache", "tokens", "correlation")},
        path=artifact.path / "sensitivity.json",
        digest=artifact.digest,
        rounded_by=job["algorithm"],
    )


@dataclass(frozen=True)
class Selection:
    """The modules that `auto` keeps in BF16 or FP8, the KL of the model with them, and the KL without them."""

    modules: tuple[str, ...]
    kl: float
    kl_before: float


def select(
    snapshot: Snapshot,
    calibration: Calibration,
    model: ModelFacts,
    recipe: Recipe,
    *,
    store: Store,
    refused: str = "",
) -> Selection:
    """Selects the layers to keep: largest KL per byte first, as few as needed to meet the recipe's KL budget.

    Each candidate mixture is measured, because the KLs of single groups do not add up. `model.layers` stay as they are.
    refused: why attention output projections can't be kept, "" if they can. UnsupportedError if that is not enough.
    """
    job, ingredients = _job(snapshot, calibration, model, recipe, store)
    found = _sensitivity(job, ingredients, model, store)
    order = [loss.name for loss in sorted(found.losses, key=lambda loss: -(loss.kl or 0.0) / loss.bytes)]
    order = [group for group in order if not (refused and names.role(model.architecture, group) == "o")]
    order = order[: len(job["groups"]) - 1]  # one must be left to quantize
    budget, kept_format = recipe.quantization.kept_budget, recipe.quantization.kept_format
    job |= {"budget": budget, "order": order, "kept_format": kept_format, "rest": _why_not_less(found, refused)}
    ingredients |= {"sensitivity": found.digest, "budget": budget, "order": order, "kept_format": kept_format}
    partial = PartialResults(store, "selection", key_of("selection", ingredients))

    def make(tmp: Path) -> dict[str, Any]:
        partial.begin()
        results = partial.path.with_suffix(".jsonl")
        if not results.exists():
            known = {"name": WHOLE, "kl": found.whole, "agreement": 0.0}
            errors = {loss.name: loss.output_error for loss in found.losses}
            lines = [known, {"output_errors": errors, "tokens": found.tokens}]
            replace_file(results, "".join(json.dumps(line) + "\n" for line in lines))
        summary = _run({**job, "results": str(results), "scratch": str(tmp)}, model, store)
        modules = [module for group in summary["kept"] for module in job["groups"][group]]
        kept = f"{len(modules)} linear layers in {kept_format.upper()}"
        store.out.info(f"KL {summary['kl_before']:.3g} -> {summary['kl']:.3g} with {kept}")
        return {"modules": modules, **summary}

    facts = store.stage("selection", ingredients, make).facts
    partial.end()
    return Selection(tuple(facts["modules"]), facts["kl"], facts["kl_before"])


def _why_not_less(found: Sensitivity, refused: str) -> str:
    cache = f"The quantized KV cache alone costs {found.kv_cache:.3g}. " if found.kv_cache is not None else ""
    return cache + (f"Output projections can't be kept: {refused}." if refused else "")


def weight_errors(
    snapshot: Snapshot, model: ModelFacts, store: Store, algorithm: Algorithm = algorithms.MAX
) -> Sensitivity:
    """The errors of the weights alone, computed from the files tensor by tensor. The result is not stored."""
    from builder.evaluate.sensitivity import weight_error

    groups = _groups(model)
    with store.out.progress("weight errors", unit="layers") as bar:
        found = weight_error.weight_errors(
            open_tensors(snapshot.path), groups, model.number_format, algorithm, bar.update
        )
    snapshot.source.check_unchanged()
    losses = _losses(model, groups, {"results": {}, "weight_errors": found, "output_errors": {}})
    return Sensitivity(tuple(losses), None, None, 0, {}, Path(), "", algorithm.name)


def _job(
    snapshot: Snapshot, calibration: Calibration, model: ModelFacts, recipe: Recipe, store: Store
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The job of the worker, and the ingredients of the stage's key."""
    part, evaluation, rows = recipe.sensitivity, recipe.evaluation, recipe.calibration
    data = check_texts(recipe)
    texts = calibrate(Rows(**data.model_dump(), samples=part.texts), store=store, use=USE)
    longest = min(part.max_tokens, int(model.config.get("max_position_embeddings") or part.max_tokens))
    job: dict[str, Any] = {
        "lengths": {"min_tokens": evaluation.min_tokens, "max_tokens": longest},
        "groups": {name: list(modules) for name, modules in _groups(model).items()},
        "format": model.number_format.name,
        "algorithm": algorithm_of(recipe, model).name,
        "layers": {name: list(modules) for name, modules in model.layers.items()},
        "kv_cache_dtype": recipe.quantization.kv_cache_dtype,
        "trust_remote_code": recipe.model.trust_remote_code,
        **{key: getattr(evaluation, key) for key in ("dtype", "batch_tokens", "top")},
        "calibration": {"seq_len": rows.seq_len, "batch_size": rows.batch_size},
        "budget": None,
        "proxy": False,
    }
    ingredients = {
        "of": [snapshot.digest, calibration.digest],
        "texts": texts.digest,
        "architecture": catalog.ingredients(model.architecture),
        **job,
        "libraries": library_versions(*modelopt.LIBRARIES),
        "sources": sources_digest(*SOURCES),
        "gpus": modelopt.calibrating(),
        "environment": modelopt.numerics(),
    }
    paths = {
        **snapshot.source.as_job(),
        "texts": str(texts.path.absolute()),
        "calibration": {**job["calibration"], "rows": str(calibration.path.absolute())},
    }
    return {**job, **paths, "gpus": ingredients["gpus"]}, ingredients


def check_texts(recipe: Recipe) -> DataSet:
    """The recipe's texts. UsageError if it names none."""
    if recipe.sensitivity.data is None:
        raise UsageError(
            "The recipe names no texts to measure the loss of each layer on.",
            why="The selection of layers is fitted to these texts, so they are yours to choose.",
            hint="--sensitivity-data FILE.jsonl or a Hub dataset, with other texts than --data; or --proxy for the "
            "errors of the weights alone",
        )
    return recipe.sensitivity.data


def algorithm_of(recipe: Recipe, model: ModelFacts) -> Algorithm:
    """The algorithm that rounds layers while they are measured: the recipe's, or one that does without its rows."""
    asked = algorithms.ALGORITHMS[recipe.quantization.algorithm]
    return algorithms.fallback(model.number_format) if asked is not algorithms.MAX else asked


def _rounding_note(used: str, asked: str) -> str:
    """How layers were rounded, where the recipe names another algorithm than `max`; ""."""
    if asked == algorithms.MAX.name:
        return ""
    return f"by {used}" if asked == used else f"by {used}, not by {asked}: with {asked} layers lose less than this"


def _groups(model: ModelFacts) -> dict[str, tuple[str, ...]]:
    """The groups of layers that no pattern keeps."""
    known = exclude.linears(model.written, model.architecture)
    return exclude.groups((name for name in known if name not in model.single), model.architecture)


def _losses(model: ModelFacts, groups: Mapping[str, Sequence[str]], summary: Mapping[str, Any]) -> list[Loss]:
    found = []
    for name, modules in groups.items():
        measured, output = summary["results"].get(name, {}), summary["output_errors"].get(name)
        tensors = [model.written[f"{module}.weight"] for module in modules]
        number_format, architecture = model.number_format, model.architecture
        served = {names.engine_layer(architecture, one): model.written[f"{one}.weight"][1] for one in modules}
        scalars = sum(number_format.shared_bytes(shape) for shape in served.values())
        found.append(
            Loss(
                name=name,
                layer=name.removeprefix("model."),
                kl=measured.get("kl"),
                agreement=measured.get("agreement"),
                proxy=summary["weight_errors"][name] if output is None else output,
                weight_error=summary["weight_errors"][name],
                output_error=output,
                bytes=sum(written_bytes(dtype, shape) - number_format.own_bytes(shape) for dtype, shape in tensors)
                - scalars,
            )
        )
    return found


def _correlation(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {
        proxy: spearman([row[proxy] for row in rows], [row["kl"] for row in rows])
        for proxy in ("weight_error", "output_error")
        if all(row[proxy] is not None for row in rows)
    }


def spearman(x: Sequence[float], y: Sequence[float]) -> float:
    """Spearman's rank correlation, -1 to 1; 0 if one side is constant. Ties get the mean of their ranks."""
    import numpy as np

    def ranks(values: Sequence[float]) -> Any:
        _, which, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[which]

    a, b = ranks(x), ranks(y)
    return float(np.corrcoef(a, b)[0, 1]) if np.ptp(a) and np.ptp(b) else 0.0


def _run(job: Mapping[str, Any], model: ModelFacts, store: Store) -> dict[str, Any]:
    """Runs the worker and returns its summary."""
    modelopt.check(open_tensors(Path(job["model"])), model.architecture, job["layers"], model.number_format)
    log = store.log("sensitivity")
    with SourceFiles.of_job(job).explain_failures():
        events, _ = process.run_job(
            workers.SENSITIVITY,
            job,
            log=log,
            bar=process.Bar(store.out, "starting ModelOpt"),
            env=modelopt.ENVIRONMENT,
        )
    summary: dict[str, Any] = events["summary"]
    return summary


def show(found: Sensitivity, command: Sequence[str], out: Output, algorithm: str = algorithms.MAX.name) -> None:
    """Prints the losses, largest first, the loss of the whole model, and the next command.

    command: the words of the command that quantizes with the same recipe. algorithm: the recipe's.
    """
    columns = ["layer", "KL", "same token", "output error", "weight error", "bytes to keep"]
    rows = [
        (
            loss.name,
            "-" if loss.kl is None else f"{loss.kl:.2e}",
            "-" if loss.agreement is None else f"{100 * loss.agreement:.1f} %",
            "-" if loss.output_error is None else f"{loss.output_error:.4f}",
            f"{loss.weight_error:.4f}",
            size(loss.bytes),
        )
        for loss in found.worst
    ]
    out.table("loss by layer, quantized alone", columns, rows)
    if note := _rounding_note(found.rounded_by, algorithm):
        out.text(f"rounded    {note}")
    if found.whole is not None:
        cache = "" if found.kv_cache is None else f", {found.kv_cache:.2e} with only the KV cache quantized"
        out.text(f"whole      KL {found.whole:.3g} nats a token over {found.tokens:,} tokens{cache}")
        ranks = ", ".join(f"{name} {value:.2f}" for name, value in found.correlation.items())
        out.text(f"proxies    rank correlation with the KL: {ranks.replace('_', ' ')}")
        out.text(f"kept       {found.path}")
        out.text(f"next       {shlex.join([*command, '--keep-bf16', f'auto:{found.whole / 2:.2g}'])}")
    facts = {name: getattr(found, name) for name in ("whole", "kv_cache", "tokens", "correlation")}
    out.result(
        {
            "layers": [asdict(loss) for loss in found.losses],
            **facts,
            "path": str(found.path),
            "rounded_by": found.rounded_by,
        }
    )
