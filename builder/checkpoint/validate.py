"""Validates a quantized checkpoint: every expected tensor exists, with the right dtype, shape and plausible values.

`isfinite` is not enough: uninitialized scales (`torch.empty(1)` that no calibration filled) were seen as 1e-44,
-1.3e-05 and 1.8e+25. Tensors are memory-mapped one by one: a checkpoint is read once and never loaded whole.
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from builder.architectures import catalog, names
from builder.checkpoint import layout_names, sharding
from builder.checkpoint.inspection import findings
from builder.checkpoint.inspection.findings import Finding
from builder.checkpoint.layout_names import LayoutNames
from builder.checkpoint.layouts import QUANT_CFG, read_json
from builder.checkpoint.tensor_checks import wrong_blocks, wrong_codes, wrong_floats, wrong_scale
from builder.core.errors import UsageError
from builder.core.safetensors_io import TensorInfo, Tensors
from builder.formats import kv_cache, registry
from builder.formats.base import FLOATS, SCALAR, Content, NumberFormat
from builder.formats.declared import MIXED, DeclaredFormats, declared
from builder.formats.kv_cache import KvCacheFormat
from builder.formats.registry import BF16, FP8, NVFP4


@dataclass(frozen=True)
class Summary:
    """A layout in numbers.

    linears: the number of linear layers by the label of their format; "kept" for unquantized ones. bits_per_weight: of
    the layers in the checkpoint's main format, with all scales. effective_bits: of all linear layers. nbytes: bytes by
    kind of tensor.
    """

    tensors: int
    decoder_layers: int
    linears: Mapping[str, int]
    bits_per_weight: float
    effective_bits: float
    nbytes: Mapping[str, int]

    def facts(self) -> dict[str, Any]:
        """For JSON: `linears` as nvfp4_linears, fp8_linears, kept_linears, ..."""
        facts = asdict(self)
        return {**facts, **{f"{label}_linears": number for label, number in facts.pop("linears").items()}}


@dataclass(frozen=True)
class Inspection:
    """What was found, and one summary for each layout (`unified`, `tensorrt_llm`)."""

    path: Path
    findings: tuple[Finding, ...]
    layouts: Mapping[str, Summary]

    @property
    def summary(self) -> dict[str, int | float]:
        """The summaries of the layouts in one table: `unified.bits_per_weight`, `unified.nbytes.lm_head`, ..."""
        table = {}
        for layout, summary in self.layouts.items():
            for name, value in summary.facts().items():
                parts = {f".{kind}": n for kind, n in value.items()} if name == "nbytes" else {"": value}
                table.update({f"{layout}.{name}{part}": n for part, n in parts.items()})
        return table

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that make answers wrong; the others are warnings."""
        return tuple(one for one in self.findings if one.severity == "error")

    def check(self, path: Path | None = None) -> None:
        """IntegrityError that names the tensors, their effect and what helps, if there is any error.

        path: the checkpoint's place in fixes, if it stays there.
        """
        if self.errors:
            raise findings.error(self.errors, path)

    def facts(self) -> dict[str, Any]:
        """For manifests and --json."""
        return {
            "findings": findings.facts(self.findings),
            "layouts": {name: summary.facts() for name, summary in self.layouts.items()},
        }


@dataclass(frozen=True)
class Expected:
    """What a tensor must be.

    label: the kind of tensor that the summary counts its bytes as; None if that follows from its name. linear: the
    format of the linear layer whose weight it is.
    """

    content: Content
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] | None = None
    label: str | None = None
    linear: NumberFormat | None = None


KV_SCALE = Expected("scale", ("F32",), SCALAR, "kv_scales")


@dataclass
class Layout:
    """The files of one layout: their tensors, what their configuration says, what was found.

    names: None if the shapes of the tensors do not follow from the configuration. rank: of a split TensorRT-LLM layout.
    """

    name: str
    tensors: Tensors
    config: Mapping[str, Any]
    formats: DeclaredFormats
    cache: KvCacheFormat
    names: LayoutNames | None
    rank: int = 0
    here: bool = False
    findings: list[Finding] = field(default_factory=list)

    @property
    def unified(self) -> bool:
        """Whether this is the Hugging Face layout."""
        return self.name == "unified"

    @property
    def main(self) -> NumberFormat:
        """The format that names the checkpoint: the one with the fewest bits."""
        return min(self.formats.used, key=lambda one: one.bits, default=NVFP4)

    def report(self, tensor: str, what: str, kind: str) -> None:
        """Records a finding about a tensor."""
        self.findings.append(findings.finding(self.name, tensor, what, kind, here=self.here))


