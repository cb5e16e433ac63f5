"""Models that are quantized already: planned from headers, taken over byte for byte, served; what can't be taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import fabricated
import pytest
import yaml
from hub_server import Hub

from builder import pipeline, plan
from builder.architectures import catalog
from builder.checkpoint import conversion, repair
from builder.checkpoint.layouts import read_json
from builder.core.errors import BuilderError, IntegrityError, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.safetensors_io import NewTensor, Tensors, read_header
from builder.core.store import Store
from builder.formats import registry
from builder.preflight import advice
from builder.recipe import schema
from builder.tokenizer import files as tokenizer_files

MODEL = exports.MODELS["qwen3"]
FORMATS = [one for one in registry.for_tensorrt_llm() if one.quant_algo is not None]
UP = "model.layers.3.mlp.up_proj"
Checkpoint = Callable[..., Path]


def companions(model: Path) -> Path:
    """Adds the tokenizer, as tools that quantize do."""
    tokenizer_files.copy(MODEL, model)
    shutil.copyfile(MODEL / "generation_config.json", model / "generation_config.json")
    return model


@pytest.fixture(scope="module")
def nvfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An NVFP4 checkpoint in ModelOpt's Hugging Face layout, with scales of an FP8 KV cache."""
    return companions(fabricated.unified(MODEL, registry.NVFP4, tmp_path_factory.mktemp("models") / "nvfp4"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, quantized by ModelOpt from the model's weights."""
    made = tmp_path_factory.mktemp("real") / "nvfp4"
    exports.export(exports.quantized(MODEL), made)
    return companions(made)


def resolved(model: Path | str, **flags: Any) -> schema.Resolved:
    return schema.resolve({"model.id": str(model), "gpu": "cpu", "calibration.data": "builtin:python-docs", **flags})


def planned(model: Path | str, root: Path, **flags: Any) -> plan.Plan:
    return plan.plan(resolved(model, **flags), Store(root, Output("quiet"), dry=True))


def taken(model: Path | str, root: Path, **flags: Any) -> pipeline.Built:
    return pipeline.build(resolved(model, **flags), Store(root, Output("quiet")), until="checkpoint")


def same(one: Path, other: Path) -> bool:
    """Whether two directories hold the same tensors, byte for byte."""
    left, right = Tensors(one), Tensors(other)
    return {n: (i.dtype, i.shape) for n, i in left.items()} == {
        n: (i.dtype, i.shape) for n, i in right.items()
    } and all(left.read(name) == right.read(name) for name in left)


@pytest.mark.parametrize("one", FORMATS, ids=lambda one: one.name)
def test_each_format_and_layout_is_taken_over_byte_for_byte(one: Any, tmp_path: Path) -> None:
    source = companions(fabricated.unified(MODEL, one, tmp_path / "model", excluded=[UP.replace("3", "0")]))
    sources = {"unified": source}
    if one.compressed_tensors is not None:
        sources["compressed"] = tmp_path / "compressed"
        conversion.convert(source, sources["compressed"], "compressed_tensors")
    for name, model in sources.items():
        built = taken(model, tmp_path / "out" / name)
        assert built.checkpoint is not None
        assert built.calibration is None
        assert same(built.checkpoint.unified, source), name
        assert built.checkpoint.facts["imported"]["format"] == one.name
        assert built.checkpoint.facts["inspection"]["findings"] == []


def test_tensorrt_llms_layout_is_taken_over_with_the_tokenizer_of_the_original(nvfp4: Path, tmp_path: Path) -> None:
    conversion.convert(nvfp4, tmp_path / "engine", "tensorrt_llm")
    with pytest.raises(UsageError, match="has no tokenizer") as raised:
        planned(tmp_path / "engine", tmp_path / "out")
    assert "--original" in raised.value.hint
    with pytest.raises(UsageError, match=r"was not made from.*arch-variants"):
        planned(tmp_path / "engine", tmp_path / "out", **{"model.original": str(exports.MODELS["llama"])})
    original = {"model.original": str(MODEL), "quality.check": False}
    found = planned(tmp_path / "engine", tmp_path / "out", **original)
    assert found.prepared.quantized is not None
    assert found.prepared.quantized.facts()["layout"] == "tensorrt_llm"
    built = taken(tmp_path / "engine", tmp_path / "out", **original)
    assert built.checkpoint is not None
    assert same(built.checkpoint.unified, nvfp4)
    assert (built.checkpoint.unified / "tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()
    assert read_json(built.checkpoint.unified / "config.json")["architectures"] == ["Qwen3ForCausalLM"]


def test_an_original_does_not_replace_the_checkpoints_own_tokenizer(nvfp4: Path, tmp_path: Path) -> None:
    original = shutil.copytree(MODEL, tmp_path / "original")
    told = read_json(original / "tokenizer_config.json")
    (original / "tokenizer_config.json").write_text(json.dumps({**told, "chat_template": "{{ messages }}"}))
    built = taken(nvfp4, tmp_path / "out", **{"model.original": str(original), "quality.check": False})
    assert built.checkpoint is not None
    ours = built.checkpoint.unified / "tokenizer_config.json"
    assert ours.read_bytes() == (nvfp4 / "tokenizer_config.json").read_bytes()


def test_a_plan_says_what_it_is_and_a_second_build_does_nothing(nvfp4: Path, tmp_path: Path) -> None:
    found = planned(nvfp4, tmp_path / "out")
    assert [stage for stage, state, _ in found.stages if state == "will run"] == [
        "snapshot", "checkpoint", "engine", "repository", "smoke",
    ]  # fmt: skip
    [quality] = [row for row in found.stages if row[0] == "quality"]
    assert quality[1:] == (
        "skipped",
        "no original to compare with; --original names the model that this one was made from",
    )
    assert found.prepared.quantized is not None
    said = found.prepared.quantized.facts()
    assert (said["tool"], said["layout"], said["kv_cache"]) == ("modelopt 0.47.0", "unified", "fp8")
    assert said["formats"]["NVFP4"].startswith("42 linear layers: down_proj, gate_proj")
    values = {key: (value, origin) for key, value, origin in found.resolved.explained()}
    assert values["quantization.format"] == ("nvfp4", "the checkpoint")
    taken(nvfp4, tmp_path / "out")
    assert not (tmp_path / "out" / "calibration").exists()
    after = planned(nvfp4, tmp_path / "out")
    assert dict((stage, state) for stage, state, _ in after.stages)["checkpoint"] == "cached"
    [written] = (tmp_path / "out" / "checkpoint").glob("*/unified/model.safetensors")
    assert found.sizes.unified == sum(info.nbytes for info in Tensors(written.parent).values())


def test_on_the_hub_it_is_planned_from_headers_and_built(nvfp4: Path, tmp_path: Path, hub: Hub) -> None:
    hub.add("nvidia/tiny-NVFP4", nvfp4)
    found = planned("nvidia/tiny-NVFP4", tmp_path / "out")
    assert found.prepared.quantized is not None
    assert found.sizes.download == sum(info.nbytes for info in Tensors(nvfp4).values())
    assert not [r for r in hub.requests if r.path.startswith("/cdn/") and r.method == "GET" and not r.header]
    built = taken("nvidia/tiny-NVFP4", tmp_path / "out")
    assert built.checkpoint is not None
    assert same(built.checkpoint.unified, nvfp4)


def test_llmapi_gets_the_hugging_face_layout_alone(nvfp4: Path, tmp_path: Path) -> None:
    without = changed(nvfp4, tmp_path / "model", cache=None)  # this card has no FP8 KV cache for heads of 32
    found = planned(without, tmp_path / "out", gpu="sm120", target="llmapi")
    assert found.sizes.checkpoint == 0
    built = pipeline.build(
        resolved(without, gpu="sm120", target="llmapi"), Store(tmp_path / "out", Output("quiet")), until="repository"
    )
    assert built.checkpoint is not None
    assert not built.checkpoint.tensorrt_llm.exists()
    assert built.repository is not None
    file = next((built.repository.path / "models").rglob("model.yaml"))
    named = yaml.safe_load(file.read_text())["model"]  # relative to the model's directory
    assert (file.parents[1] / named).resolve() == built.checkpoint.unified.resolve()


def test_a_checkpoint_described_only_in_config_json_gets_what_tensorrt_llm_reads(nvfp4: Path, tmp_path: Path) -> None:
    model = shutil.copytree(nvfp4, tmp_path / "model")
    stated = json.loads((model / "hf_quant_config.json").read_text())
    (model / "hf_quant_config.json").unlink()
    config = read_json(model / "config.json")
    (model / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "modelopt", **stated}})
    )
    built = taken(model, tmp_path / "out")
    assert built.checkpoint is not None
    written = read_json(built.checkpoint.unified / "hf_quant_config.json")
    assert written["quantization"]["quant_algo"] == "NVFP4"
    assert written["quantization"]["kv_cache_quant_algo"] == "FP8"


