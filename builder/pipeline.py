"""The stages in order: model and GPU name in, tested Triton repository out. Start reading here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from builder.calibration.rows import Calibration, calibrate, check_conversations, read_rows
from builder.checkpoint.layouts import Checkpoint
from builder.checkpoint.requested_layouts import write_requested
from builder.core import usage
from builder.core.output import Output
from builder.core.store import STAGES, Artifact, Store, WouldRun
from builder.core.usage import Usage
from builder.evaluate import tasks
from builder.evaluate.variants import Models
from builder.hub.snapshot import Snapshot, fetch, open_source
from builder.preflight import checks, ways
from builder.preflight.memory import machine
from builder.preflight.prepare import Prepared, check_fit, check_learning, prepare, tell
from builder.preflight.quantized import Quantized, check_runners, compares, not_quantizable, opened
from builder.preflight.zero_layers import keep_zeros
from builder.publish.publication import publish
from builder.publish.verdict import BuildVerdict
from builder.quantize import modelopt, streamed
from builder.quantize.data_free import ahead_of, write_data_free
from builder.quantize.early import Early
from builder.quantize.imported import ImportRequest, import_checkpoint, tokenizer_source
from builder.quantize.modelopt import QuantizeRequest, quantize
from builder.quantize.pseudo_stage import save_pseudo
from builder.quantize.scales import ScalesRequest
from builder.quantize.streamed import quantize_streamed
from builder.quantize.unquantized import write_checkpoint
from builder.recipe.schema import Recipe, Resolved
from builder.serving.smoke import SmokeReport, smoke_test
from builder.targets import target
from builder.targets.base import no_engine
from builder.transform.stage import transformed
from builder.triton.repository import Repository
from builder.trtllm.engine import Engine

if TYPE_CHECKING:
    from builder.evaluate.comparison import Candidate
    from builder.evaluate.parts.figures import Losses
    from builder.evaluate.sensitivity.stage import Sensitivity
    from builder.evaluate.stage import Evaluation
    from builder.quality.check import Quality


@dataclass(frozen=True)
class Built:
    """The artifacts of a build. A part is None where the build stopped before it.

    snapshot: what is quantized, so of a transformed model the transformed one. original: what it was made from, which
    measurements compare with; of a quantized model only if one needs it. link: None also where the verdict is "failed".
    repository: None also where the quality check failed.
    """

    snapshot: Snapshot
    prepared: Prepared | None = None
    calibration: Calibration | None = None
    checkpoint: Checkpoint | None = None
    layouts: Artifact | None = None
    pseudo: Artifact | None = None
    quality: Quality | None = None
    engine: Engine | None = None
    repository: Repository | None = None
    smoke: SmokeReport | None = None
    evaluation: Evaluation | None = None
    verdict: BuildVerdict | None = None
    link: Path | None = None
    original: Snapshot | None = None

    @property
    def models(self) -> Models:
        """What an evaluation can measure, with the model that BF16 means and that the tokenizer is from."""
        source = self.original or (tokenizer_source(self.checkpoint, self.snapshot) if self.checkpoint else None)
        rotated = self.snapshot if self.snapshot.artifact.stage == "transform" else None
        return Models(source or self.snapshot, self.calibration, self.checkpoint, self.repository, rotated)


WORKERS = {"whole": modelopt.worker, "low": streamed.worker}
WORTH_TELLING = 5.0  # seconds from which a user wants to know what took them
# How far a build must go for each runner of an evaluation.
NEEDS = {
    "bf16": "snapshot",
    "simulated": "checkpoint",
    "checkpoint": "checkpoint",
    "reference": "checkpoint",
    "served": "repository",
}


def build(resolved: Resolved, store: Store, *, until: str = "smoke") -> Built:
    """Runs the stages up to `until` (a name of store.STAGES). A stage that is in the store is not run again.

    A repository is published, that is linked from models/, if it passes the recipe's accuracy gate or, without one,
    the quality check, which runs before the engine is built. All artifacts are kept, and so is the verdict.
    """
    recipe = resolved.recipe
    gate = bool(recipe.evaluation.limits) and STAGES.index(until) >= STAGES.index(stage_needed(recipe))
    quality = recipe.quality.check and not recipe.evaluation.limits
    built = _run(resolved, store, until, quality=quality, measured=gate)
    if store.dry or built.verdict:  # the quality check failed
        return built
    if gate:
        built = replace(built, evaluation=evaluate_built(built, recipe, store))
    return built if built.repository is None else _published(built, store)


def measure(
    resolved: Resolved, store: Store, *, against: Sequence[str] = (), prepared: Prepared | None = None
) -> Evaluation:
    """Builds what the recipe's runners need, and measures it, by questions too where the recipe names tasks.

    against: directories with quantized checkpoints of the same model, and candidates.DATA_FREE, to compare with.
    prepared: what prepare returned for this recipe, if it is known.
    """
    recipe = resolved.recipe
    if recipe.tasks.names:
        tasks.check(recipe.tasks, store)
    if not against:
        built = _run(resolved, store, stage_needed(recipe), measured=True, prepared=prepared)
        return evaluate_built(built, recipe, store, with_tasks=True)
    from builder.evaluate import candidates  # for those who compare

    base = candidates.base_of(recipe.model, store=store)
    places = [place for place in against if place != candidates.DATA_FREE]
    opened = candidates.open_directories(places, base, store=store)
    if len(places) < len(against):
        candidates.check_data_free(recipe, quantized=base.quantized or recipe.model.original is not None)
    needed = max(stage_needed(recipe), "checkpoint", key=STAGES.index)
    built = _run(resolved, store, needed, measured=True, prepared=prepared)
    found = [one.candidate(store) for one in opened]
    if len(places) < len(against):
        assert built.prepared is not None
        found.insert(0, candidates.data_free(built.snapshot, _request(built.prepared), store=store))
    return evaluate_built(built, recipe, store, with_tasks=True, against=found)


def _run(
    resolved: Resolved,
    store: Store,
    until: str,
    *,
    quality: bool = False,
    measured: bool = False,
    prepared: Prepared | None = None,
) -> Built:
    """Checks everything that can be checked before any work, then runs the stages.

    measured: the recipe's runners will measure the result. prepared: what prepare returned, if it is known."""
    check_target(resolved, store, until)
    if until == "snapshot":
        source = open_source(resolved.recipe.model, store=store)
        if source.quantized:
            opened(source)  # says what can't be served before it is downloaded
        if not (source.quantized and measured):
            return Built(fetch(resolved.recipe.model, store=store, source=source))
        until = "checkpoint"  # BF16 is then the original, which is fetched with it
    wanted = stages_until(until)
    prepared = prepared or prepare(resolved, store, layouts="engine" in wanted)
    if prepared.quantized and (measured or resolved.recipe.evaluation.limits):
        check_runners(resolved.recipe, prepared.quantized)
    quality = quality and "repository" in wanted
    return run_stages(
        prepared, store, until, quality=quality, original=quality or (measured and compares(resolved.recipe))
    )


