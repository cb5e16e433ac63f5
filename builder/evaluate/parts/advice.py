"""What to try next, from the measured parts of a loss. Pure.

The figures behind it: what is left of the KL with one part exact, which is the most that a remedy of this part can win,
and how much of the sum over layers the worst ones have.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from builder.evaluate.parts.figures import PARTS, Losses
from builder.formats.algorithms import ALGORITHMS
from builder.formats.assignment import to_keep
from builder.formats.registry import all_formats
from builder.recipe.algorithm import refusal
from builder.recipe.quantization import Quantization
from builder.recipe.schema import Recipe

# Layers are named if a quarter of them or fewer have half of the loss; with equal losses it would take half of them.
FEW, MOST = 0.25, 0.5
WORTHWHILE = 0.8  # of the KL, that another remedy than the best one leaves at most to be named
LITTLE = 0.001  # nats a token: not worth advice


def advise(found: Losses, recipe: Recipe) -> list[str]:
    """Sentences, each with the figures that it follows from. Of a model that was quantized elsewhere they name no flags
    but the way to quantize it again: its formats are not the recipe's, and it is served as it is."""
    whole = found.whole.kl
    if whole < LITTLE:
        return [f"The KL is {whole:.2g}: there is little to win."]
    sentences: list[str] = []
    for name in sorted(found.without, key=lambda name: found.without[name].kl):
        left = found.without[name].kl
        if not sentences or left <= WORTHWHILE * whole:
            most = "By" if sentences else "Most is lost by"
            would = f"with {'it' if name == 'cache' else 'them'} exact the KL would be {left:.3g}, not {whole:.3g}"
            sentences += [f"{most} {PARTS[name]}: {would}.", *_remedy(name, recipe)]
    if not sentences:  # nothing but weights is quantized
        sentences = [
            text for name in found.alone for text in (f"All is lost by {PARTS[name]}.", *_remedy(name, recipe))
        ]
    cheapest = f"builder recommend --max-kl {whole / 2:.2g} measures these and writes the cheapest recipe in a budget."
    again = "A quantized model is served as it is. To change it, quantize its original: --model {}"
    last = [again.format(shlex.quote(recipe.model.original))] if recipe.model.original else [cheapest]
    return [*sentences, *_layers(found, recipe), *last]


def _remedy(name: str, recipe: Recipe) -> list[str]:
    """What can make this part more exact, and what cannot."""
    return [] if recipe.model.original else [_flags(name, recipe.quantization, rows=not recipe.calibration.data_free)]


def _flags(name: str, part: Quantization, *, rows: bool) -> str:
    if name == "cache":
        return "--kv-cache-dtype auto keeps the KV cache in the model's own type."
    if name == "weights":
        better = _algorithms(part, rows=rows)
        if better:
            return f"--algorithm {_either(better)} rounds them better, in the same format and bytes."
        return f"They are rounded by {part.algorithm}: keep the layers that lose most in {_kept(part).upper()}."
    exact = all_formats().get(f"w4a16_{part.number_format.name}")
    if exact is None:
        return f"No algorithm for weights changes that: keep the layers that lose most in {_kept(part).upper()}."
    return (
        f"No algorithm for weights changes that. --format {exact.name} leaves inputs exact, in about the same bytes "
        f"(--target {' or '.join(exact.targets)})."
    )


def _algorithms(part: Quantization, *, rows: bool) -> Sequence[str]:
    """The algorithms that can round these weights better than the recipe's. rows: whether it calibrates."""
    names = list(ALGORITHMS)
    later = [name for name in names[names.index(part.algorithm) + 1 :] if rows or not ALGORITHMS[name].reads_rows]
    return [name for name in later if not refusal(name, part.format, part.quantized_formats)]


def _either(names: Sequence[str]) -> str:
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _layers(found: Losses, recipe: Recipe) -> list[str]:
    """The few layers that have most of the loss, if there are such."""
    ordered = list(found.by_loss)
    total = sum(kl for _, kl in ordered)
    chosen: list[int] = []
    has = 0.0
    for layer, kl in ordered:
        if has >= MOST * total:
            break
        chosen.append(layer)
        has += kl
    if not total or len(chosen) > FEW * len(ordered):
        return []
    numbers = ", ".join(map(str, sorted(chosen)))
    kept = f"--keep-{_kept(recipe.quantization)}"
    flags = " ".join(f"{kept} '{found.modules[layer]}.*'" for layer in sorted(chosen))
    share = f"{100 * has / total:.0f} % of the sum over {len(ordered)} layers."
    hint = "" if recipe.model.original else f" Try {flags}."
    return [f"{'Layers' if len(chosen) > 1 else 'Layer'} {numbers}: {share}{hint}"]


def _kept(part: Quantization) -> str:
    return to_keep(part.number_format).name
