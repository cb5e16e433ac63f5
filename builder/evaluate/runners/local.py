"""The runners in transformers: `bf16` (the snapshot), `simulated` (ModelOpt), `checkpoint` (the unified layout).

| runner | weights | inputs of linear layers | KV cache |
| bf16 | the model's | - | - |
| simulated | NVFP4 by ModelOpt, calibrated as the checkpoint was | NVFP4, dynamic blocks | FP8, its own amax |
| checkpoint | unpacked from `unified/` | NVFP4 under its input_scale | FP8 under its k_scale, v_scale |
A layer that was left in FP8 or BF16 is it in both of the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from builder.core.errors import NotMeasurable, UnsupportedError
from builder.core.safetensors_io import Tensors
from builder.evaluate.datasets import Ids
from builder.formats.arithmetic import fp8 as fp8_arithmetic
from builder.formats.arithmetic import nvfp4
from builder.model import loading as model_loading
from builder.model.files import parse_config
from builder.model.hashed_files import SourceFiles

ATTENTION = "builder_fp8_kv"  # the name of our attention function in transformers
SCALES = ("weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale")
# A batch on a CPU: with 8192 tokens the fixture takes 25 % more CPU time than with 2048, for its caches; and too many
# bytes of logits are answered by the kernel's killer, not by an error one could catch.
_CPU_TOKENS, _CPU_LOGITS = 2048, 1 << 30


class Causal:
    """A causal language model of transformers. Texts are padded on the right, which no earlier token sees."""

    def __init__(self, model: Any, batch_tokens: int) -> None:
        self.model = model.eval()
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        if model.device.type == "cpu":
            batch_tokens = max(1, min(batch_tokens, _CPU_TOKENS, _CPU_LOGITS // (4 * self.vocab_size)))
        self.batch_tokens = batch_tokens

    def logits(self, batch: Sequence[Ids]) -> Iterator[Tensor]:
        padded = np.zeros((len(batch), max(map(len, batch))), dtype=np.int64)
        for row, ids in zip(padded, batch, strict=True):
            row[: len(ids)] = ids
        logits = self.model(torch.from_numpy(padded).to(self.model.device), use_cache=False).logits
        for row, ids in zip(logits, batch, strict=True):
            yield row[: len(ids)]


@contextmanager
def bf16(job: Mapping[str, Any]) -> Iterator[Causal]:
    """The model as it came. With CUDA accelerate spreads it over the GPUs and, if it must, memory (not run)."""
    yield Causal(model_loading.load(job, dtype=_dtype(job, "auto"), **_where()), job["batch_tokens"])
    SourceFiles.of_job(job).check_unchanged()


@contextmanager
def simulated(job: Mapping[str, Any]) -> Iterator[Causal]:
    """ModelOpt's fake-quantized model, calibrated anew on the checkpoint's rows: independent of what was written."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import unified_export_hf

    from builder.quantize import worker
    from builder.quantize.simulation import enable_cpu_simulation

    model, rows = worker._load({**job, **job["calibration"]})
    kept, fp8 = (job["calibration"].get(key, ()) for key in ("kept", "fp8"))
    worker._calibrate(model, rows, job["fp8_kv"], kept, fp8)
    if not torch.cuda.is_available():
        enable_cpu_simulation()
    unified_export_hf.requantize_resmooth_fused_llm_layers(model)  # q, k and v share a range, as in the checkpoint
    dtype = _dtype(job, None)
    model = model if dtype is None else model.to(dtype)
    mtq.fold_weight(model)  # quantized once, not in each forward
    yield Causal(model, job["batch_tokens"])
    SourceFiles.of_job(job).check_unchanged()


@contextmanager
def checkpoint(job: Mapping[str, Any]) -> Iterator[Causal]:
    """The unified layout as it lies on disk, read by us; `fp8_kv` false leaves the cache in the arithmetic's type."""
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
    from transformers.masking_utils import sdpa_mask

    unified = Path(job["unified"])
    raw = parse_config((unified / "config.json").read_bytes(), str(unified))
    name = (raw.get("architectures") or ["unknown"])[0]
    if not hasattr(transformers, name):
        raise NotMeasurable(f"transformers has no {name}.", hint="Measure it served: --runner served")
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    config = AutoConfig.from_pretrained(job["model"], trust_remote_code=job["trust_remote_code"])
    stored = Tensors(unified)
    dtype = _dtype(job, None) or torch.bfloat16
    model, info = getattr(transformers, name).from_pretrained(
        None,
        config=config,
        state_dict={key: _weight(stored, key, dtype) for key in stored if key.rpartition(".")[2] not in SCALES},
        dtype=dtype,
        attn_implementation=ATTENTION,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `info` lists them
        **_where(),
    )
    model_loading.check_loaded(model, info, unified)
    _quantize_inputs(model, stored)
    if job["fp8_kv"]:
        _quantize_cache(model, stored)
    yield Causal(model, job["batch_tokens"])


