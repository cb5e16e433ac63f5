"""The LLM arguments that a recipe comes to for Triton's llmapi model, each with its reason and source. Pure.

Version facts are data (llmapi_facts.py). What the LLM class would silently rewrite, filter or ignore is settled here.
Files named in sources are NVIDIA/TensorRT-LLM's.
"""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from builder import llmapi_facts, ranks, recipe, trtllm
from builder.checkpoint import head_size
from builder.errors import IntegrityError, UnsupportedError, UsageError
from builder.llmapi_facts import Facts
from builder.quantize.modelopt import gpus
from builder.store import library_versions
from builder.trtllm import Note

TOKENS_PER_BLOCK = 32
ARGS = "tensorrt_llm/llmapi/llm_args.py"
EXECUTOR = "tensorrt_llm/_torch/pyexecutor"
DTYPES = ("bfloat16", "float16")
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
    "repository.max_queue_size",
)


@dataclass(frozen=True)
class Argument:
    """One LLM argument by its dotted name, its value as YAML holds it, why, and who says so."""

    name: str
    value: Any
    reason: str
    source: str


@dataclass(frozen=True)
class Subject:
    """What the rules look at besides the arguments."""

    facts: Facts
    sm: int | None
    experts: int = 0
    fp8_kv: bool = True
    head_size: int | None = None
    fmha_head_sizes: tuple[int, ...] = field(default=())


def resolve(resolved: recipe.Resolved, model_config: Mapping[str, Any]) -> list[Argument]:
    """The arguments for this recipe, GPU and model (its config.json). UsageError, UnsupportedError as in trtllm.py."""
    asked = resolved.recipe
    subject = _subject(resolved, model_config)
    _check_target(resolved)
    trtllm.check_format(resolved)
    own = {name: value for name, value in _flatten(asked.llmapi.args).items()}
    for name, value in own.items():
        llmapi_facts.check(subject.facts, name, value)
    _check_said_once(resolved, own)
    arguments = {argument.name: argument for argument in _derived(subject, resolved, model_config)}
    for name, value in own.items():
        if name not in SAID:
            arguments[name] = Argument(name, value, "asked for", "recipe")
    return list(settle(subject, arguments).values())


def settle(subject: Subject, arguments: Mapping[str, Argument]) -> dict[str, Argument]:
    """The arguments as the LLM class would end up with them, each change with its source. Idempotent.

    UsageError, UnsupportedError for what it would refuse late, or would take and not heed.
    """
    settled = dict(arguments)
    _refuse(subject, settled)
    _graphs(settled)
    _sizes(settled)
    _scheduler(settled)
    return settled


def notes(resolved: recipe.Resolved, arguments: Sequence[Argument]) -> list[Note]:
    """What is left to know about them."""
    values = {argument.name: argument.value for argument in arguments}
    facts = llmapi_facts.load(resolved.recipe.engine.tensorrt_llm)
    found = [
        Note("llmapi", f"No release of TensorRT-LLM could be read, only states of its main branch: {facts.source}."),
        Note("llmapi", "A prompt is refused by the served model when it is longer than max_input_len; the PyTorch "
             "backend itself looks at max_num_tokens and max_seq_len alone."),
        Note("llmapi", "Code that comes with a model would be loaded by the PyTorch backend without being asked "
             f"({EXECUTOR}/model_loader.py); the checkpoint holds none unless --trust-remote-code put it there."),
    ]  # fmt: skip
    if not facts.penalties:
        found.append(Note("llmapi", f"The sampler of TensorRT-LLM {facts.version} heeds no repetition, presence or "
                          "frequency penalty; the served model refuses them."))  # fmt: skip
    if facts.images is None:
        text = f"No Triton image with TensorRT-LLM {facts.version} is known: it must be installed for Triton's Python."
        found.append(Note("llmapi", text))
    graphs = "CUDA graphs (up to 200 MB each), " if "cuda_graph_config" not in values else ""
    found.append(
        Note("llmapi", f"The estimate of memory leaves out {graphs}the autotuner's and NCCL's buffers ({ARGS}).")
    )
    if (world := resolved.recipe.engine.world_size) > 1:
        found.append(Note("llmapi", f"One server starts {world} ranks by MPI_Comm_spawn: no mpirun around it."))
    return [*found, *(Note("GPU profile", text) for text in resolved.gpu.notes if "engine.flags" not in text)]


