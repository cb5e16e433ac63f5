"""Whether several models fit on one card beside each other, whichever of them is loaded first. Pure.

TensorRT-LLM takes kv_cache_free_gpu_mem_fraction of the memory that is free when it allocates a model's KV cache, and
before that lora_cache_gpu_memory_fraction for LoRA adapters, if the engine takes any.
Triton loads models at the same time, so a model may find the card empty or full: both are taken into account.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from builder.core.errors import UnsupportedError
from builder.core.output import size

USABLE = 0.95  # of a card, for suggestions: contexts and the driver take some, how much was not measured here


@dataclass(frozen=True)
class Share:
    """What a model takes of a card, in bytes. weights: with the workspace. sequence: the KV cache of one sequence of
    max_seq_len. fraction: kv_cache_free_gpu_mem_fraction; None if the KV cache takes what it needs (a CPU).
    adapter_fraction: the same for LoRA adapters; adapter: the largest one."""

    name: str
    weights: int
    sequence: int
    fraction: float | None
    adapter_fraction: float = 0.0
    adapter: int = 0

    def most(self, memory: int) -> int:
        """The largest KV cache, that of a model which is loaded first."""
        return self.least(memory, 0) if self.fraction is not None else self.sequence

    def least(self, memory: int, others: int) -> int:
        """The smallest KV cache, that of a model which is loaded last and finds `others` bytes taken."""
        left = memory - self.weights - others
        return left if self.fraction is None else int(self.fraction * (left - self.adapters(memory, others)))

    def adapters(self, memory: int, others: int = 0) -> int:
        """The memory for LoRA adapters of a model that finds `others` bytes taken."""
        return int(self.adapter_fraction * (memory - self.weights - others))

    def taken(self, memory: int) -> int:
        """All that a model takes which is loaded first."""
        return self.weights + self.adapters(memory) + self.most(memory)


def check(cards: Mapping[str, tuple[int, Sequence[Share]]], hint: str = "") -> None:
    """UnsupportedError if the models fit together on none of these cards: {card: (bytes, what each model takes)}.

    hint: what to do then; by default the options of `builder combine` that help.
    """
    if not cards or any(not problem(memory, shares) for memory, shares in cards.values()):
        return
    card, (memory, shares) = max(cards.items(), key=lambda item: item[1][0])
    raise UnsupportedError(
        f"The {len(shares)} models do not fit beside each other on {card} ({size(memory)}).",
        why="\n".join([problem(memory, shares), *(explain(share, memory) for share in shares)]),
        hint=hint or _options(memory, shares),
    )


def _options(memory: int, shares: Sequence[Share]) -> str:
    if better := suggested(memory, shares):
        typed = " ".join(f"--kv-fraction {name}={fraction:g}" for name, fraction in better.items())
        return f"Divide the memory with `builder combine`: {typed}"
    return "Serve one of them on another card, or build it with a smaller --max-seq-len, --max-batch-size or --format."


def problem(memory: int, shares: Sequence[Share]) -> str:
    """Why these models do not fit together; "" if they do."""
    taken = sum(share.taken(memory) for share in shares)
    if taken > memory:
        return f"Together they may take {size(taken)}."
    for share in shares:
        others = sum(other.taken(memory) for other in shares if other is not share)
        if (least := share.least(memory, others)) < share.sequence:
            return f"{share.name} may get {size(max(least, 0))} of KV cache; one sequence needs {size(share.sequence)}."
        if (room := share.adapters(memory, others)) < share.adapter:
            return f"{share.name} may get {size(max(room, 0))} for LoRA adapters; one takes {size(share.adapter)}."
    return ""


def explain(share: Share, memory: int) -> str:
    """One line on what a model takes."""
    cache = f"up to {size(share.most(memory))} of KV cache"
    if share.fraction is not None:
        cache += f" (kv_cache_free_gpu_mem_fraction {share.fraction:g})"
    adapters = f"up to {size(share.adapters(memory))} for LoRA adapters, " if share.adapter_fraction else ""
    return f"{share.name}: {size(share.weights)} of weights and workspace, {adapters}{cache}"


def suggested(memory: int, shares: Sequence[Share]) -> dict[str, float]:
    """Equal fractions with which the models fit; none if there are none."""
    if any(share.fraction is None for share in shares):
        return {}
    free = sum(memory - share.weights - share.adapters(memory) for share in shares)
    rest = USABLE * memory - sum(share.weights + share.adapters(memory) for share in shares)
    fraction = int(100 * rest / free) / 100 if free > 0 else 0.0
    equal = [replace(share, fraction=fraction) for share in shares]
    return {share.name: fraction for share in shares} if fraction > 0 and not problem(memory, equal) else {}
