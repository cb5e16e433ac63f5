"""Writes the unified layout of a model from its own files and the ranges of a calibration, byte for byte as ModelOpt's
exporter does.

Nothing is loaded as a whole: each tensor goes from its file to its place in another, a few megabytes at a time
in each thread, in whatever order the source's files arrive. Formats know their arithmetic (NumberFormat.pack); torch is
imported by none of this where their kernels have no need of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from builder import __version__
from builder.architectures.written import Part
from builder.checkpoint import huggingface, unified_config
from builder.checkpoint.layouts import write_json
from builder.core.errors import IntegrityError
from builder.core.output import listed
from builder.core.safetensors_io import FileRange, Tensors
from builder.formats import algorithms
from builder.formats.assignment import ModelFormats
from builder.formats.kernels import packing
from builder.formats.kv_cache import KvCacheFormat
from builder.formats.registry import BF16, FP8
from builder.model import multimodal, tensor_names
from builder.model.files import CONFIG, json_object
from builder.model.loading import check_tied
from builder.quantize import unified_files, unified_plan
from builder.quantize.ranges import Ranges
from builder.quantize.source_weights import NAMES, SourceModel, WeightReader, itemsize, rounded
from builder.quantize.unified_files import UnifiedFiles
from builder.quantize.unified_plan import SHARD_BYTES, Layer, UnifiedPlan

# Read and packed at a time by each thread. Larger blocks leave the caches of a core.
BLOCK_BYTES = 4 << 20
# Copied at a time, so that a large embedding occupies all threads.
COPY_BYTES = 64 << 20
NAN, INF = "holds NaN", "holds Inf"
LARGE_KV = 0.5  # ModelOpt warns of scales of an FP8 KV cache above it (export/quant_utils.py, postprocess_state_dict)
# Whose layout this is. TensorRT-LLM's AutoDeploy rejects another name (_torch/auto_deploy/models/
# quant_config_reader.py), and vLLM looks for it to choose its loader (vllm/config/model.py, _parse_quant_hf_config).
# The documents are those of version 0.47; 0.37 leaves the embedding out of the excluded modules.
PRODUCER = {"name": "modelopt", "version": "0.47.0"}


@dataclass(frozen=True)
class Work:
    """How to do it. threads: by default the cores of this process. done: called with the bytes of the source that were
    finished, from any thread. ready: the source's files in the order in which they become complete; None if all are.
    algorithm: the name of what chooses block scales (formats/algorithms.py): max or mse. solved: modules whose codes
    and scales are computed already, and for each the safetensors file that holds them by the names of the format's
    tensors; NVFP4's are made under the global scale of the largest magnitude of the module's group.
    """

    threads: int | None = None
    done: Callable[[int], None] = lambda nbytes: None
    ready: Iterable[Path] | None = None
    shard_bytes: int = SHARD_BYTES
    algorithm: str = algorithms.MAX.name
    solved: Mapping[str, Path] = field(default_factory=dict)


def write(
    source: SourceModel, formats: ModelFormats, ranges: Ranges, unified: Path, work: Work | None = None
) -> dict[str, Any]:
    """Writes the unified layout into the directory `unified`, which is created. Returns facts for the manifest.

    formats: of which layers with weights of zeros are BF16 (zeros.find). ranges: of all inputs and of the KV cache that
    the formats need.

    UnsupportedError for what ModelOpt must write (unified_plan.plan); IntegrityError, with names, for weights that are
    all zero or hold NaN or Inf, and for ranges that are missing. A failure leaves no file of weights behind.
    """
    asked = work or Work()
    made = unified_plan.plan(source.config, source.headers, source.dtype, formats)
    unified_plan.check(made.layers)
    scales = ranges.scales(made.layers, formats.cache, made.architecture)
    made = replace(made, scales=scales)
    unified.mkdir(parents=True, exist_ok=True)
    with unified_files.created(unified, made, asked.shard_bytes) as files:
        files.numbers(scales)
        _run(_Writer(source, made, files, asked), asked)
        check_tied(source.config, source.directory)  # all files are there only now
    _write_documents(source, made, formats.cache, unified)
    return {**facts(made, formats), "algorithm": asked.algorithm}


def rescale(source: SourceModel, formats: ModelFormats, ranges: Ranges, unified: Path) -> dict[str, Any] | None:
    """Gives the layout that `write` made of this source in these formats the scales of other ranges: no other tensor
    depends on ranges. Returns the facts of `write`; None, with nothing changed, if other scales are needed than the
    layout holds."""
    made = unified_plan.plan(source.config, source.headers, source.dtype, formats)
    made = replace(made, scales=ranges.scales(made.layers, formats.cache, made.architecture))
    if Tensors(unified).keys() != made.tensors.keys():
        return None
    unified_files.renumber(unified, made.scales)
    return facts(made, formats)


def facts(made: UnifiedPlan, formats: ModelFormats) -> dict[str, Any]:
    """Counts for the manifest, as of a calibration with ModelOpt."""
    cache = [scale for name, scale in made.scales.items() if name.endswith(formats.cache.unified or ("no cache",))]
    layers = list(made.layers.values())
    counts = {f"{one.label}_linears": layers.count(one) for one in dict.fromkeys((FP8, *formats.layers)) if one != BF16}
    return {
        "quantized_linears": layers.count(formats.whole),
        **counts,
        f"{BF16.label}_linears": len(formats.modules(BF16)),
        "kv_scales": len(cache),
        "large_kv": sum(scale > LARGE_KV for scale in cache) if formats.cache.scale_range == FP8.input_range else 0,
    }


class _Writer:
    """Makes the tensors of a plan, one task for each group of layers and for each piece of another tensor."""

    def __init__(self, source: SourceModel, made: UnifiedPlan, files: UnifiedFiles, asked: Work) -> None:
        self._source, self._made, self._files, self._asked = source, made, files, asked
        self._solved = {path: Tensors(path.parent, [path]) for path in set(asked.solved.values())}
        self._reader = WeightReader(source.tensors)
        self.wrong: dict[str, str] = {}  # {tensor: what is wrong with it}
        self.stop = False

    def tasks(self) -> Iterator[tuple[set[Path], Callable[[], None]]]:
        """(files of the source that it reads, what to do), in the order of the source's files."""
        places = self._source.tensors.place
        found: list[tuple[FileRange, set[Path], Callable[[], None]]] = []
        for group in self._made.groups:
            ranges = [places(layer.part.source) for layer in group]
            found.append((ranges[0], {one.path for one in ranges}, lambda group=group: self._pack(group)))  # type: ignore[misc]
        for part in self._made.copies:
            place = places(part.source)
            for begin in range(0, max(1, math.prod(part.shape)), COPY_BYTES // 4):
                found.append((place, {place.path}, lambda part=part, begin=begin: self._copy(part, begin)))  # type: ignore[misc]
        for _, paths, task in sorted(found, key=lambda one: (str(one[0].path), one[0].begin)):
            yield paths, task

    def _copy(self, part: Part, first: int) -> None:
        """Copies COPY_BYTES // 4 values of a tensor, from number `first` on, rounded to its dtype."""
        info = self._source.tensors[part.source]
        count = min(COPY_BYTES // 4, math.prod(part.shape) - first)
        size, begin = itemsize(info.dtype), info.begin + (part.start + first) * itemsize(info.dtype)
        if info.dtype == part.dtype:
            place = FileRange(self._source.tensors.place(part.source).path, begin, begin + count * size)
            self._files.copy(part.name, place, first * size)
        else:
            flat = replace(part, shape=(count,), start=part.start + first)
            for at in range(0, count, BLOCK_BYTES // 4):
                piece = replace(flat, shape=(min(BLOCK_BYTES // 4, count - at),), start=flat.start + at)
                made = rounded(self._reader.rows(piece)[0], info.dtype, part.dtype)
                self._files.write(part.name, made, (first + at) * itemsize(part.dtype))
        self._asked.done(count * size)

    def _pack(self, group: Sequence[Layer]) -> None:
        """Writes the tensors of layers that share one scale of their weights."""
        found = [self._largest(layer.part) for layer in group]
        if not self.wrong:
            for layer in group:
                self._write(layer, max(found))
        self._asked.done(sum(math.prod(layer.part.shape) * self._size(layer.part) for layer in group))

    def _largest(self, part: Part) -> float:
        """The largest magnitude of a weight. One that no scale can be made of is recorded."""
        dtype = self._source.tensors[part.source].dtype
        amax = 0.0
        for begin, end in self._blocks(part):
            one = packing.largest(self._reader.rows(part, begin, end), dtype, rounded_to=self._made.dtype, threads=1)
            amax = one if math.isnan(one) else max(one, amax) if not math.isnan(amax) else amax
        if math.isnan(amax):
            self.wrong[part.source] = NAN
        elif math.isinf(amax):
            self.wrong[part.source] = INF
        elif amax == 0:
            self.wrong[part.source] = "is all zero"
        return amax

    def _write(self, layer: Layer, amax: float) -> None:
        one, part = layer.number_format, layer.part
        dtype, tensors = self._source.tensors[part.source].dtype, {tensor.name: tensor for tensor in one.tensors}
        searched = self._asked.algorithm == algorithms.MSE.name and algorithms.MSE.treats(one)
        pack, solved = one.pack_searched if searched else one.pack, layer.module in self._asked.solved
        for begin, end in [(0, 1)] if solved else self._blocks(part):
            if self.stop:
                return
            packed = pack(self._reader.rows(part, begin, end), dtype, amax, rounded_to=self._made.dtype, threads=1)
            for key, data in packed.items():
                name = f"{layer.module}.{tensors[key].unified}"
                if solved and tensors[key].per_output:
                    self._copy_solved(layer.module, key, name)
                elif tensors[key].per_output:
                    self._files.write(name, data, self._files.nbytes(name) // part.shape[0] * begin)
                elif begin == 0:
                    self._files.write(name, data)

    def _copy_solved(self, module: str, key: str, name: str) -> None:
        """Copies a tensor that an algorithm has made to its place."""
        path = self._asked.solved[module]
        info = self._solved[path].get(f"{module}.{key}")
        if info is None or info.nbytes != self._files.nbytes(name):
            raise IntegrityError(
                f"{path} does not hold {module}.{key} of this model.",
                why=f"It needs {self._files.nbytes(name)} bytes, and has {info.nbytes if info else 'none'}.",
                hint="Run the stage again: --force quantize",
            )
        self._files.copy(name, self._solved[path].place(f"{module}.{key}"), 0)

    def _blocks(self, part: Part) -> Iterator[tuple[int, int]]:
        rows = max(1, BLOCK_BYTES // (part.shape[-1] * self._size(part)))
        for begin in range(0, part.shape[0], rows):
            yield begin, min(begin + rows, part.shape[0])

    def _size(self, part: Part) -> int:
        return itemsize(self._source.tensors[part.source].dtype)


def _run(writer: _Writer, asked: Work) -> None:
    """Does all tasks, each as soon as its files are complete. IntegrityError for weights that can't be scaled."""
    threads = asked.threads or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads, "write") as pool:
        try:
            _submit(writer, pool, asked.ready)
        except BaseException:
            writer.stop = True
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    if writer.wrong:
        raise _not_scalable(writer.wrong)


def _submit(writer: _Writer, pool: ThreadPoolExecutor, ready: Iterable[Path] | None) -> None:
    """Submits tasks as files become complete, and waits for all. Raises what the first failing task raises."""
    waiting = list(writer.tasks())
    running: set[Future[None]] = set()
    complete: set[Path] = set()
    for path in ready if ready is not None else ():
        complete.add(path)
        running |= {pool.submit(task) for paths, task in waiting if paths <= complete}
        waiting = [(paths, task) for paths, task in waiting if not paths <= complete]
        running = _checked(running, wait_for_one=False)
    running |= {pool.submit(task) for _, task in waiting}
    while running:
        running = _checked(running, wait_for_one=True)


def _checked(running: set[Future[None]], *, wait_for_one: bool) -> set[Future[None]]:
    """Those that are still running. Raises what one of the others raised."""
    finished, rest = wait(running, timeout=None if wait_for_one else 0, return_when=FIRST_COMPLETED)
    for future in finished:
        future.result()
    return rest


def _not_scalable(wrong: Mapping[str, str]) -> IntegrityError:
    finite = all(what not in (NAN, INF) for what in wrong.values())  # else the layer is as wrong in BF16
    return IntegrityError(
        f"{len(wrong)} weights of the model can't be quantized: {listed(sorted(wrong))}.",
        why="\n".join(f"{name} {what}." for name, what in sorted(wrong.items())[:10]),
        hint="Fetch the model again, or choose another revision."
        + (" Layers can be left in BF16: --keep-bf16 PATTERN" if finite else ""),
    )


def _write_documents(source: SourceModel, made: UnifiedPlan, cache: KvCacheFormat, unified: Path) -> None:
    """Writes hf_quant_config.json where something is quantized, config.json, and everything that `complete` adds.

    config.json is the model's own, not the form that the installed transformers would give it.
    """
    config = json_object(source.directory / CONFIG)
    if multimodal.MARK in source.config:
        config = multimodal.own_config(source.config)
    config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": NAMES[made.dtype]}
    if made.layers or cache.quantized:
        stated = unified_config.quantization(made.layers, _unquantized(made, source.config), cache)
        document = {"producer": _producer(made), "quantization": stated}
        write_json(unified / "hf_quant_config.json", document)
        config["quantization_config"] = unified_config.block(document, made.layers)
    write_json(unified / CONFIG, config)
    huggingface.complete(unified, source.directory)


def _producer(made: UnifiedPlan) -> dict[str, str]:
    """The tool that the layout is named after: ModelOpt, unless it has no such format."""
    ours = any(one.compressed_only for one in made.layers.values())
    return {"name": "trtllm-builder", "version": __version__} if ours else PRODUCER


def _unquantized(made: UnifiedPlan, config: Mapping[str, Any]) -> list[str]:
    """Modules that are not quantized, with an output layer that is tied to the embedding."""
    head = tensor_names.head(config).removesuffix(".weight")
    return list(dict.fromkeys([*made.unquantized, head]))
