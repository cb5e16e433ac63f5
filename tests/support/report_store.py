"""A store with a repository to report on, made without quantizing or serving: only the snapshot is real.

The manifests have the facts and ingredients that the real stages write; figures are invented.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from builder.aiperf import objective
from builder.aiperf.measured import Measurement, Point
from builder.aiperf.workload import Load
from builder.aiperf.workload import Workload as AIPerfWorkload
from builder.core.output import Output
from builder.core.store import Artifact, Store
from builder.evaluate.tasks import Row
from builder.hub.snapshot import fetch
from builder.preflight import checks as preflight_checks
from builder.preflight.prepare import prepare
from builder.publish import build_record, links
from builder.recipe import schema
from builder.serving.benchmark import BenchmarkReport, Level, Percentiles, Workload
from builder.targets.base import Inputs

MODEL = "tests/data/tiny-qwen3"
SAMPLE = {"prompt": "Return the number of", "answer": " bytes written"}
KINDS = {
    "nvfp4_weights": 2_359_296,
    "block_scales": 294_912,
    "lm_head": 2_097_152,
    "embedding": 2_097_152,
    "other": 7424,
}
LAYOUT = {"tensors": 207, "decoder_layers": 6, "nvfp4_linears": 42, "bits_per_weight": 4.5, "nbytes": KINDS}


def build(
    root: Path,
    *,
    gpu: str = "sm120",
    model: str = MODEL,
    sample: Mapping[str, str] = SAMPLE,
    warnings: Mapping[str, int] | None = None,
    calibrated: Mapping[str, Any] | None = None,
    link: str = "",
    recorded: bool = True,
    smoke: bool = True,
) -> Path:
    """Adds a repository with its upstream artifacts, link and build record. Returns the link."""
    store = Store(root, Output("quiet"))
    resolved = schema.resolve({"model.id": model, "gpu": gpu, "engine.max_batch_size": 4})
    target = resolved.recipe.target
    snapshot = fetch(resolved.recipe.model, store=store)
    calibration = _stage(store, "calibration", {"samples": 64}, {"data": "builtin:python-docs", "rows": 64})
    layouts = {"unified": LAYOUT, "tensorrt_llm": LAYOUT}
    facts = {
        "warnings": dict(warnings or {}),
        **(calibrated or {}),
        "no_tensorrt_llm": None,
        "seconds": {"load": 0.1, "calibrate": 4.5},
        "max_rss": 814_452_736,
        "inspection": {"findings": [], "layouts": layouts},
    }
    made_from = {"snapshot": snapshot.digest, "calibration": calibration.digest}
    quantization = resolved.recipe.quantization.model_dump()
    versions = {"torch": "2.13.0", "nvidia-modelopt": "0.47.0"}
    ingredients = {**made_from, "quantization": quantization, "seq_len": 512, "libraries": versions}
    checkpoint = _stage(store, "checkpoint", ingredients, facts, "unified/model.safetensors", 6_877_752)
    flags = preflight_checks.check_model(Inputs(resolved, snapshot.config))
    engine = _stage(
        store,
        "engine",
        {"checkpoint": checkpoint.digest, "sm": resolved.gpu.sm, "flags": [[f.name, f.value] for f in flags]},
        {"command": ["trtllm-build", "--max_batch_size", "4"] if target == "engine" else None, "version": "1.2.1"},
    )
    part = resolved.recipe.repository.model_dump(mode="json")
    made_from = {"engine": engine.digest, "snapshot": snapshot.digest, "part": part}
    repository = _stage(store, "repository", made_from, {"target": target, "tensorrt_llm": "1.2.1"})
    if smoke:
        checks = [{"name": "HTTP infer", "passed": True, "detail": repr(sample["answer"]), "seconds": 0.2}]
        ingredients = {"repository": repository.digest, "libraries": {"tritonclient": "2.73.0"}}
        _stage(store, "smoke", ingredients, {"checks": checks, "sample": dict(sample), "passed": True})
    name = root / "models" / (link or f"{Path(model).name}-{gpu}-nvfp4")
    name.parent.mkdir(exist_ok=True)
    name.symlink_to(repository.path)
    if recorded:
        source = links.source_of(resolved.recipe.model)
        build_record.write(prepare(resolved, store), link=name, source=source, store=store)
    return name


def evaluate(link: Path, *, score: float = 98.7, limit: float | None = 98.0, data: str = "wikitext") -> None:
    """Adds an evaluation of the repository's checkpoint, as `builder eval` stores it."""
    root = link.resolve().parent.parent
    store = Store(root, Output("quiet"))
    found = {path.parent.parent.name: json.loads(path.read_text()) for path in root.glob("*/*/manifest.json")}
    scores = [
        _stage(store, "scores", {"of": [found[of]["digest"]], "runner": runner, "data": data, "score": score}, {})
        for runner, of in (("bf16", "snapshot"), ("checkpoint", "checkpoint"))
    ]
    ppl = {"value": 12.345, "low": 11.9, "high": 12.8}
    ours = {
        "ppl": {"value": 1234.5 / score, "low": 12.0, "high": 12.9},
        "score": {"value": score, "low": score - 0.6, "high": score + 0.5},
        "kl": {"value": 0.0213, "low": 0.0190, "high": 0.0241},
        "agreement": {"value": 0.934, "low": 0.921, "high": 0.945},
        "flips": {"value": 0.021, "low": 0.018, "high": 0.026},
    }
    sets = {data: {"texts": 40, "tokens": 12_345, "seconds": 3.2}}
    failed = [f"score of checkpoint on {data} is {score:.2f}, below {limit:g}"] if limit and score < limit else []
    told = {
        "measured": {
            "bf16": {data: {"ppl": ppl}, "overall": {"ppl": ppl}},
            "checkpoint": {data: ours, "overall": ours},
        },
        "sets": {"bf16": sets, "checkpoint": sets},
        "collapsed": {},
        "not_measured": {},
        "verdict": {"passed": not failed, "limits": {"score": limit}, "failed": failed} if limit else None,
    }
    ingredients = {"of": [one.digest for one in scores], "runners": ["bf16", "checkpoint"], "limit": limit}

    def make(directory: Path) -> Mapping[str, Any]:
        (directory / "evaluation.json").write_text(json.dumps(told))
        return {"verdict": told["verdict"]}

    store.stage("evaluation", ingredients, make)


