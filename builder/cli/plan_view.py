"""How a plan is printed: tables for people, one object with --json."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path

from builder.core.output import Output, size
from builder.plan import Plan
from builder.preflight import checks
from builder.preflight.suggestions import Verdict

MEMORY = ["card", "memory", "weights", "workspace", "KV cache", "KV tokens", "at full length", "largest batch", "fits"]


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
    out.table(f"plan: {recipe.model.id} on {found.resolved.gpu.name}", ["stage", "state", "why"], found.stages)
    out.table("sizes", ["what", "size"], _size_rows(found))
    out.table("at run time", MEMORY, _memory_rows(found.verdict))
    out.table("values", ["key", "value", "from"], found.resolved.explained())
    out.table(
        "LLM arguments" if found.model_yaml else "trtllm-build flags",
        ["argument" if found.model_yaml else "flag", "value", "why", "source"],
        [(f.name, f.value, f.reason, f.source) for f in found.settings],
    )
    if found.notes:
        out.table("what to know", ["rule", "note"], [(note.rule, note.text) for note in found.notes])
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
