"""One layout of a quantized checkpoint -> another: unified, TensorRT-LLM's, compressed-tensors.

Weights are never computed: their bytes are copied from file to file, and scales are rewritten one at a time, so a
conversion takes little memory whatever the size. The unified layout is between the other two.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from builder import __version__
from builder.architectures import catalog, names
from builder.checkpoint import layouts, quantized_source, shards, unified_config
from builder.checkpoint.compressed_tensors import config as compressed_config
from builder.checkpoint.compressed_tensors import tensors as compressed
from builder.checkpoint.description import CONFIG, HF_QUANT_CONFIG, Description, Layout, describe_directory
from builder.checkpoint.layouts import QUANT_CFG, check_formats, write_json, write_quant_cfg
from builder.core import atomic
from builder.core.errors import BuilderError, StageError, UsageError
from builder.core.output import Output, size
from builder.core.safetensors_io import REPAIRS, Tensors
from builder.formats.base import NumberFormat
from builder.formats.declared import MIXED, declared
from builder.model.files import INDEX

# The layouts by the names that users type; each is also a directory of a checkpoint in the store.
LAYOUTS: Mapping[str, Layout] = {
    "unified": "unified",
    "tensorrt_llm": "tensorrt_llm",
    "compressed-tensors": "compressed_tensors",
}
# What does not go along: weights, and the files that say how they are quantized.
OWN_FILES = (CONFIG, HF_QUANT_CONFIG, QUANT_CFG, INDEX, REPAIRS)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".engine")
LARGEST_COMPANION = 1 << 28  # bytes; the largest tokenizer.json known here has 33 MB
KEYS = ("quantization_config", "compression_config")  # of config.json, in the Hugging Face layouts


@dataclass(frozen=True)
class Options:
    """How to convert. model: a directory with the source model's config.json and tokenizer, which TensorRT-LLM's layout
    lacks. shard_bytes: of the files to write. done: called with the bytes of each tensor after it was written."""

    model: Path | None = None
    shard_bytes: int = shards.SHARD_BYTES
    done: Callable[[int], None] = lambda nbytes: None


@dataclass(frozen=True)
class Converted:
    """What was written. lost: what the new layout can't hold, as sentences. suspicious: scales that are not finite and
    positive."""

    layout: Layout
    files: tuple[str, ...]
    nbytes: int
    lost: tuple[str, ...] = ()
    suspicious: tuple[str, ...] = ()


def source_directory(path: Path) -> Path:
    """The directory to convert from: `path` itself, or the first layout in it if it is a checkpoint of the store.
    UsageError if there is neither."""
    if not path.is_dir():
        raise UsageError(f"There is no directory {path}.", hint="Name a directory that holds a quantized checkpoint.")
    here = [path, *(path / name for name in ("unified", "compressed_tensors", "tensorrt_llm"))]
    found = next((one for one in here if (one / CONFIG).is_file()), None)
    if found is None:
        raise UsageError(
            f"{path} holds no quantized checkpoint.",
            why="It has no config.json, and no directory unified, compressed_tensors or tensorrt_llm with one.",
            hint="Name a directory that `builder quantize`, ModelOpt or llm-compressor wrote.",
        )
    return found


def parse_size(text: str) -> int:
    """Bytes from 500MB or 5GB, decimal units. UsageError for anything else."""
    found = re.fullmatch(r"(\d{1,6})\s*(MB|GB)", text.strip(), re.IGNORECASE)
    if found is None or not int(found[1]):
        raise UsageError(f"{text!r} is not a size of files.", hint="Write it as 500MB or 5GB.")
    return int(found[1]) * {"MB": 10**6, "GB": 10**9}[found[2].upper()]


def convert_with_progress(source: Path, destination: Path, layout: Layout, options: Options, out: Output) -> Converted:
    """`convert` with a bar that counts megabytes."""
    total = sum(file.stat().st_size for file in source.glob("*.safetensors")) / 1e6
    with out.progress(f"converting to {layout}", total, "MB") as bar:
        done = 0

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            bar.update(done / 1e6)

        return convert(source, destination, layout, replace(options, done=count))


def convert(source: Path, destination: Path, layout: Layout, options: Options = Options()) -> Converted:
    """Writes the checkpoint in `source` to `destination`, which must not exist, in another layout.

    The destination appears when it is complete: a failure or a kill leaves nothing there. UnsupportedError for what has
    no place in the layout, IntegrityError for a damaged checkpoint, StageError for a full disk.
    """
    if os.path.lexists(destination):
        raise UsageError(f"{destination} exists.", hint="Name a new directory, or remove this one first.")
    found = describe_directory(source)
    quantized_source.check(found, str(source))
    if layout != "compressed_tensors":
        check_formats(found.formats)
    if found.layout == layout:
        raise UsageError(f"{source} is in this layout already.", hint=f"Copy it: cp -r {source} {destination}")
    with new_directory(destination, sum(file.stat().st_size for file in source.glob("*.safetensors"))) as new:
        return write(source, new, layout, options, found)


def write(
    source: Path, destination: Path, layout: Layout, options: Options = Options(), found: Description | None = None
) -> Converted:
    """The same into an existing, empty directory. found: the description of `source`, if it is known."""
    found = describe_directory(source) if found is None else found
    pair = (found.layout, layout)
    if pair == ("unified", "compressed_tensors"):
        made = _to_compressed(source, destination, found, options)
    elif pair == ("compressed_tensors", "unified"):
        made = _to_unified(source, destination, found, options)
    elif pair == ("unified", "tensorrt_llm"):
        made = _to_tensorrt_llm(source, destination, found, options)
    elif pair == ("tensorrt_llm", "unified"):
        made = _from_tensorrt_llm(source, destination, found, options)
    else:
        return _by_way_of_unified(source, destination, layout, options, found)
    copy_companions(source, destination)
    return made


def remove(directory: Path) -> None:
    """Removes a directory that was needed on the way."""
    shutil.rmtree(directory, ignore_errors=True)


def _by_way_of_unified(
    source: Path, destination: Path, layout: Layout, options: Options, found: Description
) -> Converted:
    """Both steps, with the unified layout in a directory that is removed afterwards."""
    between = destination / ".unified"
    between.mkdir()
    try:
        first = write(source, between, "unified", replace(options, done=lambda nbytes: None), found)
        second = write(between, destination, layout, options)
    finally:
        remove(between)
    lost, suspicious = (
        dict.fromkeys((*first.lost, *second.lost)),
        dict.fromkeys((*first.suspicious, *second.suspicious)),
    )
    return Converted(layout, second.files, second.nbytes, tuple(lost), tuple(suspicious))


def _quantized(found: Description) -> tuple[dict[str, NumberFormat], list[str]]:
    """{quantized linear layer: its format}, and the modules with other matrices, which servers must not take for
    quantized ones: layers that were left as they are, routers of mixtures, vision towers."""
    quantized = {module: one for module, one in found.layers.items() if one.quant_algo is not None}
    matrices = [name.removesuffix(".weight") for name, info in found.headers.items() if len(info.shape) == 2]
    architecture = catalog.of(found.config)
    known = {*found.layers, *(name for name in matrices if f"{name}.weight" in found.headers)}
    kept = [module for module in known if module not in quantized and not names.is_embedding(architecture, module)]
    return quantized, sorted(kept)


def _to_compressed(source: Path, destination: Path, found: Description, options: Options) -> Converted:
    quantized, kept = _quantized(found)
    stated = compressed_config.document(quantized, kept, found.cache, _head(found)) | {"producer": _producer(found)}
    made = compressed.convert(Tensors(source), found.layers, found.cache, to_compressed=True)
    files = _write(destination, made, options)
    write_json(destination / CONFIG, {**without_quantization(found.config), "quantization_config": stated})
    return _result("compressed_tensors", destination, files, made)


def _to_unified(source: Path, destination: Path, found: Description, options: Options) -> Converted:
    quantized, kept = _quantized(found)
    made = compressed.convert(Tensors(source), found.layers, found.cache, to_compressed=False)
    document = {
        "producer": _producer(found),
        "quantization": unified_config.quantization(quantized, [*kept, _head(found)], found.cache),
    }
    files = _write(destination, made, options)
    _write_configuration(destination, without_quantization(found.config), document)
    return _result("unified", destination, files, made)


def _to_tensorrt_llm(source: Path, destination: Path, found: Description, options: Options) -> Converted:
    config = catalog.with_common_keys(without_quantization(found.config))
    with _with_hf_quant_config(source, destination, found) as unified:
        layouts.write_tensorrt_llm(unified, config, destination)
    lost = _clamped(source, found)
    options.done(sum(info.nbytes for info in found.headers.values()))
    return _result("tensorrt_llm", destination, sorted(destination.glob("*.safetensors")), compressed.Made(), lost)


def _from_tensorrt_llm(source: Path, destination: Path, found: Description, options: Options) -> Converted:
    from builder.checkpoint.from_tensorrt_llm import unified_parts  # numpy: only where ranks are joined

    if options.model is None:
        raise UsageError(
            "TensorRT-LLM's layout has no config.json and tokenizer of the model.",
            why="The Hugging Face layouts need them.",
            hint="Name the directory of the model that the checkpoint was made from: --model DIRECTORY",
        )
    config = without_quantization(layouts.read_json(options.model / CONFIG))
    tensors, document = unified_parts(source, catalog.with_common_keys(config))
    made = compressed.Made(tensors)
    files = _write(destination, made, options)
    _write_configuration(destination, config, document)
    copy_companions(options.model, destination)
    lost = "KV cache scales below 1 are 1 in TensorRT-LLM's layout: what they were before is not known."
    return _result("unified", destination, files, made, (lost,) if found.cache.quantized else ())


def _write_configuration(destination: Path, config: Mapping[str, Any], document: Mapping[str, Any]) -> None:
    """hf_quant_config.json, the same in config.json, and quant_cfg.json where formats are mixed."""
    stated = document["quantization"]
    mixed = stated["quant_algo"] == MIXED
    formats = declared(stated)
    layers = formats.layers if formats.default is None else {"Linear": formats.default}
    block = unified_config.block(document, layers)
    write_json(destination / CONFIG, {**config, "quantization_config": block})
    write_json(destination / HF_QUANT_CONFIG, document)
    if mixed:
        write_quant_cfg(destination, stated)


@contextmanager
def _with_hf_quant_config(source: Path, destination: Path, found: Description) -> Iterator[Path]:
    """A directory with the files of a unified checkpoint and hf_quant_config.json, which some leave out."""
    if (source / HF_QUANT_CONFIG).is_file():
        yield source
        return
    view = destination / ".view"
    view.mkdir()
    try:
        for path in source.iterdir():
            (view / path.name).symlink_to(path.absolute())
        quantized, kept = _quantized(found)
        stated = unified_config.quantization(quantized, [*kept, _head(found)], found.cache)
        write_json(view / HF_QUANT_CONFIG, {"producer": _producer(found), "quantization": stated})
        yield view
    finally:
        shutil.rmtree(view, ignore_errors=True)


def _clamped(source: Path, found: Description) -> tuple[str, ...]:
    """What TensorRT-LLM's layout can't hold of the KV cache's scales."""
    tensors = Tensors(source)
    scales = [n for n, info in tensors.items() if n.endswith(found.cache.unified or "-") and info.dtype == "F32"]
    below = sum(struct.unpack("<f", tensors.read(name))[0] < 1 for name in scales)
    lost = f"{below} of {len(scales)} KV cache scales are below 1, and are 1 in this layout, as ModelOpt writes it."
    return (lost,) if below else ()