def inspect(path: Path, *, here: bool = False) -> Inspection:
    """Inspects a checkpoint with both layouts, or a directory with one of them. UsageError if there is none.

    here: this build has just made it, which decides what helps.
    """
    layouts = [layout for folder in (path, path / "unified", path / "tensorrt_llm") for layout in _layouts(folder)]
    if not layouts:
        raise UsageError(
            f"{path} holds no quantized checkpoint.",
            why="It has neither hf_quant_config.json nor config.json with rank*.safetensors.",
            hint="Give a directory that `builder quantize` or ModelOpt wrote.",
        )
    for layout in layouts:
        layout.here = here
    summaries = {layout.name: _inspect(layout) for layout in layouts}
    return Inspection(path, tuple(one for layout in layouts for one in layout.findings), summaries)


def _layouts(folder: Path) -> Iterator[Layout]:
    split, unified = any(folder.glob("rank*.safetensors")), (folder / "hf_quant_config.json").exists()
    config = read_json(folder / "config.json") if unified or split else {}
    if unified:
        quantization = read_json(folder / "hf_quant_config.json").get("quantization", {})
        yield _layout("unified", Tensors(folder), catalog.with_common_keys(config), quantization)
    elif split:
        config = config.get("pretrained_config", config)  # an engine directory wraps it
        files = sharding.rank_files(folder, config)
        for rank, file in enumerate(files):
            name = "tensorrt_llm" if len(files) == 1 else f"tensorrt_llm {file.stem}"
            quantization = dict(config.get("quantization", {}))
            if quantization.get("quant_algo") == MIXED:
                quantization |= read_json(folder / QUANT_CFG)
            yield _layout(name, Tensors(folder, [file]), config, quantization, rank)


def _layout(
    name: str, tensors: Tensors, config: Mapping[str, Any], quantization: Mapping[str, Any], rank: int = 0
) -> Layout:
    known = layout_names.unified(config) if name == "unified" else layout_names.tensorrt_llm(config)
    cache = kv_cache.of_algo(quantization.get("kv_cache_quant_algo")) or kv_cache.AUTO
    return Layout(name, tensors, config, declared(quantization), cache, known, rank=rank)


def _inspect(layout: Layout) -> Summary:
    expected = _from_config(layout, layout.names) if layout.names else _from_tensors(layout)
    for name in expected:
        if name not in layout.tensors:
            layout.report(name, "is missing", "missing")
    nbytes: Counter[str] = Counter()
    weights: Counter[NumberFormat] = Counter()
    for name, info in layout.tensors.items():
        want = expected.get(name) or _by_dtype(layout, name, info)
        if _check_form(layout, name, info, want):
            _check_content(layout, name, info, want)
            layout.tensors.release(name)
        nbytes[_kind(layout, name, want)] += info.nbytes
        if want.linear and want.shapes:
            number = math.prod(want.linear.weight.weight_shape(want.shapes[0]))
            weights[want.linear] += number
            if want.linear.group_size:
                _check_bits(layout, name, want.linear, number)
    linears = Counter(want.linear for want in expected.values() if want.linear)
    if not linears[layout.main]:
        layout.report(
            "every linear layer", f"is unquantized; the configuration says {layout.main.title}", "unquantized"
        )
    found = dict.fromkeys((NVFP4, FP8, BF16, *linears))
    return Summary(
        tensors=len(layout.tensors),
        decoder_layers=layout.config["num_hidden_layers"],
        linears={one.label: linears[one] for one in found},
        bits_per_weight=_bits([layout.main], nbytes, weights),
        effective_bits=_bits(list(found), nbytes, weights),
        nbytes=dict(nbytes),
    )


