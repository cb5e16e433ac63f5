"""The stages in order: model and GPU name in, tested Triton repository out. Start reading here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder import checkpoint as checkpoints
from builder import (
    engine,
    fit,
    fit_change,
    keep_bf16,
    kv_safety,
    llmapi,
    llmapi_repository,
    probe_answers,
    ranks,
    record,
    trtllm,
)
from builder.calibrate import Calibration, calibrate
from builder.checkpoint import Checkpoint
from builder.engine import Engine
from builder.errors import UnsupportedError, UsageError
from builder.fetch import Snapshot, check_directory, fetch, local_directory, read_headers
from builder.fit import Machine, ModelFacts, Sizes
from builder.output import Output, size
from builder.quantize.modelopt import gpus, quantize
from builder.recipe import Model, Resolved
from builder.repository import Repository, render
from builder.repository import sources as triton_sources
from builder.safetensors_io import read_header
from builder.smoke import SmokeReport, smoke_test
from builder.store import STAGES, Artefact, Store, WouldRun
from builder.trtllm_answers import Answer

# trtllm-build's flags, or the LLM arguments of the llmapi target: both have name, value, reason and source.
Settings = Sequence[trtllm.Flag] | Sequence[llmapi.Argument]

if TYPE_CHECKING:
    from builder.evaluate import Evaluation
    from builder.sensitivity import Sensitivity

FP8_KV = "FP8 KV cache"  # the note that is a warning


@dataclass(frozen=True)
class Built:
    """What a build left; a part is None when it was asked to stop before it."""

    snapshot: Snapshot
    flags: Settings = field(default=())
    checkpoint: Checkpoint | None = None
    engine: Engine | None = None
    repository: Repository | None = None
    smoke: SmokeReport | None = None
    link: Path | None = None
    calibration: Calibration | None = None
    evaluation: Evaluation | None = None


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

    With a gate, what was built is measured too, if it is all that the runners need; `evaluation` holds the verdict,
    and everything is kept.
    """
    built = _chain(resolved, store, until)
    enough = STAGES.index(until) >= STAGES.index(_needed(resolved))
    if resolved.recipe.evaluation.limits and enough and not store.dry:
        return replace(built, evaluation=_measure(built, resolved, store))
    return built


def measure(resolved: Resolved, store: Store) -> Evaluation:
    """Builds what the recipe's runners need, and measures it."""
    return _measure(_chain(resolved, store, _needed(resolved)), resolved, store)


def _needed(resolved: Resolved) -> str:
    part = resolved.recipe.evaluation
    needs = [NEEDS[runner] for runner in part.runners] + ["checkpoint"] * part.compare_kv
    return max(needs, key=STAGES.index)


def _check_gate(resolved: Resolved, flags: Settings) -> None:
    """UsageError, before anything is built, for a gate on a served model that will return no logits to judge by."""
    recipe = resolved.recipe
    if not recipe.evaluation.limits or "served" not in recipe.evaluation.runners:
        return
    what = "The gate asks for the served model's perplexity, and it would return no logits of a prompt."
    if recipe.target == "llmapi":
        raise UsageError(what, why="The llmapi target has no input that asks for them.", cure="--runner checkpoint")
    if not any(flag.name == "gather_context_logits" and flag.value in ("enable", "") for flag in flags):
        raise UsageError(
            what,
            why="trtllm-build leaves them out unless gather_context_logits is on.",
            cure="Add --set engine.flags.gather_context_logits=enable, or judge what is on disk: --runner checkpoint",
        )


def measure_layers(resolved: Resolved, store: Store, *, proxy: bool = False) -> Sensitivity:
    """What each group of linear layers loses; with `proxy` by errors of outputs or, without texts, of weights alone."""
    from builder import sensitivity

    recipe = resolved.recipe
    if not proxy:
        sensitivity.check_texts(recipe)
    snapshot = fetch(recipe.model, store=store, check=lambda config: None)
    flags = check_model(resolved, snapshot.config, layouts=False)
    model = keep_patterns(resolved, _headers(snapshot.path, snapshot.config, snapshot.files), flags)
    if proxy and recipe.sensitivity.data is None:
        return sensitivity.weight_errors(snapshot, model, store)
    calibration = calibrate(recipe.calibration, store=store)
    return sensitivity.sensitivity(snapshot, calibration, model, resolved, store=store, proxy=proxy)


