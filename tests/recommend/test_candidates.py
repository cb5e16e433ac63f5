"""Which recipes `builder recommend` tries, and in which order. Nothing is built."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from builder.core.errors import UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.formats.algorithms import ALGORITHMS
from builder.recipe import schema
from builder.recommend.candidates import SAME, Candidate, Listed, list_candidates, title, with_kept
from builder.recommend.request import varied

TINY = str(Path(__file__).parents[1] / "data" / "tiny-qwen3")


def listed(tmp_path: Path, **more: Any) -> Listed:
    flags = {key.replace("__", "."): value for key, value in more.items()}
    user = schema.resolve({"model.id": TINY, "evaluation.max_kl": 0.1, **flags})
    return list_candidates(varied(user), Store(tmp_path / "none", Output("quiet"), dry=True))


def labels(found: Listed) -> list[str]:
    return [title(one.settings, searches=one.searches) for one in found.candidates]


def formats(found: Listed) -> list[str]:
    return list(dict.fromkeys(one.settings.format for one in found.candidates))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"gpu": "sm120"}, ["nvfp4", "fp8", "bf16"]),
        ({"gpu": "sm120", "target": "llmapi"}, ["nvfp4", "fp8", "bf16"]),
        (
            {"gpu": "sm120", "target": "llmapi", "engine__tensorrt_llm": "1.3.0rc26"},
            ["nvfp4", "w4a16_nvfp4", "fp8", "bf16"],
        ),
        ({"gpu": "sm89"}, ["fp8", "bf16"]),
        ({"gpu": "cpu"}, ["nvfp4", "w4a16_nvfp4", "fp8", "bf16"]),
    ],
)
def test_only_what_the_gpu_and_the_target_serve(tmp_path: Path, more: dict[str, Any], expected: list[str]) -> None:
    try:
        found = listed(tmp_path, **more)
    except UsageError as error:  # a version without a row
        pytest.skip(error.what)
    assert formats(found) == expected


def test_the_order_is_bytes_then_the_cards_preference_then_time(tmp_path: Path) -> None:
    found = listed(tmp_path, gpu="cpu").candidates
    assert labels(listed(tmp_path, gpu="cpu"))[:9] == [
        *(title(one.settings) for one in found[:8]),
        "nvfp4 gptq, KV fp8, some layers in FP8",
    ]
    assert [one.settings.format for one in found[:8]] == ["nvfp4"] * 4 + ["w4a16_nvfp4"] * 4
    assert [one.settings.algorithm for one in found[:8]] == 2 * list(ALGORITHMS)
    plain = [one for one in found if not one.searches]
    assert all(later.nbytes * SAME > earlier.nbytes for earlier, later in pairwise(plain))
    assert found[-1].exact


def test_bytes_are_those_of_the_plan(tmp_path: Path) -> None:
    """Of the layout that is served, and of the cache of one sequence: 6 layers x 2 x 2 heads x 64 values x 2048."""
    [first, *_] = listed(tmp_path, gpu="cpu").candidates
    assert first.weights == first.prepared.sizes.checkpoint
    assert first.cache == 2048 * first.prepared.serving.cache.nbytes(6 * 2 * 2 * 64)
    [unified, *_] = listed(tmp_path, gpu="sm120", target="llmapi").candidates
    assert unified.weights == unified.prepared.sizes.unified


def test_what_the_user_named_is_not_varied(tmp_path: Path) -> None:
    one = listed(tmp_path, gpu="cpu", quantization__format="nvfp4", quantization__kv_cache_dtype="auto",
                 quantization__algorithm="hessian", quantization__keep_bf16="*.layers.0.*")  # fmt: skip
    assert labels(one) == ["nvfp4 hessian, KV auto", "nvfp4 hessian, KV auto, some layers in FP8"]
    [plain, _] = one.candidates
    assert len(plain.prepared.model.modules("bf16")) == 7
    algorithm = listed(tmp_path, gpu="cpu", quantization__algorithm="mse").candidates
    assert {(found.settings.format, found.settings.algorithm) for found in algorithm} == {
        ("nvfp4", "mse"), ("w4a16_nvfp4", "mse"), ("fp8", "max"), ("bf16", "max"),
    }  # fmt: skip


def test_without_rows_no_algorithm_reads_any(tmp_path: Path) -> None:
    found = listed(tmp_path, gpu="cpu", calibration__samples=0).candidates
    assert {one.settings.algorithm for one in found} == {"max", "mse"}


def test_a_rotation_comes_after_the_same_without_it(tmp_path: Path) -> None:
    """So it is recommended only where what costs as much without it was measured and failed."""
    found = labels(listed(tmp_path, gpu="cpu", transform__name="spinquant", quantization__format="nvfp4",
                          quantization__kv_cache_dtype="fp8"))  # fmt: skip
    assert found == [
        "nvfp4, KV fp8", "nvfp4 mse, KV fp8", "nvfp4 hessian, KV fp8", "nvfp4 gptq, KV fp8",
        "nvfp4, KV fp8, rotated", "nvfp4 mse, KV fp8, rotated", "nvfp4 hessian, KV fp8, rotated",
        "nvfp4 gptq, KV fp8, rotated",
        "nvfp4 gptq, KV fp8, some layers in FP8", "nvfp4 gptq, KV fp8, rotated, some layers in FP8",
    ]  # fmt: skip
    assert not any("rotated" in one for one in labels(listed(tmp_path, gpu="cpu")))


def test_kept_layers_join_those_of_the_user(tmp_path: Path) -> None:
    user = schema.resolve({"model.id": TINY, "gpu": "cpu", "evaluation.max_kl": 0.1, "quantization.format": "nvfp4",
                           "quantization.keep_fp8": "*.layers.0.*"})  # fmt: skip
    store = Store(tmp_path / "none", Output("quiet"), dry=True)
    base = varied(user)
    one: Candidate = list_candidates(base, store).candidates[0]
    more = with_kept(one, base, ["model.layers.1.mlp.down_proj"], store)
    assert len(one.prepared.model.modules("fp8")) == 7
    assert len(more.prepared.model.modules("fp8")) == 8
    assert more.nbytes > one.nbytes
    assert title(more.settings) == "nvfp4, KV fp8, 1 layer in FP8"


def test_what_nothing_serves_is_refused(tmp_path: Path) -> None:
    with pytest.raises((UnsupportedError, UsageError), match=r"int8|INT8"):
        listed(tmp_path, gpu="sm120", quantization__format="int8_dynamic")
