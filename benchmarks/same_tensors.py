"""Whether two checkpoints hold the same tensors, byte by byte."""

from __future__ import annotations

from pathlib import Path

from builder.core.safetensors_io import Tensors

# Scales that a checkpoint with calibrated or assumed ranges has and one of weights alone has not.
RANGES = (".input_scale", ".k_scale", ".v_scale")


def require_same(ours: Path, theirs: Path, *, what: str = "ModelOpt", ranges: bool = False) -> str:
    """Ends the benchmark, with names, unless both have the same tensors. Returns a sentence for the report.

    what: whose theirs are. ranges: ours may have scales of inputs and of the KV cache that theirs lacks.
    """
    one, other = Tensors(ours), Tensors(theirs)
    extra = {name for name in set(one) - set(other) if not (ranges and name.endswith(RANGES))}
    if wrong := sorted(extra | (set(other) - set(one))):
        raise SystemExit(f"{len(wrong)} tensors are in only one of {ours} and {theirs}: {', '.join(wrong[:8])}")
    different = [name for name in sorted(other) if not _same(one, other, name)]
    if different:
        raise SystemExit(f"{len(different)} tensors of {ours} and {theirs} differ: {', '.join(different[:8])}")
    return f"{len(other)} tensors, {sum(info.nbytes for info in other.values()):,} bytes: the same as those of {what}"


def _same(one: Tensors, other: Tensors, name: str) -> bool:
    """Whether a tensor's type, shape and bytes are the same in both."""
    here, there = one[name], other[name]
    if (here.dtype, here.shape) != (there.dtype, there.shape):
        return False
    pairs = zip(one.chunks(name), other.chunks(name), strict=True)
    return all(a == b for a, b in pairs)
