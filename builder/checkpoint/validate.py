"""The gate over a quantized checkpoint: every tensor that must be there is, and holds what it must.

`isfinite` is not enough: uninitialised scales (`torch.empty(1)` that no calibration filled) were seen as 1e-44,
-1.3e-05 and 1.8e+25. Memory maps, tensor by tensor: a checkpoint is read once and never held.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import Any

from builder.checkpoint import sharding
from builder.checkpoint.layouts import ARCHITECTURES, LINEARS, MIXED, NORMS, QUANT_CFG, head_size, read_json
from builder.checkpoint.tensor_checks import wrong_blocks, wrong_codes, wrong_floats, wrong_scale
from builder.core.errors import IntegrityError, UnsupportedError, UsageError
from builder.core.safetensors_io import TensorInfo, Tensors

FLOATS = ("BF16", "F16", "F32")
# Scales that calibration reads from the rows; all other numbers come from the model's weights.
ACTIVATIONS = ("input_scale", "activation_scaling_factor", "k_scale", "v_scale", "cache_scaling_factor")
BITS_PER_WEIGHT = 4.5  # 4 per element, 8 for every 16


@dataclass(frozen=True)
class Problem:
    """What is wrong with one tensor of one layout."""

    layout: str
    tensor: str
    what: str

    def __str__(self) -> str:
        return f"{self.layout}: {self.tensor} {self.what}"


@dataclass(frozen=True)
class Summary:
    """A layout in numbers: NVFP4 linear layers, their bits per weight with all scales, bytes by kind of tensor.

    `fp8_linears` are in FP8, `kept_linears` left as they were; `effective_bits` per weight of all linear layers, those
    among them.
    """

    tensors: int
    decoder_layers: int
    nvfp4_linears: int
    bits_per_weight: float
    fp8_linears: int
    kept_linears: int
    effective_bits: float
    nbytes: Mapping[str, int]


@dataclass(frozen=True)
class Inspection:
    """The problems found, and one summary for each layout (`unified`, `tensorrt_llm`)."""

    path: Path
    problems: tuple[Problem, ...]
    layouts: Mapping[str, Summary]

    @property
    def summary(self) -> dict[str, int | float]:
        """The layouts' summaries in one table for people: `unified.bits_per_weight`, `unified.nbytes.lm_head`, ..."""
        table = {}
        for layout, summary in self.layouts.items():
            for name, value in asdict(summary).items():
                parts = {f".{kind}": n for kind, n in value.items()} if name == "nbytes" else {"": value}
                table.update({f"{layout}.{name}{part}": n for part, n in parts.items()})
        return table

    def check(self) -> None:
        """IntegrityError with the names of the tensors, if there is any problem."""
        if self.problems:
            listed = "\n".join(f"  {problem}" for problem in self.problems[:10])
            read_from_rows = all(problem.tensor.endswith(ACTIVATIONS) for problem in self.problems)
            cause = (
                "the rows: try other --calib-data" if read_from_rows else "the model: fetch it again, or another one"
            )
            raise IntegrityError(
                f"The quantized checkpoint has {len(self.problems)} problems.",
                why=listed + ("\n  ..." if len(self.problems) > 10 else ""),
                hint=f"Quantize again (`--force quantize`). If they stay, it is {cause}.",
            )

    def facts(self) -> dict[str, Any]:
        """For manifests and --json."""
        return {
            "problems": [asdict(problem) for problem in self.problems],
            "layouts": {name: asdict(summary) for name, summary in self.layouts.items()},
        }


@dataclass(frozen=True)
class Expected:
    """What a tensor must be. `kind`: weight (packed NVFP4), block, scale, fp8 (a linear layer), fp8_scale, kv_scale,
    kept (a linear layer) or float."""

    kind: str
    dtypes: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] | None = None


SCALAR = ((), (1,))
SCALE, FP8_SCALE = Expected("scale", ("F32",), SCALAR), Expected("fp8_scale", ("F32",), SCALAR)
KV_SCALE = Expected("kv_scale", ("F32",), SCALAR)
SCALARS = ("scale", "fp8_scale", "kv_scale")