def _bits(formats: Sequence[NumberFormat], nbytes: Mapping[str, int], weights: Mapping[NumberFormat, int]) -> float:
    """Bits per weight of the layers in these formats, including scales; 0 if there are no such layers."""
    labels = {tensor.label for one in formats for tensor in one.tensors}
    number = sum(weights.get(one, 0) for one in formats)
    return round(8 * sum(nbytes.get(label, 0) for label in labels) / number, 4) if number else 0.0


def _calibrated() -> tuple[str, ...]:
    """Suffixes of the scales that come from the calibration rows; all others come from the model's weights."""
    tensors = [tensor for one in registry.all_formats().values() for tensor in one.tensors if tensor.calibrated]
    scales = [name for one in kv_cache.FORMATS.values() for name in (*one.unified, *one.tensorrt_llm)]
    return (*(leaf for t in tensors for leaf in (t.unified, t.tensorrt_llm)), *scales)


def _kind(layout: Layout, name: str, want: Expected) -> str:
    if want.label:
        return want.label
    module = name.rpartition(".")[0]
    if module == _head(layout):
        return "lm_head"
    return "embedding" if (layout.names and module == layout.names.embedding) or "embed" in name else "other"


def _head(layout: Layout) -> str:
    """The name of the output layer."""
    return layout.names.head if layout.names else names.ENGINE_HEAD


def _from_config(layout: Layout, known: LayoutNames) -> dict[str, Expected]:
    """All tensors of a known architecture with their shapes; for a rank, those that it holds."""
    config = layout.config
    parallel = sharding.parallel_of(config)
    pp_rank, tp_rank = divmod(layout.rank, parallel.tp)
    first, last = pp_rank == 0, pp_rank == parallel.pp - 1
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    expected = {f"{known.embedding}.weight": _float(vocab, hidden)} if first else {}
    if last:
        expected[f"{known.final_norm}.weight"] = _float(hidden)
    tied = layout.unified and config.get("tie_word_embeddings")
    if f"{known.head}.weight" in layout.tensors or (last and not tied):
        expected[f"{known.head}.weight"] = _float(vocab, hidden)
    for layer in range(len(parallel.layers(pp_rank, config["num_hidden_layers"]))):
        prefix = f"{known.layers}.{layer}."
        expected |= {f"{prefix}{name}.weight": _float(size) for name, size in known.norms.items()}
        for name, (out_features, in_features) in known.linears.items():
            expected |= _linear(layout, prefix + name, out_features, in_features)
            if name in known.biases:
                expected[f"{prefix}{name}.bias"] = _float(out_features)
        scales = layout.cache.unified if layout.unified else layout.cache.tensorrt_llm
        expected |= {f"{prefix}{known.attention}.{scale}": KV_SCALE for scale in scales}
    return {name: _share(name, want, config, parallel.tp, tp_rank) for name, want in expected.items()}


def _share(name: str, want: Expected, config: Mapping[str, Any], tp: int, tp_rank: int) -> Expected:
    """What a tensor parallel rank holds of an expected tensor."""
    if tp == 1 or not want.shapes or want.shapes == SCALAR:
        return want
    shapes = tuple(sharding.shard(name, whole, config, tp, tp_rank).shape(whole) for whole in want.shapes)
    return replace(want, shapes=shapes)


def _float(*shape: int) -> Expected:
    return Expected("floats", FLOATS, (shape,))


def _linear(layout: Layout, module: str, out_features: int, in_features: int) -> dict[str, Expected]:
    number_format, weight = layout.formats.of(module), (out_features, in_features)
    return {
        f"{module}.{tensor.leaf(unified=layout.unified)}": Expected(
            tensor.content,
            tensor.dtypes,
            tensor.shapes(weight),
            tensor.label,
            linear=number_format if tensor is number_format.weight else None,
        )
        for tensor in number_format.tensors
    }


def _kv_scales(layout: Layout, module: str) -> dict[str, Expected]:
    """The KV cache scales of the attention that this projection belongs to, for one projection of each attention."""
    attention, _, projection = module.rpartition(".")
    if layout.unified and projection in ("k_proj", "qkv_proj"):  # ModelOpt uses k_proj, v_proj for Phi-3 too
        return {f"{attention}.{scale}": KV_SCALE for scale in layout.cache.unified}
    if not layout.unified and projection == "qkv":
        return {f"{attention}.{scale}": KV_SCALE for scale in layout.cache.tensorrt_llm}
    return {}


