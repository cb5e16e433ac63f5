"""Whether several models fit on one card beside each other, whichever of them is loaded first, and with which fractions
they do. Pure.

TensorRT-LLM takes kv_cache_free_gpu_mem_fraction of the memory that is free when it allocates a model's KV cache, and
before that lora_cache_gpu_memory_fraction for LoRA adapters, if the engine takes any.
Triton loads models at the same time, so a model may find the card empty or full: both are taken into account.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from builder.core.errors import UnsupportedError
from builder.core.output import size

USABLE = 0.95  # of a card, for suggestions: contexts and the driver take some, how much was not measured here
STEPS = 50  # between the largest fractions and the smallest that are tried
MILLE = 1000  # fractions are suggested in thousandths


@dataclass(frozen=True)
class Share:
    """What a model takes of a card, in bytes. sequence: the KV cache of one sequence of max_seq_len. fraction:
    kv_cache_free_gpu_mem_fraction; None if the KV cache takes what it needs (a CPU). adapter_fraction: the same for
    LoRA adapters; adapter: the largest one."""

    name: str
    weights: int
    sequence: int
    fraction: float | None
    adapter_fraction: float = 0.0
    adapter: int = 0
    workspace: int = 0

    @property
    def held(self) -> int:
        """What it takes before its caches."""
        return self.weights + self.workspace

    def most(self, memory: int) -> int:
        """The largest KV cache, that of a model which is loaded first."""
        return self.least(memory, 0) if self.fraction is not None else self.sequence

    def least(self, memory: int, others: int) -> int:
        """The smallest KV cache, that of a model which is loaded last and finds `others` bytes taken."""
        left = memory - self.held - others
        return left if self.fraction is None else int(self.fraction * (left - self.adapters(memory, others)))

    def adapters(self, memory: int, others: int = 0) -> int:
        """The memory for LoRA adapters of a model that finds `others` bytes taken."""
        return int(self.adapter_fraction * (memory - self.held - others))

    def taken(self, memory: int) -> int:
        """All that a model takes which is loaded first."""
        return self.held + self.adapters(memory) + self.most(memory)


def check(cards: Mapping[str, tuple[int, Sequence[Share]]], hint: str = "") -> None:
    """UnsupportedError if the models fit together on none of these cards: {card: (bytes, what each model takes)}.

    hint: what to do then; by default the options of `builder combine` that help.
    """
    if not cards or any(not problem(memory, shares) for memory, shares in cards.values()):
        return
    card, (memory, shares) = max(cards.items(), key=lambda item: item[1][0])
    raise refusal(card, memory, shares, hint or _options(memory, shares))


def refusal(card: str, memory: int, shares: Sequence[Share], hint: str) -> UnsupportedError:
    """The error for models that do not fit on a card."""
    return UnsupportedError(
        f"The {len(shares)} models do not fit beside each other on {card} ({size(memory)}).",
        why="\n".join([problem(memory, shares), *(explain(share, memory) for share in shares)]),
        hint=hint,
    )


def _options(memory: int, shares: Sequence[Share]) -> str:
    if better := suggested(memory, shares):
        return f"Divide the memory with `builder combine`: {typed(better)}"
    return "Serve one of them on another card, or build it with a smaller --max-seq-len, --max-batch-size or --format."


def typed(fractions: Mapping[str, float]) -> str:
    """The options of `builder combine` and `builder plan` for these fractions."""
    return " ".join(f"--kv-fraction {name}={fraction:g}" for name, fraction in fractions.items())


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
    return f"{share.name}: {size(share.held)} of weights and workspace, {adapters}{cache}"


def suggested(memory: int, shares: Sequence[Share], fixed: Collection[str] = ()) -> dict[str, float]:
    """Fractions with which the models fit: equal ones, or more for a model that needs more. Empty if there are none.

    fixed: models that keep theirs.
    """
    if any(share.fraction is None for share in shares):
        return {}
    smallest = _smallest(memory, shares, fixed)
    if smallest is None:
        return {}
    equal = _equal(memory, smallest, fixed)
    for step in range(STEPS, -1, -1):
        tried = [share if share.name in fixed else _grown(share, equal, step / STEPS) for share in smallest]
        if sum(share.taken(memory) for share in tried) <= USABLE * memory and not problem(memory, tried):
            return {share.name: share.fraction for share in tried if share.fraction is not None}
    return {}


def _smallest(memory: int, shares: Sequence[Share], fixed: Collection[str]) -> list[Share] | None:
    """The shares with the smallest fractions that give each model a sequence beside the others; None if there are none.

    A larger fraction of one model leaves less to the others, so each is only ever raised, until all have enough.
    """
    found = [share if share.name in fixed else replace(share, fraction=1 / MILLE) for share in shares]
    while True:
        before = list(found)
        for n, share in enumerate(found):
            others = sum(other.taken(memory) for other in found if other.name != share.name)
            if share.name not in fixed and share.least(memory, others) < share.sequence:
                raised = _raised(share, memory, others)
                if raised is None:
                    return None
                found[n] = raised
        if found == before:
            return found


def _raised(share: Share, memory: int, others: int) -> Share | None:
    """With the next fraction in thousandths that gives it a sequence; None if none does."""
    left = memory - share.held - others - share.adapters(memory, others)
    number = math.ceil(MILLE * share.sequence / left) if left > 0 else MILLE
    for mille in (number, number + 1):  # the second where the bytes were rounded
        raised = replace(share, fraction=mille / MILLE)
        if mille < MILLE and raised.least(memory, others) >= share.sequence:
            return raised
    return None


def _equal(memory: int, shares: Sequence[Share], fixed: Collection[str]) -> float:
    """The fraction with which all models but the fixed ones take what the card has."""
    free = sum(memory - share.held - share.adapters(memory) for share in shares if share.name not in fixed)
    taken = sum(share.held + share.adapters(memory) for share in shares)
    taken += sum(share.most(memory) for share in shares if share.name in fixed)
    return (USABLE * memory - taken) / free if free > 0 else 0.0


def _grown(share: Share, equal: float, part: float) -> Share:
    """With a fraction this far from the smallest to the equal one, which is not smaller; in hundredths."""
    smallest = share.fraction or 0.0
    wanted = math.floor(100 * (smallest + part * max(0.0, equal - smallest))) / 100
    return replace(share, fraction=max(smallest, wanted))
