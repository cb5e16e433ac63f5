"""The notes of a plan for the llmapi target. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from builder.llmapi import versions as llmapi_versions
from builder.llmapi.normalize import ARGS, ASKED, EXECUTOR, Argument
from builder.llmapi.versions import Facts
from builder.recipe import schema
from builder.trtllm.flags import Note

STARTED = "one rank: tritonserver; several: mpirun runs trtllm-llmapi-launch for each rank (as in upstream's CI)"
DISPUTED = (
    "upstream's guides contradict that: one rank by trtllm-llmapi-launch (else MPI_ERR_SPAWN; BUILDER_LLMAPI_LAUNCH=1 "
    "does so), several by one server below mpirun -n 1"
)
CI = "tests/integration/defs/triton_server/test_triton_llmapi.py@222982db"
LAUNCH = "mpirun, with `trtllm-llmapi-launch tritonserver` for each rank"
ONE_RANK = (
    "One rank is served by tritonserver without mpirun, as in upstream's CI ({ci}). Upstream's documents contradict "
    "each other here: NVIDIA's guide for Qwen2.5-VL says that this fails with MPI_ERR_SPAWN and needs "
    "trtllm-llmapi-launch. If it fails: BUILDER_LLMAPI_LAUNCH=1 builder serve."
)
RANKS = (
    "{n} ranks are started by {launch}, as in upstream's CI ({ci}). Upstream's documents contradict each other here: "
    "NVIDIA's guide for Qwen3 starts one server with mpirun -n 1 and leaves the other ranks to the LLM class."
)


def notes(resolved: schema.Resolved, arguments: Sequence[Argument]) -> list[Note]:
    """What a user should know about these arguments."""
    values = {argument.name: argument.value for argument in arguments}
    facts = llmapi_versions.load(resolved.recipe.engine.tensorrt_llm)
    texts = [
        f"These facts come from states of TensorRT-LLM's main branch, not from its releases: {facts.source}.",
        "The served model rejects a prompt longer than max_input_len; the PyTorch backend itself checks only "
        "max_num_tokens and max_seq_len.",
        "The PyTorch backend loads a model's own code without asking "
        f"({EXECUTOR}/model_loader.py); the checkpoint contains none unless you gave --trust-remote-code.",
        *_of_version(facts),
        *_of_asked(facts, arguments),
        *_of_features(values),
    ]
    graphs = "CUDA graphs (up to 200 MB each), " if "cuda_graph_config" not in values else ""
    texts.append(f"The memory estimate does not include {graphs}the autotuner's and NCCL's buffers ({ARGS}).")
    world = resolved.recipe.engine.world_size
    texts.append(RANKS.format(n=world, launch=LAUNCH, ci=CI) if world > 1 else ONE_RANK.format(ci=CI))
    found = [Note("llmapi", text) for text in texts]
    return [*found, *(Note("GPU profile", text) for text in resolved.gpu.notes if "engine.flags" not in text)]


def _of_version(facts: Facts) -> Iterator[str]:
    if not facts.penalties:
        yield (
            f"The sampler of TensorRT-LLM {facts.version} ignores repetition, presence and frequency penalties; the "
            "served model rejects them."
        )
    if facts.images is None:
        yield f"No Triton image with TensorRT-LLM {facts.version} is known: install it for Triton's Python."


def _of_asked(facts: Facts, arguments: Sequence[Argument]) -> Iterator[str]:
    """Notes on arguments that the user set: values that the version may not know, and arguments that it ignores."""
    for argument in arguments:
        if argument.reason != ASKED:
            continue
        spec = facts.arguments.get(argument.name, {})
        if "no_effect" in spec:
            yield f"{argument.name} has no effect in TensorRT-LLM {facts.version}: {spec['no_effect']}."
        elif spec and not facts.certain(argument.name, argument.value):
            yield (
                f"{argument.name}={argument.value} is accepted only by the later of the two states: an early release "
                f"candidate, and perhaps {facts.version}, rejects it when the server starts."
            )


def _of_features(values: Mapping[str, Any]) -> Iterator[str]:
    disabled = values.get("telemetry_config.disabled")
    if disabled:
        yield (
            "Usage data is not sent (TRTLLM_NO_USAGE_STATS=1, telemetry_config.disabled); TensorRT-LLM sends it by "
            "default. To send it: --set llmapi.args.telemetry_config.disabled=false, and TRTLLM_NO_USAGE_STATS=0."
        )
    elif disabled is False:
        yield "Usage data is sent to NVIDIA: telemetry_config.disabled is false (tensorrt_llm/usage/usage_lib.py)."
    if kind := values.get("speculative_config.decoding_type"):
        yield (
            f"Speculative decoding with {kind} needs no draft model. Each sequence reserves KV cache for its draft "
            "tokens, which the estimate does not include."
        )
    if values.get("lora_config.lora_dir"):
        share = values.get("peft_cache_config.device_cache_percent", 0.02)
        yield (
            f"Adapters use {share:.0%} of the GPU memory that is free after loading, besides the KV cache, and 1 GiB "
            "of host memory unless peft_cache_config sets another size. LoRA on NVFP4 layers was not tested: compare "
            "answers."
        )
