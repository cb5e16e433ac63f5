"""Splits a TensorRT-LLM layout into one file for each rank of tensor and pipeline parallelism.

`joining` is the other direction; both are lossless. The split is TensorRT-LLM's (models/convert_utils.py@03961722:
split_matrix_tp, dup_kv_weight; mapping.py@b35ac1b6: rank = pp_rank * tp_size + tp_rank) and, byte for byte, ModelOpt's
(export/postprocess.py). Tensors are read and written in chunks, never loaded whole: a column split is a range of
bytes, a row split a strided view.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from builder.architectures import attention, names
from builder.checkpoint.layouts import (
    QUANT_CFG,
    RANK_FILE,
    Checkpoint,
    read_json,
    write_json,
)
from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.safetensors_io import CHUNK_BYTES, NewTensor, StoredBytes, Tensors, write
from builder.core.store import Store, sources_digest
from builder.formats import registry
from builder.formats.base import Axis, NumberFormat
from builder.formats.declared import MIXED, declared
from builder.formats.registry import BF16, NVFP4

LAYERS = f"{names.ENGINE_LAYERS}."
EMBEDDING, FINAL_NORM, HEAD = names.ENGINE_EMBEDDING, names.ENGINE_FINAL_NORM, names.ENGINE_HEAD
# How tensor parallelism splits a layer. Column parallel: its outputs, dim 0. Row parallel: its inputs, dim 1; the bias
# is whole and added after the all-reduce (layers/linear.py@03961722, RowLinear). The embedding is split because
# config.json says use_parallel_embedding with embedding_sharding_dim 0, as ModelOpt writes it
# (models/modeling_utils.py, parallelize_embedding; layers/embedding.py@0f02b7af: ceil(vocab / tp) rows each).
COLUMN, ROW, VOCAB, QKV = ("mlp.fc", "mlp.gate"), ("attention.dense", "mlp.proj"), (EMBEDDING, HEAD), "attention.qkv"


@dataclass(frozen=True)
class Parallel:
    """Tensor and pipeline parallel sizes."""

    tp: int = 1
    pp: int = 1

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.tp * self.pp

    def layers(self, pp_rank: int, layers: int) -> range:
        """The decoder layers of a pipeline stage. If the division leaves a remainder, the first stages get one more.

        Sources: Mapping.pp_layers (mapping.py, torch.tensor_split); the runtime counts the same way
        (cpp/include/tensorrt_llm/runtime/modelConfig.h@012f8ad2, getFirstLocalLayer).
        """
        base, rest = divmod(layers, self.pp)
        first = pp_rank * base + min(pp_rank, rest)
        return range(first, first + base + (pp_rank < rest))


@dataclass(frozen=True)
class Shard:
    """What a rank holds of a tensor: ranges of rows (dim 0), one of `n` equal parts of the columns (dim 1), and rows of
    zeros at the end."""

    rows: tuple[tuple[int, int], ...]
    column: tuple[int, int] = (0, 1)  # (i, n): the i-th of n equal parts
    padding: int = 0

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The rank's shape of a tensor with this whole shape."""
        rows = sum(end - start for start, end in self.rows) + self.padding
        return (rows, *(size // self.column[1] for size in whole[1:]))


def check(
    config: Mapping[str, Any], tp: int, pp: int, *, number_format: NumberFormat = NVFP4, gemm: bool = False
) -> None:
    """UnsupportedError if a model, by its config.json in either layout, can't be split over these sizes.

    Reads no weight. gemm: whether TensorRT-LLM's GEMM for the format computes a rank's part; it may need a larger
    multiple of inputs.
    """
    if tp * pp == 1:
        return
    wrong = _wrong(config, tp, number_format, gemm) if tp > 1 else []
    if wrong:
        fits = [1, *(n for n in range(2, tp) if not _wrong(config, n, number_format, gemm))]
        raise UnsupportedError(
            f"This model can't be split with --tp {tp}.",
            why="\n".join(wrong),
            hint=f"The largest possible size below it: --tp {fits[-1]}."
            + (" Or split the layers with --pp." if config["num_hidden_layers"] >= 2 * pp else ""),
        )
    layers = config["num_hidden_layers"]
    if pp > layers:
        raise UnsupportedError(f"--pp {pp} is more than this model's {layers} layers.", hint=f"--pp {layers} or less.")


def _wrong(config: Mapping[str, Any], tp: int, number_format: NumberFormat, gemm: bool) -> list[str]:
    """Reasons why a model can't be split over `tp` GPUs. A row split must not divide a group of inputs, which has one
    scale."""
    heads, kv_heads, size = _heads(config)
    group = number_format.group_size or 1
    inputs = math.lcm(group, number_format.gemm_inputs) if gemm else group
    wrong = []
    if heads % tp:
        wrong.append(f"{heads} attention heads are not divisible by {tp}.")
    if kv_heads % tp and tp % kv_heads:
        wrong.append(f"{kv_heads} KV heads can be neither divided by {tp} nor repeated to {tp}.")
    # The hidden size is not split, but ModelOpt requires it of all (export/postprocess.py, check_weight_shape_valid).
    widths = [("hidden_size", config["hidden_size"], group), ("intermediate_size", config["intermediate_size"], inputs)]
    for name, width, unit in [*widths, ("heads x head size", heads * size, inputs)]:
        if width % (unit * tp):
            scale = f"{number_format.title} has one scale for {group} inputs" if group > 1 else "all parts are equal"
            why = scale if unit == group else f"its GEMM needs a multiple of {unit} inputs"
            wrong.append(f"{name} {width} is not a multiple of {unit} x {tp}: {why}.")
    return wrong


def _heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Attention heads, KV heads, head size."""
    return int(config["num_attention_heads"]), attention.kv_heads(config), attention.head_size(config)


def shard(name: str, whole: Sequence[int], config: Mapping[str, Any], tp: int, tp_rank: int) -> Shard:
    """What a tensor parallel rank holds of the tensor with this TensorRT-LLM name and whole shape."""
    module, _, leaf = name.rpartition(".")
    rows = int(whole[0]) if whole else 1
    everything = Shard(((0, rows),))
    if leaf.endswith("cache_scaling_factor") or "norm" in module or module == FINAL_NORM:
        return everything
    axes = _axes(name, whole)
    if not axes:
        return everything
    if module.endswith(QKV):
        return Shard(_qkv_rows(config, tp, tp_rank, rows)) if "out" in axes else everything
    if module in VOCAB:
        each = math.ceil(rows / tp)
        start, end = min(each * tp_rank, rows), min(each * (tp_rank + 1), rows)
        return Shard(((start, end),), padding=each - (end - start))
    split_axis = _split_axis(module, name)
    if split_axis not in axes:
        return everything
    if axes.index(split_axis) == 0:
        return Shard(((tp_rank * rows // tp, (tp_rank + 1) * rows // tp),))
    return Shard(((0, rows),), column=(tp_rank, tp))


def _axes(name: str, shape: Sequence[int]) -> tuple[Axis, ...]:
    """What each dimension of a linear layer's tensor runs over. UnsupportedError for a tensor of an unknown format."""
    try:
        return registry.axes(name.rpartition(".")[2], shape)
    except KeyError:
        raise _unknown(name) from None


def _split_axis(module: str, name: str) -> Axis:
    """The axis along which tensor parallelism splits a linear layer."""
    if module.endswith(COLUMN):
        return "out"
    if module.endswith(ROW):
        return "in"
    raise _unknown(name)


def _unknown(name: str) -> UnsupportedError:
    return UnsupportedError(f"{name} can't be split over several GPUs: its split is not known.", hint="--tp 1 --pp 1")


def _qkv_rows(config: Mapping[str, Any], tp: int, tp_rank: int, rows: int) -> tuple[tuple[int, int], ...]:
    """The rows of q, k and v, each split in whole heads; with fewer KV heads than ranks, neighbours hold the same.

    rows: of the whole tensor; half as many as outputs where a row holds two (packed INT4).
    """
    heads, kv_heads, _ = _heads(config)
    size = rows // (heads + 2 * kv_heads)
    q, kv = heads // tp, max(kv_heads // tp, 1)
    first = tp_rank * kv_heads // tp
    k_start = (heads + first) * size
    v_start = k_start + kv_heads * size
    return (
        (tp_rank * q * size, (tp_rank + 1) * q * size),
        (k_start, k_start + kv * size),
        (v_start, v_start + kv * size),
    )


def local_name(name: str, layers: range, parallel: Parallel, pp_rank: int) -> str | None:
    """The tensor's name in a pipeline stage's files, which number their layers from 0; None if it isn't there.

    layers: of the stage. TensorRT-LLM numbers modules by their place in the list (models/modeling_utils.py,
    DecoderLayerList).
    """
    if name.startswith(LAYERS):
        index, _, rest = name.removeprefix(LAYERS).partition(".")
        return f"{LAYERS}{int(index) - layers[0]}.{rest}" if int(index) in layers else None
    here = pp_rank == 0 if name.startswith(EMBEDDING) else pp_rank == parallel.pp - 1
    return name if here else None


def split(source: Path, destination: Path, parallel: Parallel) -> dict[str, Any]:
    """Writes rank*.safetensors and config.json for these sizes from a whole layout; returns the mapping.

    UnsupportedError if the model can't be split over them.
    """
    config = read_json(source / "config.json")
    tensors = Tensors(source, [source / RANK_FILE])
    quantization, layers, listed = dict(config["quantization"]), {}, {}
    if quantization["quant_algo"] == MIXED:
        listed = read_json(source / QUANT_CFG)
    strictest = max(declared({**quantization, **listed}).used, key=lambda one: one.group_size or 1, default=BF16)
    check(config, parallel.tp, parallel.pp, number_format=strictest)
    if listed:
        layers = {QUANT_CFG: {**listed, "quantized_layers": local_layers(listed["quantized_layers"], config, parallel)}}
    elif "exclude_modules" in quantization:
        excluded = dict.fromkeys(quantization["exclude_modules"], "excluded")
        quantization["exclude_modules"] = sorted(local_layers(excluded, config, parallel))
    destination.mkdir(parents=True, exist_ok=True)
    for rank in range(parallel.world_size):
        write(destination / f"rank{rank}.safetensors", rank_tensors(tensors, config, parallel, rank))
    mapping = {"world_size": parallel.world_size, "tp_size": parallel.tp, "pp_size": parallel.pp}
    for name, content in layers.items():
        write_json(destination / name, content)
    write_json(destination / "config.json", {**config, "mapping": mapping, "quantization": quantization})
    return dict(mapping)


def rank_tensors(tensors: Tensors, config: Mapping[str, Any], parallel: Parallel, rank: int) -> list[NewTensor]:
    """The tensors of one rank; their bytes are read from the whole tensors when they are written."""
    pp_rank, tp_rank = divmod(rank, parallel.tp)
    layers = parallel.layers(pp_rank, config["num_hidden_layers"])
    made = []
    for name, info in tensors.items():
        local = local_name(name, layers, parallel, pp_rank)
        if local is not None:
            part = shard(name, info.shape, config, parallel.tp, tp_rank)
            shape = part.shape(info.shape) if info.shape else ()
            made.append(NewTensor(local, info.dtype, shape, _chunks(tensors, name, part)))
    return made


def _chunks(tensors: Tensors, name: str, part: Shard) -> Iterator[bytes]:
    rows = Rows.of(tensors, name)
    taken = columns(rows.nbytes, part)
    step = max(1, CHUNK_BYTES // max(rows.nbytes, 1))
    for start, end in part.rows:
        for at in range(start, end, step):
            yield rows.read(at, min(at + step, end))[:, taken].tobytes()
    if part.padding:
        yield bytes(part.padding * (taken.stop - taken.start))


@dataclass(frozen=True)
class Rows:
    """A stored tensor as rows of dimension 0, each of `nbytes` bytes; a scalar is one row. Two FP4 values share a byte
    of a U8 tensor, which is never split."""

    stored: StoredBytes
    nbytes: int

    @classmethod
    def of(cls, tensors: Tensors, name: str) -> Rows:
        """The rows of this tensor."""
        info = tensors[name]
        return cls(tensors.stored(name), info.nbytes // max(info.shape[0] if info.shape else 1, 1))

    def read(self, start: int, end: int) -> np.ndarray[Any, Any]:
        """The rows [start, end) as [rows, nbytes]."""
        data = self.stored[start * self.nbytes : end * self.nbytes]
        return np.frombuffer(data, np.uint8).reshape(end - start, self.nbytes)


def columns(row_bytes: int, part: Shard) -> slice:
    """A rank's bytes of each row. IntegrityError if the rows can't be split in equal parts."""
    index, parts = part.column
    if row_bytes % parts:
        raise IntegrityError(f"A row of {row_bytes} bytes can't be split into {parts} equal parts.")
    return slice(row_bytes * index // parts, row_bytes * (index + 1) // parts)


def local_layers(layers: Mapping[str, Any], config: Mapping[str, Any], parallel: Parallel) -> dict[str, Any]:
    """`exclude_modules` or `quantized_layers`, {layer: format}, in the layer numbers of the pipeline stages.

    All stages share one list, so UnsupportedError if a number means layers of different formats in different stages.
    """
    if parallel.pp == 1:
        return dict(layers)
    total = config["num_hidden_layers"]
    own = []
    for pp_rank in range(parallel.pp):
        span = parallel.layers(pp_rank, total)
        names = {n: local_name(n, span, parallel, pp_rank) for n in layers if n.startswith(LAYERS)}
        own.append(({local: layers[n] for n, local in names.items() if local}, len(span)))
    everywhere = {name: value for stage, _ in own for name, value in stage.items()}
    for stage, length in own:
        here = {n: v for n, v in everywhere.items() if int(n.removeprefix(LAYERS).partition(".")[0]) < length}
        if here != stage:
            wrong = sorted(n for n in {*here, *stage} if here.get(n) != stage.get(n))
            raise UnsupportedError(
                f"The formats of {', '.join(wrong[:5])} are not the same in all {parallel.pp} pipeline stages.",
                why="TensorRT-LLM numbers the layers of each stage from 0, and all stages share one configuration.",
                hint="Split with --tp only.",
            )
    return {name: value for name, value in layers.items() if not name.startswith(LAYERS)} | everywhere


def whole_shape(name: str, part: Sequence[int], config: Mapping[str, Any], tp: int) -> tuple[int, ...]:
    """The shape of a whole tensor from that of a rank's part: the inverse of Shard.shape."""
    module, _, leaf = name.rpartition(".")
    if leaf.endswith("cache_scaling_factor") or "norm" in module or module == FINAL_NORM:
        return tuple(part)
    axes = _axes(name, part)
    if not axes:
        return tuple(part)
    if module in VOCAB:
        return (config["vocab_size"], *part[1:])
    if module.endswith(QKV):
        heads, kv_heads, _ = _heads(config)
        size = part[0] // (heads // tp + 2 * max(kv_heads // tp, 1))  # rows of a head
        return ((heads + 2 * kv_heads) * size, *part[1:]) if "out" in axes else tuple(part)
    split_axis = _split_axis(module, name)
    return tuple(n * tp if axis == split_axis else n for axis, n in zip(axes, part, strict=True))


def parallel_of(config: Mapping[str, Any]) -> Parallel:
    """The parallel sizes in the config.json of a checkpoint."""
    mapping = config.get("mapping") or {}
    return Parallel(mapping.get("tp_size", 1), mapping.get("pp_size", 1))


def rank_files(directory: Path, config: Mapping[str, Any]) -> list[Path]:
    """The files rank0 to rankN-1 of a layout. IntegrityError if their number is not that of its config.json."""
    world_size, parallel = (config.get("mapping") or {}).get("world_size", 1), parallel_of(config)
    found = {file.name for file in directory.glob("rank*.safetensors")}
    names = [f"rank{rank}.safetensors" for rank in range(world_size)]
    if found != set(names):
        raise IntegrityError(f"{directory} holds {len(found)} rank files; its config.json says {world_size}.")
    if parallel.world_size != world_size:
        raise IntegrityError(
            f"{directory}/config.json: tp_size {parallel.tp} x pp_size {parallel.pp} ranks, not {world_size}."
        )
    return [directory / name for name in names]


def split_checkpoint(checkpoint: Checkpoint, parallel: Parallel, *, store: Store) -> Checkpoint:
    """The checkpoint that the engine is built from: itself for one GPU, else a stage of its own with the split layout.

    The key of the calibrated checkpoint does not depend on tp and pp, so one calibration serves all of them.
    """
    if parallel.world_size == 1:
        return checkpoint
    ingredients = {
        "checkpoint": checkpoint.digest,
        "tp": parallel.tp,
        "pp": parallel.pp,
        "sources": sources_digest(
            "builder/checkpoint/sharding.py",
            "builder/checkpoint/layouts.py",
            "builder/core/safetensors_io.py",
            "builder/formats",
            "builder/architectures",
        ),
    }
    artifact = store.stage(
        "ranks", ingredients, lambda tmp: split(checkpoint.tensorrt_llm, tmp / "tensorrt_llm", parallel)
    )
    return Checkpoint(path=artifact.path, digest=artifact.digest, facts=artifact.facts)