def changed(source: Path, target: Path, change: dict[str, NewTensor | None] | None = None, cache: Any = "FP8") -> Path:
    """A copy with other tensors, and another KV cache in its configuration; without one also without its scales."""
    scales = {name: None for name in Tensors(source) if name.endswith((".k_scale", ".v_scale")) and cache is None}
    exports.rewrite(source, target, {**scales, **(change or {})})
    stated = read_json(target / "hf_quant_config.json")
    stated["quantization"]["kv_cache_quant_algo"] = cache
    (target / "hf_quant_config.json").write_text(json.dumps(stated))
    return target


def test_a_cache_without_scales_falls_back_and_says_so(nvfp4: Path, tmp_path: Path) -> None:
    scales = {name: None for name in Tensors(nvfp4) if name.endswith((".k_scale", ".v_scale"))}
    model = changed(nvfp4, tmp_path / "model", dict(scales))
    found = planned(model, tmp_path / "out")
    assert found.resolved.recipe.quantization.kv_cache_dtype == "auto"
    [note] = [note.text for note in found.notes if note.rule == "KV scales"]
    assert "declares an FP8 KV cache and has no scales" in note
    assert "--calibrate-scales" in note
    built = taken(model, tmp_path / "out")
    assert built.checkpoint is not None
    for layout, file in (("unified", "hf_quant_config.json"), ("tensorrt_llm", "config.json")):
        assert read_json(built.checkpoint.path / layout / file)["quantization"]["kv_cache_quant_algo"] is None
    with pytest.raises(UsageError, match="has no scales for an FP8 KV cache") as raised:
        planned(model, tmp_path / "out", **{"quantization.kv_cache_dtype": "fp8"})
    assert "--calibrate-scales" in raised.value.hint


