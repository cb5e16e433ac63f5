"""What a file in configs/architectures says: one model architecture, with the source of every fact. Pure.

A linear layer of a decoder layer has a role, whatever its name: `q`, `k`, `v` and `o` of the attention, `gate`, `up`
and `down` of the MLP; `qkv` and `gate_up` where the checkpoint stores several as one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Role = Literal["q", "k", "v", "qkv", "o", "gate", "up", "gate_up", "down"]
NormRole = Literal["input", "post_attention", "q", "k"]
Target = Literal["engine", "llmapi", "reference"]
ALWAYS = "always"  # a bias that is there whatever config.json says
# The layers that every decoder layer of a complete table has. A table that stores them fused has no place here yet.
COMPLETE: tuple[Role, ...] = ("q", "k", "v", "o", "gate", "up", "down")

# What TensorRT-LLM's config.json must say, and a model's may leave out.
NEEDED_DEFAULTS = frozenset({"hidden_act", "rms_norm_eps", "rope_theta"})


class Facts(BaseModel):
    """A part of the file. Frozen; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Config(Facts):
    """How the family's config.json differs from the common one.

    `keys`: {common key: this family's}, such as {hidden_size: n_embd}; a list stands for its length. `defaults`: what
    the transformers configuration class takes for keys that config.json leaves out.
    """

    keys: Mapping[str, str] = Field(default_factory=dict)
    defaults: Mapping[str, Any] = Field(default_factory=dict)


class SlidingWindow(Facts):
    """How config.json limits attention to the last `sliding_window` tokens.

    `by_default`: whether a number in sliding_window is enough, or use_sliding_window must be true too. `first_layer`:
    the key with the number of the first layer that is limited; None if all are. A `layer_types` key overrides it.
    """

    by_default: bool = True
    first_layer: str | None = None
    source: str


class TensorNames(Facts):
    """The names of all tensors of a model, as transformers saves them. They end in .weight and .bias.

    `layers`: the list of decoder layers; `attention`, `linears` and `norms` are named below `layers`.N. `attention` is
    the module that ModelOpt gives the quantizers of the KV cache; its exporter names their scales below it.
    """

    embedding: str
    layers: str
    attention: str
    final_norm: str
    head: str
    linears: Mapping[Role, str]
    norms: Mapping[NormRole, str]
    source: str

    @model_validator(mode="after")
    def _complete(self) -> TensorNames:
        if sorted(self.linears) != sorted(COMPLETE):
            raise ValueError(f"linears must name exactly {', '.join(COMPLETE)}")
        if not {"input", "post_attention"} <= self.norms.keys() or ("q" in self.norms) != ("k" in self.norms):
            raise ValueError("norms must name input and post_attention, and q and k together or not at all")
        names = [*self.linears.values(), *self.norms.values()]
        if len(set(names)) < len(names):
            raise ValueError("linears and norms must have names of their own")
        return self


class Refusal(Facts):
    """A key of config.json with which a model of this architecture is not served, and why."""

    key: str
    why: str


class Engine(Facts):
    """How TensorRT-LLM's engine path serves the architecture.

    `architecture`: its name in MODEL_MAP (tensorrt_llm/models/__init__.py), which the checkpoint's config.json holds;
    `model_class`: the class behind it. `config`: fields that its configuration class reads beyond the common ones, with
    the value where the model's config.json has none. `output_bias`: whether the attention's output projection has a
    bias if q, k and v have one. `rope_types`: the kinds of rotary scaling that it computes.
    """

    architecture: str
    model_class: str
    since: str
    config: Mapping[str, Any] = Field(default_factory=dict)
    output_bias: bool
    rope_types: tuple[str, ...]
    refused: tuple[Refusal, ...] = ()
    source: str


class Served(Facts):
    """That a target serves the architecture, and since which version of TensorRT-LLM. None: in every version."""

    since: str | None = None
    source: str


class LlmApi(Served):
    """That TensorRT-LLM's LLM class serves the architecture, and what it needs for that.

    `arguments`: {argument: value} that upstream's model class sets where the user sets nothing (`get_model_defaults`),
    or that its code requires. `unquantized`: patterns of modules whose quantized tensors its loader does not take.
    `needs`: the source of both.
    """

    arguments: Mapping[str, Any] = Field(default_factory=dict)
    unquantized: tuple[str, ...] = ()
    needs: str = ""
    refused: tuple[Refusal, ...] = ()

    @model_validator(mode="after")
    def _sourced(self) -> LlmApi:
        if (self.arguments or self.unquantized) and not self.needs:
            raise ValueError("arguments and unquantized need their source in `needs`")
        return self


class NotServed(Facts):
    """Why no target serves the architecture, for the error message."""

    why: str
    source: str


class Rotation(Facts):
    """Which modules read and write the residual stream, and that nothing else lies between them, so that the stream
    can be rotated (builder/transform/).

    Names are those within a decoder layer; `*` stands for the number of an expert. `reads`: {norm: the linear layers
    that get its output}; each is an RMS norm with a weight and no bias. `writes`: the linear layers whose output is
    added to the stream. `values` and `output`: the projections of attention between which each head's values can be
    rotated; None where the values are stored together with queries and keys. `kept`: modules that no rotation touches.
    """

    reads: Mapping[str, tuple[str, ...]]
    writes: tuple[str, ...]
    values: str | None
    output: str
    kept: tuple[str, ...] = ()
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    source: str

    @model_validator(mode="after")
    def _complete(self) -> Rotation:
        if self.output not in self.writes or (self.values and self.values not in sum(self.reads.values(), ())):
            raise ValueError("output must be among writes, and values among reads")
        return self


