"""Recipe, GPU profile and model -> arguments of TensorRT-LLM's LLM class, each with its reason and source. Pure.

Version facts are data (versions.py). normalize.py applies what the LLM class would silently rewrite, filter or ignore;
notes.py explains it to users. Files named in sources are in NVIDIA/TensorRT-LLM.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from builder.architectures import catalog, served
from builder.architectures.attention import head_size
from builder.checkpoint import sharding
from builder.core.errors import IntegrityError, UnsupportedError, UsageError
from builder.core.store import library_versions
from builder.formats.registry import NVFP4
from builder.llmapi import guided_decoding, lora
from builder.llmapi import versions as llmapi_versions
from builder.llmapi.normalize import ARGS, ASKED, EXECUTOR, Argument, Subject, settle
from builder.llmapi.notes import notes
from builder.model import dtypes
from builder.model.config_values import routed_experts
from builder.quantize.modelopt import gpus
from builder.recipe import schema
from builder.recipe.triton_parameters import PREFIX, text
from builder.triton.engine_parameters import Parameter
from builder.trtllm import flags as trtllm_flags

__all__ = ["Argument", "Subject", "check_card", "check_machine", "check_model", "notes", "resolve", "settle", "tree"]
TOKENS_PER_BLOCK = 32
CHECK_PERIOD = "cancellation_check_period_ms"
PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}  # name -> neutral value
# Arguments that have a key of their own in the recipe.
SAID = {
    "tensor_parallel_size": "engine.tp",
    "pipeline_parallel_size": "engine.pp",
    "max_batch_size": "engine.max_batch_size",
    "max_input_len": "engine.max_input_len",
    "max_seq_len": "engine.max_seq_len",
    "max_num_tokens": "engine.max_num_tokens",
    "trust_remote_code": "model.trust_remote_code",
    "enable_chunked_prefill": "repository.enable_chunked_context",
    "kv_cache_config.dtype": "quantization.kv_cache_dtype",
    "kv_cache_config.free_gpu_memory_fraction": "repository.kv_cache_free_gpu_mem_fraction",
    "kv_cache_config.enable_block_reuse": "repository.enable_kv_cache_reuse",
    "scheduler_config.capacity_scheduler_policy": "repository.batch_scheduler_policy",
}
# What other targets' recipes hold and nothing here reads.
UNUSED = (
    "repository.preprocessing_instances",
    "repository.postprocessing_instances",
    "repository.bls_instances",
    "repository.max_queue_delay_microseconds",
)


def resolve(resolved: schema.Resolved, model_config: Mapping[str, Any]) -> list[Argument]:
    """The arguments for this recipe, GPU and model (its config.json).

    UsageError for arguments that this version does not have or does not allow together, UnsupportedError for what the
    version, the card or the model cannot do.
    """
    asked = resolved.recipe
    subject = _subject(resolved, model_config)
    _check_target(resolved)
    trtllm_flags.check_format(resolved)
    triton_config(asked.repository)
    _check_defaults(resolved, penalties=subject.facts.penalties)
    own = _asked(asked)
    for name, value in own.items():
        llmapi_versions.check(subject.facts, name, value)
    if guided_decoding.ARGUMENT in own:
        raise UsageError(
            f"llmapi.args.{guided_decoding.ARGUMENT} belongs to a key of its own.",
            why="The repository needs more for it than the argument: a vocabulary, and inputs for grammars.",
            hint="--set repository.guided_decoding=true",
        )
    _check_said_once(resolved, own)
    arguments = {argument.name: argument for argument in _derived(subject, resolved, model_config)}
    arguments |= _of_family(model_config, resolved, arguments)
    for name, value in own.items():
        if name not in SAID:
            arguments[name] = Argument(name, value, ASKED, "recipe")
    return list(settle(subject, arguments).values())


def _asked(recipe: schema.Recipe) -> dict[str, Any]:
    """The arguments that the recipe names, by dotted name: llmapi.args, and those of its LoRA adapters."""
    return lora.with_adapters(_flatten(recipe.llmapi.args), recipe.lora)


def triton_config(part: schema.Repository) -> list[Parameter]:
    """What Triton's side of the model reads (upstream's model.py reads it under the same names).

    UsageError for parameters of other models.
    """
    upstream = "llmapi/tensorrt_llm/1/model.py@044a90d2"
    found = [
        Parameter("max_batch_size", "0", "the LLM API does the batching", upstream),
        Parameter("decoupled", text(part.decoupled), "repository.decoupled", "recipe"),
        Parameter(CHECK_PERIOD, "100", "the default, written down", upstream),
    ]
    for name, value in part.parameters.items():
        if name != CHECK_PERIOD:
            raise UsageError(
                f"{PREFIX}{name} is a parameter of an engine's models, which the llmapi target does not have.",
                hint=f"Omit it. Arguments of the LLM class: --set llmapi.args.NAME=VALUE. Its own: {CHECK_PERIOD}.",
            )
        found[-1] = Parameter(name, value, PREFIX + name, "recipe")
    return found


def _of_family(
    config: Mapping[str, Any], resolved: schema.Resolved, arguments: Mapping[str, Argument]
) -> dict[str, Argument]:
    """The arguments that the model's architecture needs (configs/architectures, `llmapi`).

    UsageError if the recipe asks for another value: a state that can't be reused would give wrong answers in silence.
    """
    found = catalog.of(config)
    part = found.llmapi
    made: dict[str, Argument] = {}
    for name, value in (part.arguments if part else {}).items():
        derived = arguments.get(name)
        if derived and derived.reason == ASKED and derived.value != value:
            raise UsageError(
                f"{name} must be {str(value).lower()} for {found.name}, and the recipe says {derived.value}.",
                why=f"{part.needs if part else ''}.",
                hint=f"Leave {SAID.get(name, name)} out.",
            )
        made[name] = Argument(name, value, f"what {found.name} needs", part.needs if part else "")
    return made


def tree(arguments: Sequence[Argument]) -> dict[str, Any]:
    """Arguments with dotted names as the nested mapping of a model.yaml."""
    made: dict[str, Any] = {}
    for argument in arguments:
        *parents, last = argument.name.split(".")
        below = made
        for parent in parents:
            below = below.setdefault(parent, {})
        below[last] = argument.value
    return made


def check_machine(resolved: schema.Resolved) -> None:
    """UnsupportedError if this machine cannot serve it, IntegrityError if it has another TensorRT-LLM version.

    Called before any work.
    """
    wanted = resolved.recipe.engine.tensorrt_llm
    installed, images = library_versions("tensorrt_llm")["tensorrt_llm"], llmapi_versions.load(wanted).images
    if shutil.which("trtllm-serve") is None and importlib.util.find_spec("tensorrt_llm") is None:
        raise UnsupportedError(
            "TensorRT-LLM is not installed on this machine, so its LLM API can't be served or tested here.",
            why=f"The recipe's version is {wanted}. "
            + (f"It comes in NVIDIA's images {images}." if images else "No image of Triton's with it is known."),
            hint="Run in an image that has it, or stop at the repository: `builder render`. `builder plan` works "
            "everywhere.",
        )
    if installed not in ("absent", wanted):
        raise IntegrityError(
            f"TensorRT-LLM {installed} is installed here, and the arguments are for {wanted}.",
            why="Names and defaults of LLM arguments differ between versions.",
            hint=f"--set engine.tensorrt_llm={installed}",
        )
    world_size, have = resolved.recipe.engine.world_size, len(gpus())
    if 0 < have < world_size:
        raise UnsupportedError(
            f"Serving and testing it needs {world_size} GPUs, and this machine has {have}.",
            why="--tp times --pp is the number of ranks, and each rank needs its own GPU.",
            hint="Make only the repository: `builder render`. Or reduce --tp and --pp.",
        )


def _subject(resolved: schema.Resolved, config: Mapping[str, Any]) -> Subject:
    return Subject(
        facts=llmapi_versions.load(resolved.recipe.engine.tensorrt_llm),
        sm=resolved.gpu.sm,
        experts=routed_experts(config),
        number_format=resolved.recipe.quantization.number_format,
        cache=resolved.recipe.quantization.cache_format,
        head_size=head_size(config) if "num_attention_heads" in config else None,
        fmha_head_sizes=tuple(resolved.gpu.fmha_head_sizes),
    )


def check_card(resolved: schema.Resolved) -> None:
    """UnsupportedError for a GPU profile without a GPU."""
    if resolved.gpu.sm is None:
        raise UnsupportedError(
            f"The llmapi target needs a GPU, and the profile {resolved.gpu.name!r} has none.",
            why="TensorRT-LLM's PyTorch backend does not run on a CPU.",
            hint="Give the card's profile, for example --gpu sm120, or omit --target.",
        )


def _check_target(resolved: schema.Resolved) -> None:
    check_card(resolved)
    if resolved.recipe.engine.flags:
        raise UsageError(
            "engine.flags are flags of trtllm-build, which the llmapi target does not run.",
            hint="Set arguments of the LLM class with --set llmapi.args.NAME=VALUE.",
        )
    for key in UNUSED:
        origin = resolved.origins.get(key, "default")
        if trtllm_flags.asked_for(origin) and not origin.startswith("preset"):  # a preset speaks to every target
            raise UsageError(
                f"{key} has no effect with the llmapi target: there is one model, and the LLM API does the batching.",
                hint=f"Omit {key}.",
            )


def _check_defaults(resolved: schema.Resolved, *, penalties: bool) -> None:
    """UsageError for default penalties that the version's sampler ignores: the model would reject every request."""
    asked = resolved.recipe.repository.sampling_defaults
    for name, neutral in PENALTIES.items():
        if not penalties and getattr(asked, name) not in (None, neutral):
            raise UsageError(
                f"repository.sampling_defaults.{name} would be ignored by the sampler of TensorRT-LLM "
                f"{resolved.recipe.engine.tensorrt_llm}.",
                why="Its PyTorch sampler has no penalties.",
                hint=f"Omit {name}.",
            )


