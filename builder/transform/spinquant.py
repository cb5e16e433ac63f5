"""SpinQuant's rotations that disappear into the weights, R1 and R2 (Liu et al., arXiv 2405.16406): which tensor gets
which. Pure: nothing here reads a weight.

R1 rotates the residual stream. An RMS norm commutes with it once the norm's own weights are folded into the linear
layers that read its output: these become W diag(g) R1, and those that write to the stream R1^T W. R2 rotates each
head's values: the rows of a head in v_proj become R2^T W, and its columns in o_proj W R2. What lies between the values
and the output, a weighted sum over tokens, commutes with it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from builder.architectures import catalog
from builder.architectures.attention import head_size
from builder.architectures.facts import Architecture, Rotation
from builder.architectures.names import layer_of
from builder.architectures.written import is_loaded
from builder.core.errors import UnsupportedError
from builder.model.dtypes import FLOATS, NOT_WRITTEN, Header
from builder.model.multimodal import MARK

UNDESCRIBED = "its tensors are not described in configs/architectures"


@dataclass(frozen=True)
class Fold:
    """How a tensor of the rotated model is made of one of the model's.

    gain: the norm whose weights multiply its columns. reads: its columns are rotated by R1, or, of the embedding, its
    rows are. writes: its rows are. values, output: the layer whose R2 rotates the rows of each head, or the columns.
    ones: it is a norm, whose weights are now in the layers after it.
    """

    name: str
    source: str
    dtype: str
    shape: tuple[int, ...]
    gain: str | None = None
    reads: bool = False
    writes: bool = False
    values: int | None = None
    output: int | None = None
    ones: bool = False

    @property
    def unchanged(self) -> bool:
        """Whether it is copied."""
        return not (self.reads or self.writes or self.ones) and self.values is None and self.output is None


def tied(config: Mapping[str, Any], rotations: Collection[str]) -> bool:
    """Whether the output layer of the rotated model is the embedding. With R1 it is not: only the output layer gets the
    last norm's weights."""
    return bool(config.get("tie_word_embeddings")) and "r1" not in rotations


def config(stated: Mapping[str, Any], rotations: Collection[str]) -> dict[str, Any]:
    """config.json of the rotated model. With R1 it always states that the output layer is not tied: where the key is
    missing, transformers 4.57 ties it in some families (SmolLM3, ERNIE 4.5)."""
    return {**stated, **({"tie_word_embeddings": False} if "r1" in rotations else {})}


def plan(
    config: Mapping[str, Any], headers: Mapping[str, Header], rotations: Collection[str], model: str
) -> list[Fold]:
    """The tensors of the rotated model, in the order of the model's. model: its name, for messages.

    UnsupportedError, which says why, for a family that can't be rotated and for tensors that it is not known to have.
    """
    family = _family(config, rotations, model)
    architecture = catalog.of(config)
    loaded = [n for n in headers if not NOT_WRITTEN.search(n) and is_loaded(architecture, config, n)]
    if config.get("tie_word_embeddings"):
        loaded = [name for name in loaded if name != f"{family.head}.weight"]
    folds = [_fold(name, headers[name], family, _layer(architecture, family, name)) for name in loaded]
    if unknown := [name for name, fold in zip(loaded, folds, strict=True) if fold is None]:
        raise UnsupportedError(
            f"{model} can't be rotated: it has tensors that {architecture.title} is not known to have.",
            why=f"A rotation must reach every tensor of the residual stream. The first: {', '.join(unknown[:4])}.",
            hint="Leave --transform out.",
        )
    found = [_only(fold, rotations) for fold in folds if fold is not None]
    _check_sizes(found, config, model)
    if config.get("tie_word_embeddings") and not tied(config, rotations):
        table = next(fold for fold in found if fold.name == f"{family.embedding}.weight")
        found.append(
            Fold(
                f"{family.head}.weight",
                table.source,
                table.dtype,
                table.shape,
                gain=f"{family.final_norm}.weight",
                reads=True,
            )
        )
    return found


def check_learnable(config: Mapping[str, Any], model: str) -> None:
    """UnsupportedError for a mixture of experts, whose rotations can't be learned."""
    family = catalog.of(config).rotation
    if family and any("*" in pattern for patterns in (*family.reads.values(), family.writes) for pattern in patterns):
        raise UnsupportedError(
            f"The rotations of {model} can't be learned.",
            why=f"{catalog.of(config).title}: the router of a mixture reads its experts' inputs without rounding, and "
            "transformers 5 joins the experts in one module.",
            hint="Use random rotations: --set transform.kind=hadamard",
        )


