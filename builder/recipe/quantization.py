"""The part of a recipe about number formats: of the weights, of the KV cache, and of the layers kept in another one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from builder.formats import kv_cache, schemes
from builder.formats import registry as formats
from builder.formats.base import NumberFormat
from builder.formats.declared import MIXED
from builder.formats.kv_cache import KvCacheFormat
from builder.formats.schemes import SCHEMES, LayerScheme
from builder.recipe.algorithm import AlgorithmName, Gptq, refusal
from builder.recipe.base import Part


def _format_names() -> list[str]:
    return schemes.names()


def _cache_names() -> list[str]:
    return list(kv_cache.FORMATS)


def _check_name(value: str, known: Sequence[str]) -> str:
    """Checks a name as Literal would, with the same error. The names are looked up when a recipe is read."""
    if value in known:
        return value
    expected = " or ".join(repr(name) for name in known)
    raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})


def _list_names(schema: dict[str, Any], known: Sequence[str]) -> None:
    schema.update({"const": known[0]} if len(known) == 1 else {"enum": list(known)})


FormatName = Annotated[
    str,
    AfterValidator(lambda value: _check_name(value, _format_names())),
    Field(json_schema_extra=lambda schema: _list_names(schema, _format_names())),
]
KvCacheName = Annotated[
    str,
    AfterValidator(lambda value: _check_name(value, _cache_names())),
    Field(json_schema_extra=lambda schema: _list_names(schema, _cache_names())),
]


LayoutName = Literal["unified", "tensorrt_llm", "compressed-tensors"]  # checkpoint/conversion.py, LAYOUTS
COMPRESSED_TENSORS: LayoutName = "compressed-tensors"
TENSORRT_LLM: LayoutName = "tensorrt_llm"
AUTO = "auto:"  # before a KL budget, in keep_bf16 and keep_fp8


def _budget(entry: str) -> float:
    try:
        value = float(entry.removeprefix(AUTO))
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(
            f"{entry!r} is not a budget: auto takes a positive, finite KL in nats per token, such as auto:0.05"
        )
    return value


class Quantization(Part):
    """Which number formats. NVFP4 is E2M1 with one E4M3 scale for each 16 values, for weights and activations."""

    # These two defaults are for code that makes a recipe without a GPU profile: `resolve` chooses them by the profile.
    format: Annotated[
        FormatName, Field(description="weights and activations of the linear layers; default: the card's best")
    ] = "nvfp4"
    kv_cache_dtype: Annotated[
        KvCacheName,
        Field(description="of the KV cache; auto: the model's own type; default: fp8 where it costs nothing"),
    ] = "fp8"
    keep_bf16: Annotated[
        tuple[str, ...],
        Field(description="linear layers kept in BF16: name patterns such as *.down_proj; auto:0.05 chooses by KL"),
    ] = ()
    keep_fp8: Annotated[
        tuple[str, ...],
        Field(description="linear layers in FP8 (E4M3, one scale for the weight and one for its input), same syntax"),
    ] = ()

    algorithm: Annotated[
        AlgorithmName,
        Field(
            description="how weights are rounded: max (as NVIDIA publishes them); for NVFP4 also mse (block scales "
            "searched) and hessian (with the calibration rows' inputs); for NVFP4 and INT8 gptq (with them too)"
        ),
    ] = "max"
    gptq: Gptq = Gptq()
    memory: Annotated[
        Literal["auto", "low", "whole"],
        Field(
            description="to calibrate and measure in: whole (all layers), low (one at a time); auto: whole if it fits"
        ),
    ] = "auto"
    layouts: Annotated[
        tuple[LayoutName, ...],
        Field(
            description="of the checkpoint, beside those that the target needs: compressed-tensors for other servers"
        ),
    ] = ("unified", "tensorrt_llm")
    save_pseudo: Annotated[
        Literal["bf16", "fp16"] | None,
        Field(description="also save the dequantized weights in this type, as an ordinary model with its scales"),
    ] = None

    @field_validator("layouts", mode="before")
    @classmethod
    def _separated_by_commas(cls, value: Any) -> Any:
        names = value.split(",") if isinstance(value, str) else value
        return tuple(name.strip() if isinstance(name, str) else name for name in names)

    @field_validator("keep_bf16", "keep_fp8", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("keep_bf16", "keep_fp8")
    @classmethod
    def _patterns(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(value):
            raise ValueError("a pattern is empty; write a name such as model.layers.0.*")
        budgets = [_budget(entry) for entry in value if entry == "auto" or entry.startswith(AUTO)]
        if len(budgets) > 1:
            raise ValueError("auto is given twice, but one budget holds for the whole model")
        return tuple(dict.fromkeys(value))

    @model_validator(mode="after")
    def _one_auto(self) -> Quantization:
        if all(any(entry.startswith(AUTO) for entry in entries) for entries in (self.keep_bf16, self.keep_fp8)):
            raise ValueError(
                "keep_bf16 and keep_fp8 both say auto, but one budget chooses one format; name the layers of the other"
            )
        return self

    @model_validator(mode="after")
    def _kept_layers_differ(self) -> Quantization:
        one, patterns = self.number_format, (*self.keep_bf16, *self.keep_fp8)
        if one is formats.BF16 and patterns:
            raise ValueError("format bf16 quantizes no layer, so keep_bf16 and keep_fp8 have nothing to keep")
        if self.keep_fp8 and (one is formats.FP8 or one.scales_inputs):
            why = "all its layers are in FP8" if one is formats.FP8 else "ModelOpt would smooth those layers too"
            raise ValueError(f"keep_fp8 can't be combined with format {self.format}: {why}; use keep_bf16")
        return self

    @model_validator(mode="after")
    def _layout_exists(self) -> Quantization:
        wrong = COMPRESSED_TENSORS not in self.layouts or TENSORRT_LLM in self.layouts
        if self.number_format.compressed_only and wrong:
            raise ValueError(
                f"format {self.format} has the compressed-tensors layout alone, and layouts is "
                f"{','.join(self.layouts)}; use --layouts compressed-tensors, which is its default"
            )
        return self

    @model_validator(mode="after")
    def _algorithm_fits(self) -> Quantization:
        why = refusal(self.algorithm, self.format, self.quantized_formats)
        if why:
            raise ValueError(why)
        if self.algorithm != "gptq" and self.gptq != Gptq():
            raise ValueError(f"values of gptq have no effect with algorithm {self.algorithm}; use algorithm gptq")
        return self

    @property
    def rounding(self) -> dict[str, Any]:
        """The algorithm and its values, for jobs and keys."""
        return {"algorithm": self.algorithm, **({"gptq": self.gptq.model_dump()} if self.algorithm == "gptq" else {})}

    @property
    def number_format(self) -> NumberFormat:
        """The format of the linear layers; of a scheme, that of its MLPs or experts."""
        return schemes.whole(self.format)

    @property
    def scheme(self) -> LayerScheme | None:
        """What `format` names, if it gives attention another format."""
        return SCHEMES.get(self.format)

    @property
    def title(self) -> str:
        """What `format` is, for people."""
        return self.scheme.title if self.scheme else self.number_format.title

    @property
    def as_it_is(self) -> bool:
        """Whether nothing is quantized, neither weights nor the KV cache."""
        return self.number_format is formats.BF16 and not self.cache_format.quantized

    @property
    def cache_format(self) -> KvCacheFormat:
        """The format of the KV cache."""
        return kv_cache.get(self.kv_cache_dtype)

    @property
    def quant_algo(self) -> str | None:
        """What the checkpoint's configuration calls its weights."""
        return MIXED if self.keep_fp8 else schemes.quant_algo(self.format)

    @property
    def quantized_formats(self) -> tuple[NumberFormat, ...]:
        """The quantized formats of its layers, the model's own first."""
        named = self.scheme.formats if self.scheme else (self.number_format,)
        return tuple(dict.fromkeys((*named, *((formats.FP8,) if self.keep_fp8 else ()))))

    @property
    def kept_patterns(self) -> tuple[str, ...]:
        """The entries of keep_bf16 that are name patterns."""
        return tuple(entry for entry in self.keep_bf16 if not entry.startswith(AUTO))

    @property
    def fp8_patterns(self) -> tuple[str, ...]:
        """The entries of keep_fp8 that are name patterns."""
        return tuple(entry for entry in self.keep_fp8 if not entry.startswith(AUTO))

    @property
    def kept_budget(self) -> float | None:
        """The X of auto:X: the KL to BF16, in nats per token, that the kept layers must reach. None without auto."""
        entries = (*self.keep_bf16, *self.keep_fp8)
        return next((_budget(entry) for entry in entries if entry.startswith(AUTO)), None)

    @property
    def kept_format(self) -> Literal["bf16", "fp8"]:
        """The format that auto keeps layers in."""
        return "fp8" if any(entry.startswith(AUTO) for entry in self.keep_fp8) else "bf16"

    @field_validator("kv_cache_dtype", mode="before")
    @classmethod
    def _known_and_refused(cls, value: Any) -> Any:
        """Says why a KV format of TensorRT-LLM is rejected."""
        if value in kv_cache.REJECTED:
            raise ValueError(f"{kv_cache.REJECTED[value]}; use fp8")
        return value
