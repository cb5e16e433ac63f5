"""Layers whose weights are zero stay in BF16 (quantize/zeros.py): found once, before anything is calibrated."""

from __future__ import annotations

from dataclasses import replace

from builder.core.errors import UnsupportedError
from builder.core.output import Output, listed
from builder.hub.snapshot import Snapshot
from builder.model.source_tensors import open_tensors
from builder.preflight.prepare import Prepared
from builder.quantize import exclude, zeros


def keep_zeros(prepared: Prepared, snapshot: Snapshot, out: Output) -> Prepared:
    """The same with the layers of zeros in BF16, and those that are served with them; says so.

    UnsupportedError if no layer would be left to quantize, or if the target can't load these layers in BF16.
    """
    model = prepared.model
    known = exclude.linears(model.written, model.architecture)
    found = zeros.find(open_tensors(snapshot.path), model.architecture, model.layers)
    zero = tuple(module for module in found if module in known)  # the files may hold layers that no checkpoint has
    if not zero:
        return prepared
    layers = zeros.keep(model.layers, zero, known, model.architecture)
    try:
        made = prepared.with_layers(layers)
    except UnsupportedError as error:
        raise UnsupportedError(
            error.what,
            why=f"The weights of {listed(zero)} are all zero in the model's own files, so they have no scale. "
            f"{error.why}".strip(),
            hint="Choose another --target or --gpu. If the zeros are not meant, fetch the model again.",
        ) from None
    zeros.tell(zero, layers, out)
    return replace(made, zero_layers=zero)