@dataclass
class Layout:
    """One set of files under one naming: what is read, what its configuration says, what was found. `formats` has the
    format of each quantized layer where they are mixed; else all but the excluded ones are NVFP4."""

    name: str
    tensors: Tensors
    config: Mapping[str, Any]
    excluded: tuple[str, ...]
    kv_fp8: bool
    exact: bool  # whether the configuration says every tensor's shape
    rank: int = 0  # of TensorRT-LLM's, where its configuration says that there are several
    formats: Mapping[str, str] | None = None
    problems: list[Problem] = field(default_factory=list)

    @property
    def unified(self) -> bool:
        return self.name == "unified"

    @property
    def scales(self) -> tuple[str, str, str]:
        """The block scale's name and the two scalars'."""
        if self.unified:
            return "weight_scale", "weight_scale_2", "input_scale"
        return "weights_scaling_factor", "weights_scaling_factor_2", "activation_scaling_factor"

    def report(self, tensor: str, what: str) -> None:
        self.problems.append(Problem(self.name, tensor, what))


def inspect(path: Path) -> Inspection:
    """Inspects a checkpoint with both layouts, or a directory with one of them. UsageError if it holds none."""
    layouts = [layout for folder in (path, path / "unified", path / "tensorrt_llm") for layout in _layouts(folder)]
    if not layouts:
        raise UsageError(
            f"{path} holds no quantized checkpoint.",
            why="Neither hf_quant_config.json nor config.json with rank*.safetensors is there.",
            hint="Give a directory that `builder quantize` or ModelOpt wrote.",
        )
    summaries = {layout.name: _inspect(layout) for layout in layouts}
    return Inspection(path, tuple(problem for layout in layouts for problem in layout.problems), summaries)


def _layouts(folder: Path) -> Iterator[Layout]:
    split, unified = any(folder.glob("rank*.safetensors")), (folder / "hf_quant_config.json").exists()
    config = read_json(folder / "config.json") if unified or split else {}
    if unified:
        quantization = read_json(folder / "hf_quant_config.json").get("quantization", {})
        yield _layout("unified", Tensors(folder), config, quantization)
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
    algo, formats = quantization.get("quant_algo"), None
    if algo == MIXED:
        listed = quantization.get("quantized_layers") or {}
        formats = {layer: str(said.get("quant_algo")) for layer, said in listed.items()}
    unknown = {algo} - {"NVFP4"} if formats is None else set(formats.values()) - {"NVFP4", "FP8"}
    if unknown:
        found = ", ".join(sorted(map(str, unknown)))
        raise UnsupportedError(f"{name}: quant_algo is {found}, this gate knows NVFP4, alone and with FP8.")
    known = (config.get("architectures") or [config.get("architecture")])[0] in ARCHITECTURES
    excluded = tuple(quantization.get("exclude_modules") or ())
    kv_fp8 = quantization.get("kv_cache_quant_algo") == "FP8"
    return Layout(name, tensors, config, excluded, kv_fp8, exact=known, rank=rank, formats=formats)


def _inspect(layout: Layout) -> Summary:
    expected = _from_config(layout) if layout.exact else _from_tensors(layout)
    for name in expected:
        if name not in layout.tensors:
            layout.report(name, "is missing")
    nbytes: Counter[str] = Counter()
    weights = other_weights = 0
    for name, info in layout.tensors.items():
        want = expected.get(name) or _by_dtype(layout, name, info)
        if _check_form(layout, name, info, want):
            _check_content(layout, name, info, want)
            layout.tensors.release(name)
        nbytes[_kind(name, want)] += info.nbytes
        other_weights += prod(info.shape) if want.kind in ("kept", "fp8") else 0
        if want.kind == "weight" and want.shapes:
            weights += 2 * prod(want.shapes[0])
            _check_bits(layout, name, info, 2 * prod(want.shapes[0]))
    linears = sum(want.kind == "weight" for want in expected.values())
    if not linears:
        layout.report("every linear layer", "is unquantized, the configuration says NVFP4")
    quantized = sum(nbytes[kind] for kind in ("nvfp4_weights", "block_scales", "scales"))
    others = sum(nbytes[kind] for kind in ("fp8_linears", "fp8_scales", "kept_linears"))
    return Summary(
        tensors=len(layout.tensors),
        decoder_layers=layout.config["num_hidden_layers"],
        nvfp4_linears=linears,
        bits_per_weight=_rounded(8 * quantized, weights),
        fp8_linears=sum(want.kind == "fp8" for want in expected.values()),
        kept_linears=sum(want.kind == "kept" for want in expected.values()),
        effective_bits=_rounded(8 * (quantized + others), weights + other_weights),
        nbytes=dict(nbytes),
    )


KINDS = {"weight": "nvfp4_weights", "block": "block_scales", "scale": "scales", "kv_scale": "kv_scales"}
KINDS |= {"fp8": "fp8_linears", "fp8_scale": "fp8_scales", "kept": "kept_linears"}


