"""What to build: every key of a recipe with its meaning and default, and `resolve`, which fills them in.

Settings are resolved in this order: flag, --set, recipe file, preset, GPU profile, default. An unknown key is an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from builder.core.errors import UsageError
from builder.formats import algorithms
from builder.formats import registry as formats
from builder.formats.base import NumberFormat
from builder.formats.declared import MIXED
from builder.machine import gpus
from builder.recipe import card_formats, triton_parameters
from builder.recipe.base import MOST, Natural, Part, Positive, Processes, Ranks
from builder.recipe.evaluation import Evaluation, Quality, Sensitivity, Tasks
from builder.recipe.lora import Lora, named
from builder.recipe.quantization import COMPRESSED_TENSORS, Quantization
from builder.recipe.sources import flatten, load_preset, load_yaml, merge, nest, parse_set
from builder.recipe.target_facts import TARGETS
from builder.recipe.transform import Transform

Target = Literal["engine", "llmapi", "reference"]


class Model(Part):
    """Which weights: a Hub id (with a revision) or a local directory."""

    id: Annotated[str, Field(min_length=1, description="Hub id (Qwen/Qwen3-8B) or a local directory")]
    revision: Annotated[str | None, Field(description="branch, tag or commit on the Hub; default: main")] = None
    trust_remote_code: Annotated[bool, Field(description="run Python code that comes with the model")] = False
    original: Annotated[
        str | None,
        Field(
            min_length=1, description="for a quantized model: the one that it was made from, a Hub id or a directory"
        ),
    ] = None


# The default of TensorRT-LLM's own quantize.py (examples/quantization/quantize.py@c8c6df08). It has several
# configurations, and its text is in an unusual column, so both are set with it.
DEFAULT_DATASET = {"data": "abisee/cnn_dailymail", "config": "3.0.0", "column": "article"}


class Calibration(Part):
    """The texts that activation ranges are measured on."""

    data: Annotated[str, Field(min_length=1, description="a .jsonl file, a Hub dataset id, or builtin:python-docs")] = (
        DEFAULT_DATASET["data"]
    )
    config: Annotated[str | None, Field(description="configuration of a Hub dataset")] = None
    split: Annotated[str, Field(description="split of a Hub dataset")] = "train"
    column: Annotated[str | None, Field(description="column with the text; default: the first with a usual name")] = (
        None
    )
    revision: Annotated[str | None, Field(description="revision of a Hub dataset")] = None
    samples: Annotated[
        Natural, Field(description="number of rows, from the first row on; 0: no calibration (data-free)")
    ] = 512
    seq_len: Annotated[Positive, Field(description="longest row, in tokens; longer ones are cut")] = 2048
    batch_size: Annotated[Positive, Field(description="rows of equal length per forward pass")] = 1
    scales: Annotated[
        bool, Field(description="for a quantized model: calibrate its activation and KV cache scales; weights stay")
    ] = False

    @property
    def data_free(self) -> bool:
        """Whether scales follow from a rule, without text and without running the model."""
        return self.samples == 0

    @model_validator(mode="before")
    @classmethod
    def _default_dataset(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("data", DEFAULT_DATASET["data"]) == DEFAULT_DATASET["data"]:
            return {**DEFAULT_DATASET, **value}
        return value


class Engine(Part):
    """The sizes that the engine is built for, and trtllm-build flags that override those of the GPU profile."""

    tensorrt_llm: Annotated[str, Field(description="TensorRT-LLM version that builds and serves")] = "1.2.1"
    max_batch_size: Annotated[Positive, Field(description="most requests in one iteration")] = 64
    max_input_len: Annotated[Positive, Field(description="longest prompt, in tokens")] = 2048
    max_seq_len: Annotated[Positive, Field(description="longest prompt and answer together, in tokens")] = 4096
    max_num_tokens: Annotated[Positive, Field(description="most tokens in one iteration, after padding removal")] = 8192
    tp: Annotated[Ranks, Field(description="tensor parallel size: GPUs that share each layer")] = 1
    pp: Annotated[Ranks, Field(description="pipeline parallel size: GPUs that each hold some layers")] = 1
    flags: dict[str, str] = Field(default={}, description="more trtllm-build flags, by name without dashes")

    @field_validator("flags", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        """Values as strings, because YAML reads 64 as a number and trtllm-build takes words."""
        return {str(k): str(v) for k, v in value.items()} if isinstance(value, Mapping) else value

    @property
    def world_size(self) -> int:
        """The number of GPUs, which is the number of the engine's ranks."""
        return self.tp * self.pp

    @model_validator(mode="after")
    def _sizes_agree(self) -> Engine:
        if self.max_input_len >= self.max_seq_len:
            raise ValueError(
                f"max_input_len {self.max_input_len} leaves no room for an answer in max_seq_len {self.max_seq_len}"
            )
        if self.world_size > 1024:
            raise ValueError(f"tp {self.tp} x pp {self.pp} is {self.world_size} GPUs; an engine can use at most 1024")
        return self