def check_model(resolved: schema.Resolved, config: Mapping[str, Any]) -> None:
    """UnsupportedError for a model (its config.json) that the PyTorch backend cannot serve on this card, split so."""
    subject = _subject(resolved, config)
    served.check_llmapi(config, subject.facts.version)
    engine = resolved.recipe.engine
    number_format = resolved.recipe.quantization.number_format
    sharding.check(config, engine.tp, engine.pp, number_format=number_format, gemm=True)
    lora.check(_asked(resolved.recipe))
    if subject.cache.quantized and subject.fmha_head_sizes and subject.head_size not in subject.fmha_head_sizes:
        raise UnsupportedError(
            f"sm{subject.sm} has no fused attention kernel for heads of {subject.head_size} with an "
            f"{subject.cache.title}, only for {', '.join(map(str, subject.fmha_head_sizes))}.",
            why="TensorRT-LLM would not refuse it: it falls back to unfused attention over the whole context, which "
            "asked for a workspace of about 626 GB on an RTX 5090 (NVIDIA/TensorRT-LLM #17911, 1.3.0rc23; closed).",
            hint="--kv-cache-dtype auto, or a card of another architecture.",
        )


def _check_said_once(resolved: schema.Resolved, own: Mapping[str, Any]) -> None:
    """UsageError if llmapi.args contradicts a value that has its own recipe key."""
    values = {key: value for key, value, _ in resolved.explained()}
    for name in own.keys() & SAID.keys():
        said = values[SAID[name]]
        same = str(said).lower() == str(own[name]).lower() if isinstance(own[name], str) else said == own[name]
        if not same and name == "kv_cache_config.dtype" and own[name] not in ("auto", "fp8"):
            raise UnsupportedError(
                f"kv_cache_config.dtype {own[name]} does not agree with the checkpoint, whose KV cache is {said}.",
                why=f"{EXECUTOR}/model_loader.py, validate_and_set_kv_cache_quant, ends in a RuntimeError; the "
                "checkpoints made here have an FP8 cache or the model's own type.",
                hint="Leave it out. --kv-cache-dtype chooses between the two.",
            )
        if not same:
            value = str(own[name]).lower() if isinstance(own[name], (bool, str)) else own[name]
            raise UsageError(
                f"{name} is set twice: {SAID[name]} is {said}, llmapi.args.{name} is {own[name]}.",
                hint=f"Set it once: --set {SAID[name]}={value}",
            )


