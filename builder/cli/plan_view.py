"""How a plan is printed: decisions first, in tables, or everything in one object with --json."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from builder.core.output import Output, seconds, size
from builder.formats import algorithms
from builder.formats import registry as formats
from builder.formats.registry import BF16, FP8
from builder.plan import Plan
from builder.preflight import checks, rotating, ways
from builder.preflight.suggestions import MemoryCheck
from builder.preflight.ways import Choice
from builder.recipe.triton_parameters import PREFIX
from builder.targets.base import no_engine

MEMORY = ["card", "memory", "weights", "workspace", "KV cache", "KV tokens", "at full length", "largest batch", "fits"]


WAYS = ["way", "flag", "memory", "time", "time is", "taken"]


def show(
    found: Plan,
    out: Output,
    *,
    complete: bool = False,
    build: Sequence[str] = (),
    beside: Mapping[str, object] | None = None,
) -> None:
    """Prints a plan: decisions, stages, what was chosen, notes, sizes. With --json everything, as one object.

    `complete` adds the values and flags that are defaults, the memory of every card, and the command or model.yaml that
    launches TensorRT-LLM. `build` is the command that builds this plan, printed at the end. `beside`: for --json, how
    the card is divided among several models.
    """
    show_decisions(found, out)
    out.table("stages", ["stage", "state", "why"], found.stages)
    _show_settings(found, out, complete)
    if found.way:
        out.table("ways to quantize", WAYS, _way_rows(found.way))
    if found.notes:
        out.table("notes", ["rule", "note"], [(note.rule, note.text) for note in found.notes])
    out.table("sizes", ["what", "size"], _size_rows(found))
    out.table("memory at run time", MEMORY, _memory_rows(found.memory, complete))
    if complete and (launched := shlex.join(found.launch.command) if found.launch.command else found.launch.model_yaml):
        out.text(launched.rstrip())
    for note in found.notes:
        if note.rule in (checks.FP8_KV, checks.ROTATED):
            out.warn(note.text)
    if found.blocked:
        out.warn(f"not on this machine: {found.blocked.what} {found.blocked.hint}")
    if not complete:
        out.text("more       --all: every value, flag and card, and what launches TensorRT-LLM")
    if build and not (found.refusal or found.blocked):
        out.text(f"next       {shlex.join(build)}")
    out.result({**_as_object(found), "beside": beside})


def show_decisions(found: Plan, out: Output) -> None:
    """Prints what is built, in which formats, and whether it fits."""
    out.table(
        f"plan: {found.resolved.recipe.model.id} on {found.resolved.gpu.name}",
        ["decision", "value", "from"],
        _decision_rows(found),
    )


def _show_settings(found: Plan, out: Output, complete: bool) -> None:
    """The recipe's values, and trtllm-build's flags or the LLM class's arguments. Without defaults unless complete."""
    which = "" if complete else " that are not defaults"
    values = [row for row in found.resolved.explained() if complete or not _is_default(row[2])]
    out.table(f"values{which}", ["key", "value", "from"], values)
    title, column = ("LLM arguments", "argument") if found.launch.model_yaml else ("trtllm-build flags", "flag")
    flags = [(f.name, f.value, f.reason, f.source) for f in found.settings if complete or not _is_default(f.reason)]
    out.table(f"{title}{which}", [column, "value", "why", "source"], flags)
    served = [vars(one) for one in found.parameters if complete or one.reason.startswith(PREFIX)]
    if served:
        rows = [tuple(one.values()) for one in served]
        out.table("parameters in Triton", ["parameter", "value", "why", "source"], rows)


def _is_default(reason: str) -> bool:
    """Whether a value or flag is one that nobody chose: neither a user, nor a profile, nor a rule."""
    return reason.startswith(("default", "the default"))