def _head(found: Description) -> str:
    """The output layer's name: also where it is the embedding's transpose and not stored."""
    table = catalog.of(found.config).tensors
    return table.head if table else "lm_head"


def _producer(found: Description) -> dict[str, str]:
    """The tool that computed the weights, as the new files name it."""
    known = found.producer.name and found.producer.name != compressed_config.METHOD
    source = f"{compressed_config.METHOD} {found.producer.version}".strip()
    return asdict(found.producer) if known else {"name": "trtllm-builder", "version": __version__, "source": source}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json without what it says of the quantization."""
    return {key: value for key, value in config.items() if key not in KEYS}


def _write(destination: Path, made: compressed.Made, options: Options) -> list[Path]:
    notes = {compressed.RECORD: made.records}
    return shards.write_shards(destination, made.tensors, options.shard_bytes, notes, options.done)


def _result(
    layout: Layout, destination: Path, files: list[Path], made: compressed.Made, lost: tuple[str, ...] = ()
) -> Converted:
    nbytes = sum(file.stat().st_size for file in files)
    return Converted(layout, tuple(file.name for file in files), nbytes, lost, tuple(made.suspicious))


def copy_companions(source: Path, destination: Path) -> None:
    """Copies tokenizer, generation_config.json and other small files."""
    for path in sorted(source.iterdir()):
        weights = path.suffix in WEIGHTS or path.name in OWN_FILES or path.name.startswith(".")
        if not weights and path.is_file() and path.stat().st_size <= LARGEST_COMPANION:
            shutil.copyfile(path, destination / path.name)


@contextmanager
def new_directory(destination: Path, nbytes: int) -> Iterator[Path]:
    """A new directory beside `destination` that gets its name if the block succeeds, and is removed if not."""
    parent = destination.absolute().parent
    atomic.make_directory(parent)
    for stale in parent.glob(f".{destination.name}.*.converting"):
        if not Path("/proc", stale.name.split(".")[-2]).exists():
            shutil.rmtree(stale, ignore_errors=True)
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise _full(parent, f"The new checkpoint has {size(nbytes)}; {size(free)} are free.")
    new = parent / f".{destination.name}.{os.getpid()}.converting"
    try:
        new.mkdir()
        yield new
        new.rename(destination)
    except OSError as error:
        raise _disk_error(error, parent) from error
    finally:
        with suppress(OSError):
            atomic.remove(new)


def _disk_error(error: OSError, parent: Path) -> BuilderError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _full(parent, "Nothing of the new checkpoint was kept.")
    return atomic.disk_error(error, parent)


def _full(parent: Path, why: str) -> StageError:
    return StageError(
        f"The disk that holds {parent} is full.", why=why, hint="Free some space, or name a directory on another disk."
    )
