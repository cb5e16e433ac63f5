"""What a build would do, before it does it: stages, sizes, every value with its reason. No weight is read.

Sizes come from config.json and the headers of the safetensors files alone.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from builder import pipeline
from builder.core.errors import BuilderError, EvaluationError
from builder.core.output import Output, seconds, size
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
    instances = stream_capacity.at_once(part, max_batch_size)
    needs = stream_capacity.memory(instances, int(config.get("vocab_size") or 0))
    return instances, needs, stream_capacity.explain(part, max_batch_size)


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
        known = {"scores": found.why, "texts": "its texts are not read yet", "evaluation": "all scores are there"}
        return [("evaluation", "will run", f"{gate}: {known.get(found.stage, why)}")]
    passed = "passed" if found.verdict and found.verdict.passed else "failed"
    return [("evaluation", "cached", f"{found.path.name}, {gate}: {passed}")]


MEMORY = ["", "memory", "weights", "workspace", "KV cache", "KV tokens", "at full length", "largest batch", ""]


def _size_rows(found: Plan) -> list[tuple[str, str]]:
    s, host = found.sizes, found.host
    ranks = "" if len(s.ranks) == 1 else f", {len(s.ranks)} ranks of up to {size(max(s.ranks))}"
    return [
        ("parameters", f"{s.parameters / 1e9:.3f} billion"),
        ("model files", size(s.download)),
        ("checkpoint, Hugging Face layout", size(s.unified)),
        ("checkpoint, TensorRT-LLM layout", size(s.checkpoint) + ranks),
        (
            "kept in the output directory",
            ", ".join(f"{name} {size(n)}" for name, n in s.disk.items() if n and name != "snapshot"),
        ),
        ("still to be made there", f"{size(found.missing)} ({size(host.disk)} free)"),
        ("memory while calibrating", f"{size(s.calibration_memory)} (this machine: {size(host.available)} available)"),
        *_kept_rows(found),
        *_stream_rows(found),
        ("KV cache", f"{s.kv_bytes_per_token / 1024:.1f} KiB a token, on each GPU"),
    ]


def _stream_rows(found: Plan) -> list[tuple[str, str]]:
    if found.streams is None:
        return []
    instances, needs, why = found.streams
    return [("streams at once", f"{instances} ({why}), a process each: {size(needs)} of host memory; others wait")]


def _kept_rows(found: Plan) -> list[tuple[str, str]]:
    part = found.resolved.recipe.quantization
    kept = (("bf16", "BF16", found.kept, found.price), ("fp8", "FP8", found.fp8, found.fp8_price))
    rows = []
    for name, label, modules, price in kept:
        auto = part.kept_budget is not None and part.kept_format == name
        text = f"{len(modules)} linear layers, {size(price)} more"
        if auto and found.open_choice:
            text += f"; auto:{part.kept_budget:g} has not chosen yet, so all sizes here are without its layers"
        rows += [(f"left in {label}", text)] if modules or auto else []
    return rows


def _memory_rows(verdict: Verdict) -> list[tuple[str, ...]]:
    """A row a card. Numbers are of the fullest rank."""
    return [
        (
            m.card + (" (verdict)" if m.card == verdict.card else ""),
            *(size(n) for n in (m.memory, m.weights, m.workspace, m.kv_cache)),
            str(m.kv_tokens),
            f"{m.sequences} sequences",
            str(m.largest_batch),
            "fits" if m.fits else f"lacks {size(m.lacking)}",
        )
        for m in verdict.memory
    ]


def _verdict(verdict: Verdict) -> dict[str, object]:
    refusal, change = verdict.refusal, verdict.change
    return {
        "card": verdict.card,
        "fits": refusal is None,
        "what": refusal.what if refusal else None,
        "why": refusal.why if refusal else None,
        "change": list(change.flags) if change else None,
    }


def show(found: Plan, out: Output) -> None:
    """For people: tables. With --json: the same as one object."""
    recipe = found.resolved.recipe
    out.table(f"plan: {recipe.model.id} on {found.resolved.gpu.name}", ["stage", "", "why"], found.stages)
    out.table("sizes", ["what", "size"], _size_rows(found))
    out.table("at run time", MEMORY, _memory_rows(found.verdict))
    out.table("values", ["key", "value", "from"], found.resolved.explained())
    out.table(
        "LLM arguments" if found.model_yaml else "trtllm-build flags",
        ["argument" if found.model_yaml else "flag", "value", "why", "source"],
        [(f.name, f.value, f.reason, f.source) for f in found.settings],
    )
    if found.notes:
        out.table("what to know", ["rule", ""], [(note.rule, note.text) for note in found.notes])
    if found.command:
        out.text(shlex.join(found.command))
    if found.model_yaml:
        out.text(found.model_yaml.rstrip())
    for note in found.notes:
        if note.rule == checks.FP8_KV:
            out.warn(note.text)
    if found.blocked:
        out.warn(f"not on this machine: {found.blocked.what} {found.blocked.hint}")
    out.result(
        {
            "model": recipe.model.id,
            "gpu": found.resolved.gpu.name,
            "target": recipe.target,
            "stages": [{"stage": stage, "state": state, "why": why} for stage, state, why in found.stages],
            "sizes": asdict(found.sizes),
            "memory": [{**asdict(m), "fits": m.fits} for m in found.verdict.memory],
            "verdict": _verdict(found.verdict),
            "kept": {
                "modules": list(found.kept),
                "bytes": None if found.open_choice else found.price,
                "open_choice": found.open_choice,
                "fp8_modules": list(found.fp8),
                "fp8_bytes": None if found.open_choice else found.fp8_price,
            },
            "streams": None
            if found.streams is None
            else dict(zip(("at_once", "bytes", "why"), found.streams, strict=True)),
            "machine": {**asdict(found.host), "missing": found.missing},
            "values": {key: {"value": value, "from": origin} for key, value, origin in found.resolved.explained()},
            "arguments" if found.model_yaml else "flags": [vars(setting) for setting in found.settings],
            "notes": [vars(note) for note in found.notes],
            "command": found.command,
            "model_yaml": found.model_yaml,
            "blocked": found.blocked.what if found.blocked else None,
            "refusal": found.refusal.what if found.refusal else None,
        }
    )


def show_command(found: Plan, out: Output) -> None:
    """The trtllm-build command alone, ready to paste. With --json also as words, and the word still to be filled in."""
    if found.model_yaml:
        raise checks.no_engine()
    none = None if found.command else f"The {found.resolved.recipe.target} target runs no trtllm-build."
    shell = []
    if found.command:
        cache = Path(found.command[found.command.index("--output_timing_cache") + 1])
        if not cache.parent.is_dir():  # trtllm-build makes no directory for it, and would fail at its very end
            shell.append(shlex.join(["mkdir", "-p", str(cache.parent)]))
        shell.append(shlex.join(found.command))
    for line in shell:
        out.text(line)
    if none:
        out.info(f"{none} To see an engine's: --gpu sm120 (`builder gpus`).")
    if found.placeholder:
        made = "`builder quantize`" if found.placeholder == "CHECKPOINT" else "`builder engine`, before the engine,"
        out.warn(f"{found.placeholder} stands for a directory that is not made yet: {made} makes it in the store.")
    if found.blocked and found.command:
        out.warn(f"not on this machine: {found.blocked.what} {found.blocked.hint}")
    out.result(
        {
            "target": found.resolved.recipe.target,
            "command": found.command,
            "shell": shell,
            "placeholder": found.placeholder,
            "why": none,
            "flags": [vars(flag) for flag in found.settings],
            "blocked": found.blocked.what if found.blocked else None,
        }
    )
