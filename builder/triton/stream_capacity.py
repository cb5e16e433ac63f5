"""How many streams an engine's repository carries at once, and how much host memory that takes.

A process of tensorrt_llm_bls carries many streams, each in a thread. With 32 clients at 40 ms per token it took 39 to
46 MiB and 19 CPU-ms per request of 64 tokens, and the server 15 (Triton 24.10, two cores that were busy with other
work). 32 processes of one stream each, as here before, took 768 MB, 28 CPU-ms and 23. On two idle cores and at 20 ms
per token (benchmarks/gateway.py, docs/guides/gateway.md), 32 streams reached 0.99 of the engine's rate, with a median
time to the first token of 35 ms; 128 streams reached 0.98, with 84 ms.
"""

from __future__ import annotations

from builder.recipe import schema

# Requests beyond max_batch_size wait in the engine, whose scheduler knows best what fits. A thread takes about 60 KB.
THREADS_PER_ROW, MAX_THREADS = 2, 512
# The proportional set size of a process (smaps_rollup) is 38 MB with a vocabulary of 4,096 tokens, 43 with 151,936 and
# 43 with 262,144, measured with Triton 24.10 (benchmarks/gateway.py). The processes share libraries but not the tokens.
INSTANCE_BYTES = 38 << 20
INSTANCE_BYTES_PER_TOKEN = 35


def threads(max_batch_size: int) -> int:
    """The number of requests that one process answers at once."""
    return min(THREADS_PER_ROW * max_batch_size, MAX_THREADS)


def streams(part: schema.Repository, max_batch_size: int) -> int:
    """The number of streams that run at once: the engine's max_batch_size, unless the processes have fewer threads."""
    return min(max_batch_size, part.bls_instances * threads(max_batch_size))


def memory(count: int, vocab_size: int) -> int:
    """The approximate host memory of `count` processes, in bytes."""
    return count * (INSTANCE_BYTES + INSTANCE_BYTES_PER_TOKEN * vocab_size)


def explain(part: schema.Repository, max_batch_size: int) -> str:
    """Where the number of streams comes from, for the plan."""
    if streams(part, max_batch_size) == max_batch_size:
        return f"max_batch_size {max_batch_size}"
    return f"{MAX_THREADS} for each of repository.bls_instances, {part.bls_instances}"
