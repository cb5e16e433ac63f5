"""Whether calibration saw enough: the thresholds, and the sentences for what fell short. Pure; the build and the report
both use it.

`facts` are those of a checkpoint: `coverage`, made by `of_batches`, and `experts`, from builder/quantize/experts.py.
Checkpoints from which nothing was calibrated, or that were made before these existed, have neither.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from builder.calibration.rows import FEW_ROWS, MIN_TOKENS

# A range read from N tokens leaves out 1 of N + 1 further ones of the same kind: that is the chance that one of N + 1
# exchangeable values is the largest. 256 tokens leave 0.4 % of an expert's inputs to be clipped. Measured on the
# bundled model's 18 MLP inputs (13,000 tokens of builtin:python-docs-text, random samples): 0.4 % with 256 tokens,
# 1.5 % with 64.
EXPERT_TOKENS = 256
# Most rows cut, and at fewer tokens than ModelOpt's own examples take (hf_ptq.py, --calib_seq 512): the ranges come
# from the beginnings of texts alone.
MOST_CUT, SHORT = 0.5, 512
NAMED = 3  # layers that a sentence names


def shortfalls(facts: Mapping[str, Any]) -> list[str]:
    """What calibration covered too little, a sentence each; [] if nothing, or if nothing was read from rows."""
    coverage: Mapping[str, Any] = facts.get("coverage") or {}
    if not coverage:
        return []
    few = experts_few(facts.get("experts") or {}, all_tokens=facts.get("experts_see_all", False))
    return [*_texts(coverage), *few]


def _texts(coverage: Mapping[str, Any]) -> list[str]:
    rows, tokens, cut = coverage["rows"], coverage["tokens"], coverage["cut"]
    found = []
    if rows < FEW_ROWS:
        found.append(f"only {rows} rows of text, where at least {FEW_ROWS} are advised")
    if tokens < MIN_TOKENS:
        found.append(f"only {tokens:,} tokens, where at least {MIN_TOKENS:,} are advised")
    if cut > MOST_CUT * rows and coverage["limit"] < SHORT:
        found.append(f"{cut} of {rows} rows were cut at {coverage['limit']:,} tokens (--calib-seq-len)")
    return found


def experts_few(experts: Mapping[str, Sequence[int]], *, all_tokens: bool = False) -> list[str]:
    """A sentence on the experts that fewer than EXPERT_TOKENS tokens were routed to.

    experts: {module that holds the experts: tokens of each}. all_tokens: every expert's ranges were read from all
    tokens, whatever the routing.
    """
    few = {layer: len(rare(tokens)) for layer, tokens in experts.items() if rare(tokens)}
    if not few or all_tokens:
        return []
    worst = sorted(few, key=lambda layer: -few[layer])[:NAMED]
    named = ", ".join(f"{few[layer]} of {len(experts[layer])} experts of {layer}" for layer in worst)
    more = f" and those of {len(few) - NAMED} more layers" if len(few) > NAMED else ""
    return [f"{named}{more} saw fewer than {EXPERT_TOKENS} tokens"]


def rare(tokens: Sequence[int]) -> list[int]:
    """The experts, by their numbers, that saw fewer than EXPERT_TOKENS tokens."""
    return [index for index, seen in enumerate(tokens) if seen < EXPERT_TOKENS]


def of_batches(batches: Sequence[Any], limit: int) -> dict[str, int]:
    """The `coverage` of batches of token ids, each [rows, tokens], cut at `limit` tokens. A row that reaches the limit
    counts as cut."""
    return {
        "rows": sum(len(batch) for batch in batches),
        "tokens": sum(batch.numel() for batch in batches),
        "cut": sum(len(batch) for batch in batches if batch.shape[1] >= limit),
        "limit": limit,
    }


def summary(facts: Mapping[str, Any]) -> str:
    """One line on what calibration saw, with the tokens of the least used expert. "" if the checkpoint was not
    calibrated."""
    coverage = facts.get("coverage")
    if not coverage:
        return ""
    line = f"{coverage['rows']} rows, {coverage['tokens']:,} tokens"
    experts: Mapping[str, Sequence[int]] = facts.get("experts") or {}
    if not experts:
        return line
    sizes = sorted({len(tokens) for tokens in experts.values()})
    least = min(min(tokens) for tokens in experts.values())
    each = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
    plural = "s" * (len(experts) != 1)
    return f"{line}; {each} experts in {len(experts)} layer{plural}, the least used saw {least:,} tokens"