def tree(arguments: Sequence[Argument]) -> dict[str, Any]:
    """Dotted names as the nested mapping that a model.yaml holds."""
    made: dict[str, Any] = {}
    for argument in arguments:
        *parents, last = argument.name.split(".")
        below = made
        for parent in parents:
            below = below.setdefault(parent, {})
        below[last] = argument.value
    return made


def check_machine(resolved: recipe.Resolved) -> None:
    """Before the first expensive byte: can this machine serve it? UnsupportedError if not, IntegrityError for another
    version of TensorRT-LLM."""
    wanted = resolved.recipe.engine.tensorrt_llm
    installed, images = library_versions("tensorrt_llm")["tensorrt_llm"], llmapi_facts.load(wanted).images
    if shutil.which("trtllm-serve") is None and importlib.util.find_spec("tensorrt_llm") is None:
        raise UnsupportedError(
            "TensorRT-LLM is not installed on this machine, so its LLM API can't be served or tested here.",
            why=f"The recipe's version is {wanted}. "
            + (f"It comes in NVIDIA's images {images}." if images else "No image of Triton's with it is known."),
            cure="Run where it is, or stop at the repository: `builder render`. `builder plan` works everywhere.",
        )
    if installed not in ("absent", wanted):
        raise IntegrityError(
            f"TensorRT-LLM {installed} is installed here, and the arguments are for {wanted}.",
            why="Names and defaults of LLM arguments differ between versions.",
            cure=f"--set engine.tensorrt_llm={installed}",
        )
    world_size, have = resolved.recipe.engine.world_size, len(gpus())
    if 0 < have < world_size:
        raise UnsupportedError(
            f"{world_size} GPUs are needed to serve and test it, and this machine has {have}.",
            why="--tp times --pp is the number of ranks, and each takes a GPU of its own.",
            cure="Stop at the repository: `builder render`. Or split it less.",
        )


def _subject(resolved: recipe.Resolved, config: Mapping[str, Any]) -> Subject:
    return Subject(
        facts=llmapi_facts.load(resolved.recipe.engine.tensorrt_llm),
        sm=resolved.gpu.sm,
        experts=int(config.get("num_experts") or config.get("num_local_experts") or 0),
        fp8_kv=resolved.recipe.quantization.kv_cache_dtype == "fp8",
        head_size=head_size(config) if "num_attention_heads" in config else None,
        fmha_head_sizes=tuple(resolved.gpu.fmha_head_sizes),
    )


def _check_target(resolved: recipe.Resolved) -> None:
    if resolved.gpu.sm is None:
        raise UnsupportedError(
            f"The llmapi target needs a GPU, and the profile {resolved.gpu.name!r} has none.",
            why="TensorRT-LLM's PyTorch backend does not run on a CPU.",
            cure="Name the card's profile, as --gpu sm120, or leave --target out.",
        )
    if resolved.recipe.engine.flags:
        raise UsageError(
            "engine.flags are trtllm-build's, and the llmapi target does not run it.",
            cure="Arguments of the LLM class are set by --set llmapi.args.NAME=VALUE.",
        )
    for key in UNUSED:
        origin = resolved.origins.get(key, "default")
        if trtllm.asked_for(origin) and not origin.startswith("preset"):  # a preset speaks to every target
            raise UsageError(
                f"{key} has no meaning for the llmapi target: one model answers, and the LLM API batches and waits.",
                cure=f"Leave {key} out.",
            )


