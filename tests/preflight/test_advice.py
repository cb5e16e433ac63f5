"""The advice of a refusal leads on: what it says to type is typed, until the recipe is accepted or the advice ends."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from model_configs import QWEN3_8B

from builder.architectures import catalog
from builder.core.errors import BuilderError, UnsupportedError, UsageError
from builder.formats import registry
from builder.llmapi.versions import read as llmapi_facts
from builder.machine import gpus
from builder.preflight import advice, checks
from builder.recipe import schema
from builder.targets.base import Inputs
from builder.trtllm.versions import versions as engine_versions

STOP = re.compile(r"`builder quantize([^`]*)`")
ENDS = re.compile(r"another model|one of these models|ends here", re.IGNORECASE)
VERSIONS = sorted({*engine_versions(), *(one[end] for one in llmapi_facts()["versions"] for end in ("first", "last"))})
SIZES = {**QWEN3_8B, "dtype": "bfloat16", "rope_theta": 1000000.0, "vocab_size": 151936, "rms_norm_eps": 1e-6,
         "hidden_act": "silu"}  # fmt: skip
CARDS = ("cpu", "sm80", "sm89", "sm100", "sm103", "sm120")  # a kind of refusal each
RELEASES = ("1.1.0", "1.2.1", "1.3.0rc22")
# An engine; the LLM API in both ranges of versions, and with a refused key; none; one that nothing is known of.
KINDS = ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "Cohere2ForCausalLM", "GraniteForCausalLM", "UnknownForCausalLM")


def accepted(
    flags: Mapping[str, Any], config: Mapping[str, Any], *, only_quantize: bool = False
) -> BuilderError | None:
    """The refusal of this recipe for a model with this config.json; None if it is accepted."""
    try:
        resolved = schema.resolve(
            {"model.id": "somebody/something", "calibration.data": "builtin:python-docs", **flags}
        )
        checks.check_model(Inputs(resolved, config, {}), layouts=not only_quantize)
    except (UnsupportedError, UsageError) as error:
        return error
    return None


def follow(flags: dict[str, Any], config: Mapping[str, Any]) -> str:
    """Types what the refusal of this recipe says, and returns what it was; "" if there is none. AssertionError if the
    advice leads into another refusal, or if there is none and the message does not say that it ends there."""
    error = accepted(flags, config)
    if error is None:
        return ""
    text = f"{error.what} -> {error.hint}"
    if settings := advice.settings(error.hint):
        refusal = accepted({**flags, **settings}, config)
        assert refusal is None, f"{text}, and then: {refusal}"
        for part in advice.ALTERNATIVES.split(STOP.sub("", error.hint)):
            refusal = accepted({**flags, **advice.settings(part)}, config) if advice.settings(part) else None
            assert refusal is None, f"{text}, and with {part!r}: {refusal}"
        return text
    stop = STOP.search(error.hint)
    if stop:
        refusal = accepted({**flags, **advice.settings(stop[1])}, config, only_quantize=True)
        assert refusal is None, f"{text}, and then: {refusal}"
    assert stop or ENDS.search(error.hint), f"no way on: {text}"
    return text


def starts(cards: Sequence[str] = CARDS, versions: Sequence[str] = RELEASES) -> Iterator[dict[str, str]]:
    """Each target with these cards and versions."""
    for gpu in cards:
        for target in ("engine", "llmapi", "reference"):
            for version in versions:
                yield {"gpu": gpu, "target": target, "engine.tensorrt_llm": version}


@pytest.mark.parametrize("name", KINDS)
def test_following_the_advice_ends_well(name: str) -> None:
    for flags in starts():
        follow(flags, {**SIZES, "architectures": [name]})


@pytest.mark.slow
@pytest.mark.parametrize("name", [one.name for one in catalog.every()])
def test_following_the_advice_ends_well_for_every_family_card_and_version(name: str) -> None:
    for flags in starts(gpus.names(), VERSIONS):
        follow(flags, {**SIZES, "architectures": [name]})


@pytest.mark.parametrize("number_format", [one.name for one in registry.for_tensorrt_llm()])
def test_advice_about_formats_and_caches_ends_well(number_format: str) -> None:
    for flags in starts(versions=("1.2.1",)):
        for cache in ("fp8", "auto"):
            for config in (SIZES, {**SIZES, "architectures": ["Gemma3ForCausalLM"], "head_dim": 256}):
                asked = {"quantization.format": number_format, "quantization.kv_cache_dtype": cache}
                follow({**flags, **asked}, config)


def test_what_the_test_reads_in_a_hint() -> None:
    assert advice.settings("--kv-cache-dtype auto, or a card of another architecture.") == {
        "quantization.kv_cache_dtype": "auto"
    }
    assert advice.settings("Without an engine: --gpu sm120 --target llmapi --set engine.tensorrt_llm=1.3.0rc22.") == {
        "gpu": "sm120", "target": "llmapi", "engine.tensorrt_llm": "1.3.0rc22",
    }  # fmt: skip
    assert advice.settings("Take another model.") == {}
    assert advice.settings("Use another model or, if --tp is the cause, a smaller --tp.") == {}
    assert advice.settings("Give the original model, with --format and one of nvfp4, fp8.") == {}


def test_a_chain_that_needs_two_steps() -> None:
    """A version too old for the LLM API, and for the family: the advice is what both need."""
    flags = {"gpu": "sm120", "target": "llmapi", "engine.tensorrt_llm": "1.1.0"}
    said = follow(flags, {**SIZES, "architectures": ["Cohere2ForCausalLM"]})
    assert said.endswith("-> All of these together: --set engine.tensorrt_llm=1.3.0rc22")