def _measure(built: Built, resolved: Resolved, store: Store) -> Evaluation:
    from builder.evaluate import Models, evaluate  # numpy: only for those who measure

    models = Models(built.snapshot, built.calibration, built.checkpoint, built.repository)
    return evaluate(models, resolved, store=store)


def _chain(resolved: Resolved, store: Store, until: str) -> Built:
    recipe = resolved.recipe
    wanted = STAGES[: STAGES.index(until) + 1]
    if until in ("ranks", "engine") and recipe.target == "llmapi":
        raise no_engine()
    if "engine" in wanted and not store.dry:
        check_machine(resolved, serving="smoke" in wanted)
    if "repository" in wanted and recipe.target != "llmapi":
        triton_sources(recipe.engine.tensorrt_llm)  # refused before any work where there are none

    if "checkpoint" not in wanted:
        return Built(fetch(recipe.model, store=store))
    layouts = "engine" in wanted

    answers = probe_answers.answers(resolved, store.root)

    def check(config: Mapping[str, Any]) -> None:
        flags = check_model(resolved, config, layouts=layouts, answers=answers)
        if layouts or recipe.quantization.keep_bf16:
            model = keep_patterns(resolved, read_model(recipe.model, store), flags)
            if layouts:
                check_fit(resolved, model, flags, store)

    snapshot = fetch(recipe.model, store=store, check=check)
    flags = check_model(resolved, snapshot.config, layouts=layouts, answers=answers)
    _check_gate(resolved, flags)
    model = keep_patterns(resolved, _headers(snapshot.path, snapshot.config, snapshot.files), flags)
    if layouts and not store.dry and snapshot.artefact.cached:  # checked above where it is not, before the download
        check_fit(resolved, model, flags, store, fetched=True)
    if more := keep_bf16.widened(recipe.quantization.kept_patterns, model.kept):
        names = ", ".join(more[:4]) + ", ..." * (len(more) > 4)
        store.out.info(f"{len(more)} more layers stay in BF16, multiplied as one with those named: {names}")
    if recipe.target != "llmapi":
        for note in trtllm.window_notes(snapshot.config, trtllm.resolve(resolved, snapshot.config, answers)):
            store.out.warn(note.text)

    calibration = calibrate(recipe.calibration, store=store)
    if recipe.quantization.kept_budget is not None:
        model = keep_chosen(resolved, snapshot, calibration, model, flags, store)
        if layouts and not store.dry:
            check_fit(resolved, model, flags, store, fetched=True)
    checkpoint = quantize(
        snapshot,
        calibration,
        recipe.quantization,
        recipe.calibration,
        store=store,
        kept=model.kept,
        trust_remote_code=recipe.model.trust_remote_code,
    )
    made = Built(snapshot, flags, checkpoint, calibration=calibration)
    if "ranks" not in wanted:
        return made

    built, repository = _served(checkpoint, snapshot, resolved, answers, wanted, store)
    made = replace(made, engine=built, repository=repository)
    if repository is None:
        return made
    if "smoke" in wanted:
        made = replace(made, smoke=smoke_test(repository, store=store))
    return replace(made, link=publish(resolved, made, repository, model, answers, store))


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
        arguments = llmapi.resolve(resolved, snapshot.config)
        return None, llmapi_repository.render(checkpoint, snapshot, arguments, resolved, store=store)
    split = ranks.split_checkpoint(checkpoint, ranks.Parallel(recipe.engine.tp, recipe.engine.pp), store=store)
    if "engine" not in wanted:
        return None, None
    built = engine.build(split, trtllm.resolve(resolved, snapshot.config, answers), resolved, store=store)
    if "repository" not in wanted:
        return built, None
    return built, render(built, snapshot, recipe.repository, store=store)


def no_engine() -> UsageError:
    """Where an engine, or the command that builds it, was asked of the llmapi target."""
    return UsageError(
        "The llmapi target has no engine: the checkpoint is loaded as it is.",
        cure="As far as the repository: `builder render`.",
    )


def check_machine(resolved: Resolved, *, serving: bool = True) -> None:
    """Whether this machine has what the target needs, before the first expensive byte."""
    if resolved.recipe.target != "llmapi":
        engine.check_machine(resolved, serving=serving)
    elif serving:
        llmapi.check_machine(resolved)


def check_model(
    resolved: Resolved, config: Mapping[str, Any], *, layouts: bool, answers: Sequence[Answer] = ()
) -> Settings:
    """The target's settings for a model by its config.json, and what cards answered to probes (probe_answers).

    With `layouts` also that the target can load it.
    """
    asked = resolved.recipe
    if asked.target == "llmapi":
        if layouts:
            llmapi.check_model(resolved, config)
        return llmapi.resolve(resolved, config)
    if asked.llmapi.args:
        raise UsageError(
            f"llmapi.args are arguments of TensorRT-LLM's LLM class, which the {asked.target} target does not use.",
            cure="--target llmapi, or leave them out.",
        )
    if layouts:
        checkpoints.architecture(config)
        checkpoints.rope(config)
        inputs = ranks.GEMM_INPUTS if asked.target == "engine" else ranks.BLOCK
        ranks.check(config, asked.engine.tp, asked.engine.pp, inputs=inputs)
    return trtllm.resolve(resolved, config, answers)


def notes(resolved: Resolved, config: Mapping[str, Any], answers: Sequence[Answer] = ()) -> list[trtllm.Note]:
    """What a user should know before building this model for this target, and a reader of the report after it."""
    risk = kv_safety.warning(config, resolved.recipe.quantization.kv_cache_dtype)
    known = [trtllm.Note(FP8_KV, risk)] if risk else []
    if resolved.recipe.target == "llmapi":
        return known + llmapi.notes(resolved, llmapi.resolve(resolved, config))
    flags = trtllm.resolve(resolved, config, answers)
    return known + trtllm.notes(resolved, config, flags, answers) + trtllm.window_notes(config, flags)


def keep_patterns(resolved: Resolved, model: ModelFacts, flags: Settings) -> ModelFacts:
    """The model with the layers that the recipe leaves in BF16. UsageError or UnsupportedError where it can't."""
    patterns = resolved.recipe.quantization.kept_patterns
    model = replace(model, kept=keep_bf16.keep(patterns, keep_bf16.linears(model.tensors)))
    check_kept(resolved, model, flags)
    return model


def keep_chosen(
    resolved: Resolved,
    snapshot: Snapshot,
    calibration: Calibration,
    model: ModelFacts,
    flags: Settings,
    store: Store,
) -> ModelFacts:
    """The model with as many layers more in BF16 as hold the budget of keep_bf16's auto."""
    from builder import sensitivity  # numpy: only for those who measure

    values = {flag.name: flag.value for flag in flags}
    refused = keep_bf16.output_must_be_quantized(values) if resolved.recipe.target == "engine" else ""
    chosen = sensitivity.select(snapshot, calibration, model, resolved, store=store, refused=refused)
    model = with_chosen(model, chosen.modules)
    check_kept(resolved, model, flags)
    return model


def with_chosen(model: ModelFacts, modules: Sequence[str]) -> ModelFacts:
    """The model with these layers kept in BF16 too."""
    kept = {*model.kept, *modules}
    return replace(model, kept=tuple(name for name in keep_bf16.linears(model.tensors) if name in kept))


def check_kept(resolved: Resolved, model: ModelFacts, flags: Settings) -> None:
    """UnsupportedError if ranks or engine could not have the kept layers in BF16."""
    asked = resolved.recipe
    keep_bf16.check_split(model.kept, model.config, ranks.Parallel(asked.engine.tp, asked.engine.pp))
    if asked.target == "engine":
        keep_bf16.check_flags(model.kept, {flag.name: flag.value for flag in flags})


def check_fit(resolved: Resolved, model: ModelFacts, flags: Settings, store: Store, *, fetched: bool = False) -> None:
    """UnsupportedError with the smallest change that would fit on the card, or if what is still to be made finds no
    room on the disk or in this machine's memory. `fetched`: the snapshot is here, and maybe more."""
    host, here = fit.machine(store.root), gpus()
    verdict = fit_change.judge(model, fit.serving(resolved, flags), resolved, host, here)
    if verdict.refusal:
        raise verdict.refusal
    found = sizes(resolved, model, flags)
    tight = not here and found.calibration_memory > host.available
    if not tight and found.artefacts <= host.disk:
        return
    made = [artefact.stage for artefact in stored(resolved, store)[0]] if fetched else []
    remaining = [stage for stage in STAGES if stage not in made]
    if refusal := host_refusal(resolved, model, found, host, remaining):
        raise refusal
    if tight and "checkpoint" in remaining:
        needs, free = size(found.calibration_memory), size(host.available)
        store.out.warn(f"calibrating takes about {needs}, and of this machine's memory {free} are free now")


def host_refusal(
    resolved: Resolved, model: ModelFacts, found: Sizes, host: Machine, remaining: Sequence[str]
) -> UnsupportedError | None:
    """Whether the stages that remain find no room on this machine: its disk, or its memory where no GPU calibrates."""
    missing = sum(found.disk.get(stage, 0) for stage in remaining if stage != "snapshot")
    if refusal := fit_change.disk_refusal(found, host, missing):
        return refusal
    if "checkpoint" not in remaining or gpus():
        return None
    return fit_change.calibration_refusal(model, resolved.recipe.calibration, host)


def stored(resolved: Resolved, store: Store) -> tuple[list[Artefact], WouldRun | None]:
    """What is in the store already, and the first stage that would run: the chain, on a store that makes none."""
    dry = Store(store.root, Output("quiet"), force=sorted(store.force), dry=True)
    try:
        build(resolved, dry)
    except WouldRun as would:
        return dry.done, would
    return dry.done, None


def sizes(resolved: Resolved, model: ModelFacts, flags: Settings) -> Sizes:
    """Of this recipe's model, checkpoint, ranks and engine."""
    rows = resolved.recipe.calibration
    local = local_directory(resolved.recipe.model) is not None
    tokens = rows.batch_size * rows.seq_len
    return fit.sizes(model, fit.serving(resolved, flags), calibration_tokens=tokens, local=local)


def read_model(model: Model, store: Store) -> ModelFacts:
    """config.json and tensor headers: from the directory, or from the Hub by ranged reads."""
    directory = local_directory(model)
    if directory is None:
        return ModelFacts(*read_headers(model, store=store))
    files = check_directory(directory, trust_remote_code=model.trust_remote_code)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return _headers(directory, config, files)


def _headers(directory: Path, config: Mapping[str, Any], files: Sequence[str]) -> ModelFacts:
    shards = [directory / name for name in files if name.endswith(".safetensors")]
    tensors = {name: (info.dtype, tuple(info.shape)) for file in shards for name, info in read_header(file).items()}
    return ModelFacts(config, tensors)


def publish(
    resolved: Resolved, made: Built, repository: Repository, model: ModelFacts, answers: Sequence[Answer], store: Store
) -> Path:
    """The link to the repository, and the record of how it came to be for `builder report`."""
    name = link(resolved, repository, store)
    if not store.dry:
        known = notes(resolved, model.config, answers)
        record.write(resolved, made.flags, known, model, sizes(resolved, model, made.flags), link=name, store=store)
    return name


def link(resolved: Resolved, repository: Repository, store: Store) -> Path:
    """The name that people use: <output>/models/<model>-<gpu>-<format> -> the repository. Replaced in one step.

    A model over several GPUs has its sizes in the name, as -tp2-pp2, so that it stands beside the one for one GPU.
    """
    recipe = resolved.recipe
    directory = local_directory(recipe.model)
    model = directory.name if directory else recipe.model.id.split("/")[-1]
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.")
    parallel = "".join(f"-{name}{n}" for name, n in (("tp", recipe.engine.tp), ("pp", recipe.engine.pp)) if n > 1)
    other = "-llmapi" if recipe.target == "llmapi" else ""
    name = store.root / "models" / f"{plain}-{resolved.gpu.name}-{recipe.quantization.format}{parallel}{other}"
    target = os.path.relpath(repository.path, name.parent)
    name.parent.mkdir(parents=True, exist_ok=True)
    if not (name.is_symlink() and os.readlink(name) == target):
        fresh = name.parent / f".{name.name}.{os.getpid()}"
        fresh.symlink_to(target)
        fresh.replace(name)
    return name
