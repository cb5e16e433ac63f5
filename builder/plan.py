"""What a build would do, before it does it: stages, sizes, every value with its reason. No weight is read.

Sizes come from config.json and the headers of the safetensors files alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder import pipeline
from builder.core.errors import BuilderError, EvaluationError
from builder.core.output import seconds, size
from builder.core.store import STAGES, Artifact, Store, WouldRun
from builder.llmapi import arguments as llmapi_arguments
from builder.llmapi import repository as llmapi_repository
from builder.preflight import checks, memory, suggestions
from builder.preflight.memory import Machine, Sizes
from builder.preflight.suggestions import Verdict
from builder.quantize.modelopt import gpus
from builder.recipe.schema import Resolved
from builder.triton import stream_capacity
from builder.trtllm import engine, probe_store
from builder.trtllm import flags as trtllm_flags
from builder.trtllm.probe_results import Answer


@dataclass(frozen=True)
class Plan:
    """`stages` are (stage, "cached" | "will run" | "skipped", why); `blocked` says why this machine can't build it;
    `refusal` what does not fit, on the card or on this machine, where a build would end with it.

    `command` is trtllm-build's; `placeholder` is the word in it for a checkpoint that is not made yet.
    `verdict` holds what each card of the profile has room for; `missing` the bytes that are still to be kept here;
    `kept` the linear layers left in BF16, `fp8` those in FP8, `price` and `fp8_price` the bytes that they add;
    `open_choice`: auto is still to choose. `streams`: how many at once, their bytes of host memory, why that many; None
    where the LLM API's server carries them itself.
    """

    resolved: Resolved
    stages: list[tuple[str, str, str]]
    sizes: Sizes
    settings: checks.Settings
    notes: list[trtllm_flags.Note]
    command: list[str] | None
    placeholder: str | None
    model_yaml: str | None
    blocked: BuilderError | None
    refusal: BuilderError | None
    verdict: Verdict
    host: Machine
    missing: int
    kept: tuple[str, ...] = ()
    price: int = 0
    fp8: tuple[str, ...] = ()
    fp8_price: int = 0
    open_choice: bool = False
    streams: tuple[int, int, str] | None = None


def plan(resolved: Resolved, store: Store) -> Plan:
    """The plan for a recipe. `store` is a dry one: it finds artifacts and makes none."""
    model = checks.read_model(resolved.recipe.model, store)
    answers = probe_store.answers(resolved, store.root)
    settings = checks.check_model(resolved, model.config, layouts=True, answers=answers)
    if model.directory is not None:
        checks.check_tokenizer(resolved, model.directory, model.config)
    model = checks.keep_patterns(resolved, model, settings)
    blocked = refusal = None
    try:
        checks.check_machine(resolved)
    except BuilderError as error:
        blocked = error
    notes = checks.notes(resolved, model.config, answers, model.directory)
    done, first = pipeline.stored(resolved, store)
    stages = _stages(resolved, done, first) + _gate(resolved, store)
    check = _quality(resolved, model, store)
    at = 1 + max((n for n, (stage, *_) in enumerate(stages) if stage == "checkpoint"), default=0)
    stages[at:at] = check
    selection = next((artifact for artifact in done if artifact.stage == "selection"), None)
    if selection is not None:
        model = checks.with_chosen(resolved, model, selection.facts["modules"])
    asked, host = memory.serving(resolved, settings), memory.machine(store.root)
    sizes = checks.sizes(resolved, model, settings)
    price, fp8_price = memory.price_of_kept(model, asked), memory.price_of_fp8(model, asked)
    open_choice = resolved.recipe.quantization.kept_budget is not None and selection is None
    command, placeholder = _command(resolved, model.config, answers, store, done)
    launched = command, placeholder, _model_yaml(resolved, model.config)
    missing = sum(sizes.disk.get(stage, 0) for stage, state, _ in stages if state != "cached" and stage != "snapshot")
    notes += [trtllm_flags.Note("offline", text) for text in store.assumed]
    verdict = suggestions.judge(model, asked, resolved, host, gpus())
    if blocked is None:  # disk and memory are those of the machine that builds: this one, if it can
        remaining = [stage for stage, state, _ in stages if state != "cached"]
        refusal = checks.host_refusal(resolved, model, sizes, host, remaining)
    refusal = verdict.refusal or refusal
    return Plan(
        resolved,
        stages,
        sizes,
        settings,
        notes,
        *launched,
        blocked,
        refusal,
        verdict,
        host,
        missing,
        model.kept,
        price,
        model.fp8,
        fp8_price,
        open_choice,
        _streams(resolved, model.config, asked.max_batch_size),
    )


def _streams(resolved: Resolved, config: Mapping[str, Any], max_batch_size: int) -> tuple[int, int, str] | None:
    if resolved.recipe.target == "llmapi":
        return None
    part = resolved.recipe.repository
    count = stream_capacity.instances(part, max_batch_size)
    needs = stream_capacity.memory(count, int(config.get("vocab_size") or 0))
    return count, needs, stream_capacity.explain(part, max_batch_size)


def _command(
    resolved: Resolved, config: Mapping[str, Any], answers: Sequence[Answer], store: Store, done: Sequence[Artifact]
) -> tuple[list[str] | None, str | None]:
    """trtllm-build's for the checkpoint in the store, else for one named by a word, with that word."""
    if resolved.recipe.target != "engine":
        return None, None
    flags = trtllm_flags.resolve(resolved, config, answers)
    stage = "ranks" if resolved.recipe.engine.world_size > 1 else "checkpoint"
    made = next((artifact.path for artifact in done if artifact.stage == stage), None)
    placeholder = None if made else stage.upper()
    timing = engine.timing_cache(store.root, resolved.recipe.engine.tensorrt_llm)
    layout = (made or Path(stage.upper())) / "tensorrt_llm"
    return trtllm_flags.command(flags, checkpoint=layout, output=Path("ENGINE"), timing_cache=timing), placeholder