class LlmApi(Part):
    """For the llmapi target only: arguments of TensorRT-LLM's LLM class that override the derived ones."""

    args: dict[str, Any] = Field(default={}, description="more LLM arguments, as in a model.yaml")


class SamplingDefaults(Part):
    """Values for requests that name none of their own. Without any, text models decode greedily."""

    model_config = ConfigDict(allow_inf_nan=False)

    from_model: Annotated[
        bool, Field(description="those of the model's generation_config.json, for the ones that are not set here")
    ] = False
    temperature: Annotated[float | None, Field(ge=0, description="0: greedy")] = None
    top_p: Annotated[float | None, Field(ge=0, le=1, description="1: the whole vocabulary")] = None
    top_k: Annotated[int | None, Field(ge=0, le=MOST, description="0: the whole vocabulary; 1: greedy")] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, description="1: none")] = None
    presence_penalty: Annotated[float | None, Field(description="0: none")] = None
    frequency_penalty: Annotated[float | None, Field(description="0: none")] = None


class Repository(Part):
    """How Triton serves the model."""

    decoupled: Annotated[bool, Field(description="stream answers token by token")] = True
    preprocessing_instances: Annotated[Processes, Field(description="tokenizer processes")] = 1
    postprocessing_instances: Annotated[Processes, Field(description="detokenizer processes")] = 1
    bls_instances: Annotated[
        Processes, Field(description="processes of tensorrt_llm_bls; each carries twice max_batch_size streams, to 512")
    ] = 1
    max_queue_delay_microseconds: Annotated[Natural, Field(description="longest wait for a fuller batch")] = 0
    max_queue_size: Annotated[
        Natural, Field(description="most waiting requests of a model; others are rejected; 0: no limit")
    ] = 1024
    queue_timeout_seconds: Annotated[
        Natural, Field(le=86_400, description="longest wait in a queue; then a request is rejected; 0: no limit")
    ] = 600
    stall_timeout_seconds: Annotated[
        Natural, Field(le=86_400, description="longest pause of an engine inside a streamed answer; 0: no limit")
    ] = 120
    kv_cache_free_gpu_mem_fraction: Annotated[
        float, Field(gt=0, le=1, description="share of the memory left after the weights")
    ] = 0.9
    batch_scheduler_policy: Annotated[
        Literal["guaranteed_no_evict", "max_utilization"], Field(description="what happens when no KV block is free")
    ] = "guaranteed_no_evict"
    enable_kv_cache_reuse: Annotated[bool | None, Field(description="default: if the engine supports it")] = None
    enable_chunked_context: Annotated[bool | None, Field(description="default: if the engine supports it")] = None
    exclude_input_in_output: Annotated[bool, Field(description="leave the prompt out of the answer")] = True
    guided_decoding: Annotated[
        bool | None, Field(description="answers that follow a JSON schema; default: if the engine supports it")
    ] = None
    end_ids: Annotated[
        tuple[Annotated[int, Field(ge=0)], ...] | None,
        Field(min_length=1, description="token ids that end an answer; default: from the model's files"),
    ] = None
    add_special_tokens: Annotated[
        bool, Field(description="begin a text prompt with the tokenizer's own tokens, such as <s>")
    ] = True
    skip_special_tokens: Annotated[bool, Field(description="leave control tokens out of the answer's text")] = True
    parse_special_tokens: Annotated[
        Literal["prompts", "everywhere", "never"],
        Field(description="where text of clients can contain control tokens; prompts: not in messages of a chat"),
    ] = "prompts"
    sampling_defaults: SamplingDefaults = SamplingDefaults()
    tool_calls: Annotated[
        Literal["auto", "hermes", "llama3", "mistral", "mistral-named", "none"],
        Field(description="how the model writes tool calls; auto: as its chat template tells"),
    ] = "auto"
    reasoning: Annotated[
        Literal["auto", "think", "magistral", "none"],
        Field(description="how the model marks its reasoning; auto: as its chat template tells"),
    ] = "auto"
    parameters: dict[str, str] = Field(default={}, description="more parameters of NVIDIA's Triton models, by name")

    @field_validator("parameters", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        return triton_parameters.checked(value) if isinstance(value, Mapping) else value


class Recipe(Part):
    """Everything that decides what is built."""

    model: Model
    name: Annotated[
        str | None,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$",
            description="name of the link in models/, which is moved to this build; default: from model and recipe",
        ),
    ] = None
    gpu: Annotated[str, Field(description="a profile or a card (`builder gpus` lists both), or auto")] = "auto"
    target: Annotated[
        Target, Field(description="what serves the model: a TensorRT engine, the LLM API or the reference executor")
    ]
    transform: Transform = Transform()
    quantization: Quantization = Quantization()
    calibration: Annotated[Calibration, Field(validate_default=True)] = Calibration.model_validate({})
    engine: Engine = Engine()
    llmapi: LlmApi = LlmApi()
    lora: Lora = Lora()
    repository: Repository = Repository()
    quality: Quality = Quality()
    evaluation: Evaluation = Evaluation()
    tasks: Tasks = Tasks()
    sensitivity: Sensitivity = Sensitivity()

    @model_validator(mode="after")
    def _something_is_measured(self) -> Recipe:
        if not self.evaluation.data and not self.tasks.names:
            raise ValueError("evaluation.data is empty and no task is named; add --data FILE.jsonl or --tasks gsm8k")
        return self

    @model_validator(mode="after")
    def _algorithm_has_rows(self) -> Recipe:
        part = self.quantization
        if self.calibration.data_free and algorithms.ALGORITHMS[part.algorithm].reads_rows:
            raise ValueError(
                f"algorithm {part.algorithm} reads the inputs of layers from calibration rows, and there are none "
                f"(data-free); use algorithm {algorithms.fallback(part.number_format).name}, or name rows: "
                "--calib-data FILE.jsonl --calib-samples 512"
            )
        return self

    @model_validator(mode="after")
    def _ranges_are_measured(self) -> Recipe:
        part = self.quantization
        if self.calibration.data_free and any(one.needs_ranges for one in part.quantized_formats):
            raise ValueError(
                f"format {part.format} measures the ranges of inputs on calibration rows, and there are none "
                "(data-free): under an assumed range, integers would round most inputs to zero; use format "
                "int8_dynamic, which needs no range, or name rows: --calib-data FILE.jsonl"
            )
        return self

    @model_validator(mode="after")
    def _rotations_can_be_learned(self) -> Recipe:
        part = self.quantization
        if self.transform.learns and self.calibration.data_free:
            raise ValueError(
                "transform.kind learned reads calibration rows, and there are none (data-free); name rows: "
                "--calib-data FILE.jsonl, or use --set transform.kind=hadamard"
            )
        if self.transform.learns and not part.number_format.rounds_inputs:
            raise ValueError(
                f"transform.kind learned lowers the loss by rounded inputs of layers, and format {part.format} "
                "leaves them, or scales them first; use --set transform.kind=hadamard"
            )
        return self

    @model_validator(mode="after")
    def _auto_has_texts(self) -> Recipe:
        if self.quantization.kept_budget is not None and self.sensitivity.data is None:
            raise ValueError(
                f"quantization.keep_{self.quantization.kept_format}: auto chooses layers by their loss on texts, "
                "and no texts are named; "
                "add --sensitivity-data FILE.jsonl, with other texts than those of --data"
            )
        return self


