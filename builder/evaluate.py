"""Snapshot, Checkpoint, Repository -> Evaluation: what quantization cost, measured on each of its forms.

Every runner scores the same tokens, in a process of its own, so that memory comes back; BF16 goes first and keeps the
likeliest tokens of each position, which the others are compared with. Each data set of each runner is a stage of the
store: what was finished is never measured again. Nothing heavy is imported here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from builder import evaluation_data, gate, metrics, process
from builder.calibrate import Calibration
from builder.checkpoint import Checkpoint
from builder.errors import EvaluationError, NotMeasurable, UsageError
from builder.evaluation_data import Texts
from builder.fetch import Snapshot
from builder.gate import OVERALL, Verdict
from builder.metrics import Estimate
from builder.output import Output, seconds
from builder.quantize import modelopt
from builder.recipe import Resolved
from builder.recipe_evaluation import RUNNERS
from builder.repository import Repository
from builder.runners.language import knows
from builder.store import Artefact, Store, key_of, library_versions, sources_digest

SOURCES = (
    "builder/runners",
    "builder/evaluation_data.py",
    "builder/calibrate.py",
    "builder/client.py",
    "builder/serve.py",
    "builder/guards.py",
    "builder/reference",
    "builder/nvfp4.py",
    "builder/ranks.py",
    "builder/quantize",
    "builder/checkpoint.py",
    "builder/inspection.py",
    "builder/model_directory.py",
    "builder/safetensors_io.py",
    "builder/tensor_numbers.py",
)
TABLE_SOURCES = ("builder/evaluate.py", "builder/metrics.py", "builder/gate.py")
LIBRARIES = (*modelopt.LIBRARIES, "tritonclient", "nvidia-pytriton")
KV_AUTO = "checkpoint, KV auto"  # the row of evaluation.compare_kv


@dataclass(frozen=True)
class Models:
    """What there is to measure; a part that no runner of the recipe needs may be None."""

    snapshot: Snapshot
    calibration: Calibration | None = None
    checkpoint: Checkpoint | None = None
    repository: Repository | None = None


@dataclass(frozen=True)
class Evaluation:
    """`measured`: runner -> data set, or of several "overall" -> metric; `sets`: runner -> data set -> counts, seconds.

    `collapsed`: runner -> data sets on which it finds shuffled tokens as likely as text; `not_measured`: runner -> why.
    """

    measured: Mapping[str, Mapping[str, Mapping[str, Estimate]]]
    sets: Mapping[str, Mapping[str, Mapping[str, Any]]]
    collapsed: Mapping[str, Sequence[str]]
    not_measured: Mapping[str, str]
    verdict: Verdict | None = None
    path: Path = Path()

    def as_dict(self) -> dict[str, Any]:
        """For JSON. A figure that is no number is None there."""
        figures = {
            runner: {
                name: {metric: _plain(estimate) for metric, estimate in found.items()} for name, found in sets.items()
            }
            for runner, sets in self.measured.items()
        }
        verdict = {"passed": self.verdict.passed, **asdict(self.verdict)} if self.verdict else None
        rest = {"sets": self.sets, "collapsed": self.collapsed, "not_measured": self.not_measured}
        return {"measured": figures, **rest, "verdict": verdict}

    def check(self) -> None:
        """EvaluationError where the gate failed, NotMeasurable where none but BF16 could be measured."""
        if self.verdict:
            self.verdict.check(str(self.path / "evaluation.json"))
        if self.not_measured and not set(self.measured) - {"bf16"}:
            runner, why = next(iter(self.not_measured.items()))
            raise NotMeasurable(f"{runner} can't be measured.", why=why)


def evaluate(models: Models, resolved: Resolved, *, store: Store) -> Evaluation:
    """Measures every runner of the recipe on every data set, and judges by the gate, if there is one.

    IntegrityError if model and tokenizer don't belong together, EvaluationError if the gate needs what could not be
    measured. A gate that failed is told by the verdict; `check` raises it.
    """
    part = resolved.recipe.evaluation
    texts = evaluation_data.read_texts(part, store=store)
    scores: dict[str, list[Artefact]] = {}
    not_measured: dict[str, str] = {}
    for runner in _runners(resolved):
        try:
            scores[runner.label] = _score(runner, models, texts, scores.get("bf16"), resolved, store)
        except NotMeasurable as error:
            not_measured[runner.label] = str(error)
    found = _tables(scores, texts, part.resamples, part.seed, not_measured)
    return _judged(found, scores, resolved, store)


@dataclass(frozen=True)
class _Runner:
    """`label` names its row; `name` is what opens it; `fp8_kv` whether the cache is quantized."""

    label: str
    name: str
    fp8_kv: bool


def _runners(resolved: Resolved) -> list[_Runner]:
    """In the order of RUNNERS: BF16 first."""
    part, fp8 = resolved.recipe.evaluation, resolved.recipe.quantization.kv_cache_dtype == "fp8"
    found = [_Runner(name, name, fp8) for name in RUNNERS if name in part.runners]
    if part.compare_kv and not fp8:
        raise UsageError(
            "There is no FP8 KV cache to compare: the recipe leaves it in the model's own type.",
            cure="Compare with --kv-cache-dtype fp8",
        )
    if part.compare_kv:
        fp8_rows = [] if "checkpoint" in part.runners else [_Runner("checkpoint", "checkpoint", True)]
        found += [*fp8_rows, _Runner(KV_AUTO, "checkpoint", False)]
    return found


def _score(
    runner: _Runner,
    models: Models,
    texts: Sequence[Texts],
    reference: Sequence[Artefact] | None,
    resolved: Resolved,
    store: Store,
) -> list[Artefact]:
    """The scores of each data set, from the store or by a child process."""
    job, of = _job(runner, models, resolved, store)
    part = resolved.recipe.evaluation
    common = {
        "of": of,
        "runner": runner.name,
        "tokenizer": models.snapshot.digest,
        **{key: job[key] for key in ("lengths", "dtype", "seed", "batch_tokens", "fp8_kv", "trust_remote_code")},
        "kept": job.get("calibration", {}).get("kept", []),
        "top": part.top if runner.name == "bf16" else None,
        "libraries": library_versions(*LIBRARIES),
        "sources": sources_digest(*SOURCES),
        "gpus": modelopt.gpus(),
    }
    theirs: Sequence[Artefact | None] = reference or [None] * len(texts)
    sets = []
    for one, bf16 in zip(texts, theirs, strict=True):
        ingredients = {**common, "texts": one.digest, "reference": bf16.digest if bf16 else None}
        sets.append(
            {
                "name": one.name,
                "rows": str(one.path),
                "reference": str(bf16.path) if bf16 else None,
                "ingredients": ingredients,
            }
        )

    def stored(one: Mapping[str, Any]) -> Artefact | None:
        return store.find("scores", key_of("scores", one["ingredients"]))

    missing = [one for one in sets if stored(one) is None]
    kept = f", {len(sets) - len(missing)} found in the store" if len(missing) < len(sets) else ""
    store.out.stage("evaluate", f"{runner.label} on {len(sets)} data sets{kept}")
    if missing:
        _run({**job, "sets": missing}, store)
    return [artefact for artefact in map(stored, sets) if artefact]


def _job(runner: _Runner, models: Models, resolved: Resolved, store: Store) -> tuple[dict[str, Any], list[str]]:
    """What the child is told, and the digests of the artefacts that it measures."""
    recipe = resolved.recipe
    part = recipe.evaluation
    positions = int(models.snapshot.config.get("max_position_embeddings") or recipe.engine.max_seq_len)
    job: dict[str, Any] = {
        "runner": runner.name,
        "label": runner.label,
        "fp8_kv": runner.fp8_kv,
        "model": str(models.snapshot.path.absolute()),
        "trust_remote_code": recipe.model.trust_remote_code,
        "root": str(store.root),
        "lengths": {
            "min_tokens": part.min_tokens,
            "max_tokens": evaluation_data.longest(part, positions, recipe.engine),
        },
        **{key: getattr(part, key) for key in ("dtype", "seed", "batch_tokens", "top")},
    }
    if runner.name == "bf16":
        return job, [models.snapshot.digest]
    if runner.name == "simulated":
        assert models.calibration is not None
        assert models.checkpoint is not None
        rows = {"rows": str(models.calibration.path.absolute()), "kept": models.checkpoint.facts["kept"]}
        rows |= {key: getattr(recipe.calibration, key) for key in ("seq_len", "batch_size")}
        return {**job, "calibration": rows}, [models.snapshot.digest, models.calibration.digest]
    if runner.name == "served":
        return {**job, **_served(models.repository, store)}, [models.repository.digest if models.repository else ""]
    assert models.checkpoint is not None
    if runner.name == "reference" and not models.checkpoint.tensorrt_llm.is_dir():
        raise NotMeasurable("The checkpoint has no TensorRT-LLM layout, which the reference executor reads.")
    layouts = {"unified": str(models.checkpoint.unified), "tensorrt_llm": str(models.checkpoint.tensorrt_llm)}
    return {**job, **layouts}, [models.checkpoint.digest]


def _served(repository: Repository | None, store: Store) -> dict[str, Any]:
    assert repository is not None
    gathers = True  # by the llmapi target, for each request that asks
    if repository.facts["target"] != "llmapi":
        engine = json.loads((Path(repository.facts["engine"]) / "config.json").read_text(encoding="utf-8"))
        gathers = bool(engine.get("build_config", {}).get("gather_context_logits"))
    return {
        "models": str(repository.models.absolute()),
        "facts": dict(repository.facts),
        "gathers": gathers,
        "server_log": str(store.log("triton")),
        "timeout": 600.0,
    }


def _run(job: Mapping[str, Any], store: Store) -> None:
    """The child, which publishes what it measures."""
    process.run_job(
        "builder.runners.child",
        job,
        log=store.log(f"evaluate-{job['runner']}"),
        out=store.out,
        label=f"{job['label']}: starting",
        unit="tokens",
        env=modelopt.ENVIRONMENT,
    )


def _tables(
    scores: Mapping[str, Sequence[Artefact]],
    texts: Sequence[Texts],
    resamples: int,
    seed: int,
    not_measured: Mapping[str, str],
) -> Evaluation:
    measured: dict[str, dict[str, dict[str, Estimate]]] = {}
    for label, artefacts in scores.items():
        theirs: Sequence[Artefact | None] = [None] * len(texts)
        if "bf16" in scores and label != "bf16":
            theirs = scores["bf16"]
        sums = [metrics.read(a.path, t.path if t else None) for a, t in zip(artefacts, theirs, strict=True)]
        rows = {
            one.name: metrics.measure([s], resamples=resamples, seed=seed + n)
            for n, (one, s) in enumerate(zip(texts, sums, strict=True))
        }
        overall = {OVERALL: metrics.measure(sums, resamples=resamples, seed=seed)} if len(sums) > 1 else {}
        measured[label] = {**rows, **overall}
    named = {
        label: {one.name: dict(a.facts) for one, a in zip(texts, found, strict=True)} for label, found in scores.items()
    }
    collapsed = {
        label: [name for name, facts in sets.items() if not knows(facts)]
        for label, sets in named.items()
        if not all(map(knows, sets.values()))
    }
    return Evaluation(measured, named, collapsed, not_measured)


def _judged(
    found: Evaluation, scores: Mapping[str, Sequence[Artefact]], resolved: Resolved, store: Store
) -> Evaluation:
    """With its verdict, kept in the store. What the gate can't judge is an error after the tables are kept."""
    part = resolved.recipe.evaluation
    unjudged: EvaluationError | None = None
    try:
        verdict = gate.judge(part, found.measured, found.collapsed, found.not_measured)
    except EvaluationError as error:
        verdict, unjudged = None, error
    whole = replace(found, verdict=verdict)
    ingredients = {
        "of": [artefact.digest for artefacts in scores.values() for artefact in artefacts],
        "runners": list(scores),
        "not_measured": found.not_measured,
        "limits": part.limits,
        "resamples": part.resamples,
        "seed": part.seed,
        "sources": sources_digest(*TABLE_SOURCES),
    }

    def make(directory: Path) -> dict[str, Any]:
        told = whole.as_dict()
        (directory / "evaluation.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
        return {"verdict": told["verdict"], "not_measured": told["not_measured"], "collapsed": told["collapsed"]}

    artefact = store.stage("evaluation", ingredients, make)
    if unjudged:
        raise unjudged
    return replace(whole, path=artefact.path)


def _plain(estimate: Estimate) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in asdict(estimate).items()}