def stages_until(until: str) -> tuple[str, ...]:
    """The stages from the first to this one."""
    return STAGES[: STAGES.index(until) + 1]


def check_target(resolved: Resolved, store: Store, until: str) -> None:
    """Rejects, before any work, stages that the target does not have or that this machine cannot run."""
    wanted, by = stages_until(until), target(resolved.recipe.target)
    if until in ("ranks", "engine") and not by.facts.has_engine:
        raise no_engine()
    if "engine" in wanted and not store.dry:
        checks.check_machine(resolved, serving="smoke" in wanted)
    if "repository" in wanted:
        by.check_templates(resolved.recipe.engine.tensorrt_llm)


def run_stages(prepared: Prepared, store: Store, until: str, *, quality: bool = False, original: bool = False) -> Built:
    """The stages in order. With `quality`, it ends after the checkpoint if the quality check fails.

    original: fetch what a quantized model was made from too, if it was named, because something compares with it."""
    wanted = stages_until(until)
    early = _early(prepared, store) if "checkpoint" in wanted and not store.dry else Early()
    with closing(early):
        return _run_stages(prepared, store, wanted, early, quality=quality, original=original)


def _early(prepared: Prepared, store: Store) -> Early:
    """What begins before all files of the model are there and hashed: the data-free writer, unless weights are rotated
    first, or for a local directory the worker that calibrates, unless layers are measured before."""
    if prepared.data_free and prepared.recipe.transform.rotates:
        return Early()
    if prepared.data_free:
        return Early(ahead=ahead_of(prepared.source, _request(prepared), store=store))
    is_first = prepared.quantized is None and prepared.recipe.quantization.kept_budget is None
    choice = prepared.way(machine(store.root)) if prepared.source.times and is_first else None
    return Early(worker=WORKERS[choice.taken.name](store), way=choice.taken.name) if choice else Early()


