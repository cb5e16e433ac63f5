"""The stages in order: model and GPU name in, tested Triton repository out. Start reading here."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.calibration.rows import Calibration, calibrate, check_conversations, read_rows
from builder.checkpoint import sharding
from builder.checkpoint.layouts import Checkpoint
from builder.core.output import Output
from builder.core.store import STAGES, Artifact, Store, WouldRun, read
from builder.evaluate import tasks
from builder.hub.snapshot import Snapshot, fetch
from builder.llmapi import arguments as llmapi_arguments
from builder.llmapi import repository as llmapi_repository
from builder.preflight import checks, memory
from builder.preflight.memory import ModelFacts
from builder.publish import build_record, links, verdict
from builder.publish.verdict import Verdict
from builder.quantize import exclude
from builder.quantize.modelopt import quantize
from builder.recipe.schema import Resolved
from builder.serving.smoke import SmokeReport, smoke_test
from builder.triton.repository import Repository, render
from builder.triton.template_values import template_files
from builder.trtllm import engine, probe_store
from builder.trtllm import flags as trtllm_flags
from builder.trtllm.engine import Engine
from builder.trtllm.probe_results import Answer

if TYPE_CHECKING:
    from builder.evaluate.sensitivity.stage import Sensitivity
    from builder.evaluate.stage import Evaluation
    from builder.quality.check import Quality


@dataclass(frozen=True)
class Built:
    """What a build left; a part is None when it was asked to stop before it.

    `link` is None too where the verdict is "failed"; `repository` where the quality check already failed.
    """

    snapshot: Snapshot
    model: ModelFacts | None = None
    flags: checks.Settings = field(default=())
    checkpoint: Checkpoint | None = None
    engine: Engine | None = None
    repository: Repository | None = None
    smoke: SmokeReport | None = None
    link: Path | None = None
    calibration: Calibration | None = None
    quality: Quality | None = None
    evaluation: Evaluation | None = None
    verdict: Verdict | None = None


# How far the chain must have come for a runner.
NEEDS = {
    "bf16": "snapshot",
    "simulated": "checkpoint",
    "checkpoint": "checkpoint",
    "reference": "checkpoint",
    "served": "repository",
}


def build(resolved: Resolved, store: Store, *, until: str = "smoke") -> Built:
    """Runs the stages up to `until` (a name of store.STAGES), each found in the store or made now.

    A repository is published, which is to say linked, if it passes the gate of the recipe, or without one the quality
    check, which comes before the engine. The verdict is kept; so is everything that was made.
    """
    built = _chain(resolved, store, until, check=True)
    enough = STAGES.index(until) >= STAGES.index(_needed(resolved))
    if store.dry or built.verdict:
        return built
    if resolved.recipe.evaluation.limits and enough:
        built = replace(built, evaluation=_measure(built, resolved, store))
    if built.repository is None:
        return built
    repository, found = built.repository, _judge(built, built.repository, resolved, store)
    link = None if found.status == "failed" else _publish(resolved, built, repository, store)
    return replace(built, verdict=found, link=link)


def _judge(built: Built, repository: Repository, resolved: Resolved, store: Store) -> Verdict:
    """The verdict on a repository, by the gate or else by the quality check, kept in the store."""
    part, evaluation, quality = resolved.recipe, built.evaluation, built.quality
    if evaluation and evaluation.verdict:
        limits = ", ".join(f"{metric} {limit:g}" for metric, limit in evaluation.verdict.limits.items())
        passed = evaluation.verdict.passed
        reasons = (f"the gate: {limits}",) if passed else tuple(evaluation.verdict.failed)
        found = Verdict("passed" if passed else "failed", reasons, "accuracy gate")
        measured = read(evaluation.path)
        asked: dict[str, Any] = {"limits": part.evaluation.limits, "evaluation": measured.digest if measured else None}
    elif quality and not quality.unmeasured:
        found = Verdict("passed", (f"a score of {quality.score:.2f}, at least {part.quality.min_score:g} was asked",))
        asked = {"min_score": part.quality.min_score, "quality": quality.digest}
    else:
        found = Verdict("not checked", (quality.unmeasured if quality else "--no-quality-check",))
        asked = {}
    verdict.keep(found, [repository.digest], asked, store=store)
    return found


def _check_quality(
    made: Built, calibration: Calibration, checkpoint: Checkpoint, resolved: Resolved, store: Store
) -> Built:
    """With its quality; where that is too low with the verdict too, which is kept for any repository made of it."""
    from builder.quality.check import check_quality  # numpy: only for those who measure

    assert made.model is not None
    host = memory.machine(store.root)
    quality = check_quality(made.snapshot, calibration, checkpoint, made.model, resolved, host, store=store)
    made, limit = replace(made, quality=quality), resolved.recipe.quality.min_score
    if not (failed := quality.failure(limit)):
        return made
    found = Verdict("failed", (failed,))
    verdict.keep(found, [checkpoint.digest], {"min_score": limit, "quality": quality.digest}, store=store)
    return replace(made, verdict=found)


def _is_checked(resolved: Resolved) -> bool:
    """Whether a build measures quality by itself: a gate of the recipe takes its place."""
    return resolved.recipe.quality.check and not resolved.recipe.evaluation.limits


def measure(resolved: Resolved, store: Store) -> Evaluation:
    """Builds what the recipe's runners need, and measures it, by questions too where the recipe names tasks."""
    if resolved.recipe.tasks.names:
        tasks.check(resolved.recipe.tasks, store)
    return _measure(_chain(resolved, store, _needed(resolved)), resolved, store, ask=True)


