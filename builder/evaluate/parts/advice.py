"""What to try next, from the measured parts of a loss. Pure.

The figures behind it: what is left of the KL with one part exact, which is the most that a remedy of this part can win,
and how much of the sum over layers the worst ones have.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from builder.evaluate.parts.figures import PARTS, Losses
from builder.formats.assignment import to_keep
from builder.formats.registry import all_formats
from builder.recipe.algorithm import AlgorithmName, refusal
from builder.recipe.quantization import Quantization

# Layers are named if a quarter of them or fewer have half of the loss; with equal losses it would take half of them.
FEW, MOST = 0.25, 0.5
WORTHWHILE = 0.8  # of the KL, that another remedy than the best one leaves at most to be named
LITTLE = 0.001  # nats a token: not worth advice


def advise(found: Losses, part: Quantization) -> list[str]:
    """Sentences, each with the figures that it follows from."""
    whole = found.whole.kl
    if whole < LITTLE:
        return [f"The KL is {whole:.2g}: there is little to win."]
    sentences: list[str] = []
    for name in sorted(found.without, key=lambda name: found.without[name].kl):
        left = found.without[name].kl
        if not sentences or left <= WORTHWHILE * whole:
            most = "By" if sentences else "Most is lost by"
            would = f"with {'it' if name == 'cache' else 'them'} exact the KL would be {left:.3g}, not {whole:.3g}"
            sentences += [f"{most} {PARTS[name]}: {would}.", _remedy(name, part)]
    if not sentences:  # nothing but weights is quantized
        sentences = [text for name in found.alone for text in (f"All is lost by {PARTS[name]}.", _remedy(name, part))]
    return [*sentences, *_layers(found, part)]


def _remedy(name: str, part: Quantization) -> str:
    """What can make this part more exact, and what cannot."""
    if name == "cache":
        return "--kv-cache-dtype auto keeps the KV cache in the model's own type."
    if name == "weights":
        better = _algorithms(part)
        if better:
            return f"--algorithm {' or '.join(better)} rounds them better, in the same format and bytes."
        return f"They are rounded by {part.algorithm}: keep the layers that lose most in {_kept(part).upper()}."
    exact = all_formats().get(f"w4a16_{part.number_format.name}")
    if exact is None:
        return f"No algorithm for weights changes that: keep the layers that lose most in {_kept(part).upper()}."
    return (
        f"No algorithm for weights changes that. --format {exact.name} leaves inputs exact, in about the same bytes "
        f"(--target {' or '.join(exact.targets)})."
    )


def _algorithms(part: Quantization) -> Sequence[str]:
    """The algorithms that can round these weights better than the recipe's."""
    names = get_args(AlgorithmName)
    later = names[names.index(part.algorithm) + 1 :]
    return [name for name in later if not refusal(name, part.format, part.quantized_formats)]


def _layers(found: Losses, part: Quantization) -> list[str]:
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
    flags = " ".join(f"--keep-{_kept(part)} '{found.modules[layer]}.*'" for layer in sorted(chosen))
    share = f"{100 * has / total:.0f} % of the sum over {len(ordered)} layers"
    return [f"{'Layers' if len(chosen) > 1 else 'Layer'} {numbers}: {share}. Try {flags}."]


def _kept(part: Quantization) -> str:
    return to_keep(part.number_format).name