def _run_stages(
    prepared: Prepared, store: Store, wanted: Sequence[str], early: Early, *, quality: bool, original: bool
) -> Built:
    recipe, asked = prepared.recipe, prepared

    def check_room(prepared: Prepared) -> None:
        if "engine" in wanted and not store.dry:
            check_fit(prepared, store, made=lambda: [artifact.stage for artifact in stored(asked, store)[0]])

    check_room(prepared)
    check_learning(prepared, store)
    used = usage.started()

    def before() -> None:
        checks.check_architecture(recipe.model, asked.model, store)
        early.begin()

    arrived = early.ahead.arrived if early.ahead else None
    snapshot = fetch(recipe.model, store=store, source=prepared.source, before=before, arrived=arrived)
    if early.ahead:
        early.ahead.complete()
    if "transform" not in wanted:
        return Built(snapshot)
    if "checkpoint" in wanted:
        tell(prepared, store)
    elif prepared.quantized is not None:
        return Built(snapshot, prepared)
    if prepared.quantized is not None:
        imported = _imported(prepared, prepared.quantized, snapshot, store)
        named = prepared.quantized.original
        if named and original:
            imported = replace(imported, original=fetch(named.model, store=store, source=named))
        return _serve(_checked(imported, store) if quality else imported, wanted, store)

    source, snapshot = snapshot, _transformed(prepared, snapshot, store)
    rotated_from = source if recipe.transform.rotates else None
    if "checkpoint" not in wanted:
        part = prepared.calibration if "calibration" in wanted else None
        rows = calibrate(part, store=store) if part else None
        return Built(snapshot, prepared, rows, original=rotated_from)
    if recipe.quantization.as_it_is:
        plain = Built(snapshot, prepared, checkpoint=write_checkpoint(snapshot, store=store), original=rotated_from)
        return _serve(plain, wanted, store)

    built = replace(_made(prepared, snapshot, store, early, check_room), original=rotated_from)
    _tell_limit(used(), store)
    return _serve(_checked(built, store) if quality else built, wanted, store)


def _made(
    prepared: Prepared, snapshot: Snapshot, store: Store, early: Early, check_room: Callable[[Prepared], None]
) -> Built:
    """The quantized checkpoint, with what it was calibrated on. check_room: for more layers in higher precision."""
    prepared = keep_zeros(prepared, snapshot, store.out)
    if prepared.zero_layers:
        check_room(prepared)
    calibration = None
    if prepared.calibration is not None:
        calibration = calibrate(prepared.calibration, store=store)
        check_conversations(read_rows(calibration), snapshot.path)
    if calibration is not None and prepared.recipe.quantization.kept_budget is not None:
        from builder.evaluate.sensitivity.choose import choose_excluded  # numpy: only for those who measure

        prepared = choose_excluded(prepared, snapshot, calibration, store)
        check_room(prepared)
    if calibration is None:
        checkpoint = write_data_free(snapshot, _request(prepared), store=store, ahead=early.ahead)
    else:
        checkpoint = _quantized(prepared, snapshot, calibration, store, early)
    return Built(snapshot, prepared, calibration, checkpoint)


def _transformed(prepared: Prepared, snapshot: Snapshot, store: Store) -> Snapshot:
    """The model as it is quantized, whose rotations may be learned from the calibration rows first."""
    recipe = prepared.recipe
    if not recipe.transform.learns:
        return transformed(snapshot, recipe.transform, store=store)
    from builder.transform.learned import Rows

    calibration = calibrate(recipe.calibration, store=store)
    check_conversations(read_rows(calibration), snapshot.path)
    part = recipe.quantization.number_format.name
    rows = Rows(calibration, recipe.calibration.seq_len, part, prepared.model.layers, recipe.model.trust_remote_code)
    return transformed(snapshot, recipe.transform, rows, store=store)