def _model_yaml(resolved: Resolved, config: Mapping[str, Any]) -> str | None:
    """What the llmapi target's model reads, with a word for the checkpoint."""
    if resolved.recipe.target != "llmapi":
        return None
    decoupled = resolved.recipe.repository.decoupled
    return llmapi_repository.model_yaml(
        Path("CHECKPOINT/unified"), llmapi_arguments.resolve(resolved, config), decoupled=decoupled
    )


def _stages(resolved: Resolved, done: Sequence[Artifact], first: WouldRun | None) -> list[tuple[str, str, str]]:
    """(stage, state, why) of the whole chain, of which `done` is in the store and `first` would run first."""
    rows = [(artifact.stage, "cached", artifact.path.name) for artifact in done]
    skipped = {"ranks", "engine"} if resolved.recipe.target == "llmapi" else set()
    skipped |= set() if resolved.recipe.engine.world_size > 1 else {"ranks"}
    stages = [stage for stage in STAGES if stage not in skipped]
    if resolved.recipe.quantization.kept_budget is not None:
        at = stages.index("checkpoint")
        stages[at:at] = ["texts", "sensitivity", "selection"]
    for stage in stages[len(rows) :]:
        why = first.why if first and first.stage == stage else f"its input comes from {rows[-1][0]}"
        rows.append((stage, "will run", why))
    return rows


def _quality(resolved: Resolved, model: memory.ModelFacts, store: Store) -> list[tuple[str, str, str]]:
    """The row of the quality check: what it found, or what it will cost. None where a gate takes its place."""
    part = resolved.recipe.quality
    if resolved.recipe.evaluation.limits:
        return []
    if not part.check:
        return [("quality", "skipped", "--no-quality-check: what quantization costs will not be known")]
    found = pipeline.quality_stored(resolved, store)
    if found is None or isinstance(found, WouldRun):
        from builder.quality.check import cost  # numpy

        took, needs = cost(model, resolved, memory.machine(store.root))
        asked = f"{part.texts} texts, BF16 against the checkpoint, must score {part.min_score:g}"
        return [("quality", "will run", f"{asked}; about {seconds(took)}, {size(needs)} of memory")]
    if found.unmeasured:
        return [("quality", "skipped", f"not checked: {found.unmeasured}")]
    failed = found.failure(part.min_score)
    said = f"FAILED: {failed}" if failed else f"score {found.score:.2f}, at least {part.min_score:g} asked: passed"
    return [("quality", "cached", f"{found.path.name if found.path else ''}, {said}")]


def _gate(resolved: Resolved, store: Store) -> list[tuple[str, str, str]]:
    """The row of the gate's evaluation, if there is a gate."""
    limits = resolved.recipe.evaluation.limits
    if not limits:
        return []
    gate = "a gate (" + ", ".join(f"{metric} {limit:g}" for metric, limit in limits.items()) + ")"
    try:
        found = pipeline.gate_stored(resolved, store)
    except EvaluationError as error:
        return [("evaluation", "cached", f"{gate}: {error.what}")]
    if isinstance(found, WouldRun):
        why = f"its input comes from {found.stage}"
        texts = "its texts are not read yet" if found.key else found.why  # no key: their commit is not known here
        known = {"scores": found.why, "texts": texts, "evaluation": "all scores are there"}
        return [("evaluation", "will run", f"{gate}: {known.get(found.stage, why)}")]
    passed = "passed" if found.verdict and found.verdict.passed else "failed"
    return [("evaluation", "cached", f"{found.path.name}, {gate}: {passed}")]
