"""Sizes that a number format can't store are refused in the plan, with formats that the card and the target take."""

from __future__ import annotations

from pathlib import Path

import pytest

from builder.core.errors import UnsupportedError
from builder.core.output import Output
from builder.core.store import Store
from builder.formats import registry
from builder.preflight import advice
from builder.preflight.prepare import prepare
from builder.recipe import schema
from tests.pipeline.test_plan import dense, sparse

NARROW = dense(2, 576, 9, 3, 64, 1536, 4096)  # SmolLM-135M's widths: 4.5 blocks of 128, and 9 of 64


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse(NARROW, tmp_path_factory.mktemp("sparse") / "narrow")


def asked(model: Path, gpu: str, **more: str) -> schema.Resolved:
    return schema.resolve({"model.id": str(model), "gpu": gpu, "calibration.data": "builtin:python-docs", **more})


@pytest.mark.parametrize("gpu", ["sm80", "sm89"])
@pytest.mark.parametrize("target", ["engine", "llmapi"])
@pytest.mark.parametrize("layouts", [True, False])
def test_the_plan_refuses_them_and_its_advice_is_accepted(
    narrow: Path, tmp_path: Path, gpu: str, target: str, layouts: bool
) -> None:
    store, flags = Store(tmp_path, Output("quiet")), {"target": target, "quantization.format": "int4_awq"}
    with pytest.raises(UnsupportedError, match="input size that is not a multiple of 128, as INT4") as caught:
        prepare(asked(narrow, gpu, **flags), store, layouts=layouts)
    assert "q_proj.weight [576, 576]" in caught.value.why
    typed = advice.settings(caught.value.hint)
    assert typed
    for name in caught.value.hint.rpartition("--format ")[2].split(", "):
        prepare(asked(narrow, gpu, **{**flags, "quantization.format": name}), store, layouts=layouts)


def test_the_default_of_the_card_is_refused_too(narrow: Path, tmp_path: Path) -> None:
    store = Store(tmp_path, Output("quiet"))
    with pytest.raises(UnsupportedError, match="not a multiple of 128") as caught:
        prepare(asked(narrow, "sm80", target="engine"), store)
    assert "nvfp4" not in caught.value.hint  # which fits, and which no sm80 runs
    kept = asked(narrow, "sm80", target="engine", **{"quantization.keep_bf16": "*_proj"})
    with pytest.raises(UnsupportedError, match="nothing is left to quantize"):
        prepare(kept, store)
    rest = ("*.self_attn.*", "*.gate_proj", "*.up_proj")
    prepared = prepare(asked(narrow, "sm80", target="engine", **{"quantization.keep_bf16": rest}), store)
    assert len(prepared.model.modules("bf16")) == 12


def test_odd_outputs_have_a_reason_of_their_own() -> None:
    one = registry.get("int4_awq")
    assert "odd output size" in one.misfit((575, 128))
    assert "not a multiple of 128" in one.misfit((575, 576))
    assert one.fits((576, 128))