def _request(prepared: Prepared) -> QuantizeRequest:
    recipe, trusted = prepared.recipe, prepared.recipe.model.trust_remote_code
    return QuantizeRequest(
        recipe.quantization, recipe.calibration, prepared.model.layers, trusted, prepared.zero_layers
    )


def _quantized(
    prepared: Prepared, snapshot: Snapshot, calibration: Calibration, store: Store, early: Early
) -> Checkpoint:
    """The checkpoint, made in the way that preflight chose. With --memory auto, one that is in the store is taken,
    whichever way made it, so that on a machine with other memory nothing is calibrated again."""
    request = _request(prepared)
    by = {"whole": quantize, "low": quantize_streamed}
    taken = _way(prepared, store, lambda way, dry: by[way](snapshot, calibration, request, store=dry))
    with closing(early):  # unused if the checkpoint is in the store
        return by[taken](
            snapshot, calibration, request, store=store, early=early.worker if early.way == taken else None
        )


def _way(prepared: Prepared, store: Store, make: Callable[[str, Store], object]) -> str:
    """The way that preflight chose or, if its result is not in the store, another one that is as good and whose is."""
    choice = prepared.way(machine(store.root))
    assert choice is not None

    def is_stored(way: str) -> bool:
        dry = Store(store.root, Output("quiet"), force=sorted(store.force), dry=True)
        try:
            make(way, dry)
        except WouldRun:
            return False
        return True

    taken = choice.taken.name
    if choice.as_good and not is_stored(taken):
        return next(filter(is_stored, choice.as_good), taken)
    return taken


def _tell_limit(used: Usage, store: Store) -> None:
    """Prints what limited the stages from the download to the checkpoint, if they took a while."""
    made = {done.stage: done for done in store.done if not done.cached}
    if "checkpoint" not in made or used.seconds < WORTH_TELLING:
        return
    fetched = made.get("snapshot")
    if fetched is not None and fetched.facts["revision"]:
        nbytes = sum(file["size"] for file in fetched.facts["external"]["files"].values())
        used = usage.with_download(used, nbytes, fetched.manifest["seconds"])
    store.out.info(usage.sentence(used))


def _imported(prepared: Prepared, quantized: Quantized, snapshot: Snapshot, store: Store) -> Built:
    """The checkpoint of a model that is quantized already."""
    recipe = prepared.recipe
    layouts = ("unified", "tensorrt_llm") if quantized.writes_engine_layout else ("unified",)
    companions = quantized.original if quantized.found.layout == "tensorrt_llm" else None
    asked = ImportRequest(quantized.found, quantized.cache, quantized.formats, layouts, companions)
    if recipe.calibration.scales:
        rows = calibrate(recipe.calibration, store=store)
        check_conversations(read_rows(rows), prepared.model.directory or snapshot.path)
        part = ScalesRequest(recipe.calibration, quantized.cache.name, recipe.model.trust_remote_code)
        by = {way: replace(asked, rows=rows, scales=replace(part, by_layer=way == "low")) for way in ("whole", "low")}
        asked = by[_way(prepared, store, lambda way, dry: import_checkpoint(snapshot, by[way], store=dry))]
    checkpoint = import_checkpoint(snapshot, asked, store=store)
    return Built(snapshot, prepared, asked.rows, checkpoint)


def _checked(built: Built, store: Store) -> Built:
    """With the result of the quality check, and a verdict only if it failed."""
    assert built.prepared is not None
    if store.dry or (built.prepared.quantized and built.original is None):
        return built
    from builder.quality.accept import check_checkpoint  # numpy: only for those who measure

    found, verdict = check_checkpoint(built.prepared, built.models, store)
    return replace(built, quality=found, verdict=verdict)


def _serve(built: Built, wanted: Sequence[str], store: Store) -> Built:
    """The stages after the checkpoint, unless it failed the quality check."""
    prepared, checkpoint = built.prepared, built.checkpoint
    assert prepared is not None
    assert checkpoint is not None
    if built.verdict:
        return built
    part = prepared.recipe.quantization
    requested = write_requested(checkpoint, part.layouts, store=store)
    pseudo = save_pseudo(checkpoint, part.save_pseudo, algorithm=part.algorithm, store=store)
    built = replace(built, layouts=requested, pseudo=pseudo)
    if "ranks" not in wanted:
        return built
    snapshot = tokenizer_source(checkpoint, built.snapshot)
    served = prepared.target.serve_layout(checkpoint, snapshot, prepared.stages(wanted, store))
    built = replace(built, engine=served.engine, repository=served.repository)
    if built.repository is not None and "smoke" in wanted:
        built = replace(built, smoke=smoke_test(built.repository, store=store))
    return built