def check_model(resolved: recipe.Resolved, config: Mapping[str, Any]) -> None:
    """UnsupportedError for a model (its config.json) that the PyTorch backend can't serve, split so, on this card."""
    subject = _subject(resolved, config)
    name = (config.get("architectures") or ["unknown"])[0]
    if name not in subject.facts.architectures:
        raise UnsupportedError(
            f"{name} is no architecture that the llmapi target is known to serve.",
            why=f"Known: {', '.join(subject.facts.architectures)} (tensorrt_llm/_torch/models).",
            cure="Take one of these models, or stop at the checkpoint: `builder quantize`.",
        )
    engine = resolved.recipe.engine
    ranks.check(config, engine.tp, engine.pp, inputs=ranks.GEMM_INPUTS)
    if subject.fp8_kv and subject.fmha_head_sizes and subject.head_size not in subject.fmha_head_sizes:
        raise UnsupportedError(
            f"sm{subject.sm} has no attention kernel for heads of {subject.head_size} with an FP8 KV cache, only for "
            f"{', '.join(map(str, subject.fmha_head_sizes))} (NVIDIA/TensorRT-LLM #17911).",
            why="The PyTorch backend calls the attention operator that engines call, with context FMHA always on.",
            cure="--kv-cache-dtype auto, or a card of another architecture.",
        )


def _check_said_once(resolved: recipe.Resolved, own: Mapping[str, Any]) -> None:
    """A value with a key of its own in the recipe; llmapi.args may repeat it but not contradict it."""
    values = {key: value for key, value, _ in resolved.explained()}
    for name in own.keys() & SAID.keys():
        said = values[SAID[name]]
        same = str(said).lower() == str(own[name]).lower() if isinstance(own[name], str) else said == own[name]
        if not same:
            value = str(own[name]).lower() if isinstance(own[name], (bool, str)) else own[name]
            raise UsageError(
                f"{name} is said twice: {SAID[name]} is {said}, llmapi.args.{name} {own[name]}.",
                cure=f"Say it once: --set {SAID[name]}={value}",
            )


