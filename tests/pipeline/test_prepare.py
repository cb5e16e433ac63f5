"""What follows from a recipe and its model is computed once per command."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builder import pipeline, plan
from builder.core.output import Output
from builder.core.store import Store
from builder.hub import snapshot
from builder.preflight import checks
from builder.preflight.prepare import prepare
from builder.recipe import schema
from builder.trtllm import flags

MODEL = Path(__file__).parents[1] / "data" / "tiny-qwen3"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of these was called, with what it was called for."""
    found: Counter[str] = Counter()

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            found[f"{name} {Path(args[0]).name}" if name == "header" else name] += 1
            return real(*args, **kwargs)

        return call

    for name, module, attribute in (
        ("resolve", flags, "resolve"),
        ("header", snapshot, "read_header"),
        ("check", checks, "check_model"),
    ):
        monkeypatch.setattr(module, attribute, counted(name, getattr(module, attribute)))
    return found


def asked(**more: Any) -> schema.Resolved:
    values = {"calibration.samples": 4, "calibration.seq_len": 32, "quality.check": False, **more}
    return schema.resolve({"model.id": str(MODEL), "gpu": "cpu", **values})


def once(calls: Counter[str]) -> bool:
    shards = {f"header {path.name}": 1 for path in MODEL.glob("*.safetensors")}
    return calls == Counter({"resolve": 1, "check": 1, **shards})


def test_a_cached_build_and_a_cached_plan_resolve_flags_and_read_headers_once(
    tmp_path: Path, calls: Counter[str]
) -> None:
    pipeline.build(asked(), Store(tmp_path, Output("quiet")), until="repository")
    assert once(calls)  # the first build too
    calls.clear()
    pipeline.build(asked(), Store(tmp_path, Output("quiet")), until="repository")
    assert once(calls)
    calls.clear()
    found = plan.plan(asked(), Store(tmp_path, Output("quiet"), dry=True))
    states = {stage: state for stage, state, _ in found.stages}
    assert {states.pop(stage) for stage in ("snapshot", "calibration", "checkpoint", "engine", "repository")} == {
        "cached"
    }
    assert states == {"quality": "skipped", "smoke": "will run"}
    assert once(calls)


def test_a_plan_with_a_gate_and_a_quality_check_prepares_once_too(tmp_path: Path, calls: Counter[str]) -> None:
    for more in ({"quality.check": True}, {"evaluation.min_score": 90.0}):
        calls.clear()
        plan.plan(asked(**more), Store(tmp_path, Output("quiet"), dry=True))
        assert once(calls)


def test_an_unquantized_build_says_that_nothing_is_quantized(tmp_path: Path) -> None:
    """It is neither "quantized already" nor left unchecked by a flag."""
    resolved = asked(**{"quantization.format": "bf16", "quantization.kv_cache_dtype": "auto", "quality.check": True})
    store = Store(tmp_path, Output("quiet"))
    prepared = prepare(resolved, store)
    assert (prepared.why_not_calibrated, prepared.why_not_checked) == (("nothing is quantized",) * 2)
    built = pipeline.build(resolved, store, until="repository")
    assert built.verdict is not None
    assert built.verdict.reasons == ("nothing is quantized",)
    quantized = prepare(asked(), store)
    assert (quantized.why_not_calibrated, quantized.why_not_checked) == ("", "--no-quality-check")


def test_what_is_prepared_is_what_the_stages_get(tmp_path: Path) -> None:
    prepared = prepare(asked(**{"quantization.keep_bf16": "*.0.*.o_proj"}), Store(tmp_path, Output("quiet")))
    assert prepared.model.modules("bf16") == ("model.layers.0.self_attn.o_proj",)
    assert prepared.serving.target == "reference"
    more = prepared.with_chosen(["model.layers.1.self_attn.o_proj"])
    assert len(more.model.modules("bf16")) == 2
    assert more.sizes.unified > prepared.sizes.unified
    assert more.settings is prepared.settings
