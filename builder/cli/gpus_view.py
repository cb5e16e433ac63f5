"""What `builder gpus` prints: the profiles with what a recipe can choose on them, and every card once."""

from __future__ import annotations

from dataclasses import asdict

from builder.core.output import Output
from builder.machine import gpus
from builder.machine.gpus import TARGETS, GpuProfile
from builder.recipe import card_formats


def show(out: Output) -> None:
    """Prints the profiles with the formats they run, and every card once. With --json, everything."""
    profiles = [gpus.load(name) for name in gpus.names()]
    choices = {profile.name: _choices(profile) for profile in profiles}
    rows = []
    for profile in profiles:
        of_target = (found[target] for found in choices[profile.name].values() for target in TARGETS)
        default = profile.best[0].format if profile.best else "-"
        rows.append((profile.name, default, *(", ".join(found) or "-" for found in of_target), profile.title))
    runs = [f"{what} ({target})" for what in ("runs", "KV cache") for target in TARGETS]
    out.table("GPU profiles", ["profile", "default", *runs, "for"], rows)
    table = []
    for card, name in gpus.card_owners().items():
        figures = (card.memory_gb, card.bandwidth_gb_s, card.fp8_tflops, card.fp4_tflops)
        shown = ("-" if number is None else number for number in figures)
        table.append((name, card.name, *shown, ", ".join(card.also) or "-"))
    header = ["profile", "card", "GB", "GB/s", "FP8 dense TFLOPS", "FP4 dense TFLOPS", "other names"]
    out.table("cards", header, table)
    facts = {p.name: {k: v for k, v in asdict(p).items() if k not in ("name", "card")} for p in profiles}
    out.result({name: {**known, "choices": choices[name]} for name, known in facts.items()})


def _choices(gpu: GpuProfile) -> dict[str, dict[str, list[str]]]:
    """{recipe key: {target: what a recipe can choose}}; without a GPU, the targets that need one run nothing."""
    on_gpu = gpu.sm is not None
    caches = {target: card_formats.running_caches(gpu, target) if on_gpu else [] for target in TARGETS}
    return {
        "format": {target: card_formats.choosable(gpu, target) if on_gpu else [] for target in TARGETS},
        "kv_cache_dtype": {target: [one.name for one in found] for target, found in caches.items()},
    }