def _family(config: Mapping[str, Any], rotations: Collection[str], model: str) -> Rotation:
    """How the family is rotated. UnsupportedError if it can't be."""
    architecture = catalog.of(config)
    why = "its language model is a part of a multimodal one" if MARK in config else architecture.not_rotated
    if why or architecture.rotation is None:
        known = ", ".join(sorted(one.title for one in catalog.every() if one.rotation))
        title = architecture.title if architecture.title != "unknown" else architecture.name
        raise UnsupportedError(
            f"{model} can't be rotated.",
            why=f"{title}: {why or UNDESCRIBED}.",
            hint=f"Leave --transform out. These families can be rotated: {known}.",
        )
    if "r2" in rotations and architecture.rotation.values is None:
        raise UnsupportedError(
            f"{model} has no tensor of values that could be rotated alone.",
            why=f"{architecture.title} stores queries, keys and values as one tensor.",
            hint="Rotate the residual stream alone: --set transform.rotations=r1",
        )
    return architecture.rotation


def _layer(architecture: Architecture, family: Rotation, name: str) -> tuple[int, str] | None:
    """(number of the decoder layer, the rest of the tensor's name); None outside of the layers."""
    layer = layer_of(architecture, name)
    return None if layer is None else (layer, name.removeprefix(f"{family.layers}.{layer}."))


def _fold(name: str, header: Header, family: Rotation, place: tuple[int, str] | None) -> Fold | None:
    """What both rotations do to a tensor; None for one that the family is not known to have."""
    fold = Fold(name, name, *header)
    changes = _outside(name, family) if place is None else _inside(*place, family, len(header[1]))
    return None if changes is None or header[0] not in FLOATS else Fold(**{**vars(fold), **changes})


def _outside(name: str, family: Rotation) -> dict[str, Any] | None:
    known: dict[str, dict[str, Any]] = {
        f"{family.embedding}.weight": {"reads": True},
        f"{family.final_norm}.weight": {"ones": True},
        f"{family.head}.weight": {"reads": True, "gain": f"{family.final_norm}.weight"},
    }
    return known.get(name)


def _inside(layer: int, name: str, family: Rotation, dims: int) -> dict[str, Any] | None:
    module, _, kind = name.rpartition(".")
    if kind == "weight" and dims == 1 and module in family.reads:
        return {"ones": True}
    if any(fnmatchcase(module, pattern) for pattern in family.kept):
        return {}
    if kind not in ("weight", "bias") or dims != (2 if kind == "weight" else 1):
        return None
    changes = {"values": layer} if module == family.values else {}
    if any(fnmatchcase(module, pattern) for pattern in family.writes):
        return {"writes": True, **({"output": layer} if module == family.output and kind == "weight" else {})}
    for norm, patterns in family.reads.items():
        if any(fnmatchcase(module, pattern) for pattern in patterns):
            gain = f"{family.layers}.{layer}.{norm}.weight"
            return {**changes, **({"reads": True, "gain": gain} if kind == "weight" else {})}
    return None


def _only(fold: Fold, rotations: Collection[str]) -> Fold:
    """The same with these rotations alone."""
    kept = dict(vars(fold))
    if "r1" not in rotations:
        kept |= {"gain": None, "reads": False, "writes": False, "ones": False}
    if "r2" not in rotations:
        kept |= {"values": None, "output": None}
    return Fold(**kept)


def _check_sizes(folds: Collection[Fold], config: Mapping[str, Any], model: str) -> None:
    """UnsupportedError for tensors whose sizes are not those of the residual stream or of whole heads."""
    hidden, size = int(config["hidden_size"]), head_size(config)

    def wrong(fold: Fold) -> Iterator[str]:
        if fold.reads and fold.shape[-1] != hidden:
            yield f"{fold.shape[-1]} columns instead of {hidden}"
        if (fold.writes or fold.ones) and fold.shape[0] != hidden:
            yield f"{fold.shape[0]} rows instead of {hidden}"
        if fold.values is not None and fold.shape[0] % size:
            yield f"{fold.shape[0]} rows, which are not whole heads of {size}"
        if fold.output is not None and fold.shape[-1] % size:
            yield f"{fold.shape[-1]} columns, which are not whole heads of {size}"

    problems = [f"{fold.name} has {text}" for fold in folds for text in wrong(fold)]
    if problems:
        raise UnsupportedError(
            f"{model} can't be rotated: sizes of {len(problems)} tensors do not follow from config.json.",
            why=f"{problems[0]}.",
            hint="Leave --transform out.",
        )