def _from_tensors(layout: Layout) -> dict[str, Expected]:
    """For other decoders, from the tensors themselves: each linear layer must have all tensors of its format."""
    expected: dict[str, Expected] = {}
    for name, info in layout.tensors.items():
        module = name.removesuffix(".weight")
        if module == name or len(info.shape) != 2:
            continue
        number_format = layout.formats.of(module)
        stored = number_format.quant_algo is not None and info.dtype in number_format.weight.dtypes
        if stored or not ("embed" in module or module == _head(layout) or "norm" in module):
            weight = number_format.weight.weight_shape(info.shape) if stored else info.shape
            expected |= _linear(layout, module, weight[0], weight[1])
        expected |= _kv_scales(layout, module)
    if layout.cache.quantized and not any(want is KV_SCALE for want in expected.values()):
        layout.report("k_scale and v_scale", "are missing in all layers", "missing")
    for layer in range(layout.config.get("num_hidden_layers", 0)) if layout.unified else ():
        if not any(f".layers.{layer}." in name for name in layout.tensors):
            layout.report(f"layer {layer}", "has no tensor", "missing")
    return expected


def _by_dtype(layout: Layout, name: str, info: TensorInfo) -> Expected:
    """For a tensor that is not expected: its values are checked too."""
    if name.endswith((".k_scale", ".v_scale", "_cache_scaling_factor")):
        return KV_SCALE
    if info.dtype == "F8_E4M3":
        return Expected("block_scales", (info.dtype,), label="block_scales")
    return Expected("floats", (info.dtype,))


def _check_form(layout: Layout, name: str, info: TensorInfo, want: Expected) -> bool:
    """Checks dtype and shape. False if they are so wrong that the content can't be checked."""
    if name.startswith(f"{_head(layout)}.") and (info.dtype not in FLOATS or not name.endswith((".weight", ".bias"))):
        layout.report(name, f"is {info.dtype}: the output layer must not be quantized", "quantized-head")
        return False
    if info.dtype not in want.dtypes:
        layout.report(name, f"is {info.dtype}, not {' or '.join(want.dtypes)}", "dtype")
        return False
    if want.shapes and info.shape not in want.shapes:
        layout.report(name, f"has the shape {list(info.shape)}, not {list(want.shapes[0])}", "shape")
        return want.content != "scale"
    return True


def _check_content(layout: Layout, name: str, info: TensorInfo, want: Expected) -> None:
    data = layout.tensors.data(name)
    if want.content == "scale":
        wrong = wrong_scale(struct.unpack("<f", data)[0])
    elif want.content == "block_scales":
        wrong = wrong_blocks(data)
    elif want.content == "codes":
        wrong = wrong_codes(data)
    else:
        wrong = wrong_floats(info, data, zeros=want.linear is BF16)
    if wrong:
        layout.report(name, wrong, _kind_of_value(layout, name, want, wrong))


def _kind_of_value(layout: Layout, name: str, want: Expected, wrong: str) -> str:
    """The kind of finding that a bad value is."""
    if want.content == "scale":
        return "kv-scale" if want is KV_SCALE else "input-scale" if name.endswith(_calibrated()) else "weight-scale"
    if want.content == "block_scales":
        return "block-scales"
    return "zero" if wrong == "is all zero" else "not-finite"


def _check_bits(layout: Layout, name: str, number_format: NumberFormat, weights: int) -> None:
    """Checks the bits per weight of a layer in a format with groups, including the scales of the groups."""
    module = name.removesuffix(number_format.weight.leaf(unified=layout.unified))
    leaves = [t.leaf(unified=layout.unified) for t in number_format.tensors if len(t.dims) == 2]
    stored = [layout.tensors.get(f"{module}{leaf}") for leaf in leaves]
    bits = 8 * sum(info.nbytes for info in stored if info) / weights if weights else 0.0
    if abs(bits - number_format.bits) > 0.1:
        layout.report(
            name, f"takes {bits:.2f} bits per weight with its block scales, not {number_format.bits}", "shape"
        )