def _decision_rows(found: Plan) -> list[tuple[str, str, str]]:
    """(decision, value, who or what decided) for what is built, in which formats, and whether it fits."""
    recipe, gpu = found.resolved.recipe, found.resolved.gpu
    origin = {key: why for key, _, why in found.resolved.explained()}
    parallel = f", {recipe.engine.world_size} GPUs (tp {recipe.engine.tp}, pp {recipe.engine.pp})"
    card = f"{gpu.card.name}, " if gpu.card else ""
    decisions = [
        ("model", f"{recipe.model.id}, {_parameters(found.sizes.parameters)}", origin["model.id"]),
        ("GPU", f"{card}{gpu.name}: {gpu.title}" + parallel * (recipe.engine.world_size > 1), origin["gpu"]),
        ("target", f"{recipe.target}, TensorRT-LLM {recipe.engine.tensorrt_llm}", origin["target"]),
        *([("transform", recipe.transform.title, origin["transform.name"])] if recipe.transform.rotates else []),
        *_rotating_rows(found),
        *_learning_rows(found),
        *_format_rows(found, origin["quantization.format"]),
        (
            "KV cache",
            recipe.quantization.cache_format.title.replace("KV cache", "").strip(),
            origin["quantization.kv_cache_dtype"],
        ),
        _calibration_row(found, origin["calibration.data"]),
        *_fit_rows(found),
    ]
    if found.blocked:
        decisions.append(("on this machine", f"no: {found.blocked.what}", found.blocked.hint))
    return decisions


def _rotating_rows(found: Plan) -> list[tuple[str, str, str]]:
    """What folding rotations into the weights costs."""
    took = rotating.seconds(found.resolved.recipe, found.prepared.model)
    if took is None:
        return []
    about = f"about {seconds(took)}" if took >= 1 else "less than a second"
    return [
        ("rotating costs", f"{about}, beside reading and writing {size(found.sizes.disk['transform'])}", ways.BASIS)
    ]


def _learning_rows(found: Plan) -> list[tuple[str, str, str]]:
    """What learning the rotations costs."""
    if found.learning is None:
        return []
    took = "time unknown" if found.learning.seconds is None else f"about {seconds(found.learning.seconds)}"
    basis = ways.NOT_MEASURED if found.learning.seconds is None else ways.BASIS
    return [("learning costs", f"{took}, about {size(found.learning.memory)} of memory, in float32", basis)]


def _format_rows(found: Plan, origin: str) -> list[tuple[str, str, str]]:
    """The formats of the layers: chosen, or those that a quantized model is in."""
    taken = found.prepared.quantized
    if taken is None:
        part = found.resolved.recipe.quantization
        origins = {key: why for key, _, why in found.resolved.explained()}
        rounding = (part.algorithm, algorithms.ALGORITHMS[part.algorithm].title)
        searched = [("algorithm", ": ".join(rounding), origins["quantization.algorithm"])] * (part.algorithm != "max")
        searched += _rounding_rows(found.way)
        return [("format", part.title, origin), *searched, *((w, text, "recipe") for w, text in _kept_rows(found))]
    tool, layout, kinds = taken.explained()
    written = "ModelOpt's Hugging Face layout" + ", TensorRT-LLM's layout" * taken.writes_engine_layout
    return [
        ("quantized already", f"by {tool}, in {layout}", "its files"),
        *((f"in {title}", text, "its config and headers") for title, text in kinds),
        ("will be written", f"{written}; no weight is quantized again", "target"),
    ]


def _rounding_rows(choice: Choice | None) -> list[tuple[str, str, str]]:
    """What the algorithm costs."""
    if choice is None or choice.taken.rounding is None:
        return []
    cost, way = choice.taken.rounding, choice.taken
    took = "time unknown" if cost.seconds is None else "less than a second"
    if cost.seconds is not None and cost.seconds >= 1:
        took = f"about {seconds(cost.seconds)}"
    held = f" and {size(cost.memory)} of memory" * (cost.memory > 0)
    again = f", the rows up to {cost.passes} times, as only so many Hessians fit into memory" * (cost.passes > 1)
    return [("algorithm costs", f"{took}{held} more than max; {ways.TITLES[way.name]}{again}", way.basis)]


def _calibration_row(found: Plan, origin: str) -> tuple[str, str, str]:
    rows = found.prepared.calibration
    if rows is None:
        return "calibration", "none", found.prepared.why_not_calibrated
    what = "scales of inputs and KV cache only: " * (found.prepared.quantized is not None)
    return "calibration", f"{what}{rows.samples} rows of {rows.data}, up to {rows.seq_len} tokens", origin


