"""What a number format is: how a linear layer in it is stored, computed, sized and served.

A format is one module of this package that defines `FORMAT`. Nothing here imports torch: the methods that compute get
tensors from callers that have imported it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from builder.core.errors import UnsupportedError
from builder.core.safetensors_io import byte_size

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, dtype

FLOATS = ("BF16", "F16", "F32")
SCALAR: tuple[tuple[int, ...], ...] = ((), (1,))  # the shapes in which writers store one number

Axis = Literal["out", "in"]
# What the numbers of a tensor are, which says what can be wrong with them (checkpoint/tensor_checks.py).
# "codes" are packed E2M1, "integers" INT8 or packed INT4, "positive" floats of which each is a scale.
Content = Literal["codes", "integers", "block_scales", "scale", "positive", "floats"]


@dataclass(frozen=True)
class Dim:
    """A dimension of a stored tensor: one entry for every `group` of the layer's outputs or inputs."""

    axis: Axis
    group: int = 1


OUT, IN = Dim("out"), Dim("in")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a linear layer on disk.

    name: what the format's own methods call it.
    unified, tensorrt_llm: the last part of its name in the Hugging Face layout and in TensorRT-LLM's.
    dtypes: the safetensors dtypes that it may have.
    dims: its dimensions; () for one number. A dimension of outputs comes first. Where several projections are served
        as one layer, tensors with a dimension of outputs are concatenated along it; others must be equal.
    label: the line of the checkpoint's summary that counts its bytes.
    tensorrt_llm_shape: its shape in TensorRT-LLM's layout, where that is not the shape in the other.
    tensorrt_llm_dtype: its dtype there, where the same bytes have another one (packed INT4: U8 and I8).
    calibrated: whether it is read from the calibration rows, and not from the model's weights.
    compressed_tensors: the last part of its name in the compressed-tensors layout; None where that is the unified one,
        "" where it has no place there.
    reciprocal: whether compressed-tensors divides by it where the other layouts multiply, and so stores 1 / x.
    optional: whether a layer may lack it, which means ones: ModelOpt's exporter folds the scales of an input into what
        computes this input (export/quant_utils.py, fuse_prequant_layernorm).
    folded: the roles (architectures/names.py) of the layers for which it always does so.
    filled: whether TensorRT-LLM's layout then holds these ones, because its layers always have the tensor.
    """

    name: str
    unified: str
    tensorrt_llm: str
    dtypes: tuple[str, ...]
    dims: tuple[Dim, ...]
    content: Content
    label: str
    tensorrt_llm_shape: tuple[int, ...] | None = None
    tensorrt_llm_dtype: str | None = None
    calibrated: bool = False
    compressed_tensors: str | None = None
    reciprocal: bool = False
    optional: bool = False
    folded: tuple[str, ...] = ()
    filled: bool = False

    @property
    def axes(self) -> tuple[Axis, ...]:
        """What each dimension follows: outputs or inputs."""
        return tuple(dim.axis for dim in self.dims)

    @property
    def per_output(self) -> bool:
        """Whether projections that are served as one layer each keep their own part of it."""
        return "out" in self.axes

    def leaf(self, *, unified: bool) -> str:
        """The last part of its name in a layout."""
        return self.unified if unified else self.tensorrt_llm

    def shapes(self, weight: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """The shapes that it may have where the layer's weight is [outputs, inputs]."""
        return SCALAR if not self.dims else (self.shape(weight),)

    def shape(self, weight: Sequence[int]) -> tuple[int, ...]:
        """Its shape where the layer's weight is [outputs, inputs]."""
        sizes = dict(zip(("out", "in"), weight, strict=True))
        return tuple(sizes[dim.axis] // dim.group for dim in self.dims)

    def weight_shape(self, stored: Sequence[int]) -> tuple[int, int]:
        """[outputs, inputs] of the layer whose weight this tensor is: the inverse of `shape`."""
        sizes = {dim.axis: size * dim.group for dim, size in zip(self.dims, stored, strict=True)}
        return sizes["out"], sizes["in"]

    def held(self, role: str | None, *, unified: bool) -> bool:
        """Whether a layer with this role has it in a layout, as ModelOpt exports the layer."""
        return role not in self.folded or (self.filled and not unified)

    def nbytes(self, weight: Sequence[int]) -> int:
        """Its bytes in a layer whose weight is [outputs, inputs]."""
        return byte_size(self.dtypes[0], self.shape(weight))


@dataclass(frozen=True)
class Scheme:
    """A number format as compressed-tensors describes it in a group of config.json (0.18, quantization/quant_args.py).

    compressor: the name of the class that packs it (config/base.py, CompressionFormat).
    weights, inputs: the arguments that differ from the defaults of QuantizationArgs; inputs is None where they are not
        quantized.
    """

    compressor: str
    weights: Mapping[str, Any]
    inputs: Mapping[str, Any] | None = None

    @property
    def has_shape(self) -> bool:
        """Whether a layer has a tensor `weight_shape`: I64 [2], outputs and inputs before weights were packed."""
        return self.compressor == "pack-quantized"


@dataclass(frozen=True, eq=False)
class NumberFormat:
    """A number format of linear layers. Subclasses add the arithmetic.

    name: its name in recipes; title: its name for people.
    quant_algo: ModelOpt's and TensorRT-LLM's name of it (tensorrt_llm/quantization/mode.py, QuantAlgo); None where the
        layer is not quantized.
    bits: of a weight, with the scales of its group and without those of its output or of the layer.
    tensors: what is stored of a layer, the weight first; the bias is not among them.
    label: what the checkpoint's summary calls its layers: "fp8" for fp8_linears.
    group_size: inputs that share a scale; None where there are no groups.
    entry: what ModelOpt says of its layers beside quant_algo and group_size (has_zero_point, pre_quant_scale).
    whole_model: whether a recipe can choose it for all layers (quantization.format).
    modelopt_config: the configuration of modelopt.torch.quantization that quantizes a whole model to it.
    prepare_export: whether weights are rounded before ModelOpt's Hugging Face exporter and its simulation get them,
        which round them in other ways than its TensorRT-LLM exporter (quantize/quantizers.py).
    gpu_format: the entry of `formats` in configs/gpus/*.yaml that a GPU must have, with the version of TensorRT-LLM
        and the source; None where every GPU runs it.
    targets: the targets whose TensorRT-LLM runs it on any GPU; targets_source: why not the others.
    gemm_plugin, gemm_plugin_why, gemm_plugin_source: trtllm-build's --gemm_plugin for it, the reason and its source.
        "auto" is the model's own type.
    gemm_inputs, gemm_outputs: what a GPU's part of a layer must be a multiple of for TensorRT-LLM's GEMM.
    compressed_tensors: what compressed-tensors calls it; None where that library has no such format.
    input_range: the largest magnitude of an input under the scale 1, where an `input_scale` is stored.
    needs_ranges: whether ranges of inputs must be measured: an assumed one is far too wide for integers.
    compressed_only: whether only readers of compressed-tensors load it. Its unified layout, which holds what the other
        is made of, is then read by the builder alone, and there is no layout of TensorRT-LLM.
    """

    name: str
    title: str
    quant_algo: str | None
    bits: float
    tensors: tuple[StoredTensor, ...]
    label: str
    group_size: int | None = None
    entry: Mapping[str, Any] = field(default_factory=dict)
    whole_model: bool = False
    modelopt_config: str | None = None
    prepare_export: bool = False
    gpu_format: str | None = None
    targets: tuple[str, ...] = ("engine", "llmapi")
    targets_source: str = ""
    gemm_plugin: str = "auto"
    gemm_plugin_why: str = "cuBLASLt in the model's type for layers that are not quantized, such as lm_head"
    gemm_plugin_source: str = "tensorrt_llm/plugin/plugin.py@c20322ff"
    gemm_inputs: int = 1
    gemm_outputs: int = 1
    compressed_tensors: Scheme | None = None
    input_range: float | None = None
    needs_ranges: bool = False
    compressed_only: bool = False

    @property
    def weight(self) -> StoredTensor:
        """The tensor that holds the layer's weight."""
        return self.tensors[0]

    @property
    def scales_inputs(self) -> bool:
        """Whether each input of a layer has a scale of its own, which quantizing searches (AWQ, SmoothQuant)."""
        return any(tensor.dims == (IN,) for tensor in self.tensors)

    @property
    def rounds_inputs(self) -> bool:
        """Whether the inputs of a layer are rounded as they are: not scaled first, as those of AWQ and SmoothQuant,
        which compressed-tensors does not have."""
        return self.compressed_tensors is not None and self.compressed_tensors.inputs is not None

    @property
    def layer_entry(self) -> dict[str, Any]:
        """A layer's entry in quant_cfg.json (ModelOpt, export/quant_utils.py, process_layer_quant_config)."""
        group = {} if self.group_size is None else {"group_size": self.group_size}
        return {"quant_algo": self.quant_algo, **group, **self.entry}

    def misfit(self, weight: Sequence[int]) -> str:
        """Which of a weight's sizes [outputs, inputs] can't be stored in it, and why; "" if both can."""
        if self.group_size is None or weight[-1] % self.group_size == 0:
            return ""
        return f"an input size that is not a multiple of {self.group_size}, as {self.title} requires"

    @property
    def packs(self) -> bool:
        """Whether `pack` gives everything that is stored of a weight: it depends on no calibration."""
        return type(self).pack is not NumberFormat.pack and not self.scales_inputs

    def fits(self, weight: Sequence[int]) -> bool:
        """Whether a weight [outputs, inputs] can be stored in it."""
        return not self.misfit(weight)

    def own_bytes(self, weight: Sequence[int]) -> int:
        """Bytes of a projection [outputs, inputs], without what it shares with those that are served with it."""
        return sum(tensor.nbytes(weight) for tensor in self.tensors if tensor.per_output)

    def shared_bytes(self, weight: Sequence[int], role: str | None = None, *, unified: bool = False) -> int:
        """Bytes that a served layer with this role has once in a layout, of however many projections it is made."""
        shared = [one for one in self.tensors if not one.per_output and one.held(role, unified=unified)]
        return sum(tensor.nbytes(weight) for tensor in shared)

    def modelopt(self, mtq: Any) -> dict[str, Any]:
        """A copy of the ModelOpt configuration for a whole model; `mtq` is modelopt.torch.quantization.

        UnsupportedError where the installed version has none.
        """
        if self.modelopt_config is None:
            raise ValueError(f"{self.name} is not a format for a whole model")
        if not hasattr(mtq, self.modelopt_config):
            raise UnsupportedError(
                f"The installed ModelOpt cannot quantize to {self.title}.",
                why=f"It has no {self.modelopt_config}.",
                hint="Install a later nvidia-modelopt (0.47 has it), or choose another --format.",
            )
        config: dict[str, Any] = copy.deepcopy(getattr(mtq, self.modelopt_config))
        return config

    def quantizers(self, mtq: Any) -> dict[str, Mapping[str, Any] | None]:
        """What ModelOpt's quantizers of a single layer are set to, by their names before `_quantizer`, as in the
        configuration for a whole model. None turns a quantizer off."""
        config = self.modelopt(mtq)["quant_cfg"]
        if not isinstance(config, dict):  # a list from ModelOpt 0.44 on
            config = {one["quantizer_name"]: one.get("cfg") for one in config}
        return {part: config.get(f"*{part}_quantizer") for part in ("weight", "input")}

    def pack(
        self, rows: np.ndarray[Any, Any], dtype: str, amax: float, *, rounded_to: str, threads: int | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """What is stored of rows of a weight, by the `name` of its tensors, without those that are calibrated.

        rows: raw bits [outputs, inputs] in the safetensors dtype `dtype`; the values are rounded to `rounded_to` first.
        amax: the largest magnitude of all weights that share a scale, finite and above 0.
        """
        raise NotImplementedError

    def pack_searched(
        self, rows: np.ndarray[Any, Any], dtype: str, amax: float, *, rounded_to: str, threads: int | None = None
    ) -> dict[str, np.ndarray[Any, Any]]:
        """The same with block scales searched for the least squared error; for formats that `algorithms.MSE` treats."""
        raise NotImplementedError

    def dequantize(self, stored: Mapping[str, Tensor], kind: dtype) -> Tensor:
        """The weight [outputs, inputs] in `kind` from the layer's tensors, by their `name`."""
        raise NotImplementedError

    def round_input(self, x: Tensor, stored: Mapping[str, Tensor]) -> Tensor:
        """The layer's input [..., inputs] as its GEMM sees it, in the dtype of `x`."""
        raise NotImplementedError

    def round_weight(self, weight: Tensor, amax: Tensor) -> Tensor:
        """The weight [..., inputs] through the format and back, in float32; `amax` is the largest magnitude of all
        weights that share its scale."""
        raise NotImplementedError