AUTO = {"quantization.keep_bf16": ["auto:0.05"], "sensitivity.data": {"data": "texts.jsonl"}}


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"quantization.format": "nvfp4"}, "--format would quantize it"),
        ({"quantization.algorithm": "mse"}, "--algorithm would quantize it"),
        ({"quantization.keep_bf16": ["*.o_proj"]}, "--keep-bf16 would quantize it"),
        ({"quantization.keep_fp8": ["*.o_proj"]}, "--keep-fp8 would quantize it"),
        (AUTO, "--keep-bf16 would quantize it"),
        ({"quantization.kv_cache_dtype": "auto"}, "has an FP8 KV cache, and --kv-cache-dtype auto asks for another"),
    ],
)
def test_a_recipe_that_says_how_to_quantize_is_rejected(
    nvfp4: Path, tmp_path: Path, flags: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says) as raised:
        planned(nvfp4, tmp_path / "out", **flags)
    assert "the original model" in raised.value.hint


def test_an_original_that_is_quantized_too_is_rejected(nvfp4: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is quantized too"):
        planned(nvfp4, tmp_path / "out", **{"model.original": str(nvfp4)})


@pytest.mark.parametrize("flag", ["model.original", "calibration.scales"])
def test_flags_for_quantized_models_need_one(tmp_path: Path, flag: str) -> None:
    with pytest.raises(UsageError, match="is not quantized, and --"):
        planned(MODEL, tmp_path / "out", **{flag: str(MODEL) if flag == "model.original" else True})


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"evaluation.runners": ["bf16", "checkpoint"]}, "no original to compare it with"),
        ({"evaluation.runners": ["simulated"]}, "is quantized already"),
    ],
)
def test_measurements_that_need_the_original_are_rejected(
    nvfp4: Path, tmp_path: Path, flags: dict[str, Any], says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        pipeline.measure(resolved(nvfp4, **flags), Store(tmp_path / "out", Output("quiet")))


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({"evaluation.runners": ["bf16"]}, True),
        ({"evaluation.runners": ["bf16", "checkpoint"], "quality.check": False}, True),
        ({"evaluation.runners": ["checkpoint"]}, False),
    ],
)
def test_an_evaluation_fetches_the_original_only_where_it_compares_with_it(
    nvfp4: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: dict[str, Any], wanted: bool
) -> None:
    monkeypatch.setattr(pipeline, "evaluate_built", lambda built, *_, **__: built)
    conversion.convert(nvfp4, tmp_path / "engine", "tensorrt_llm")
    asked = resolved(tmp_path / "engine", **{"model.original": str(MODEL), **flags})
    built: Any = pipeline.measure(asked, Store(tmp_path / "out", Output("quiet")))
    assert (built.original is not None) == wanted
    measured = built.models.snapshot
    assert measured.config["architectures"] == ["Qwen3ForCausalLM"]
    assert (measured.path / "tokenizer.json").is_file()
    assert len(list((tmp_path / "out" / "snapshot").iterdir())) == 1 + wanted


