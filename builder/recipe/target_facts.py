"""What is known of each target as data, for packages that must not import `builder.targets`.

Code asks for a property ("is there an engine?"), not for a name: a new target is one more row here and one module in
`builder/targets/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class TargetFacts:
    """The properties of a target.

    has_engine: the checkpoint is split into ranks and becomes an engine; otherwise its Hugging Face layout is loaded.
    builds_tensorrt: the engine is made by trtllm-build and runs TensorRT-LLM's kernels.
    needs_gpu: building or serving needs an NVIDIA GPU and the TensorRT-LLM version of the recipe.
    float32: weights and KV cache are float32, and sequences are computed one at a time, so answers do not depend on
        the batch.
    python_model: one Python model serves requests. It returns the logits of a prompt to each request that asks,
        through shared memory, and has no input for biased words.
    served_by, server: what serves it, for a sentence and for a table.
    """

    name: str
    has_engine: bool
    builds_tensorrt: bool
    needs_gpu: bool
    float32: bool
    python_model: bool
    served_by: str
    server: str


ENGINE = TargetFacts(
    name="engine",
    has_engine=True,
    builds_tensorrt=True,
    needs_gpu=True,
    float32=False,
    python_model=False,
    served_by="its TensorRT engine",
    server="TensorRT engine",
)
LLMAPI = TargetFacts(
    name="llmapi",
    has_engine=False,
    builds_tensorrt=False,
    needs_gpu=True,
    float32=False,
    python_model=True,
    served_by="TensorRT-LLM's LLM API, without an engine",
    server="TensorRT-LLM LLM API",
)
REFERENCE = TargetFacts(
    name="reference",
    has_engine=True,
    builds_tensorrt=False,
    needs_gpu=False,
    float32=True,
    python_model=False,
    served_by="the reference executor, not on a GPU",
    server="reference executor, on a CPU",
)
TARGETS: Mapping[str, TargetFacts] = {facts.name: facts for facts in (ENGINE, LLMAPI, REFERENCE)}


def target_facts(name: str) -> TargetFacts:
    """The facts of a target by its name in a recipe or in a repository's facts. KeyError for another name."""
    return TARGETS[name]