def _needed(resolved: Resolved) -> str:
    part = resolved.recipe.evaluation
    needs = [NEEDS[runner] for runner in part.runners] + ["checkpoint"] * part.compare_kv
    return max(needs, key=STAGES.index)


def measure_layers(resolved: Resolved, store: Store, *, proxy: bool = False) -> Sensitivity:
    """What each group of linear layers loses; with `proxy` by errors of outputs or, without texts, of weights alone."""
    from builder.evaluate.sensitivity import stage as sensitivity_stage

    recipe = resolved.recipe
    if not proxy:
        sensitivity_stage.check_texts(recipe)
    snapshot = fetch(recipe.model, store=store, check=lambda config: None)
    flags = checks.check_model(resolved, snapshot.config, layouts=False)
    model = checks.keep_patterns(resolved, checks.headers(snapshot.path, snapshot.config, snapshot.files), flags)
    if proxy and recipe.sensitivity.data is None:
        return sensitivity_stage.weight_errors(snapshot, model, store)
    calibration = calibrate(recipe.calibration, store=store)
    check_conversations(read_rows(calibration), snapshot.path)
    return sensitivity_stage.sensitivity(snapshot, calibration, model, resolved, store=store, proxy=proxy)


def _measure(built: Built, resolved: Resolved, store: Store, *, ask: bool = False) -> Evaluation:
    from builder.evaluate.stage import evaluate  # numpy: only for those who measure
    from builder.evaluate.variants import Models

    models = Models(built.snapshot, built.calibration, built.checkpoint, built.repository)
    return evaluate(models, resolved, store=store, ask=ask)