def _derived(subject: Subject, resolved: recipe.Resolved, config: Mapping[str, Any]) -> list[Argument]:
    asked, part = resolved.recipe, resolved.recipe.repository
    chunked, reuse = part.enable_chunked_context, part.enable_kv_cache_reuse
    dtype = config.get("dtype") or config.get("torch_dtype")
    found = [
        Argument("dtype", dtype if dtype in DTYPES else "auto", "the model's own", "config.json"),
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
    if subject.experts:
        found.append(Argument("moe_config.backend", "CUTLASS", "the one that runs NVFP4 experts on every card; "
                              "its default changed from CUTLASS to AUTO", f"{ARGS}, MoeConfig"))  # fmt: skip
    return found


def _kv_dtype(subject: Subject) -> Argument:
    source = f"{EXECUTOR}/model_loader.py, validate_and_set_kv_cache_quant"
    name = "kv_cache_config.dtype"
    if subject.fp8_kv:
        return Argument(name, "fp8", "what the checkpoint says (hf_quant_config.json), which auto would take", source)
    return Argument(name, "auto", "the checkpoint has no KV scales, so the cache is in the model's own type", source)


def _asked_sizes(resolved: recipe.Resolved, config: Mapping[str, Any]) -> list[Argument]:
    """The four sizes. A profile's small batch pays for engines without context FMHA, which this backend always has."""
    found = []
    for flag in trtllm.sizes(resolved, config):
        value, reason, source = int(flag.value), flag.reason, flag.source
        if flag.name == "max_batch_size" and reason.startswith("GPU profile"):
            default = int(recipe.Engine.model_fields["max_batch_size"].default)
            value, reason, source = default, "the default; the profile's is for engines without context FMHA", "recipe"
        found.append(Argument(flag.name, value, reason, source))
    return found


def _from(resolved: recipe.Resolved, key: str) -> tuple[str, str]:
    return resolved.origins.get(key, "default"), "recipe"


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}; below a name that takes a mapping nothing is taken apart."""
    whole = {name for name, spec in llmapi_facts.read()["arguments"].items() if spec["type"] == "mapping"}
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in whole:
            flat |= _flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat


def _put(settled: dict[str, Argument], name: str, value: Any, reason: str, source: str) -> None:
    if name not in settled or settled[name].value != value:
        settled[name] = Argument(name, value, reason, source)


def _refuse(subject: Subject, settled: Mapping[str, Argument]) -> None:
    values = {name: argument.value for name, argument in settled.items()}
    if values["max_batch_size"] > values["max_num_tokens"]:
        raise UsageError(
            f"max_batch_size {values['max_batch_size']} is more than max_num_tokens {values['max_num_tokens']}: each "
            "sequence takes a token of an iteration.",
            why=f"Upstream only warns ({ARGS}, validate_runtime_args).",
            cure=f"--max-batch-size {values['max_num_tokens']}, or a larger --max-num-tokens.",
        )
    cache = values.get("kv_cache_config.max_tokens")
    if cache is not None and cache < values["max_seq_len"]:
        raise UsageError(
            f"kv_cache_config.max_tokens {cache} has no room for one sequence of max_seq_len {values['max_seq_len']}.",
            cure=f"--max-seq-len {cache}, or a larger cache.",
        )
    graphs = values.get("cuda_graph_config.batch_sizes"), settled.get("cuda_graph_config.max_batch_size")
    if graphs[0] and graphs[1] and graphs[1].reason == "asked for" and graphs[1].value != max(graphs[0]):
        raise UsageError(
            "cuda_graph_config.batch_sizes and max_batch_size contradict each other.",
            why=f"{ARGS}, CudaGraphConfig: given both, they must agree.",
            cure="Leave out one of the two.",
        )
    _refuse_moe(subject, values)


def _refuse_moe(subject: Subject, values: Mapping[str, Any]) -> None:
    asked = [name for name in values if name.startswith(("moe_config.", "moe_"))]
    if asked and not subject.experts:
        raise UsageError(
            f"{asked[0]} is for models with experts, and this one has none.", cure=f"Leave {asked[0]} out."
        )
    limit = subject.facts.trtllm_moe_below_sm
    if values.get("moe_config.backend") == "TRTLLM" and subject.sm is not None and subject.sm >= limit:
        raise UnsupportedError(
            f"The TRTLLM backend for experts does not run on sm{subject.sm}.",
            why="TRTLLMGenFusedMoE refuses SM120 and above (NVIDIA/TensorRT-LLM #8474).",
            cure="Leave moe_config.backend out: CUTLASS.",
        )
    parts = [values.get(f"moe_{kind}_parallel_size") for kind in ("tensor", "expert")]
    given = [part for part in parts if part]
    whole = values["tensor_parallel_size"]
    if given and (whole % math.prod(given) if len(given) == 1 else math.prod(given) != whole):
        raise UsageError(
            f"moe_tensor_parallel_size times moe_expert_parallel_size must be {whole}, the tensor parallel size.",
            why="tensorrt_llm/mapping.py refuses any other product.",
            cure="Leave out one of the two.",
        )


def _graphs(settled: dict[str, Argument]) -> None:
    """cuda_graph_config: null turns them off; sizes beyond the largest batch are dropped upstream without a word."""
    if "cuda_graph_config" in settled:
        for name in [name for name in settled if name.startswith("cuda_graph_config.")]:
            del settled[name]
        return
    source = f"{EXECUTOR}/model_engine.py, _filter_cuda_graph_batch_sizes"
    most = settled["max_batch_size"].value
    sizes, largest = "cuda_graph_config.batch_sizes", "cuda_graph_config.max_batch_size"
    if settled.get(sizes) and settled[sizes].value:
        settled.pop(largest, None)
        kept = sorted({n for n in settled[sizes].value if n <= most}) or [most]
        _put(settled, sizes, kept, f"sorted; no batch is larger than {most}", source)
    elif not 0 < settled[largest].value <= most:
        _put(settled, largest, most, "every batch that can come, and none is larger", source)


def _sizes(settled: dict[str, Argument]) -> None:
    prompt = settled["max_input_len"].value
    if not settled["enable_chunked_prefill"].value and settled["max_num_tokens"].value < prompt:
        source = "tensorrt_llm/llmapi/llm.py: a longer prompt is refused when it comes"
        _put(settled, "max_num_tokens", prompt, "without chunked prefill a prompt goes in at once", source)


def _scheduler(settled: dict[str, Argument]) -> None:
    if settled["pipeline_parallel_size"].value > 1:
        reason = "pipeline stages have a loop of their own, whatever is asked"
        _put(settled, "disable_overlap_scheduler", True, reason, f"{EXECUTOR}/py_executor.py, _executor_loop_pp")
