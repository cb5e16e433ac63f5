"""The page about model families, from configs/architectures/."""

from __future__ import annotations

from collections.abc import Iterator

from builder.architectures import catalog
from builder.architectures.facts import Architecture
from docs.generate.markdown import code, say, table, text


def models() -> Iterator[str]:
    """Which target serves which family since when, what was quantized here, and where each fact comes from."""
    yield from say(
        "# Models",
        "From `configs/architectures/`. The engine and reference targets serve a family that has a TensorRT-LLM "
        "layout; `--target llmapi` serves it with TensorRT-LLM's `LLM` class (its PyTorch backend). A version is the "
        "first that serves it. No family was run on a GPU here.",
        "*Quantized* means: a test quantizes a small model of the family with random weights, with ModelOpt on a CPU, "
        "and compares its layers, bytes and excluded modules with what this builder planned. *Planned* means that only "
        "its configuration was looked at.",
    )
    every = sorted(catalog.every(), key=lambda one: not _served(one))
    headers = ("architecture in config.json", "family", "engine", "llmapi", "reference executor", "with ModelOpt")
    yield from table(headers, map(_row, every))
    yield from say(
        "A model of another architecture can be quantized (`builder quantize`, Hugging Face layout) if ModelOpt knows "
        "its layers.",
        "In the unified layout the experts of a mixture are layers of their own (`experts.N.gate_proj`), each with its "
        f"scales{_stacked(every)}. Routers, gates of shared experts, convolutions and the small projections of linear "
        "attention stay in 16 bits, as ModelOpt's exporter leaves them.",
    )
    yield from _multimodal()
    yield from _needs()
    yield from _refused(every)
    yield from say("## Sources")
    yield from table(("family", "facts", "llmapi"), map(_sources, every))


def _served(one: Architecture) -> bool:
    return bool(one.engine or one.llmapi or one.reference)


def _stacked(every: list[Architecture]) -> str:
    """The families whose experts stay stacked, as an exception to the rule."""
    titles = [text(one.title) for one in every if one.experts and not one.experts.apart]
    if not titles:
        return ""
    return (
        f"; those of {' and '.join(titles)} stay stacked, three-dimensional parameters with their scales beside them "
        "(`experts.down_proj_weight_scale`)"
    )


def _row(one: Architecture) -> tuple[str, ...]:
    engine = one.engine.since if one.engine else "no"
    others = ("no" if part is None else part.since or "yes" for part in (one.llmapi, one.reference))
    made = f"quantized ({', '.join(one.quantized_with)})" if one.quantized_with else "planned"
    return code(one.name), text(one.title), engine, *others, made


def _multimodal() -> Iterator[str]:
    yield from say(
        "## Multimodal models",
        "Their language model is taken out, quantized and served alone: the checkpoint is one of the text "
        "architecture, without the vision and audio parts. Others are refused.",
    )
    parts = [
        (code(part.name), code(one.name), part.source) for one in catalog.every() for part in one.language_model_of
    ]
    yield from table(("multimodal architecture", "language model", "source"), [(*p[:2], text(p[2])) for p in parts])


def _needs() -> Iterator[str]:
    yield from say("## What a family needs with llmapi", "The builder sets these by itself.")
    rows = []
    for one in catalog.every():
        part = one.llmapi
        if part and part.needs:
            arguments = ", ".join(code(f"{name}: {str(value).lower()}") for name, value in part.arguments.items())
            rows.append((code(one.name), arguments, ", ".join(map(code, part.unquantized)), text(part.needs)))
    yield from table(("architecture", "arguments", "layers that stay in BF16", "why, and source"), rows)


def _refused(every: list[Architecture]) -> Iterator[str]:
    yield from say("## What is refused")
    rows = []
    for one in every:
        parts = (("engine", one.engine), ("llmapi", one.llmapi))
        refusals = [(target, refusal) for target, part in parts if part for refusal in part.refused]
        rows += [(f"{code(one.name)} with {code(r.key)}", target, text(r.why)) for target, r in refusals]
        if one.not_served:
            rows.append((code(one.name), "all", text(f"{one.not_served.why} ({one.not_served.source})")))
        if one.not_quantized:
            rows.append((code(one.name), "planned only", text(one.not_quantized)))
    yield from table(("architecture", "target", "why"), rows)


def _sources(one: Architecture) -> tuple[str, str, str]:
    return text(one.title), text(one.source), text(one.llmapi.source) if one.llmapi else ""