def _derived(subject: Subject, resolved: schema.Resolved, config: Mapping[str, Any]) -> list[Argument]:
    asked, part = resolved.recipe, resolved.recipe.repository
    chunked, reuse = part.enable_chunked_context, part.enable_kv_cache_reuse
    dtype = dtypes.served(config)
    own = dtypes.stated(config) in (dtype, None)
    reason = "the model's own" if own else "NVFP4 layers take 16-bit types alone"
    found = [
        Argument("dtype", dtype, reason, "config.json" if own else "builder/model/dtypes.py"),
        Argument("tensor_parallel_size", asked.engine.tp, *_from(resolved, "engine.tp")),
        Argument("pipeline_parallel_size", asked.engine.pp, *_from(resolved, "engine.pp")),
        *_asked_sizes(resolved, config),
        Argument("enable_chunked_prefill", chunked is not False, "a prompt longer than max_num_tokens goes in pieces"
                 if chunked is None else "asked for", f"{ARGS} (off by default)" if chunked is None else "recipe"),
        Argument("attn_backend", "TRTLLM", "the default; the one with an FP8 KV cache and paged context FMHA on every "
                 "card", f"{ARGS}; cpp/tensorrt_llm/common/attentionOp.cpp"),
        Argument("disable_overlap_scheduler", False, "the default: the next step is prepared while this one runs",
                 f"{EXECUTOR}/py_executor.py"),
        _kv_dtype(subject),
        Argument("kv_cache_config.free_gpu_memory_fraction", part.kv_cache_free_gpu_mem_fraction,
                 "of what is free after weights and activations",
                 _from(resolved, "repository.kv_cache_free_gpu_mem_fraction")[1]),
        Argument("kv_cache_config.tokens_per_block", TOKENS_PER_BLOCK, "the default, written down", ARGS),
        Argument("kv_cache_config.enable_block_reuse", reuse is not False,
                 "the default: prompts that begin alike share blocks" if reuse is None else "asked for",
                 ARGS if reuse is None else "recipe"),
        Argument("scheduler_config.capacity_scheduler_policy", part.batch_scheduler_policy.upper(),
                 *_from(resolved, "repository.batch_scheduler_policy")),
        Argument("cuda_graph_config.max_batch_size", 0, "every batch that can come", ARGS),
        Argument("cuda_graph_config.enable_padding", True, "a batch between two graphs takes the larger one",
                 f"{ARGS}: usually a net win; off by default"),
        Argument("trust_remote_code", asked.model.trust_remote_code, *_from(resolved, "model.trust_remote_code")),
    ]  # fmt: skip
    if part.guided_decoding:
        reason = "repository.guided_decoding: answers that follow a grammar"
        found.append(Argument(guided_decoding.ARGUMENT, guided_decoding.BACKEND, reason, ARGS))
    if subject.facts.takes("telemetry_config.disabled"):
        reason = "off here: the class sends NVIDIA usage data by default (GPU, CPU, architecture, these values)"
        source = "tensorrt_llm/usage/usage_lib.py@03fa4799; PR #12384"
        found.append(Argument("telemetry_config.disabled", True, reason, source))
    if subject.experts and subject.number_format is NVFP4:
        found.append(Argument("moe_config.backend", "CUTLASS", "the one that runs NVFP4 experts on every card; "
                              "its default changed from CUTLASS to AUTO", f"{ARGS}, MoeConfig"))  # fmt: skip
    return found