def _published(built: Built, store: Store) -> Built:
    """With its verdict and, unless that is "failed", its link in models/."""
    from builder.quality.accept import judge

    assert built.prepared is not None
    assert built.repository is not None
    recipe, unchecked = built.prepared.recipe, built.prepared.why_not_checked
    verdict = judge(recipe, built.repository, built.evaluation, built.quality, store=store, unchecked=unchecked)
    link = None if verdict.status == "failed" else publish(built.prepared, built.repository, store)
    return replace(built, verdict=verdict, link=link)


def stage_needed(recipe: Recipe) -> str:
    """The last stage that the recipe's runners need."""
    part = recipe.evaluation
    needs = [NEEDS[runner] for runner in part.runners] + ["checkpoint"] * part.compare_kv
    return max(needs, key=STAGES.index)


def evaluate_built(
    built: Built, recipe: Recipe, store: Store, *, with_tasks: bool = False, against: Sequence[Candidate] = ()
) -> Evaluation:
    """The evaluation of what was built; with `with_tasks` on the recipe's tasks too. against: what to compare with."""
    from builder.evaluate.stage import evaluate  # numpy: only for those who measure

    return evaluate(built.models, recipe, store=store, with_tasks=with_tasks, against=against)


def measure_layers(resolved: Resolved, store: Store, *, proxy: bool = False) -> Sensitivity:
    """The loss of each group of linear layers; with `proxy` its errors of outputs or, without texts, of weights."""
    from builder.evaluate.sensitivity import stage as sensitivity_stage

    recipe = resolved.recipe
    if not proxy:
        sensitivity_stage.check_texts(recipe)
    prepared = prepare(resolved, store, layouts=False)
    if prepared.quantized:
        raise not_quantizable(recipe.model.id, "The loss of each layer is measured")
    if not (proxy and recipe.sensitivity.data is None):
        ways.check_measured(recipe)
        if (choice := prepared.way(machine(store.root))) is not None:
            ways.check_fits(choice)
    snapshot = fetch(recipe.model, store=store, source=prepared.source)
    snapshot = _transformed(prepared, snapshot, store)
    prepared = keep_zeros(prepared, snapshot, store.out)
    if proxy and recipe.sensitivity.data is None:
        algorithm = sensitivity_stage.algorithm_of(recipe, prepared.model)
        return sensitivity_stage.weight_errors(snapshot, prepared.model, store, algorithm)
    part = recipe.calibration
    if part.data_free:  # of weights alone; the worker that loads the model wants a row
        part = part.model_copy(update={"samples": 1})
    calibration = calibrate(part, store=store)
    check_conversations(read_rows(calibration), snapshot.path)
    return sensitivity_stage.sensitivity(snapshot, calibration, prepared.model, recipe, store=store, proxy=proxy)


def measure_parts(resolved: Resolved, store: Store) -> Losses:
    """What the recipe's checkpoint loses by its weights, by the inputs of its layers, and by its KV cache."""
    from builder.evaluate.parts import stage as parts  # numpy: only for those who measure

    parts.check(resolved.recipe)
    prepared = prepare(resolved, store, layouts=False)
    parts.check_model(prepared.model, prepared.recipe, quantized=prepared.quantized is not None)
    models = run_stages(prepared, store, "checkpoint", original=True).models
    assert models.checkpoint is not None
    model = models.transformed or models.snapshot  # whose weights the checkpoint rounds
    return parts.measure_parts(model, models.checkpoint, prepared.recipe, store=store)


def stored(prepared: Prepared, store: Store) -> tuple[list[Artifact], WouldRun | None]:
    """The artifacts of this build that are in the store, and the first stage that would run."""
    dry = Store(store.root, Output("quiet"), force=sorted(store.force), dry=True)
    dry.assumed = store.assumed
    try:
        run_stages(prepared, dry, "smoke")
    except WouldRun as would:
        return dry.done, would
    return dry.done, None
