"""What a build would do, before it does it: stages, sizes, every value with its reason. No weight is read.

Sizes come from config.json and the headers of the safetensors files alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from builder import pipeline
from builder.checkpoint.requested_layouts import COMPRESSED_TENSORS
from builder.core.errors import BuilderError, EvaluationError
from builder.core.output import seconds, size
from builder.core.store import STAGES, Artifact, Store, WouldRun
from builder.formats import registry as formats
from builder.preflight import checks, memory, suggestions
from builder.preflight.learning import Learning
from builder.preflight.memory import Machine, Sizes
from builder.preflight.prepare import Prepared, prepare
from builder.preflight.suggestions import MemoryCheck
from builder.preflight.ways import Choice
from builder.quantize.modelopt import gpus
from builder.recipe.schema import Recipe, Resolved
from builder.targets.base import Launch, Made, Settings
from builder.triton.engine_parameters import Parameter
from builder.trtllm.rules import Note

Row = tuple[str, str, str]  # stage, "cached" | "will run" | "skipped", why


@dataclass(frozen=True)
class Plan:
    """The result of `plan`.

    prepared: the recipe and what follows from it, with the layers that `auto` chose. launch: the command or model.yaml.
    memory: the estimate for each card of the profile. missing: bytes still to be written to the output directory.
    blocked: why this machine cannot build it. refusal: what does not fit, on the card or on this machine.
    way: how this machine would quantize the model, and the other ways; None if it is not quantized.
    learning: what learning its rotations takes; None if none are learned.
    open_choice: `auto` has not chosen its layers yet. prices: the bytes that the single layers add, by their format.
    parameters: of the model in Triton that runs the engine or the LLM class.
    streams: concurrent streams, their bytes of host memory, and why that many; None if the target has no limit.
    """

    prepared: Prepared
    stages: list[Row]
    notes: list[Note]
    launch: Launch
    memory: MemoryCheck
    host: Machine
    way: Choice | None
    learning: Learning | None
    missing: int
    blocked: BuilderError | None
    refusal: BuilderError | None
    open_choice: bool
    prices: Mapping[str, int]
    parameters: Sequence[Parameter]
    streams: tuple[int, int, str] | None

    @property
    def resolved(self) -> Resolved:
        """The recipe with its GPU profile and the origin of each value."""
        return self.prepared.resolved

    @property
    def settings(self) -> Settings:
        """trtllm-build's flags or the LLM class's arguments."""
        return self.prepared.settings

    @property
    def sizes(self) -> Sizes:
        """Bytes of the model and of what is made of it."""
        return self.prepared.sizes


def plan(resolved: Resolved, store: Store) -> Plan:
    """The plan for a recipe. `store` is a dry one: it finds artifacts and makes none."""
    prepared = prepare(resolved, store)
    resolved = prepared.resolved
    blocked = _blocked(resolved)
    pipeline.check_target(resolved, store, "smoke")
    done, first = pipeline.stored(prepared, store)
    stages = _stages(prepared, done, first)
    at = 1 + next(n for n, (stage, *_) in enumerate(stages) if stage == "checkpoint")
    stages = [*stages[:at], *_quality(prepared, store), *stages[at:], *_gate(prepared, store)]
    selection = next((artifact for artifact in done if artifact.stage == "selection"), None)
    if selection is not None:
        prepared = prepared.with_chosen(selection.facts["modules"])
    host = memory.machine(store.root)
    way, learning = prepared.way(host), prepared.learning(host)
    checked = suggestions.judge(prepared.model, prepared.serving, resolved.gpu, host, gpus())
    remaining = [stage for stage, state, _ in stages if state != "cached"]
    refusal = checked.refusal
    if refusal is None and blocked is None:  # disk and memory are those of the machine that builds: this one, if it can
        refusal = checks.host_refusal(way, prepared.sizes, host, remaining)
        if learning and "transform" in remaining:
            refusal = refusal or learning.refusal
    return Plan(
        prepared=prepared,
        stages=stages,
        notes=[*prepared.notes, *(Note("offline", text) for text in store.assumed)],
        launch=prepared.target.launch(prepared.inputs, prepared.settings, Made(store.root, done)),
        memory=checked,
        host=host,
        way=way,
        learning=learning,
        missing=sum(prepared.sizes.disk.get(stage, 0) for stage in remaining if stage != "snapshot"),
        blocked=blocked,
        refusal=refusal,
        open_choice=resolved.recipe.quantization.kept_budget is not None and selection is None,
        prices={
            name: memory.price(prepared.model, prepared.serving, formats.get(name)) for name in prepared.model.layers
        },
        parameters=prepared.target.parameters(prepared.inputs, prepared.settings),
        streams=prepared.target.streams(prepared.inputs, prepared.serving.max_batch_size),
    )


def _blocked(resolved: Resolved) -> BuilderError | None:
    try:
        checks.check_machine(resolved)
    except BuilderError as error:
        return error
    return None


def _stages(prepared: Prepared, done: Sequence[Artifact], first: WouldRun | None) -> list[Row]:
    """The rows of the whole chain, of which `done` is in the store and `first` would run first."""
    rows: list[Row] = [(artifact.stage, "cached", artifact.path.name) for artifact in done]
    skipped = set() if prepared.target.facts.has_engine else {"ranks", "engine"}
    skipped |= set() if prepared.recipe.engine.world_size > 1 else {"ranks"}
    part = prepared.recipe.quantization
    beside = [COMPRESSED_TENSORS in part.layouts, part.save_pseudo is not None]  # each is a stage "layouts"
    skipped |= set() if any(beside) else {"layouts"}
    skipped |= set() if prepared.calibration else {"calibration"}
    skipped |= set() if prepared.recipe.transform.rotates else {"transform"}
    stages = [stage for stage in STAGES if stage not in skipped]
    if prepared.recipe.transform.learns:  # from the rows
        stages.remove("transform")
        stages.insert(stages.index("calibration") + 1, "transform")
    if all(beside):
        stages.insert(stages.index("layouts"), "layouts")
    if prepared.recipe.quantization.kept_budget is not None:
        at = stages.index("checkpoint")
        stages[at:at] = ["texts", "sensitivity", "selection"]
    at = stages.index("repository")
    stages[at:at] = ["adapter" for one in prepared.inputs.adapters if one.repository]  # each is downloaded
    for stage in stages[len(rows) :]:
        why = first.why if first and first.stage == stage else f"its input comes from {rows[-1][0]}"
        rows.append((stage, "will run", why))
    return rows


def _quality(prepared: Prepared, store: Store) -> list[Row]:
    """The row of the quality check: its result, or what it will cost. None where a gate replaces it."""
    recipe, part = prepared.recipe, prepared.recipe.quality
    if recipe.evaluation.limits:
        return []
    if why := prepared.why_not_checked:
        cost_unknown = ": what quantization costs will not be known" * (why == "--no-quality-check")
        return [("quality", "skipped", f"{why}{cost_unknown}")]
    from builder.quality.check import check_quality, cost  # numpy

    host = memory.machine(store.root)
    try:
        built = pipeline.run_stages(prepared, store, "checkpoint", original=True)
        found = check_quality(built.models, (built.prepared or prepared).model, recipe, host, store=store)
    except WouldRun:
        took, needs = cost(prepared.model, recipe, host)
        asked = f"{part.texts} texts, BF16 against the checkpoint, must score {part.min_score:g}"
        return [("quality", "will run", f"{asked}; about {seconds(took)}, {size(needs)} of memory")]
    if found.unmeasured:
        return [("quality", "skipped", f"not checked: {found.unmeasured}")]
    failed = found.failure(part.min_score)
    said = f"FAILED: {failed}" if failed else f"score {found.score:.2f}, at least {part.min_score:g} asked: passed"
    return [("quality", "cached", f"{found.path.name if found.path else ''}, {said}")]


def _gate(prepared: Prepared, store: Store) -> list[Row]:
    """The row of the gate's evaluation, if there is a gate."""
    recipe: Recipe = prepared.recipe
    limits = recipe.evaluation.limits
    if not limits:
        return []
    gate = "a gate (" + ", ".join(f"{metric} {limit:g}" for metric, limit in limits.items()) + ")"
    try:
        built = pipeline.run_stages(prepared, store, pipeline.stage_needed(recipe), original=True)
        found = pipeline.evaluate_built(built, recipe, store)
    except EvaluationError as error:
        return [("evaluation", "cached", f"{gate}: {error.what}")]
    except WouldRun as would:
        why = f"its input comes from {would.stage}"
        texts = "its texts are not read yet" if would.key else would.why  # no key: their commit is not known here
        known = {"scores": would.why, "texts": texts, "evaluation": "all scores are there"}
        return [("evaluation", "will run", f"{gate}: {known.get(would.stage, why)}")]
    passed = "passed" if found.verdict and found.verdict.passed else "failed"
    return [("evaluation", "cached", f"{found.path.name}, {gate}: {passed}")]
