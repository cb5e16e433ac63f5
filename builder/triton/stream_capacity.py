"""How many streams a repository of the engine layout carries at once, and what that costs.

Each instance of tensorrt_llm_bls is a process that carries one stream; a client more waits for one to end. With 32
clients at 40 ms a token and answers of 32 tokens, the median time to the first token was 9.4 s with 4 instances and
0.10 s with 32 (`builder bench`, Triton 24.10; 32 instances take 10 s longer to start on two cores).
"""

from __future__ import annotations

from builder.recipe import schema

MOST = 32  # by default; --set repository.bls_instances=N for more
# Proportional set size of one instance that streams (smaps_rollup), measured with Triton 24.10: 24.1 MiB with a
# vocabulary of 4,096 tokens, 52.8 MiB with one of 49,152. Processes share libraries, and not the tokenizer.
INSTANCE_BYTES = 22 << 20
INSTANCE_BYTES_OF_TOKEN = 670


def at_once(part: schema.Repository, max_batch_size: int) -> int:
    """The instances of tensorrt_llm_bls: as many as the engine has places, unless the recipe says how many."""
    return part.bls_instances or min(max_batch_size, MOST)


def memory(instances: int, vocab_size: int) -> int:
    """Bytes of host memory that the instances take, about."""
    return instances * (INSTANCE_BYTES + INSTANCE_BYTES_OF_TOKEN * vocab_size)


def explain(part: schema.Repository, max_batch_size: int) -> str:
    """Where the number comes from, for the plan."""
    if part.bls_instances:
        return "repository.bls_instances"
    return f"max_batch_size {max_batch_size}" + (f", at most {MOST}" if max_batch_size > MOST else "")