def _rounded(bits: int, weights: int) -> float:
    return round(bits / weights, 4) if weights else 0.0


def _kind(name: str, want: Expected) -> str:
    if want.kind != "float":
        return KINDS[want.kind]
    return "lm_head" if name.startswith("lm_head.") else "embedding" if "embed" in name else "other"


def _from_config(layout: Layout) -> dict[str, Expected]:
    """All tensors of an architecture that this project knows, with their shapes; of a rank, all that it holds."""
    config = layout.config
    parallel = sharding.parallel_of(config)
    pp_rank, tp_rank = divmod(layout.rank, parallel.tp)
    first, last = pp_rank == 0, pp_rank == parallel.pp - 1
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    embedding, norm = (
        ("model.embed_tokens", "model.norm") if layout.unified else ("transformer.vocab_embedding", "transformer.ln_f")
    )
    expected = {f"{embedding}.weight": _float(vocab, hidden)} if first else {}
    if last:
        expected[f"{norm}.weight"] = _float(hidden)
    tied = layout.unified and config.get("tie_word_embeddings")
    if "lm_head.weight" in layout.tensors or (last and not tied):
        expected["lm_head.weight"] = _float(vocab, hidden)
    for layer in range(len(parallel.layers(pp_rank, config["num_hidden_layers"]))):
        prefix = f"model.layers.{layer}." if layout.unified else f"transformer.layers.{layer}."
        for name, size in _norms(layout).items():
            expected[f"{prefix}{name}.weight"] = _float(size)
        for name, (out_features, in_features) in _linears(layout).items():
            expected |= _linear(layout, prefix + name, out_features, in_features)
            if _has_bias(layout, name):
                expected[f"{prefix}{name}.bias"] = _float(out_features)
            expected |= _kv_scales(layout, prefix + name)
    return {name: _share(name, want, config, parallel.tp, tp_rank) for name, want in expected.items()}


def _share(name: str, want: Expected, config: Mapping[str, Any], tp: int, tp_rank: int) -> Expected:
    """The part of a tensor that a tensor parallel rank holds."""
    if tp == 1 or not want.shapes or want.shapes == SCALAR:
        return want
    shapes = tuple(sharding.share(name, whole, config, tp, tp_rank).shape(whole) for whole in want.shapes)
    return replace(want, shapes=shapes)


def _float(*shape: int) -> Expected:
    return Expected("float", FLOATS, (shape,))


def _norms(layout: Layout) -> dict[str, int]:
    sizes = dict.fromkeys(("input_layernorm", "post_layernorm"), layout.config["hidden_size"])
    if "Qwen3ForCausalLM" in (layout.config.get("architecture"), *layout.config.get("architectures", ())):
        sizes |= dict.fromkeys(("attention.q_layernorm", "attention.k_layernorm"), head_size(layout.config))
    return {NORMS[name]: size for name, size in sizes.items()} if layout.unified else sizes


