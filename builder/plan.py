"""What a build would do, before it does it: stages, sizes, every value with its reason. No weight is read.

Sizes come from config.json and the headers of the safetensors files alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from builder import engine, fit, fit_change, kv_safety, pipeline, trtllm
from builder.errors import BuilderError
from builder.fit import Machine, Sizes
from builder.fit_change import Verdict
from builder.output import Output, size
from builder.quantize.modelopt import gpus
from builder.recipe import Resolved
from builder.store import STAGES, Store, WouldRun

FP8_KV = "FP8 KV cache"  # the note that is a warning


@dataclass(frozen=True)
class Plan:
    """`stages` are (stage, "cached" | "will run", why); `blocked` says why this machine can't build it, if so.

    `verdict` holds what each card of the profile has room for; `missing` the bytes that are still to be kept here;
    `kept` the linear layers left in BF16, and `price` the bytes that they add; `open_choice`: auto is still to choose.
    """

    resolved: Resolved
    stages: list[tuple[str, str, str]]
    sizes: Sizes
    flags: list[trtllm.Flag]
    notes: list[trtllm.Note]
    command: list[str] | None
    blocked: BuilderError | None
    verdict: Verdict
    host: Machine
    missing: int
    kept: tuple[str, ...] = ()
    price: int = 0
    open_choice: bool = False


def plan(resolved: Resolved, store: Store) -> Plan:
    """The plan for a recipe. `store` is a dry one: it finds artefacts and makes none."""
    model = pipeline.read_model(resolved.recipe.model, store)
    flags = pipeline.check_model(resolved, model.config, layouts=True)
    model = pipeline.keep_patterns(resolved, model, flags)
    blocked = None
    try:
        engine.check_machine(resolved)
    except BuilderError as error:
        blocked = error
    command = None
    split = resolved.recipe.engine.world_size > 1
    if resolved.recipe.target == "engine":
        command = trtllm.command(
            flags,
            checkpoint=Path("RANKS/tensorrt_llm" if split else "CHECKPOINT/tensorrt_llm"),
            output=Path("ENGINE"),
            timing_cache=store.root / "timing" / "model.cache",
        )
    notes = trtllm.notes(resolved, model.config, flags)
    if risk := kv_safety.warning(model.config, resolved.recipe.quantization.kv_cache_dtype):
        notes = [trtllm.Note(FP8_KV, risk), *notes]
    stages = _stages(resolved, store)
    selection = next((done for done in store.done if done.stage == "selection"), None)
    if selection is not None:
        model = pipeline.with_chosen(model, selection.facts["modules"])
    asked, host, sizes = fit.serving(resolved, flags), fit.machine(store.root), pipeline.sizes(resolved, model, flags)
    price = fit.price_of_kept(model, asked)
    open_choice = resolved.recipe.quantization.kept_budget is not None and selection is None
    missing = sum(sizes.disk.get(stage, 0) for stage, state, _ in stages if state != "cached" and stage != "snapshot")
    if blocked is None:
        blocked = fit_change.disk_refusal(sizes, host, missing)
    verdict = fit_change.judge(model, asked, resolved, host, gpus())
    return Plan(
        resolved, stages, sizes, flags, notes, command, blocked, verdict, host, missing, model.kept, price, open_choice
    )


def _stages(resolved: Resolved, store: Store) -> list[tuple[str, str, str]]:
    """The chain itself, run on a store that makes nothing: it stops at the first stage that would run."""
    first: WouldRun | None = None
    try:
        pipeline.build(resolved, store)
    except WouldRun as would:
        first = would
    rows = [(done.stage, "cached", done.path.name) for done in store.done]
    split = resolved.recipe.engine.world_size > 1
    stages = [stage for stage in STAGES if stage != "ranks" or split]
    if resolved.recipe.quantization.kept_budget is not None:
        at = stages.index("checkpoint")
        stages[at:at] = ["texts", "sensitivity", "selection"]
    for stage in stages[len(rows) :]:
        why = first.why if first and first.stage == stage else f"its input comes from {rows[-1][0]}"
        rows.append((stage, "will run", why))
    if gate := resolved.recipe.evaluation.limits:
        asked = ", ".join(f"{metric} {limit:g}" for metric, limit in gate.items())
        rows.append(("evaluation", "will run", f"a gate ({asked}): what was measured before is found then"))
    return rows


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
        ("KV cache", f"{s.kv_bytes_per_token / 1024:.1f} KiB a token, on each GPU"),
    ]


def _kept_rows(found: Plan) -> list[tuple[str, str]]:
    budget = found.resolved.recipe.quantization.kept_budget
    text = f"{len(found.kept)} linear layers, {size(found.price)} more" if found.kept or budget is not None else ""
    if found.open_choice:
        text += f"; auto:{budget:g} has not chosen yet, so all sizes here are without its layers"
    return [("left in BF16", text)] if text else []


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
        "trtllm-build flags",
        ["flag", "value", "why", "source"],
        [(f.name, f.value, f.reason, f.source) for f in found.flags],
    )
    if found.notes:
        out.table("what to know", ["rule", ""], [(note.rule, note.text) for note in found.notes])
    if found.command:
        out.text(" ".join(found.command))
    for note in found.notes:
        if note.rule == FP8_KV:
            out.warn(note.text)
    if found.blocked:
        out.warn(f"not on this machine: {found.blocked.what} {found.blocked.cure}")
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
            },
            "machine": {**asdict(found.host), "missing": found.missing},
            "values": {key: {"value": value, "from": origin} for key, value, origin in found.resolved.explained()},
            "flags": [vars(flag) for flag in found.flags],
            "notes": [vars(note) for note in found.notes],
            "command": found.command,
            "blocked": found.blocked.what if found.blocked else None,
        }
    )
