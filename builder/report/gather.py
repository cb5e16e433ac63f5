"""Gathers everything that a report shows about a finished repository, from manifests and the build record."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.aiperf import measured
from builder.aiperf.measured import Measurement
from builder.calibration import coverage
from builder.core.errors import UsageError
from builder.core.store import STAGES, Artifact, artifacts, read, root_of, tests_of, upstream
from builder.evaluate.parts.figures import Losses
from builder.evaluate.tasks import Row
from builder.formats import algorithms, kv_cache, registry
from builder.publish import build_record as records
from builder.publish import verdict
from builder.quality import check as qualities
from builder.quality.check import Quality
from builder.recipe.target_facts import TARGETS
from builder.report import results
from builder.report.results import Evaluation, Loss
from builder.report.verdict import ReportVerdict, judge
from builder.serving.benchmark import OLD_STAGE, STAGE, BenchmarkReport
from builder.serving.smoke import SmokeReport
from builder.triton.repository import open_repository

REFERENCE = (
    "It was not run on a GPU: the reference executor served it on a CPU. That validates the checkpoint, and says "
    "nothing about speed, GPU memory or the kernels of a TensorRT engine."
)


@dataclass(frozen=True)
class Stage:
    """A stage upstream of the repository: how many seconds it took when it ran, in total and, if recorded, by part."""

    name: str
    key: str
    seconds: float
    parts: Mapping[str, float]


@dataclass(frozen=True)
class Model:
    """Which model was built for which GPU, and what serves it. `built`: seconds since 1970."""

    name: str
    id: str
    revision: str | None
    gpu: str
    gpu_title: str
    target: str
    format: str
    built: float
    repository: str  # the key of its directory

    @property
    def server(self) -> str:
        """A description of what serves it."""
        return TARGETS[self.target].server if self.target in TARGETS else self.target


@dataclass(frozen=True)
class Size:
    """Sizes on disk and in memory, in bytes.

    `disk`: (label, bytes) of each stage. `contents`: {checkpoint layout: {kind of tensor: bytes}}. `weights`: bytes of
    the safetensors files before and after quantization. `memory`: the estimate for each GPU (preflight.memory.Memory as
    a dict). `peaks`: (stage, bytes) of measured host memory.
    """

    parameters: int | None
    disk: Sequence[tuple[str, int]]
    contents: Mapping[str, Mapping[str, int]]
    bits_per_weight: float | None
    weights: tuple[int, int] | None
    memory: Sequence[Mapping[str, Any]]
    peaks: Sequence[tuple[str, int]]


@dataclass(frozen=True)
class Report:
    """Everything that the page and the model card show. If a value is empty or None, its section is left out."""

    model: Model
    verdict: ReportVerdict
    values: Sequence[tuple[str, Any, str]]  # of the recipe: key, value, origin
    flags: Sequence[Mapping[str, Any]]  # of trtllm-build: name, value, and if recorded, reason and source
    versions: Mapping[str, str]
    stages: Sequence[Stage]
    size: Size
    quality: Quality | None
    evaluation: Evaluation | None
    tasks: Sequence[Row]
    losses: Sequence[Loss]
    parts: Losses | None
    smoke: SmokeReport | None
    benchmark: BenchmarkReport | None
    load: Measurement | None  # by AIPerf
    calibration: str  # what calibration saw (calibration.coverage.summary)
    warnings: Sequence[str]
    unmeasured: Sequence[str]
    command: str | None  # the build command
    directory: str | None  # its working directory, if the command contains a relative path
    engine_command: str | None  # the trtllm-build command


@dataclass(frozen=True)
class _Found:
    """The sources of a report: the upstream artifacts by stage, the measurements, and the build record."""

    path: Path
    repository: Artifact
    chain: Mapping[str, Artifact]
    smoke: Artifact | None
    benchmark: Artifact | None
    load: Artifact | None
    quality: Quality | None
    judged: verdict.BuildVerdict | None  # by the build
    evaluation: Evaluation | None
    tasks: Sequence[Row]
    losses: Sequence[Loss]
    parts: Losses | None
    record: Mapping[str, Any]

    def facts(self, stage: str) -> Mapping[str, Any]:
        return self.chain[stage].facts if stage in self.chain else {}

    def ingredients(self, stage: str) -> Mapping[str, Any]:
        return self.chain[stage].manifest["ingredients"] if stage in self.chain else {}


def gather(path: Path) -> Report:
    """Gathers the report of a repository, given its directory or a link to it. UsageError if it is not one."""
    found = _find(path)
    smoke = SmokeReport.from_dict(found.smoke.facts) if found.smoke else None
    target = str(found.repository.facts["target"])
    command = found.record.get("command")
    engine_command = found.facts("engine").get("command")
    return Report(
        model=_model(found),
        verdict=judge(smoke, found.evaluation, target, found.tasks, quality=found.quality, judged=found.judged),
        values=_values(found),
        flags=found.record.get("flags") or [dict(zip(("name", "value"), flag, strict=True)) for flag in _flags(found)],
        versions=_versions(found),
        stages=_stages(found),
        quality=found.quality,
        size=_size(found),
        evaluation=found.evaluation,
        tasks=found.tasks,
        losses=found.losses,
        parts=found.parts,
        smoke=smoke,
        benchmark=BenchmarkReport.from_dict(found.benchmark.facts) if found.benchmark else None,
        load=Measurement.from_dict(found.load.facts) if found.load else None,
        calibration=coverage.summary(found.facts("checkpoint")),
        warnings=_warnings(found),
        unmeasured=_unmeasured(found, target),
        command=shlex.join(command) if command else None,
        directory=found.record.get("directory") if _model(found).revision is None else None,
        engine_command=shlex.join(engine_command) if engine_command else None,
    )


def name_of(path: Path) -> str:
    """The display name of a repository: the link's if `path` is one, else the first link's in models/, else its key."""
    directory = Path(path).resolve()
    root = root_of(directory)
    links = [path] if path.is_symlink() else sorted((root / "models").glob("*")) if root else []
    return next((link.name for link in links if link.resolve() == directory), f"repository-{directory.name}")


def _find(path: Path) -> _Found:
    directory = Path(path).resolve()
    open_repository(path).check_single("report")
    repository = read(directory)
    if repository is None:
        raise UsageError(f"{path} was just changed or removed.", hint="Run the same command again.")
    root = root_of(directory)
    everything = artifacts(root) if root else [repository]
    record = records.find(root, directory) if root else None
    chain = {artifact.stage: artifact for artifact in upstream([repository], everything)}
    # If two artifacts have the same content, the record says which one the build used.
    for stage in record["stages"] if record and root else ():
        artifact = read(root / stage["path"]) if root else None
        if artifact and artifact.stage in chain and artifact.digest == chain[artifact.stage].digest:
            chain[artifact.stage] = artifact
    chain = {stage: chain[stage] for stage in STAGES if stage in chain}
    return _Found(
        path=path,
        repository=repository,
        chain=chain,
        smoke=_newest(tests_of([repository], everything, ["smoke"])),
        benchmark=_newest(tests_of([repository], everything, [STAGE, OLD_STAGE])),
        load=_newest(tests_of([repository], everything, [measured.STAGE])),
        quality=_quality(chain, everything),
        judged=verdict.latest(repository.digest, [artifact.digest for artifact in chain.values()], everything),
        evaluation=results.evaluation_of(chain, everything),
        tasks=results.tasks_of(chain, everything),
        losses=results.losses_of(chain, everything),
        parts=results.parts_of(chain, everything),
        record=record or {},
    )


def _quality(chain: Mapping[str, Artifact], everything: Sequence[Artifact]) -> Quality | None:
    """The newest quality check of this checkpoint, unless it could not measure anything."""
    ours = {artifact.digest for artifact in chain.values()}
    of = [a for a in everything if a.stage == "quality" and set(a.manifest["ingredients"]["of"]) <= ours]
    found = _newest(of)
    measured = qualities.read_quality(found.facts, found.digest, found.path) if found else None
    return None if measured and measured.unmeasured else measured


def _newest(found: Sequence[Artifact]) -> Artifact | None:
    return max(found, key=lambda artifact: float(artifact.manifest["started"]), default=None)


def _model(found: _Found) -> Model:
    snapshot, gpu = found.facts("snapshot"), found.record.get("gpu", {})
    sm = found.ingredients("engine").get("sm")
    target = str(found.repository.facts["target"])
    return Model(
        name=name_of(found.path),
        id=str(snapshot.get("model_id", "unknown")),
        revision=snapshot.get("revision"),
        gpu=str(gpu.get("name") or (f"sm{sm}" if sm else "cpu" if _on_cpu(target) else "unknown")),
        gpu_title=str(gpu.get("title", "")),
        target=target,
        format=_format(found.ingredients("checkpoint")) + _transform(found),
        built=float(found.repository.manifest["started"]),
        repository=str(found.repository.manifest["key"]),
    )


def _on_cpu(target: str) -> bool:
    return target in TARGETS and not TARGETS[target].needs_gpu


def _format(checkpoint: Mapping[str, Any]) -> str:
    quantization = checkpoint.get("quantization", checkpoint)  # data-free, the formats are ingredients of their own
    number_format = registry.all_formats().get(name := str(quantization.get("format", "unknown")))
    weights = number_format.title if number_format else name
    algorithm = str(quantization.get("algorithm", algorithms.MAX.name))
    weights += f" ({algorithm})" * (algorithm != algorithms.MAX.name)
    cache = kv_cache.FORMATS.get(str(quantization.get("kv_cache_dtype")))
    return f"{weights}, {cache.title}" if cache else weights


def _transform(found: _Found) -> str:
    rotations = " and ".join(name.upper() for name in found.facts("transform").get("rotations", {}))
    return f", weights rotated (SpinQuant {rotations})" if rotations else ""


def _values(found: _Found) -> list[tuple[str, Any, str]]:
    """(key, value, origin) of the recipe from the build record; without one, as far as the manifests contain it."""
    if "values" in found.record:
        return [(str(key), value, str(origin)) for key, value, origin in found.record["values"]]
    checkpoint = found.ingredients("checkpoint")
    known = {
        "model.id": found.facts("snapshot").get("model_id"),
        "target": found.repository.facts["target"],
        **{f"quantization.{key}": value for key, value in checkpoint.get("quantization", {}).items()},
        "calibration.data": found.facts("calibration").get("data"),
        "calibration.samples": found.ingredients("calibration").get("samples"),
        "calibration.seq_len": checkpoint.get("seq_len"),
        "engine.tensorrt_llm": found.repository.facts.get("tensorrt_llm"),
        **{f"engine.{name}": value for name, value in _flags(found) if name.startswith("max_")},
        **{f"repository.{key}": value for key, value in found.ingredients("repository").get("part", {}).items()},
    }
    return [(key, value, "manifest") for key, value in known.items() if value is not None]


def _flags(found: _Found) -> list[tuple[str, str]]:
    return [(str(name), str(value)) for name, value in found.ingredients("engine").get("flags", [])]


def _versions(found: _Found) -> dict[str, str]:
    versions = dict(found.record.get("versions", {}))
    if found.repository.facts.get("tensorrt_llm"):
        reference = _on_cpu(str(found.repository.facts["target"]))
        key = "TensorRT-LLM (format of the engine)" if reference else "TensorRT-LLM"
        versions[key] = str(found.repository.facts["tensorrt_llm"])
    smoke = found.smoke.manifest["ingredients"] if found.smoke else {}
    for part in (*(found.ingredients(stage) for stage in found.chain), smoke):
        versions |= {name: str(version) for name, version in part.get("libraries", {}).items()}
    return versions


def _stages(found: _Found) -> list[Stage]:
    return [
        Stage(artifact.stage, artifact.manifest["key"], float(artifact.manifest["seconds"]), _parts(artifact.facts))
        for artifact in (*found.chain.values(), *([found.smoke] if found.smoke else []))
    ]


def _parts(facts: Mapping[str, Any]) -> Mapping[str, float]:
    parts = facts.get("seconds")
    return parts if isinstance(parts, Mapping) else {}


def _size(found: _Found) -> Size:
    layouts = found.facts("checkpoint").get("inspection", {}).get("layouts", {})
    model, checkpoint = _files(found, "snapshot"), _files(found, "checkpoint")
    disk = [
        ("Model as downloaded", sum(model.values())),
        ("Model with rotated weights", sum(_files(found, "transform").values())),
        ("Checkpoint, Hugging Face layout", _total(checkpoint, "unified/")),
        ("Checkpoint, TensorRT-LLM layout", _total(checkpoint, "tensorrt_llm/")),
        ("Checkpoint, compressed-tensors layout", sum(_files(found, "layouts").values())),
        ("Checkpoint, split by rank", sum(_files(found, "ranks").values())),
        ("Engine", _total(_files(found, "engine"))),
        ("Triton repository", _total(_files(found, "repository"))),
    ]
    before, after = _total(model, end=".safetensors"), _total(checkpoint, "unified/", ".safetensors")
    return Size(
        parameters=found.record.get("sizes", {}).get("parameters"),
        disk=[(what, nbytes) for what, nbytes in disk if nbytes],
        contents={name: layout["nbytes"] for name, layout in layouts.items()},
        bits_per_weight=next((layout["bits_per_weight"] for layout in layouts.values()), None),
        weights=(before, after) if before and after else None,
        memory=found.record.get("memory", []),
        peaks=[(stage, a.facts["max_rss"]) for stage, a in found.chain.items() if a.facts.get("max_rss")],
    )


def _files(found: _Found, stage: str) -> dict[str, int]:
    """{file name: bytes} of a stage, including external files."""
    if stage not in found.chain:
        return {}
    external = found.facts(stage).get("external", {}).get("files", {})
    return {name: entry["size"] for name, entry in {**external, **found.chain[stage].manifest["files"]}.items()}


def _total(files: Mapping[str, int], start: str = "", end: str = "") -> int:
    return sum(n for name, n in files.items() if name.startswith(start) and name.endswith(end))


def _warnings(found: _Found) -> list[str]:
    facts = found.facts("checkpoint")
    little = [f"Calibration covers little: {sentence}." for sentence in coverage.shortfalls(facts)]
    texts = [f"{text} ({times} times)" if times > 1 else text for text, times in facts.get("warnings", {}).items()]
    texts += [f"{p['layout']}: {p['tensor']} {p['what']}" for p in facts.get("inspection", {}).get("findings", [])]
    if facts.get("no_tensorrt_llm"):
        texts.append(f"There is no TensorRT-LLM layout: {facts['no_tensorrt_llm']}")
    for runner, sets in found.evaluation.collapsed.items() if found.evaluation else ():
        texts.append(
            f"{runner} rates shuffled tokens as likely as text ({', '.join(sets)}): not a working language model."
        )
    return little + texts + [f"{note['rule']}: {note['text']}" for note in found.record.get("notes", [])]


def _unmeasured(found: _Found, target: str) -> list[str]:
    """Sentences on what was not measured but a reader might assume."""
    texts = [REFERENCE] if _on_cpu(target) else []
    if found.smoke is None:
        texts.append("It was not served: the store contains no smoke test of this repository.")
    if found.evaluation is None and found.quality is None:
        texts.append("Accuracy was not measured on texts: the loss in perplexity and KL is unknown.")
    elif found.evaluation is None and found.quality:
        texts.append(
            f"Accuracy was measured on {found.quality.tokens:,} tokens only, by the quality check of the build."
        )
    texts += _unmeasured_runners(found.evaluation) if found.evaluation else []
    if not found.tasks:
        texts.append("Tasks were not run: its accuracy on benchmark questions is unknown.")
    if not found.losses:
        texts.append("The loss caused by each layer was not measured.")
    if found.benchmark is None and found.load is None:
        texts.append("Serving was not benchmarked: latency and throughput under concurrent requests are unknown.")
    if found.record.get("memory"):
        texts.append("Memory at run time was estimated with upstream's formulas, not measured on a GPU.")
    if not found.record:
        texts.append(
            "There is no build record: the recipe is shown only as far as the manifests contain it, without origins."
        )
    return texts


def _unmeasured_runners(evaluation: Evaluation) -> list[str]:
    def words(runner: str) -> str:
        return results.RUNNERS.get(runner, runner)

    texts = [f"Accuracy, {words(name)}: not measured. {why}" for name, why in evaluation.not_measured.items()]
    measured = list(dict.fromkeys(score.runner for score in evaluation.scores if score.runner != results.BF16))
    if "served" not in (*measured, *evaluation.not_measured):
        texts.append(f"Accuracy was not measured on the served model, only on: {', '.join(map(words, measured))}.")
    return texts