def ask(link: Path, *, task: str = "gsm8k", value: float = 0.512) -> None:
    """Adds an evaluation of the repository's checkpoint by tasks, without texts."""
    root = link.resolve().parent.parent
    store = Store(root, Output("quiet"))
    found = {path.parent.parent.name: json.loads(path.read_text()) for path in root.glob("*/*/manifest.json")}
    answered = [
        _stage(store, "tasks", {"of": [found[of]["digest"]], "runner": runner, "task": task, "value": value}, {})
        for runner, of in (("bf16", "snapshot"), ("checkpoint", "checkpoint"))
    ]
    same = {"task": task, "metric": "exact_match (strict-match)", "documents": 1319, "fewshot": 5}
    rows = [
        Row(runner="bf16", value=0.531, stderr=0.0137, **same),
        Row(runner="checkpoint", value=value, stderr=0.0138, change=value - 0.531, flips=0.083, **same),
        Row(runner="checkpoint", **{**same, "metric": "brier_score"}, value=0.4, stderr=None),
    ]
    told = {"measured": {}, "sets": {}, "tasks": {"rows": [asdict(row) for row in rows]}}
    ingredients = {"of": [one.digest for one in answered], "runners": ["bf16", "checkpoint"]}

    def make(directory: Path) -> Mapping[str, Any]:
        (directory / "evaluation.json").write_text(json.dumps(told))
        return {"verdict": None, "texts": False, "tasks": len(rows)}

    store.stage("evaluation", ingredients, make)


def put_benchmark(link: Path, *, concurrency: tuple[int, ...] = (1, 16, 256)) -> None:
    """Adds a stored benchmark, as `builder load` does."""
    root = link.resolve().parent.parent
    manifest = json.loads((link.resolve() / "manifest.json").read_text())
    times = Percentiles(0.0123, 0.0456, 12.345)
    levels = tuple(Level(n, 31, n // 256, 1.5, 70.0 * n, times, times, times) for n in concurrency)
    report = BenchmarkReport(Workload(concurrency), levels)
    _stage(Store(root, Output("quiet")), "benchmark", {"repository": manifest["digest"]}, asdict(report))


def put_aiperf(link: Path, *, concurrency: tuple[int, ...] = (1, 16, 256)) -> None:
    """Adds what AIPerf measured, as `builder bench` does: a point per concurrency, one per rate, and a replay."""
    loads = [*(Load(concurrency=n) for n in concurrency), *(Load(rate=n / 2) for n in concurrency), Load()]
    points = tuple(
        Point(load, 31, 1, 12.5, 2.5 + n, 70.0 * n + 1, 512, 128, Percentiles(0.01 * n, 0.02 * n, 0.05 * n + 1),
              Percentiles(0.004, 0.005, 0.006 + n / 1000), Percentiles(1.0, 2.0, 3.0), 2.0 + n / 2, 0.75, "too many")
        for n, load in enumerate(loads)
    )  # fmt: skip
    workload = AIPerfWorkload(tuple(loads), 32, 512, 128, objective=objective.parse("ttft<=500ms,itl<=50ms"))
    manifest = json.loads((link.resolve() / "manifest.json").read_text())
    store = Store(link.resolve().parent.parent, Output("quiet"))
    facts = Measurement(workload.as_dict(), points, "0.13.0").as_dict()
    _stage(store, "aiperf", {"repository": manifest["digest"]}, facts)


def put_load(link: Path) -> None:
    """Adds the artifact that `builder load` stored before its stage was named "benchmark"."""
    times = {"p50": 0.1, "p90": 0.2, "p99": 0.3}
    levels = [
        {"clients": 3, "answered": 32, "failed": 0, "seconds": 1.5, "tokens_per_second": 20.0, "whole": times,
         "first": times, "token": times, "why": "", "shortest": 4, "longest": 5},
    ]  # fmt: skip
    facts = {"asked": {"clients": [3], "requests": 32, "input_tokens": 24, "output_tokens": 5}, "levels": levels}
    manifest = json.loads((link.resolve() / "manifest.json").read_text())
    store = Store(link.resolve().parent.parent, Output("quiet"))
    _stage(store, "load", {"repository": manifest["digest"]}, facts)


def _stage(
    store: Store,
    stage: str,
    ingredients: Mapping[str, Any],
    facts: Mapping[str, Any],
    name: str = "file",
    size: int = 0,
) -> Artifact:
    def make(directory: Path) -> Mapping[str, Any]:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(f"stands in for {stage} {json.dumps(ingredients)}" + " " * size)
        return facts

    return store.stage(stage, ingredients, make)