def _parameters(count: int) -> str:
    millions = count / 1e6
    return f"{millions / 1000:.2f} billion parameters" if millions >= 1000 else f"{millions:.1f} million parameters"


def _fit_rows(found: Plan) -> list[tuple[str, str, str]]:
    """Whether it fits on the card that was named, is here, or is the largest; and on the profile's other cards."""
    verdict = found.memory
    if verdict.refusal:
        rows = [("fits", f"no: {verdict.refusal.what}", verdict.refusal.hint)]
    elif found.refusal:
        rows = [("fits", f"no: {found.refusal.what}", found.refusal.hint)]
    else:
        [card] = [m for m in verdict.cards if m.card == verdict.card]
        room = f"{size(card.kv_cache)} of KV cache, {card.sequences} sequences of full length"
        rows = [("fits", f"yes, on {verdict.card}: {room}", f"{size(card.needed)} of {size(card.memory)} needed")]
    small = [m.card for m in verdict.cards if not m.fits and m.card != verdict.card]
    if small:
        rows.append(("does not fit on", ", ".join(small), "memory of the card"))
    return rows


def _kept_rows(found: Plan) -> list[tuple[str, str]]:
    part, model = found.resolved.recipe.quantization, found.prepared.model
    rows = []
    for name in dict.fromkeys((BF16.name, FP8.name, *model.layers)):
        modules = model.modules(name)
        auto = part.kept_budget is not None and part.kept_format == name
        text = f"{len(modules)} linear layers, {size(found.prices.get(name, 0))} more"
        if auto and found.open_choice:
            text += f"; auto:{part.kept_budget:g} has not chosen its layers yet, so no size here includes them"
        rows += [(f"left in {formats.get(name).title}", text)] if modules or auto else []
    return rows


def _size_rows(found: Plan) -> list[tuple[str, str]]:
    s, host = found.sizes, found.host
    ranks = "" if len(s.ranks) == 1 else f", {len(s.ranks)} ranks of up to {size(max(s.ranks))}"
    return [
        ("model files", size(s.download)),
        ("checkpoint, Hugging Face layout", size(s.unified)),
        ("checkpoint, TensorRT-LLM layout", size(s.checkpoint) + ranks),
        (
            "kept in the output directory",
            ", ".join(f"{name} {size(n)}" for name, n in s.disk.items() if n and name != "snapshot"),
        ),
        ("still to be written there", f"{size(found.missing)} ({size(host.disk)} free)"),
        *_quantizing_rows(found),
        *_stream_rows(found),
        ("KV cache", f"{s.kv_bytes_per_token / 1024:.1f} KiB per token on each GPU"),
    ]


def _stream_rows(found: Plan) -> list[tuple[str, str]]:
    if found.streams is None:
        return []
    streams, needs, why = found.streams
    return [("concurrent streams", f"{streams} ({why}): {size(needs)} of host memory; others wait")]


def _quantizing_rows(found: Plan) -> list[tuple[str, str]]:
    if found.way is None:
        return []
    needs = size(found.way.taken.memory)
    return [("memory while quantizing", f"{needs} (this machine: {size(found.host.available)} available)")]


def _way_rows(choice: Choice) -> list[tuple[str, ...]]:
    """One row for each way to quantize: what it needs, how long it takes, and why it is taken or can't be."""
    rows: list[tuple[str, ...]] = []
    for way in choice.ways:
        where = "of GPU memory" if choice.device.gpu and way.name != "data-free" else "of host memory"
        took = "unknown" if way.seconds is None else f"about {seconds(way.seconds)}"
        state = f"no: {way.impossible}" if way.impossible else "possible" if way.fits else "does not fit"
        state = f"yes: {choice.why}" if way is choice.taken else state
        rows.append(
            (ways.TITLES[way.name], ways.FLAGS[way.name], f"about {size(way.memory)} {where}", took, way.basis, state)
        )
    return rows


def _memory_rows(verdict: MemoryCheck, complete: bool) -> list[tuple[str, ...]]:
    """One row for the card that the verdict is about, or with `complete` for each. Of the rank that needs most."""
    return [
        (
            m.card + (" (verdict)" if m.card == verdict.card else ""),
            *(size(n) for n in (m.memory, m.weights, m.workspace, m.kv_cache)),
            str(m.kv_tokens),
            f"{m.sequences} sequences",
            str(m.largest_batch),
            "fits" if m.fits else f"lacks {size(m.lacking)}",
        )
        for m in verdict.cards
        if complete or m.card == verdict.card
    ]