def _chain(resolved: Resolved, store: Store, until: str, *, check: bool = False) -> Built:
    """With `check` it ends after the checkpoint if the quality check fails."""
    recipe = resolved.recipe
    wanted = STAGES[: STAGES.index(until) + 1]
    if until in ("ranks", "engine") and recipe.target == "llmapi":
        raise checks.no_engine()
    if "engine" in wanted and not store.dry:
        checks.check_machine(resolved, serving="smoke" in wanted)
    if "repository" in wanted and recipe.target != "llmapi":
        template_files(recipe.engine.tensorrt_llm)  # refused before any work where there are none

    if "checkpoint" not in wanted:
        return Built(fetch(recipe.model, store=store))
    answers = probe_store.answers(resolved, store.root)
    snapshot, flags, model = _fetched(resolved, answers, wanted, store)

    calibration = calibrate(recipe.calibration, store=store)
    check_conversations(read_rows(calibration), snapshot.path)
    if recipe.quantization.kept_budget is not None:
        model = keep_chosen(resolved, snapshot, calibration, model, flags, store)
        if "engine" in wanted and not store.dry:
            checks.check_fit(resolved, model, flags, store, made=lambda: stages_stored(resolved, store))
    checkpoint = quantize(
        snapshot,
        calibration,
        recipe.quantization,
        recipe.calibration,
        store=store,
        kept=model.kept,
        fp8=model.fp8,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    made = Built(snapshot, model, flags, checkpoint, calibration=calibration)
    if check and "repository" in wanted and _is_checked(resolved) and not store.dry:
        made = _check_quality(made, calibration, checkpoint, resolved, store)
    if "ranks" not in wanted or made.verdict:
        return made

    built, repository = _served(checkpoint, snapshot, resolved, answers, wanted, store)
    made = replace(made, engine=built, repository=repository)
    if repository is not None and "smoke" in wanted:
        made = replace(made, smoke=smoke_test(repository, store=store))
    return made


def _fetched(
    resolved: Resolved, answers: Sequence[Answer], wanted: Sequence[str], store: Store
) -> tuple[Snapshot, checks.Settings, ModelFacts]:
    """The model, refused by its config.json and tensor headers before a weight is read; with its settings and facts."""
    recipe, layouts = resolved.recipe, "engine" in wanted

    def check(config: Mapping[str, Any]) -> checks.Settings:
        flags = checks.check_model(resolved, config, layouts=layouts, answers=answers)
        checks.check_gate(resolved, flags)
        return flags

    def check_all(config: Mapping[str, Any]) -> None:
        flags = check(config)
        model = checks.read_model(recipe.model, store)
        if model.directory is not None:
            checks.check_tokenizer(resolved, model.directory, config)
        model = checks.keep_patterns(resolved, model, flags)
        if layouts:
            checks.check_fit(resolved, model, flags, store)
        checks.check_architecture(recipe.model, model, store)

    snapshot = fetch(recipe.model, store=store, check=check_all)
    flags = check(snapshot.config)
    checks.check_tokenizer(resolved, snapshot.path, snapshot.config)
    model = checks.keep_patterns(resolved, checks.headers(snapshot.path, snapshot.config, snapshot.files), flags)
    if layouts and not store.dry and snapshot.artifact.cached:  # checked above where it is not, before the download
        checks.check_fit(resolved, model, flags, store, made=lambda: stages_stored(resolved, store))
    for note in checks.tokenizer_notes(resolved, snapshot.path, snapshot.config):
        store.out.warn(note.text)
    part = recipe.quantization
    for form, patterns, kept in (("BF16", part.kept_patterns, model.kept), ("FP8", part.fp8_patterns, model.fp8)):
        if more := exclude.widened(patterns, kept):
            names = ", ".join(more[:4]) + ", ..." * (len(more) > 4)
            store.out.info(f"{len(more)} more layers stay in {form}, multiplied as one with those named: {names}")
    if recipe.target != "llmapi":
        for note in trtllm_flags.window_notes(
            snapshot.config, trtllm_flags.resolve(resolved, snapshot.config, answers)
        ):
            store.out.warn(note.text)
    return snapshot, flags, model


def _served(
    checkpoint: Checkpoint,
    snapshot: Snapshot,
    resolved: Resolved,
    answers: Sequence[Answer],
    wanted: Sequence[str],
    store: Store,
) -> tuple[Engine | None, Repository | None]:
    """The repository around an engine made of the checkpoint's ranks, or with llmapi around the checkpoint itself."""
    recipe = resolved.recipe
    if recipe.target == "llmapi":
        arguments = llmapi_arguments.resolve(resolved, snapshot.config)
        return None, llmapi_repository.render(checkpoint, snapshot, arguments, resolved, store=store)
    split = sharding.split_checkpoint(checkpoint, sharding.Parallel(recipe.engine.tp, recipe.engine.pp), store=store)
    if "engine" not in wanted:
        return None, None
    built = engine.build(split, trtllm_flags.resolve(resolved, snapshot.config, answers), resolved, store=store)
    if "repository" not in wanted:
        return built, None
    return built, render(built, snapshot, recipe.repository, store=store)


def keep_chosen(
    resolved: Resolved,
    snapshot: Snapshot,
    calibration: Calibration,
    model: ModelFacts,
    flags: checks.Settings,
    store: Store,
) -> ModelFacts:
    """The model with as many layers more in BF16, or FP8, as hold the budget of auto."""
    from builder.evaluate.sensitivity import stage as sensitivity_stage  # numpy: only for those who measure

    values = {flag.name: flag.value for flag in flags}
    recipe = resolved.recipe
    refused = exclude.output_must_be_quantized(values) if recipe.target == "engine" else ""
    if recipe.target == "llmapi" and recipe.quantization.kept_format == "fp8":
        refused = exclude.BY_Q_PROJ
    chosen = sensitivity_stage.select(snapshot, calibration, model, resolved, store=store, refused=refused)
    model = checks.with_chosen(resolved, model, chosen.modules)
    checks.check_kept(resolved, model, flags)
    return model


def stored(resolved: Resolved, store: Store) -> tuple[list[Artifact], WouldRun | None]:
    """What is in the store already, and the first stage that would run: the chain, on a store that makes none."""
    dry = Store(store.root, Output("quiet"), force=sorted(store.force), dry=True)
    dry.assumed = store.assumed
    try:
        build(resolved, dry)
    except WouldRun as would:
        return dry.done, would
    return dry.done, None


def stages_stored(resolved: Resolved, store: Store) -> list[str]:
    """The stages of this recipe that are in the store."""
    return [artifact.stage for artifact in stored(resolved, store)[0]]


def gate_stored(resolved: Resolved, store: Store) -> Evaluation | WouldRun:
    """What a dry store holds of the gate's evaluation: all of it, with the verdict, or what would run first for it."""
    try:
        return _measure(_chain(resolved, store, _needed(resolved)), resolved, store)
    except WouldRun as would:
        return would


def quality_stored(resolved: Resolved, store: Store) -> Quality | WouldRun | None:
    """What a dry store holds of the quality check, or what would run first for it; None where there is none."""
    from builder.quality.check import check_quality

    if not _is_checked(resolved):
        return None
    try:
        made = _chain(resolved, store, "checkpoint")
        assert made.calibration is not None
        assert made.checkpoint is not None
        assert made.model is not None
        host = memory.machine(store.root)
        return check_quality(made.snapshot, made.calibration, made.checkpoint, made.model, resolved, host, store=store)
    except WouldRun as would:
        return would


def _publish(resolved: Resolved, made: Built, repository: Repository, store: Store) -> Path:
    """The link to the repository, and the record of how it came to be for `builder report`."""
    assert made.model is not None
    answers = probe_store.answers(resolved, store.root)
    known = checks.notes(resolved, made.model.config, answers, made.model.directory)
    sizes = checks.sizes(resolved, made.model, made.flags)
    with store.locked("publish", "models"):  # of two builds that want the same name one goes first
        name = links.link(resolved, repository.path, store)
        source = links.source_of(resolved)
        if not os.path.lexists(name):  # a record whose link is missing tells `clean` that the user removed the link
            links.move(name, repository.path)
        build_record.write(resolved, made.flags, known, made.model, sizes, link=name, source=source, store=store)
        links.move(name, repository.path)
    if name.name != (short := links.base_name(resolved)) and not resolved.recipe.name:
        store.out.info(f"models/{short} belongs to another build, so this one is models/{name.name}")
    return name