class StackedExperts(Facts):
    """Experts that a model's files hold as two three-dimensional parameters instead of one matrix for each.

    `gate_up` and `down`: the last parts of the parameters' names; `module`: that of the experts, beside them.
    `inputs_first`: whether they are [experts, inputs, outputs], else [experts, outputs, inputs]. `apart`: whether
    ModelOpt's exporter writes the matrices of each expert (`experts.N.gate_proj`, ...) or the stacked parameters, with
    their scales beside them (`experts.down_proj_weight_scale`).
    """

    gate_up: str
    down: str
    module: str
    inputs_first: bool
    apart: bool
    source: str

    @model_validator(mode="after")
    def _contiguous(self) -> StackedExperts:
        if self.apart and self.inputs_first:
            raise ValueError("experts that are written apart must be stored [experts, outputs, inputs]")
        return self


class Multimodal(Facts):
    """The multimodal architecture whose language model this is. Its config.json holds this one's as `text_config`."""

    name: str
    source: str


class Architecture(Facts):
    """One architecture: what `architectures` in config.json calls it, and everything that is known about it.

    `also`: other names of it in `architectures`; a checkpoint gets `name`, which TensorRT-LLM knows.
    `biases`: {role: `always`, or the key of config.json that adds it}; other layers have none. `qk_norm`: whether
    queries and keys are normalized. `tensors`: None if only transformers knows them. `never_quantized`: parts of the
    names of two-dimensional weights that quantizers leave alone, beyond the usual ones. `float32`: patterns of tensors
    that transformers keeps in float32. `same_input`: linear layers of a decoder layer that get the same input, by the
    ends of their names; ModelOpt gives each set one scale of the weights, as it does to q, k and v, and to gate and up
    (export/unified_export_hf.py, collect_shared_input_modules). `not_loaded`: patterns of tensors that transformers
    ignores, such as the layers that predict further tokens. `renamed`: tensors that it writes under another name than
    TensorRT-LLM reads.
    `language_model_of`: multimodal architectures whose language model this is. `rotation`: how its residual stream is
    rotated; `not_rotated`: why it can't be, as the end of a sentence that begins with its name. Without
    `engine`, `llmapi` or `reference` that target does not serve it.

    `quantized_with`: the versions of ModelOpt that a test quantized a small model of this architecture with, on a CPU;
    `not_quantized`: why there is none.
    """

    name: str
    also: tuple[str, ...] = ()
    title: str
    model_types: tuple[str, ...]
    source: str
    config: Config = Config()
    biases: Mapping[Role, str] = Field(default_factory=dict)
    qk_norm: bool = False
    sliding_window: SlidingWindow | None = None
    tensors: TensorNames | None = None
    never_quantized: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    same_input: tuple[tuple[str, ...], ...] = ()
    not_loaded: tuple[str, ...] = ()
    renamed: Mapping[str, str] = Field(default_factory=dict)
    experts: StackedExperts | None = None
    language_model_of: tuple[Multimodal, ...] = ()
    rotation: Rotation | None = None
    not_rotated: str = ""
    engine: Engine | None = None
    llmapi: LlmApi | None = None
    reference: Served | None = None
    not_served: NotServed | None = None
    quantized_with: tuple[str, ...] = ()
    not_quantized: str = ""

    @model_validator(mode="after")
    def _consistent(self) -> Architecture:
        if (self.engine or self.reference) and self.tensors is None:
            raise ValueError("engine and reference need the table of tensors")
        if self.tensors and self.qk_norm != ("q" in self.tensors.norms):
            raise ValueError("qk_norm and tensors.norms disagree")
        if self.not_served and (self.engine or self.llmapi or self.reference):
            raise ValueError("not_served contradicts the targets")
        if self.rotation and self.not_rotated:
            raise ValueError("rotation contradicts not_rotated")
        if self.quantized_with and self.not_quantized:
            raise ValueError("quantized_with contradicts not_quantized")
        if (self.engine or self.reference) and not self.config.defaults.keys() >= NEEDED_DEFAULTS:
            raise ValueError(f"engine and reference need config.defaults of {', '.join(sorted(NEEDED_DEFAULTS))}")
        return self


class Conventions(Facts):
    """Last parts of module names that decoders use, for architectures without a table of tensors.

    `blocks`: the halves of a decoder layer. `fused`: layers that servers multiply as one, {name of the fused layer: its
    roles}. `never_quantized`: parts of the names of two-dimensional weights that quantizers leave alone.
    """

    blocks: Mapping[Literal["attention", "mlp"], str]
    linears: Mapping[Role, tuple[str, ...]]
    fused: Mapping[str, tuple[Role, ...]]
    embeddings: tuple[str, ...]
    heads: tuple[str, ...]
    never_quantized: tuple[str, ...]
    source: str