def _as_object(found: Plan) -> dict[str, Any]:
    """Everything that a plan holds, for --json. Its keys are the same for every target and machine."""
    recipe, settings = found.resolved.recipe, [vars(setting) for setting in found.settings]
    took = rotating.seconds(recipe, found.prepared.model)
    return {
        "model": recipe.model.id,
        "gpu": found.resolved.gpu.name,
        "target": recipe.target,
        "stages": [{"stage": stage, "state": state, "why": why} for stage, state, why in found.stages],
        "sizes": asdict(found.sizes),
        "memory": [{**asdict(m), "fits": m.fits} for m in found.memory.cards],
        "verdict": _verdict(found.memory),
        "quantized": found.prepared.quantized.facts() if found.prepared.quantized else None,
        "kept": {
            "open_choice": found.open_choice,
            "layers": {name: list(modules) for name, modules in found.prepared.model.layers.items()},
            "bytes": None if found.open_choice else dict(found.prices),
        },
        "ways": _ways(found.way),
        "rotating": None if took is None else {"seconds": took},
        "learning": {"memory": found.learning.memory, "seconds": found.learning.seconds} if found.learning else None,
        "streams": None
        if found.streams is None
        else dict(zip(("at_once", "bytes", "why"), found.streams, strict=True)),
        "machine": {**asdict(found.host), "missing": found.missing},
        "values": {key: {"value": value, "from": origin} for key, value, origin in found.resolved.explained()},
        "flags": [] if found.launch.model_yaml else settings,
        "arguments": settings if found.launch.model_yaml else [],
        "parameters": [vars(one) for one in found.parameters],
        "notes": [vars(note) for note in found.notes],
        "command": found.launch.command,
        "model_yaml": found.launch.model_yaml,
        "blocked": found.blocked.what if found.blocked else None,
        "refusal": found.refusal.what if found.refusal else None,
    }


def _ways(choice: Choice | None) -> dict[str, object] | None:
    if choice is None:
        return None
    listed = [{**asdict(way), "taken": way is choice.taken} for way in choice.ways]
    return {"device": asdict(choice.device), "why": choice.why, "ways": listed}


def _verdict(verdict: MemoryCheck) -> dict[str, object]:
    refusal, change = verdict.refusal, verdict.change
    return {
        "card": verdict.card,
        "fits": refusal is None,
        "what": refusal.what if refusal else None,
        "why": refusal.why if refusal else None,
        "change": list(change.flags) if change else None,
    }


def show_command(found: Plan, out: Output) -> None:
    """Prints the trtllm-build command, ready to paste. With --json also as a list, with the placeholder in it.

    UsageError for a target without an engine.
    """
    if found.launch.model_yaml:
        raise no_engine()
    why_none = None if found.launch.command else f"The {found.resolved.recipe.target} target runs no trtllm-build."
    shell = []
    if found.launch.command:
        cache = Path(found.launch.command[found.launch.command.index("--output_timing_cache") + 1])
        if not cache.parent.is_dir():  # trtllm-build does not create it, and would fail at its very end
            shell.append(shlex.join(["mkdir", "-p", str(cache.parent)]))
        shell.append(shlex.join(found.launch.command))
    for line in shell:
        out.text(line)
    if why_none:
        out.info(f"{why_none} To see the command for an engine, name a GPU: --gpu sm120 (`builder gpus`).")
    if word := found.launch.placeholder:
        command = "`builder quantize`" if word == "CHECKPOINT" else "`builder engine`"
        out.warn(f"{word} stands for a directory that does not exist yet: {command} creates it in the store.")
    if found.blocked and found.launch.command:
        out.warn(f"not on this machine: {found.blocked.what} {found.blocked.hint}")
    out.result(
        {
            "target": found.resolved.recipe.target,
            "command": found.launch.command,
            "shell": shell,
            "placeholder": found.launch.placeholder,
            "why": why_none,
            "flags": [vars(flag) for flag in found.settings],
            "blocked": found.blocked.what if found.blocked else None,
        }
    )