@pytest.mark.parametrize(("until", "flags"), [("checkpoint", {}), ("repository", {"quality.check": False})])
def test_a_build_without_a_comparison_does_not_fetch_the_original(
    nvfp4: Path, tmp_path: Path, until: str, flags: dict[str, Any]
) -> None:
    asked = resolved(nvfp4, **{"model.original": str(MODEL), **flags})
    built = pipeline.build(asked, Store(tmp_path / "out", Output("quiet")), until=until)
    assert built.original is None


def test_the_loss_of_its_layers_can_not_be_measured(nvfp4: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is quantized already"):
        pipeline.measure_layers(resolved(nvfp4), Store(tmp_path / "out", Output("quiet")), proxy=True)


def test_a_format_that_the_card_can_not_run_is_named_without_a_flag_that_can_not_help(
    nvfp4: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="sm80") as raised:
        planned(nvfp4, tmp_path / "out", gpu="sm80", target="engine")
    assert "--format" not in raised.value.hint
    assert "original model" in raised.value.hint
    assert "--gpu cpu" in raised.value.hint
    assert planned(nvfp4, tmp_path / "out", gpu="cpu").prepared.quantized


def test_every_format_of_a_mixed_checkpoint_is_checked_against_the_card(tmp_path: Path) -> None:
    model = companions(
        fabricated.unified(MODEL, registry.NVFP4, tmp_path / "model", attention=registry.get("fp8_pc_pt"))
    )
    found = planned(model, tmp_path / "out")
    assert found.resolved.quant_algo == "MIXED_PRECISION"
    assert [one.name for one in found.resolved.quantized_formats] == ["nvfp4", "fp8_pc_pt"]
    with pytest.raises(UnsupportedError, match="sm100 can't run FP8 per channel") as raised:
        planned(model, tmp_path / "out", gpu="sm100", target="engine")
    assert "--format" not in raised.value.hint


def test_advice_is_tried_with_the_formats_of_the_checkpoint(tmp_path: Path) -> None:
    """No engine is built of a mixture, and the LLM API runs no NVFP4 on sm80: both have to change."""
    moe = MODEL.parent / "arch-variants" / "qwen3_moe"
    source = companions(fabricated.unified(moe, registry.NVFP4, tmp_path / "source"))
    model = changed(source, tmp_path / "model", cache=None)  # heads of 32 have no kernel with an FP8 cache on sm120
    with pytest.raises(UnsupportedError) as raised:
        planned(model, tmp_path / "out", gpu="sm80", target="engine")
    settings = advice.settings(raised.value.hint)
    assert settings["target"] == "llmapi"
    assert planned(model, tmp_path / "out", **{"gpu": "sm80", **settings}).resolved.gpu.name != "sm80"


def test_a_checkpoints_output_projections_in_bf16_are_refused_with_advice_that_keeps_its_kv_cache(
    tmp_path: Path,
) -> None:
    outputs = [
        f"model.layers.{n}.self_attn.o_proj" for n in range(read_json(MODEL / "config.json")["num_hidden_layers"])
    ]
    model = companions(fabricated.unified(MODEL, registry.NVFP4, tmp_path / "model", excluded=outputs))
    with pytest.raises(UnsupportedError, match="can't stay in BF16 in this engine") as raised:
        planned(model, tmp_path / "out", gpu="sm100", target="engine")
    assert "--kv-cache-dtype" not in raised.value.hint
    assert "--keep-" not in raised.value.hint
    settings = advice.settings(raised.value.hint)
    assert planned(model, tmp_path / "out", **{"gpu": "sm100", "target": "engine", **settings}).prepared.quantized


def without(name: str) -> Callable[[Path, Path], Path]:
    return lambda source, target: changed(source, target, {name: None})


def zeros(name: str, dtype: str, *shape: int) -> Callable[[Path, Path], Path]:
    from source_models import zeros as content

    return lambda source, target: changed(
        source, target, {name: NewTensor(name, dtype, shape, [content(dtype, shape)])}
    )


def truncated(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    content = (target / "model.safetensors").read_bytes()
    (target / "model.safetensors").write_bytes(content[: len(content) // 2])
    return target


def lying_index(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    names = dict.fromkeys([*Tensors(source), "model.layers.9.mlp.up_proj.weight"], "model.safetensors")
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return target


def said(**quantization: Any) -> Callable[[Path, Path], Path]:
    def make(source: Path, target: Path) -> Path:
        shutil.copytree(source, target)
        stated = read_json(target / "hf_quant_config.json")
        stated["quantization"] |= quantization
        (target / "hf_quant_config.json").write_text(json.dumps(stated))
        return target

    return make


def contradicting(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    config = read_json(target / "config.json")
    block = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["*.self_attn.*", "lm_head"]}
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": block}))
    return target


def unquantized(source: Path, target: Path) -> Path:
    shutil.copytree(MODEL, target)
    shutil.copyfile(source / "hf_quant_config.json", target / "hf_quant_config.json")
    return target


BAD: dict[str, tuple[Callable[[Path, Path], Path], type[BuilderError], str]] = {
    "a scale is missing": (without(f"{UP}.weight_scale_2"), IntegrityError, f"Missing: {UP}.weight_scale_2"),
    "a weight is missing": (without(f"{UP}.weight"), IntegrityError, f"missing.*{UP}.weight"),
    "input scales are missing": (without(f"{UP}.input_scale"), IntegrityError, "scales for the inputs.*--calibrate-sc"),
    "block scales of another group size": (
        zeros(f"{UP}.weight_scale", "F8_E4M3", 768, 8), IntegrityError, f"{UP}.weight_scale is F8_E4M3",
    ),
    "a scale of another type": (zeros(f"{UP}.weight_scale_2", "F16"), IntegrityError, f"{UP}.weight_scale_2 is F16"),
    "a packed weight of another shape": (zeros(f"{UP}.weight", "U8", 760, 128), IntegrityError, "Not what their"),
    "a tensor of nothing": (zeros("model.layers.3.mlp.extra", "BF16", 4), IntegrityError, "unexpected"),
    "truncated": (truncated, IntegrityError, "truncated"),
    "an index that lies": (lying_index, IntegrityError, "index.*disagree.*model.layers.9"),
    "groups of 32": (said(group_size=32), UnsupportedError, "groups of 16; this checkpoint says 32"),
    "an unknown format": (said(quant_algo="FP3"), UnsupportedError, "FP3"),
    "blocks of FP8": (said(quant_algo="FP8_PB_WO"), UnsupportedError, "block of 128x128"),
    "two descriptions": (contradicting, IntegrityError, "contradict each other.*config.json says BF16 of"),
    "a description without quantized tensors": (unquantized, IntegrityError, "no tensor of a linear layer is quanti"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_or_unknown_checkpoint_is_named_before_any_weight_is_read(
    name: str, nvfp4: Path, tmp_path: Path
) -> None:
    make, error, says = BAD[name]
    model = make(nvfp4, tmp_path / "model")
    with pytest.raises(error, match="(?s)" + says) as raised:
        planned(model, tmp_path / "out")
    assert raised.value.hint
    with pytest.raises(error):
        taken(model, tmp_path / "out")
    assert not list((tmp_path / "out").glob("snapshot/[0-9a-f]*"))


def test_fetch_refuses_what_can_not_be_served_before_a_weight_is_downloaded(
    nvfp4: Path, tmp_path: Path, hub: Hub
) -> None:
    hub.add("nvidia/tiny-groups", said(group_size=32)(nvfp4, tmp_path / "model"))
    with pytest.raises(UnsupportedError, match="groups of 16"):
        pipeline.build(resolved("nvidia/tiny-groups"), Store(tmp_path / "out", Output("quiet")), until="snapshot")
    assert not [r for r in hub.requests if r.path.startswith("/cdn/") and r.method == "GET" and not r.header]


def test_a_checkpoint_of_the_store_is_named_by_one_of_its_layouts(nvfp4: Path, tmp_path: Path) -> None:
    built = taken(nvfp4, tmp_path / "out")
    assert built.checkpoint is not None
    with pytest.raises(UsageError, match="several layouts") as raised:
        planned(built.checkpoint.path, tmp_path / "out")
    assert raised.value.hint.endswith(f"--model {built.checkpoint.path / 'unified'}")


def test_a_quantized_multimodal_model_is_refused(nvfp4: Path, tmp_path: Path) -> None:
    model = shutil.copytree(nvfp4, tmp_path / "model")
    multimodal = next(one for one in catalog.every() if one.language_model_of)
    config = {**read_json(model / "config.json"), "model_type": multimodal.model_types[0]}
    outer = {
        "architectures": [multimodal.language_model_of[0].name],
        "text_config": config,
        "vision_config": {"depth": 1},
    }
    (model / "config.json").write_text(json.dumps(outer))
    with pytest.raises(UnsupportedError, match="multimodal model that is quantized") as raised:
        planned(model, tmp_path / "out", gpu="sm120", target="llmapi")
    assert "original model" in raised.value.hint


def test_a_nan_is_found_when_it_is_taken_over(nvfp4: Path, tmp_path: Path) -> None:
    name = f"{UP}.weight_scale_2"
    model = changed(nvfp4, tmp_path / "model", {name: NewTensor(name, "F32", (), [b"\0\0\xc0\x7f"])})
    with pytest.raises(IntegrityError, match=name):
        taken(model, tmp_path / "out")
    assert not list((tmp_path / "out" / "checkpoint").glob("[0-9a-f]*"))


def test_what_was_repaired_is_taken_over_without_what_was_replaced(nvfp4: Path, tmp_path: Path) -> None:
    name = "model.layers.2.self_attn.o_proj.input_scale"
    model = changed(nvfp4, tmp_path / "model", {name: NewTensor(name, "F32", (), [b"\0\0\xc0\x7f"])})
    repair.repair(model)
    built = taken(model, tmp_path / "out")
    assert built.checkpoint is not None
    assert same(built.checkpoint.unified, model)
    files = list(built.checkpoint.unified.glob("*.safetensors"))
    assert sum(list(read_header(file)).count(name) for file in files) == 1


def test_one_is_served_and_tested(real: Path, tmp_path: Path) -> None:
    """The whole chain, with ModelOpt's real export and the real Triton server."""
    built = pipeline.build(resolved(real), Store(tmp_path / "out", Output("quiet")))
    assert built.smoke is not None
    assert not built.smoke.failed
    assert built.verdict is not None
    assert built.verdict.status == "not checked"
    assert built.verdict.reasons == (
        "no original to compare with; --original names the model that this one was made from",
    )
    assert built.link is not None
    assert built.link.name == "nvfp4-cpu-nvfp4"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["compressed_tensors", "tensorrt_llm"])
def test_the_other_layouts_are_served_and_compared_with_the_original(real: Path, tmp_path: Path, layout: Any) -> None:
    conversion.convert(real, tmp_path / "model", layout)
    built = pipeline.build(
        resolved(tmp_path / "model", **{"model.original": str(MODEL)}), Store(tmp_path / "out", Output("quiet"))
    )
    assert built.smoke is not None
    assert not built.smoke.failed
    assert built.quality is not None
    assert built.quality.score is not None
    assert built.verdict is not None
    assert built.verdict.status == "passed"


@pytest.mark.slow
def test_missing_scales_are_calibrated_and_weights_stay(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = companions(shutil.copytree(checkpoints["qwen3"] / "unified", tmp_path / "source"))
    model = changed(
        source, tmp_path / "model", {n: None for n in Tensors(source) if n.endswith(("k_scale", "v_scale"))}
    )
    flags = {"calibration.scales": True, "calibration.samples": 4, "calibration.seq_len": 64}
    built = pipeline.build(resolved(model, **flags), Store(tmp_path / "out", Output("quiet")), until="checkpoint")
    assert built.checkpoint is not None
    assert built.calibration is not None
    there, here = Tensors(source), Tensors(built.checkpoint.unified)
    assert set(there) == set(here)
    assert all(there.read(n) == here.read(n) for n in there if n.endswith(("weight", "weight_scale")))
    written = read_json(built.checkpoint.unified / "hf_quant_config.json")
    assert written["quantization"]["kv_cache_quant_algo"] == "FP8"
    low = resolved(model, **{**flags, "quantization.memory": "low"})
    again = pipeline.build(low, Store(tmp_path / "low", Output("quiet")), until="checkpoint").checkpoint
    assert again is not None
    found = Tensors(again.unified)
    assert {name: found.read(name) for name in found} == {name: here.read(name) for name in here}
    assert not list((tmp_path / "low" / "partial").iterdir())