COLUMNS = ["", "data", "PPL", "score", "KL to BF16", "same top token", "flips"]


def show(found: Evaluation, out: Output) -> None:
    """Tables for people; with --json one object."""
    show_tables(found, out)
    out.result(found.as_dict() | {"path": str(found.path)})


def show_tables(found: Evaluation, out: Output) -> None:
    """What was scored, then the figures of every runner on every data set, then the gate's verdict."""
    first = next(iter(found.sets.values()), {})
    rows = [
        (name, *(facts[key] for key in ("texts", "dropped", "cut", "tokens")), _times(found, name))
        for name, facts in first.items()
    ]
    out.table("scored", ["data", "texts", "too short", "cut", "tokens", "time"], rows)
    out.table("what quantization cost (95 % intervals)", COLUMNS, _rows(found))
    if found.verdict:
        asked = ", ".join(f"{metric} {limit:g}" for metric, limit in found.verdict.limits.items())
        out.text(f"gate       {asked}: {'passed' if found.verdict.passed else 'FAILED'}")
        for text in found.verdict.failed:
            out.text(f"           {text}")


def _rows(found: Evaluation) -> list[tuple[str, ...]]:
    rows = []
    for runner, sets in found.measured.items():
        for name, figures in sets.items():
            told = [str(figures[metric]) if metric in figures else "-" for metric in ("ppl", "score", "kl")]
            told += [_percent(figures.get(metric)) for metric in ("agreement", "flips")]
            mark = " (collapsed)" if name in found.collapsed.get(runner, ()) else ""
            rows.append((runner + mark, name, *told))
    rows += [(runner, "", "not measurable: " + why.splitlines()[0]) for runner, why in found.not_measured.items()]
    return [(*row, *[""] * (len(COLUMNS) - len(row))) for row in rows]


def _percent(estimate: Estimate | None) -> str:
    return f"{100 * estimate.value:.2f} %" if estimate else "-"


def _times(found: Evaluation, name: str) -> str:
    return ", ".join(f"{runner} {seconds(sets[name]['seconds'])}" for runner, sets in found.sets.items())