@dataclass(frozen=True)
class Resolved:
    """A recipe, its GPU profile, and for each dotted key that is not a default the source that set it.

    stored: the quantized formats of a model that is quantized already, that of most layers first; None for one that is
    not. A checkpoint can mix formats that no recipe mixes.
    """

    recipe: Recipe
    gpu: gpus.GpuProfile
    origins: Mapping[str, str]
    again: Callable[[Mapping[str, Any]], Resolved] | None = field(default=None, compare=False, repr=False)
    stored: tuple[NumberFormat, ...] | None = None

    @property
    def quantized_formats(self) -> tuple[NumberFormat, ...]:
        """The formats that the card must run: those of the checkpoint, or those that the recipe quantizes to."""
        return self.stored or self.recipe.quantization.quantized_formats

    @property
    def quant_algo(self) -> str | None:
        """What the configuration of the checkpoint calls its weights."""
        return MIXED if len(self.stored or ()) > 1 else self.recipe.quantization.quant_algo

    def changed(self, flags: Mapping[str, Any]) -> Resolved:
        """The recipe of the same sources and these flags ({dotted key: value}). Raises what `resolve` raises."""
        return self.again(flags) if self.again else self

    def explained(self) -> list[tuple[str, Any, str]]:
        """(dotted key, value, source) for every value, in the order of the recipe. The source may be "default"."""
        flat = flatten(self.recipe.model_dump())
        return [(key, value, self.origins.get(key, "default")) for key, value in flat.items()]