def _linears(layout: Layout) -> dict[str, tuple[int, int]]:
    """Name of each linear layer of a decoder layer, with its out and in features."""
    config = layout.config
    hidden, inner, head = config["hidden_size"], config["intermediate_size"], head_size(config)
    q = config["num_attention_heads"] * head
    kv = (config.get("num_key_value_heads") or config["num_attention_heads"]) * head
    sizes = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    sizes |= {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    if layout.unified:
        return {name: sizes[name.split(".")[-1]] for names in LINEARS.values() for name in names}
    parts = {name: [sizes[p.split(".")[-1]] for p in names] for name, names in LINEARS.items()}
    return {name: (sum(n for n, _ in shapes), shapes[0][1]) for name, shapes in parts.items()}


def _has_bias(layout: Layout, linear: str) -> bool:
    """Qwen2's q, k and v have one whatever its configuration says; of the others it says it."""
    config, attention = layout.config, "att" in linear
    output = linear.endswith((".o_proj", ".dense"))
    if layout.unified and "Qwen2ForCausalLM" in config["architectures"]:
        return attention and not output
    if not layout.unified and "qwen_type" in config and output:
        return False
    names = ("attention_bias", "attn_bias") if attention else ("mlp_bias",)
    return any(bool(config.get(name)) for name in names)


def _linear(layout: Layout, module: str, out_features: int, in_features: int) -> dict[str, Expected]:
    form, shape = _format(layout, module), (out_features, in_features)
    block, *scalars = layout.scales
    if form is None:
        return {f"{module}.weight": Expected("kept", FLOATS, (shape,))}
    if form == "FP8":  # the weight's scale has the name of NVFP4's block scales
        weight = {f"{module}.weight": Expected("fp8", ("F8_E4M3",), (shape,))}
        return weight | {f"{module}.{scale}": FP8_SCALE for scale in (block, scalars[1])}
    return {
        f"{module}.weight": Expected("weight", ("U8",), ((out_features, in_features // 2),)),
        f"{module}.{block}": Expected("block", ("F8_E4M3",), ((out_features, in_features // 16),)),
        **{f"{module}.{scalar}": SCALE for scalar in scalars},
    }


def _format(layout: Layout, module: str) -> str | None:
    """NVFP4, FP8 or, for a layer that is left as it was, None: as the configuration says."""
    if layout.formats is not None:
        return layout.formats.get(module)
    return None if any(fnmatchcase(module, pattern) for pattern in layout.excluded) else "NVFP4"


def _kv_scales(layout: Layout, module: str) -> dict[str, Expected]:
    if not layout.kv_fp8:
        return {}
    if not layout.unified and module.endswith(".qkv"):
        attention = module.removesuffix("qkv")
        return {f"{attention}{which}_cache_scaling_factor": KV_SCALE for which in ("k", "v", "kv")}
    attention, _, projection = module.rpartition(".")
    if layout.unified and projection in ("k_proj", "qkv_proj"):  # ModelOpt says k_proj and v_proj for Phi-3 too
        return {f"{attention}.k_proj.k_scale": KV_SCALE, f"{attention}.v_proj.v_scale": KV_SCALE}
    return {}


def _from_tensors(layout: Layout) -> dict[str, Expected]:
    """What the tensors of any other decoder demand of each other: every linear layer that is not excluded is NVFP4."""
    expected: dict[str, Expected] = {}
    for name, info in layout.tensors.items():
        module = name.removesuffix(".weight")
        if module == name or len(info.shape) != 2:
            continue
        packed = info.dtype == "U8"
        if packed or not ("embed" in module or module == "lm_head" or "norm" in module):
            expected |= _linear(layout, module, info.shape[0], info.shape[1] * (2 if packed else 1))
        expected |= _kv_scales(layout, module)
    if layout.kv_fp8 and not any(want is KV_SCALE for want in expected.values()):
        layout.report("k_scale and v_scale", "are missing in all layers")
    for layer in range(layout.config.get("num_hidden_layers", 0)) if layout.unified else ():
        if not any(f".layers.{layer}." in name for name in layout.tensors):
            layout.report(f"layer {layer}", "has no tensor")
    return expected


def _by_dtype(layout: Layout, name: str, info: TensorInfo) -> Expected:
    """For a tensor that nothing demands: its numbers are checked all the same."""
    if name.endswith((".k_scale", ".v_scale", "_cache_scaling_factor")):
        return KV_SCALE
    return Expected("block" if info.dtype == "F8_E4M3" else "float", (info.dtype,))


def _check_form(layout: Layout, name: str, info: TensorInfo, want: Expected) -> bool:
    """Dtype and shape; False where the content cannot be judged because the tensor is something else."""
    if name.startswith("lm_head.") and (info.dtype not in FLOATS or not name.endswith((".weight", ".bias"))):
        layout.report(name, f"is {info.dtype}: the output layer is quantized and must not be")
        return False
    if info.dtype not in want.dtypes:
        layout.report(name, f"is {info.dtype}, not {' or '.join(want.dtypes)}")
        return False
    if want.shapes and info.shape not in want.shapes:
        layout.report(name, f"has the shape {list(info.shape)}, not {list(want.shapes[0])}")
        return want.kind not in SCALARS
    return True


def _check_content(layout: Layout, name: str, info: TensorInfo, want: Expected) -> None:
    data = layout.tensors.data(name)
    if want.kind in SCALARS:
        wrong = wrong_scale(struct.unpack("<f", data)[0])
    elif want.kind == "block":
        wrong = wrong_blocks(data)
    elif want.kind == "weight":
        wrong = wrong_codes(data)
    else:
        wrong = wrong_floats(info, data, zeros=want.kind == "kept")
    if wrong:
        layout.report(name, wrong)


def _check_bits(layout: Layout, name: str, info: TensorInfo, weights: int) -> None:
    block = layout.tensors.get(f"{name.removesuffix('weight')}{layout.scales[0]}")
    bits = 8 * (info.nbytes + (block.nbytes if block else 0)) / weights if weights else 0.0
    if abs(bits - BITS_PER_WEIGHT) > 0.1:
        layout.report(name, f"takes {bits:.2f} bits per weight with its block scales, not {BITS_PER_WEIGHT}")
