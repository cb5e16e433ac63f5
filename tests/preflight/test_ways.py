"""Which way a model is quantized in: by what fits, by what the recipe says, and never one that can't be taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.core.errors import UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.formats import registry
from builder.pipeline import measure_layers
from builder.preflight import memory, rounding, ways
from builder.preflight.better_algorithm import better_algorithm
from builder.preflight.memory import Machine
from builder.preflight.model_facts import ModelFacts
from builder.preflight.prepare import prepare
from builder.preflight.ways import Device
from builder.recipe import schema

GB = 10**9


def dense(layers: int, hidden: int, inner: int) -> ModelFacts:
    """A Llama-like model of these sizes, with 8 KV heads of 128 and a vocabulary of 151,936, by its shapes alone."""
    matrices = {
        **{f"self_attn.{name}_proj": (hidden, hidden) for name in "qo"},
        **{f"self_attn.{name}_proj": (1024, hidden) for name in "kv"},
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    tensors = {name: ("BF16", (151936, hidden)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for i in range(layers):
        tensors |= {f"model.layers.{i}.{name}.weight": ("BF16", shape) for name, shape in matrices.items()}
    config = {
        "architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, "hidden_size": hidden, "vocab_size": 151936,
        "intermediate_size": inner, "num_attention_heads": hidden // 128, "num_key_value_heads": 8, "head_dim": 128,
    }  # fmt: skip
    return ModelFacts(config, tensors)


QWEN3_8B = dense(36, 4096, 12288)
TINY = "tests/data/tiny-qwen3"
HOST = Device("this machine", 16 * GB, 16 * GB, 2, False)


def recipe(**values: Any) -> schema.Recipe:
    return schema.resolve({"model.id": TINY, "gpu": "sm120", **values}).recipe


def gpus(*memories: int) -> Device:
    return Device("a card", sum(memories), memories[0], 16, True)


@pytest.mark.parametrize(
    ("has", "way"),
    [(64 * GB, "whole"), (16 * GB, "low"), (8 * GB, "low")],
)
def test_auto_takes_the_whole_model_if_it_fits_else_one_layer_at_a_time(has: int, way: str) -> None:
    """Qwen3-8B has 16.4 GB of weights: it calibrates on a laptop with 8 GB."""
    choice = ways.choose(recipe(), QWEN3_8B, replace(HOST, memory=has, largest=has))
    assert (choice.taken.name, choice.refusal) == (way, None)
    assert choice.as_good == ({"whole": ("low",), "low": ("whole",)}[way])


def test_a_model_of_72_billion_parameters_calibrates_on_one_card_of_96_gb() -> None:
    large = dense(80, 8192, 29568)
    assert ways.choose(recipe(), large, gpus(96 * GB)).taken.name == "low"
    assert ways.choose(recipe(), large, gpus(96 * GB, 96 * GB)).taken.name == "whole"
    assert memory.streamed_memory(large, 2048) == memory.streamed_memory(dense(8, 8192, 29568), 2048), "flat in depth"


@given(st.integers(1, 40 * GB), st.sampled_from(["auto", "low", "whole"]), st.booleans())
def test_a_way_that_is_taken_fits_or_is_refused_with_what_would(has: int, asked: str, on_gpu: bool) -> None:
    on = replace(HOST, memory=has, largest=has, gpu=on_gpu)
    choice = ways.choose(recipe(**{"quantization.memory": asked}), QWEN3_8B, on)
    assert asked in ("auto", choice.taken.name)
    offloaded = on_gpu and choice.taken.name == "whole"  # the host's memory holds the rest
    assert (choice.refusal is None) == (choice.taken.fits or offloaded)
    if choice.refusal:
        assert "--data-free" in choice.refusal.hint
        low = next(way for way in choice.ways if way.name == "low")
        assert ("--memory low" in choice.refusal.hint) == (low.fits and choice.taken.name != "low")
    if asked == "auto" and not choice.taken.fits:
        assert not any(way.possible for way in choice.ways[:2])


def test_a_gpu_whose_memory_is_unknown_holds_every_model() -> None:
    assert ways.choose(recipe(), QWEN3_8B, Device("NVIDIA GB10", None, None, 20, True)).taken.name == "whole"


def test_a_gpus_time_is_not_made_up() -> None:
    whole, low, free = ways.ways(recipe(), QWEN3_8B, gpus(96 * GB))
    assert (whole.seconds, low.seconds) == (None, None)
    assert free.seconds is not None


def test_more_cores_and_fewer_rows_take_less_time() -> None:
    def took(samples: int, cores: int) -> list[float]:
        found = ways.ways(recipe(**{"calibration.samples": samples}), QWEN3_8B, replace(HOST, cores=cores))
        return [way.seconds or 0.0 for way in found]

    assert all(a > b > 0 for a, b in zip(took(512, 2), took(512, 4), strict=True))
    assert all(a > b > 0 for a, b in zip(took(512, 2)[:2], took(64, 2)[:2], strict=True))
    assert took(512, 2)[2] == took(64, 2)[2], "data-free reads no row"


def test_a_token_is_multiplied_with_the_experts_that_it_is_sent_to() -> None:
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {"model.layers.0.self_attn.q_proj.weight": ("BF16", (8, 8))}
    tensors |= {f"model.layers.0.mlp.experts.{i}.up_proj.weight": ("BF16", (16, 8)) for i in range(8)}
    config = {**QWEN3_8B.config, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2}
    assert ways.active_parameters(ModelFacts({**config, "num_hidden_layers": 1}, tensors)) == 64 + 2 * 128


@pytest.mark.parametrize("flag", [{"calibration.samples": 0}, {"quantization.memory": "low"}])
@pytest.mark.parametrize("name", [one.name for one in registry.for_whole_model() if one.scales_inputs])
def test_formats_that_need_modelopt_are_refused_by_name(flag: dict[str, Any], name: str) -> None:
    asked = {"quantization.format": name, "gpu": "cpu", **flag}
    with pytest.raises(UnsupportedError, match=r"--(data-free|memory low) can't be used here") as caught:
        ways.check(recipe(**asked), QWEN3_8B)
    assert registry.get(name).title in caught.value.why
    auto = ways.choose(recipe(**{**asked, **dict.fromkeys(flag, 8 if "calibration.samples" in flag else "auto")}),
                       QWEN3_8B, HOST)  # fmt: skip
    assert auto.taken.name == "whole"
    assert auto.refusal is not None


@pytest.mark.parametrize("flag", [{"calibration.samples": 0}, {"quantization.memory": "low"}])
@pytest.mark.parametrize("cache", ["fp8", "auto"])
def test_weights_that_stay_in_bf16_need_no_modelopt(flag: dict[str, Any], cache: str) -> None:
    asked = recipe(**{"quantization.format": "bf16", "quantization.kv_cache_dtype": cache, "gpu": "cpu", **flag})
    ways.check(asked, QWEN3_8B)
    assert not any(way.impossible for way in ways.ways(asked, QWEN3_8B, HOST))


def test_contradictions_are_refused_before_any_work(tmp_path: Any) -> None:
    store, free = Store(tmp_path, Output("quiet")), {"model.id": TINY, "gpu": "cpu", "calibration.samples": 0}
    with pytest.raises(UsageError, match="--calibrate-scales measures scales") as caught:
        prepare(schema.resolve({**free, "calibration.scales": True}), store)
    assert "Build twice" in caught.value.hint
    auto = {"quantization.keep_fp8": "auto:0.05", "sensitivity.data": {"data": "builtin:python-docs"}}
    with pytest.raises(UsageError, match="--data-free measures nothing"):
        prepare(schema.resolve({**free, **auto}), store)
    assert not list(tmp_path.iterdir())


AUTO = {"quantization.keep_fp8": "auto:0.05", "sensitivity.data": {"data": "builtin:python-docs"}}
LOW = {"quantization.memory": "low"}


def test_what_holds_the_whole_model_is_refused_with_memory_low(tmp_path: Any) -> None:
    store, low = Store(tmp_path, Output("quiet")), {"model.id": TINY, "gpu": "cpu", **LOW}
    with pytest.raises(UsageError, match="--memory low never holds the whole model, and auto") as caught:
        prepare(schema.resolve({**low, **AUTO}), store)
    assert "--keep-fp8 '*.down_proj'" in caught.value.hint
    texts = {"sensitivity.data": AUTO["sensitivity.data"]}
    with pytest.raises(UsageError, match="The loss of each layer is measured with the whole model"):
        measure_layers(schema.resolve({**low, **texts}), store)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("asked", "has", "taken"), [("auto", 64, "whole"), ("auto", 9, "low"), ("low", 64, "low")])
@pytest.mark.parametrize("name", ["nvfp4", "nvfp4_awq"])
def test_scales_alone_are_calibrated_in_either_way(asked: str, has: int, taken: str, name: str) -> None:
    """Also of formats whose weights only ModelOpt writes: they stay."""
    given = recipe(**{"quantization.memory": asked, "quantization.format": name})
    choice = ways.choose(given, QWEN3_8B, replace(HOST, memory=has * GB, largest=has * GB), scales=True)
    assert choice.taken.name == taken
    assert choice.refusal is None
    assert [way.name for way in choice.ways] == ["whole", "low"]
    assert choice.as_good == {("auto", 64): ("low",), ("auto", 9): ("whole",), ("low", 64): ()}[asked, has]


def test_layers_of_weights_alone_are_measured_without_calibration() -> None:
    free = {"calibration.samples": 0, "quantization.format": "w4a16_nvfp4"}
    ways.check_measured(recipe(**free, **{"quantization.kv_cache_dtype": "auto"}))
    for changed in ({"quantization.kv_cache_dtype": "fp8"}, {"quantization.format": "nvfp4"}):
        with pytest.raises(UsageError, match="--data-free calibrates nothing"):
            ways.check_measured(recipe(**{**free, "quantization.kv_cache_dtype": "auto", **changed}))


def test_auto_never_takes_one_layer_at_a_time_where_layers_are_chosen_by_their_loss() -> None:
    small = replace(HOST, memory=9 * GB, largest=9 * GB)
    assert ways.choose(recipe(), QWEN3_8B, small).taken.name == "low"
    choice = ways.choose(recipe(**AUTO), QWEN3_8B, small)
    assert choice.taken.name == "whole"
    assert choice.refusal is not None
    assert "auto chooses layers by the loss" in choice.why


def test_layers_are_not_measured_where_the_whole_model_does_not_fit() -> None:
    ways.check_fits(ways.choose(recipe(), QWEN3_8B, replace(HOST, memory=99 * GB, largest=99 * GB)))
    with pytest.raises(UnsupportedError, match="measured with the whole model in memory") as caught:
        ways.check_fits(ways.choose(recipe(), QWEN3_8B, replace(HOST, memory=9 * GB, largest=9 * GB)))
    assert "--proxy" in caught.value.hint


def test_data_free_has_no_calibration(tmp_path: Any) -> None:
    found = prepare(
        schema.resolve({"model.id": TINY, "gpu": "cpu", "calibration.samples": 0}), Store(tmp_path, Output("quiet"))
    )
    assert found.calibration is None
    assert found.why_not_calibrated.startswith("data-free")
    choice = found.way(Machine(GB, 1000, 1000))
    assert choice is not None
    assert (choice.taken.name, choice.refusal) == ("data-free", None)


@given(st.sampled_from(["auto", "low", "whole"]), st.sampled_from(["hessian", "gptq"]))
def test_what_rounds_with_the_rows_goes_layer_by_layer_whatever_fits(asked: str, algorithm: str) -> None:
    values = {"quantization.memory": asked, "quantization.algorithm": algorithm}
    choice = ways.choose(recipe(**values), QWEN3_8B, replace(HOST, memory=64 * GB, largest=64 * GB))
    assert (choice.taken.name, choice.refusal, choice.as_good) == ("low", None, ())
    assert f"--algorithm {algorithm}" in choice.why
    plain = ways.choose(recipe(**{"quantization.memory": "low"}), QWEN3_8B, HOST).taken
    assert choice.taken.memory > plain.memory
    assert (choice.taken.seconds or 0) > (plain.seconds or 0)
    matrix = 4 * 12288**2  # of down_proj
    assert (choice.taken.memory - plain.memory > 4 * matrix) == (algorithm == "gptq")


def test_an_algorithm_that_rounds_with_the_rows_costs_more_with_more_rows_and_wider_layers() -> None:
    def cost(algorithm: str, on: Device = HOST, model: ModelFacts = QWEN3_8B, **more: Any) -> ways.Rounding:
        found = ways.choose(recipe(**{"quantization.algorithm": algorithm, **more}), model, on).taken.rounding
        assert found is not None
        assert found.algorithm == algorithm
        return found

    def took(*args: Any, **more: Any) -> float:
        found = cost(*args, **more).seconds
        assert found is not None
        return found

    few = {"calibration.samples": 64}
    assert took("mse") < took("hessian") < took("gptq")
    assert took("gptq", **few) < took("gptq")
    assert took("mse", **few) == took("mse")
    assert took("gptq", HOST, dense(36, 4096, 24576)) > 2 * took("gptq")  # with the square of inputs
    assert took("gptq", replace(HOST, cores=4)) == took("gptq") / 2
    assert cost("mse").memory == 0
    assert cost("gptq", gpus(64 * GB)).seconds is None  # not measured there
    plain, free, chosen = recipe(), recipe(**{"calibration.samples": 0}), recipe(**{"quantization.algorithm": "gptq"})
    assert all(way.rounding is None for one in (plain, free) for way in ways.ways(one, QWEN3_8B, HOST))
    assert [way.name for way in ways.ways(chosen, QWEN3_8B, HOST) if way.rounding] == ["low"]


def test_experts_see_their_share_of_the_tokens() -> None:
    config = {"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 1, "num_experts": 8}
    names = [f"model.layers.0.mlp.experts.{i}.{leaf}_proj" for i in range(8) for leaf in ("gate", "up", "down")]
    tensors = {f"{name}.weight": ("BF16", (1024, 1024)) for name in names}
    asked = recipe(**{"quantization.algorithm": "gptq"})
    few, most = (
        rounding.seconds(asked, ModelFacts({**config, "num_experts_per_tok": used}, tensors), 10**6) for used in (2, 8)
    )
    moments = 8 * 2 * 10**6 * 1024**2 * rounding.MOMENT_NS["gptq"] / 1e9  # gate and up share an input
    assert most - few == pytest.approx(moments * 3 / 4)


STACKED = ModelFacts(
    {"architectures": ["GptOssForCausalLM"], "num_hidden_layers": 1, "num_local_experts": 4},
    {"model.layers.0.mlp.experts.down_proj": ("BF16", (4, 64, 64))},
)
SHARED = replace(QWEN3_8B, config={**QWEN3_8B.config, "num_kv_shared_layers": 4})
MEASURED = {"quantization.keep_fp8": "auto:0.1", "sensitivity.data": "builtin:python-docs"}


@pytest.mark.parametrize("algorithm", ["mse", "hessian", "gptq"])
def test_what_modelopt_must_write_is_rounded_by_max(algorithm: str) -> None:
    with pytest.raises(UnsupportedError, match="ModelOpt must write this model, and it rounds by max") as caught:
        ways.check(recipe(**{"quantization.algorithm": algorithm}), STACKED)
    assert caught.value.hint == "Use --algorithm max"
    ways.check(recipe(**{"quantization.algorithm": "max"}), STACKED)


@pytest.mark.parametrize("algorithm", ["hessian", "gptq"])
def test_after_layers_are_measured_block_scales_can_only_be_searched(algorithm: str) -> None:
    with pytest.raises(UnsupportedError, match="it rounds one decoder layer at a time") as caught:
        ways.check(recipe(**{"quantization.algorithm": algorithm, **MEASURED}), QWEN3_8B)
    assert caught.value.hint.startswith("Use --algorithm mse. Or name the layers")
    ways.check(recipe(**{"quantization.algorithm": "mse", **MEASURED}), QWEN3_8B)


@pytest.mark.parametrize(
    ("model", "values", "better"),
    [
        (QWEN3_8B, {}, "gptq"),
        (QWEN3_8B, {"quantization.algorithm": "hessian"}, "gptq"),
        (QWEN3_8B, {"quantization.algorithm": "gptq"}, ""),
        (QWEN3_8B, {"calibration.samples": 0}, "mse"),
        (QWEN3_8B, {"calibration.samples": 0, "quantization.algorithm": "mse"}, ""),
        (QWEN3_8B, {"calibration.samples": 8, "calibration.seq_len": 256}, "hessian"),
        (QWEN3_8B, MEASURED, "mse"),
        (QWEN3_8B, {"quantization.format": "fp8"}, ""),
        (QWEN3_8B, {"quantization.format": "nvfp4_awq"}, ""),
        (STACKED, {}, ""),
        (SHARED, {}, "mse"),
    ],
)
def test_only_an_algorithm_that_would_be_accepted_is_proposed(
    model: ModelFacts, values: dict[str, Any], better: str
) -> None:
    assert better_algorithm(recipe(**{"gpu": "cpu", **values}), model) == better


def test_layers_that_share_keys_can_not_be_rounded_with_the_rows() -> None:
    with pytest.raises(UnsupportedError, match="it rounds one decoder layer at a time") as caught:
        ways.check(recipe(**{"quantization.algorithm": "hessian"}), SHARED)
    assert "last 4 layers" in caught.value.why
    assert caught.value.hint == "Use --algorithm mse."


@pytest.mark.parametrize(("samples", "fits"), [(23, False), (24, True)])
def test_gptq_needs_half_as_many_tokens_as_the_widest_layer_has_inputs(samples: int, fits: bool) -> None:
    values = {"quantization.algorithm": "gptq", "calibration.samples": samples, "calibration.seq_len": 256}
    if fits:
        ways.check(recipe(**values), QWEN3_8B)
        return
    with pytest.raises(UsageError, match="5,888 calibration tokens are too few for --algorithm gptq") as caught:
        ways.check(recipe(**values), QWEN3_8B)
    assert "12,288 inputs" in caught.value.why
    assert "--algorithm hessian" in caught.value.hint


def test_moments_that_do_not_fit_together_cost_passes_of_the_rows() -> None:
    config = {"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 2, "num_experts": 8,
              "num_attention_heads": 8, "hidden_size": 1024, "num_experts_per_tok": 2}  # fmt: skip
    names = [f"model.layers.{n}.mlp.experts.{i}.{x}_proj" for n in (0, 1) for i in range(8) for x in ("up", "down")]
    model = ModelFacts(config, {f"{name}.weight": ("BF16", (1024, 1024)) for name in names})
    asked, matrix = recipe(**{"quantization.algorithm": "gptq"}), 4 * 1024**2
    assert rounding.passes(asked, model, 4 * 16 * matrix) == {0: 1, 1: 1}
    assert rounding.passes(asked, model, 4 * 8 * matrix) == {0: 2, 1: 2}
    assert rounding.passes(asked, model, 0) == {0: 16, 1: 16}
    assert rounding.passes(recipe(**{"quantization.algorithm": "mse"}), model, 0) == {}
    costs = [
        ways.choose(asked, model, replace(HOST, largest=number * matrix)).taken.rounding for number in (4 * 16, 4 * 8)
    ]
    [one, two] = [cost for cost in costs if cost is not None and cost.seconds is not None]
    assert (one.passes, two.passes) == (1, 2)
    tokens = asked.calibration.samples * asked.calibration.seq_len
    once = 2 * ways.active_parameters(model) * tokens / ways.OPERATIONS / HOST.cores
    assert (two.seconds or 0) - (one.seconds or 0) == pytest.approx(once)