def _dtype(job: Mapping[str, Any], default: Any) -> Any:
    """Of the arithmetic: the recipe's; by itself the model's own on a GPU and float32 on a CPU, as the reference
    executor's, so that runners differ in what they quantize and not in how they add."""
    if job["dtype"] != "auto":
        return getattr(torch, job["dtype"])
    return default if torch.cuda.is_available() else torch.float32


def _where() -> dict[str, Any]:
    return {"device_map": "auto"} if torch.cuda.is_available() else {}


def _tensor(stored: Tensors, name: str) -> Tensor:
    kinds = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F16": torch.float16}
    info = stored[name]
    kind = kinds.get(info.dtype, torch.float32)
    return torch.frombuffer(bytearray(stored.data(name)), dtype=kind).reshape(info.shape)


def _weight(stored: Tensors, name: str, dtype: torch.dtype) -> Tensor:
    tensor = _tensor(stored, name)
    if tensor.dtype == torch.float8_e4m3fn:
        return fp8_arithmetic.dequantize(tensor, _tensor(stored, f"{name}_scale"), dtype)
    if tensor.dtype != torch.uint8:
        return tensor.to(dtype)
    return nvfp4.dequantize(tensor, _tensor(stored, f"{name}_scale"), _tensor(stored, f"{name}_scale_2"), dtype)


def _quantize_inputs(model: Any, stored: Tensors) -> None:
    """Each linear layer with an input_scale rounds its input under it. NotMeasurable if one of these is no Linear."""
    modules = dict(model.named_modules())
    last: dict[str, Any] = {}
    for name in (key.removesuffix(".input_scale") for key in stored if key.endswith(".input_scale")):
        module = modules.get(name)
        if not isinstance(module, torch.nn.Linear):
            raise NotMeasurable(
                f"{name} is no linear layer in transformers' {type(model).__name__}.",
                why="transformers joins a mixture's experts in one tensor; this runner does not.",
                hint="Measure ModelOpt's simulation, or what is served: --runner simulated, --runner served",
            )
        fp8 = stored[f"{name}.weight"].dtype == "F8_E4M3"
        module.register_forward_pre_hook(_Rounded(_tensor(stored, f"{name}.input_scale"), last, fp8=fp8))


class _Rounded:
    """A linear layer's input under its scale. Layers that follow one another with the same input (q, k, v; gate, up)
    share `last`: it is rounded once."""

    def __init__(self, scale: Tensor, last: dict[str, Any], *, fp8: bool = False) -> None:
        self._scale, self._key, self._last = scale, (float(scale), fp8), last
        self._quantize = fp8_arithmetic.fake_quantize if fp8 else nvfp4.fake_quantize

    def __call__(self, layer: Any, inputs: tuple[Tensor]) -> tuple[Tensor]:
        last = self._last
        if last.get("input") is not inputs[0] or last["key"] != self._key:
            rounded = self._quantize(inputs[0], self._scale.to(inputs[0].device))
            last.update(input=inputs[0], key=self._key, rounded=rounded)
        return (last["rounded"],)


def _quantize_cache(model: Any, stored: Tensors) -> None:
    """The scales for `_attend`, where the checkpoint has them."""
    modules = dict(model.named_modules())
    for key in stored:
        kind = key.rpartition(".")[2]
        if kind in ("k_scale", "v_scale"):
            attention = modules.get(key.rpartition(".")[0].rpartition(".")[0])
            if attention is None:
                raise UnsupportedError(f"{key} belongs to no attention of {type(model).__name__}.")
            setattr(attention, kind, _tensor(stored, key).reshape(()))


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
    """transformers' sdpa over keys (after RoPE) and values that went through an FP8 cache."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    for_cache = [(key, getattr(module, "k_scale", None)), (value, getattr(module, "v_scale", None))]
    key, value = (x if s is None else fp8_arithmetic.round_e4m3(x, s.to(x.device)) for x, s in for_cache)
    return sdpa_attention_forward(module, query, key, value, mask, **options)