def resolve(
    flags: Mapping[str, Any],
    *,
    sets: Sequence[str] = (),
    recipe_file: Path | None = None,
    preset: str | None = None,
) -> Resolved:
    """The recipe that these sources describe.

    `flags` maps dotted keys to values; `sets` are KEY=VALUE texts. UsageError names the key and its source.
    UnsupportedError for an unknown GPU, and for "auto" on a machine without one.
    """
    layers: list[tuple[str, dict[str, Any]]] = []
    if preset:
        layers.append((f"preset {preset}", load_preset(preset)))
    if recipe_file:
        layers.append((str(recipe_file), load_yaml(recipe_file)))
    layers += [(f"--set {text}", parse_set(text)) for text in sets]
    layers += [("command line", nest(key, value)) for key, value in flags.items()]

    layers = [(origin, named(triton_parameters.to_own_keys(layer))) for origin, layer in layers]
    name = "auto"
    for _, layer in layers:
        name = layer.get("gpu", name)
    if not isinstance(name, str):
        raise UsageError(f"gpu: {name!r} is not the name of a GPU.", hint="`builder gpus` lists them; --gpu sm120")
    gpu = gpus.detect() if name == "auto" else gpus.named(name)
    layers.insert(0, (f"GPU profile {gpu.name}", {**gpu.recipe, "gpu": gpu.name, "target": gpu.target}))

    merged, origins = merge(layers)
    if name != "auto":
        merged["gpu"] = gpu.name
    if merged["target"] in TARGETS:  # validation rejects another
        _choose_formats(merged, origins, gpu)
    try:
        recipe = Recipe.model_validate(merged)
    except ValidationError as error:
        raise _usage_error(error, origins) from error

    def again(more: Mapping[str, Any]) -> Resolved:
        return resolve({**flags, **more}, sets=sets, recipe_file=recipe_file, preset=preset)

    return Resolved(recipe, gpu, origins, again)


def _choose_formats(merged: dict[str, Any], origins: dict[str, str], gpu: gpus.GpuProfile) -> None:
    """Fills in the formats of the weights and of the KV cache that no source names, the card's best, and the layout of
    a format that has one alone."""
    part, target = merged.setdefault("quantization", {}), merged["target"]
    if not isinstance(part, dict):
        return  # which validation rejects
    if "format" not in part:
        part["format"], why = card_formats.default_format(gpu, target)
        origins["quantization.format"] = f"GPU profile {gpu.name}: {why}"
    one = formats.all_formats().get(str(part["format"]))
    if one is not None and one.compressed_only and "layouts" not in part:
        part["layouts"] = [COMPRESSED_TENSORS]
        origins["quantization.layouts"] = f"format {one.name}: its only layout"
    if "kv_cache_dtype" not in part:
        part["kv_cache_dtype"], why = card_formats.default_cache(gpu, target, str(part["format"]))
        origins["quantization.kv_cache_dtype"] = f"GPU profile {gpu.name}: {why}"


def schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file. No key is required, because other sources may set it."""
    generated = Recipe.model_json_schema()
    generated["title"] = "trtllm-builder recipe"
    generated.pop("required", None)
    return generated


def known_keys() -> list[str]:
    """Every dotted key of a recipe."""
    return list(_keys(Recipe))


def _keys(part: type[BaseModel], above: str = "") -> Iterator[str]:
    for name, info in part.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, Part):
            yield from _keys(kind, f"{above}{name}.")
        else:
            yield f"{above}{name}"


def _usage_error(error: ValidationError, origins: Mapping[str, str]) -> UsageError:
    lines, meant = [], []
    for problem in error.errors():
        key = ".".join(str(piece) for piece in problem["loc"])
        origin = f" (from {origins[key]})" if key in origins else ""
        if problem["type"] == "extra_forbidden":
            lines.append(f"there is no key {key!r}{origin}")
            meant += _similar_keys(key)
        elif problem["type"] == "missing" and key in ("model", "model.id"):
            lines.append("no model is named")
        else:
            message = problem["msg"].removeprefix("Value error, ")  # pydantic's prefix to what our validators raise
            lines.append(f"{key or 'recipe'}: {message}{origin}")
    hint = "`builder schema` prints every key; examples are in configs/recipes/."
    if lines == ["no model is named"]:
        hint = "Add --model Qwen/Qwen3-8B, or a local directory."
    why = f"Did you mean {' and '.join(map(repr, meant))}?" if meant else ""
    return UsageError("The recipe is not valid: " + "; ".join(lines) + ".", why=why, hint=hint)


def _similar_keys(key: str) -> list[str]:
    """The recipe key most like this one, compared as a whole or else by its last word. May be empty."""
    last = key.split(".")[-1]
    whole = difflib.get_close_matches(key, known_keys(), n=1)
    return whole or difflib.get_close_matches(last, known_keys(), n=1, cutoff=0.4)
