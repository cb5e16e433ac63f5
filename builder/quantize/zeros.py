"""Linear layers whose weights are all zero in the source model: they stay in BF16, because a scale of 0 has no inverse.

Blocks that are added to a model begin so (LLaMA Pro, arXiv 2401.02415: o_proj and down_proj), and so do experts that
were pruned. Calibrating again does not change it. Layers that are served as one keep one format, so the whole group
stays in BF16; of a mixture that is all experts of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from builder.architectures import names
from builder.architectures.facts import Architecture
from builder.core.errors import UnsupportedError
from builder.core.output import Output, listed
from builder.core.safetensors_io import Tensors, read_bytes
from builder.formats.assignment import Layers, by_layer, merged
from builder.formats.registry import BF16
from builder.quantize import exclude

FIRST = 4096  # bytes that tell for almost every weight
MINUS_ZERO = b"\0\x80"  # float16, bfloat16 and float32 have no other nonzero bytes in -0.0


def find(tensors: Tensors, architecture: Architecture, layers: Layers) -> tuple[str, ...]:
    """The linear layers to quantize whose weights are all zero (or -0.0).

    tensors: of the source model, under its own names (model/source_tensors.py).
    """
    kept = {module for module, one in by_layer(layers).items() if one is BF16}
    found = []
    for name, info in tensors.items():
        module = name.removesuffix(".weight")
        if names.is_quantizable(architecture, name, info.shape) and module not in kept:
            found += [module] * _is_zero(tensors, name)
    return tuple(sorted(found))


def _is_zero(tensors: Tensors, name: str) -> bool:
    info, place = tensors[name], tensors.place(name)
    first = read_bytes(replace(place, end=min(place.end, place.begin + FIRST)))
    if any(first.translate(None, MINUS_ZERO)) or not info.nbytes:
        return False
    itemsize = info.nbytes // max(1, info.shape[0] * info.shape[1])
    for part in tensors.chunks(name):
        signs = part[itemsize - 1 :: itemsize]
        if part.count(0) + signs.count(0x80) < len(part):
            return False
    return True


def keep(layers: Layers, zero: Sequence[str], known: Sequence[str], architecture: Architecture) -> Layers:
    """The layers in a format of their own, with these in BF16, extended to whole groups. UnsupportedError if no layer
    would be left to quantize."""
    groups = exclude.groups(known, architecture).values()
    together = {module for members in groups if set(members).intersection(zero) for module in members}
    others = {name: [m for m in modules if m not in together] for name, modules in layers.items()}
    made = merged({name: found for name, found in others.items() if found}, BF16.name, sorted(together), known)
    if len(made.get(BF16.name, ())) == len(known):
        raise UnsupportedError(
            f"All {len(known)} linear layers would stay in BF16: nothing is left to quantize.",
            why=f"The weights of {listed(zero)} are all zero in the model's own files.",
            hint="Check the model: fetch it again, or choose another revision.",
        )
    return made


def tell(zero: Sequence[str], layers: Layers, out: Output) -> None:
    """Warns that layers stay in BF16 because they, or layers that are served with them, are zero."""
    more = len(layers.get(BF16.name, ())) - len(zero)
    also = f" (with the layers that are served together with them: {more + len(zero)} in all)" if more > 0 else ""
    out.warn(
        f"{len(zero)} linear layer{'s' * (len(zero) > 1)} of the model {'are' if len(zero) > 1 else 'is'} all zero and "
        f"stay{'s' * (len(zero) == 1)} in BF16{also}: {listed(zero)}. If that is not meant, fetch the model again."
    )