def _kv_dtype(subject: Subject) -> Argument:
    source = f"{EXECUTOR}/model_loader.py, validate_and_set_kv_cache_quant"
    name = "kv_cache_config.dtype"
    if subject.cache.quantized:
        return Argument(
            name, subject.cache.name, "what the checkpoint says (hf_quant_config.json), which auto would take", source
        )
    return Argument(name, "auto", "the checkpoint has no KV scales, so the cache is in the model's own type", source)


def _asked_sizes(resolved: schema.Resolved, config: Mapping[str, Any]) -> list[Argument]:
    """The four sizes. A profile reduces the batch for engines without context FMHA; this backend always has it."""
    found = []
    for flag in trtllm_flags.sizes(resolved, config):
        value, reason, source = int(flag.value), flag.reason, flag.source
        if flag.name == "max_batch_size" and reason.startswith("GPU profile"):
            default = int(schema.Engine.model_fields["max_batch_size"].default)
            value, reason, source = (
                default,
                "the default; the profile's suits engines without context FMHA",
                "recipe",
            )
        found.append(Argument(flag.name, value, reason, source))
    return found


def _from(resolved: schema.Resolved, key: str) -> tuple[str, str]:
    return resolved.origins.get(key, "default"), "recipe"


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}. A mapping is kept as a value if the argument takes a mapping."""
    whole = {name for name, spec in llmapi_versions.read()["arguments"].items() if spec["type"] == "mapping"}
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in whole:
            flat |= _flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat
