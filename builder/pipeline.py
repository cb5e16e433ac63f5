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
from builder import engine, fit, fit_change, keep_bf16, ranks, trtllm
from builder.calibrate import Calibration, calibrate
from builder.checkpoint import Checkpoint
from builder.engine import Engine
from builder.errors import UsageError
from builder.fetch import Snapshot, check_directory, fetch, local_directory, read_headers
from builder.fit import ModelFacts, Sizes
from builder.quantize.modelopt import gpus, quantize
from builder.recipe import Model, Resolved
from builder.repository import Repository, render
from builder.safetensors_io import read_header
from builder.smoke import SmokeReport, smoke_test
from builder.store import STAGES, Store

if TYPE_CHECKING:
    from builder.evaluate import Evaluation
    from builder.sensitivity import Sensitivity


@dataclass(frozen=True)
class Built:
    """What a build left; a part is None when it was asked to stop before it."""

    snapshot: Snapshot
    flags: Sequence[trtllm.Flag] = field(default=())
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


def _check_gate(resolved: Resolved, flags: Sequence[trtllm.Flag]) -> None:
    """UsageError, before the engine is built, for a gate on a served model that will return no logits to judge by."""
    gathers = any(flag.name == "gather_context_logits" and flag.value in ("enable", "") for flag in flags)
    if resolved.recipe.evaluation.limits and "served" in resolved.recipe.evaluation.runners and not gathers:
        raise UsageError(
            "The gate asks for the served model's perplexity, and the engine would return no logits of a prompt.",
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
    if "engine" in wanted and not store.dry:
        engine.check_machine(resolved, serving="smoke" in wanted)

    if "checkpoint" not in wanted:
        return Built(fetch(recipe.model, store=store))
    layouts = "engine" in wanted

    def check(config: Mapping[str, Any]) -> None:
        flags = check_model(resolved, config, layouts=layouts)
        if layouts or recipe.quantization.keep_bf16:
            model = keep_patterns(resolved, read_model(recipe.model, store), flags)
            if layouts:
                check_fit(resolved, model, flags, store, disk=True)

    snapshot = fetch(recipe.model, store=store, check=check)
    flags = check_model(resolved, snapshot.config, layouts=layouts)
    _check_gate(resolved, flags)
    model = keep_patterns(resolved, _headers(snapshot.path, snapshot.config, snapshot.files), flags)
    if layouts and not store.dry and snapshot.artefact.cached:  # checked above where it is not, before the download
        check_fit(resolved, model, flags, store)
    if more := keep_bf16.widened(recipe.quantization.kept_patterns, model.kept):
        names = ", ".join(more[:4]) + ", ..." * (len(more) > 4)
        store.out.info(f"{len(more)} more layers stay in BF16, multiplied as one with those named: {names}")

    calibration = calibrate(recipe.calibration, store=store)
    if recipe.quantization.kept_budget is not None:
        model = keep_chosen(resolved, snapshot, calibration, model, flags, store)
        if layouts and not store.dry:
            check_fit(resolved, model, flags, store)
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

    parallel = ranks.Parallel(recipe.engine.tp, recipe.engine.pp)
    split = ranks.split_checkpoint(checkpoint, parallel, store=store)
    if "engine" not in wanted:
        return made

    built = engine.build(split, flags, resolved, store=store)
    if "repository" not in wanted:
        return replace(made, engine=built)

    repository = render(built, snapshot, recipe.repository, store=store)
    if "smoke" not in wanted:
        return replace(made, engine=built, repository=repository, link=link(resolved, repository, store))

    report = smoke_test(repository, store=store)
    made = replace(made, engine=built, repository=repository, smoke=report)
    return replace(made, link=link(resolved, repository, store))


def check_model(resolved: Resolved, config: Mapping[str, Any], *, layouts: bool) -> list[trtllm.Flag]:
    """The engine's flags for a model by its config.json; with `layouts` also that TensorRT-LLM's layout can hold it."""
    if layouts:
        checkpoints.architecture(config)
        checkpoints.rope(config)
        asked = resolved.recipe
        inputs = ranks.GEMM_INPUTS if asked.target == "engine" else ranks.BLOCK
        ranks.check(config, asked.engine.tp, asked.engine.pp, inputs=inputs)
    return trtllm.resolve(resolved, config)


def keep_patterns(resolved: Resolved, model: ModelFacts, flags: Sequence[trtllm.Flag]) -> ModelFacts:
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
    flags: Sequence[trtllm.Flag],
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


def check_kept(resolved: Resolved, model: ModelFacts, flags: Sequence[trtllm.Flag]) -> None:
    """UnsupportedError if ranks or engine could not have the kept layers in BF16."""
    asked = resolved.recipe
    keep_bf16.check_split(model.kept, model.config, ranks.Parallel(asked.engine.tp, asked.engine.pp))
    if asked.target == "engine":
        keep_bf16.check_flags(model.kept, {flag.name: flag.value for flag in flags})


def check_fit(
    resolved: Resolved, model: ModelFacts, flags: Sequence[trtllm.Flag], store: Store, *, disk: bool = False
) -> None:
    """UnsupportedError with the smallest change that would fit; with `disk` also if the artefacts find no room."""
    host = fit.machine(store.root)
    verdict = fit_change.judge(model, fit.serving(resolved, flags), resolved, host, gpus())
    if verdict.refusal:
        raise verdict.refusal
    found = sizes(resolved, model, flags)
    if disk and (refusal := fit_change.disk_refusal(found, host, found.artefacts)):
        raise refusal


def sizes(resolved: Resolved, model: ModelFacts, flags: Sequence[trtllm.Flag]) -> Sizes:
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


def link(resolved: Resolved, repository: Repository, store: Store) -> Path:
    """The name that people use: <output>/models/<model>-<gpu>-<format> -> the repository. Replaced in one step."""
    recipe = resolved.recipe
    directory = local_directory(recipe.model)
    model = directory.name if directory else recipe.model.id.split("/")[-1]
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.")
    name = store.root / "models" / f"{plain}-{resolved.gpu.name}-{recipe.quantization.format}"
    target = os.path.relpath(repository.path, name.parent)
    name.parent.mkdir(parents=True, exist_ok=True)
    if not (name.is_symlink() and os.readlink(name) == target):
        fresh = name.parent / f".{name.name}.{os.getpid()}"
        fresh.symlink_to(target)
        fresh.replace(name)
    return name
