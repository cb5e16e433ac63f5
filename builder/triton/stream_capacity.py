"""How many concurrent streams an engine's repository supports, and how much host memory that takes.

Each instance of tensorrt_llm_bls is a process that carries one stream. Further streams wait until one ends. At a
concurrency of 32, with 40 ms per token and answers of 32 tokens, the median TTFT was 9.4 s with 4 instances and 0.10 s
with 32 (`builder bench`, Triton 24.10). On two cores, 32 instances take 10 s longer to start.
"""

from __future__ import annotations

from builder.recipe import schema

MAX_BY_DEFAULT = 32  # --set repository.bls_instances=N for more
# The proportional set size of a streaming instance (smaps_rollup) is 24.1 MiB with a vocabulary of 4,096 tokens and
# 52.8 MiB with 49,152, measured with Triton 24.10. The processes share libraries but not the tokenizer.
INSTANCE_BYTES = 22 << 20
INSTANCE_BYTES_PER_TOKEN = 670


def instances(part: schema.Repository, max_batch_size: int) -> int:
    """The number of tensorrt_llm_bls instances: the recipe's, or max_batch_size up to MAX_BY_DEFAULT."""
    return part.bls_instances or min(max_batch_size, MAX_BY_DEFAULT)


def memory(count: int, vocab_size: int) -> int:
    """The approximate host memory of `count` instances, in bytes."""
    return count * (INSTANCE_BYTES + INSTANCE_BYTES_PER_TOKEN * vocab_size)


def explain(part: schema.Repository, max_batch_size: int) -> str:
    """Where the number of instances comes from, for the plan."""
    if part.bls_instances:
        return "repository.bls_instances"
    return f"max_batch_size {max_batch_size}" + (
        f", at most {MAX_BY_DEFAULT}" if max_batch_size > MAX_BY_DEFAULT else ""
    )
