"""Linear layers left in BF16: what patterns mean, and what becomes of them in every form of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import exports
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builder.architectures.catalog import UNKNOWN
from builder.architectures.names import group_of
from builder.calibration.rows import calibrate
from builder.checkpoint import layouts as checkpoint_layouts
from builder.checkpoint import sharding, validate
from builder.checkpoint.layouts import Checkpoint
from builder.checkpoint.sharding import Parallel
from builder.core.errors import BuilderError, IntegrityError, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.safetensors_io import Tensors
from builder.core.store import Store, WouldRun
from builder.evaluate.runners import local
from builder.formats import kv_cache
from builder.formats.assignment import ModelFormats
from builder.formats.registry import BF16
from builder.hub.snapshot import fetch
from builder.preflight import advice, checks, memory
from builder.preflight.memory import Serving
from builder.preflight.model_facts import ModelFacts
from builder.quantize import exclude, worker
from builder.quantize.modelopt import QuantizeRequest, quantize
from builder.quantize.simulation import enable_cpu_simulation
from builder.recipe import schema
from builder.recipe.quantization import Quantization
from builder.reference.model import ReferenceModel
from builder.trtllm import flags as trtllm_flags

TINY = exports.MODELS["qwen3"]
PATTERNS = ["model.layers.1.*", "*.2.self_attn.k_proj", "*.0.mlp.up_proj", "*.3.mlp.down_proj", "*.3.self_attn.o_proj"]
ASKED = Serving(max_batch_size=1, max_input_len=64, max_seq_len=128, max_num_tokens=128)
# Six pipeline stages of one layer each would disagree; of two layers they agree on their second ones.
SECOND = ["model.layers.1.mlp.*", "model.layers.3.mlp.*", "model.layers.5.mlp.*"]


def facts(source: Path, patterns: list[str] | None = None) -> ModelFacts:
    tensors = {name: (info.dtype, info.shape) for name, info in Tensors(source).items()}
    kept = exclude.keep(patterns or [], exclude.linears(tensors))
    return ModelFacts(checkpoint_layouts.read_json(source / "config.json"), tensors, {"bf16": kept})


def export(name: str, patterns: list[str], directory: Path, **sizes: int) -> tuple[Path, Path]:
    """ModelOpt's TensorRT-LLM layout of the model with these layers kept, and ours made of its unified one."""
    source = exports.MODELS[name]
    model = exports.quantized(source, kept=facts(source, patterns).modules("bf16"))
    exports.export(model, directory / "unified", directory / "modelopt", **sizes)
    config = checkpoint_layouts.read_json(source / "config.json")
    checkpoint_layouts.write_tensorrt_llm(directory / "unified", config, directory / "tensorrt_llm")
    return directory / "modelopt", directory / "tensorrt_llm"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("kept")
    export("qwen3", PATTERNS, directory)
    return directory


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = (exports.DATA / "eval" / "prose.jsonl").read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:4]))
    return file


def test_patterns_name_modules_and_take_along_what_is_multiplied_with_them() -> None:
    kept = set(facts(TINY, PATTERNS).modules("bf16"))
    assert len([name for name in kept if name.startswith("model.layers.1.")]) == 7
    assert {f"model.layers.2.self_attn.{x}_proj" for x in "qkv"} < kept
    assert {f"model.layers.0.mlp.{x}_proj" for x in ("gate", "up")} < kept
    assert len(kept) == 7 + 3 + 2 + 1 + 1
    assert exclude.widened(PATTERNS, sorted(kept)) == [
        "model.layers.0.mlp.gate_proj",
        "model.layers.2.self_attn.q_proj",
        "model.layers.2.self_attn.v_proj",
    ]
    assert facts(TINY).modules("bf16") == ()


names = st.sets(st.sampled_from(exclude.linears(facts(TINY).tensors)), min_size=1, max_size=8)


@given(names)
def test_groups_are_kept_whole_and_nothing_else_is(wanted: set[str]) -> None:
    known = exclude.linears(facts(TINY).tensors)
    kept = exclude.keep(sorted(wanted), known)
    asked = {group_of(UNKNOWN, name) for name in wanted}
    assert set(kept) == {name for name in known if group_of(UNKNOWN, name) in asked}
    assert exclude.keep(kept, known) == kept


@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("model.layers.0.mlp.donw_proj", "model.layers.0.mlp.down_proj"),
        ("*.down_porj", "*.down_proj"),
        ("transformer.layers.0.mlp.proj", "model.layers.0.mlp"),
        ("lm_head", "never quantized"),
    ],
)
def test_a_pattern_that_matches_nothing_names_near_ones(pattern: str, near: str) -> None:
    with pytest.raises(UsageError, match="matches no linear layer") as caught:
        facts(TINY, [pattern])
    assert near in f"{caught.value.why} {caught.value.hint}"
    assert caught.value.exit_code == 2


def test_something_must_be_left_to_quantize() -> None:
    with pytest.raises(UnsupportedError, match="nothing is left to quantize"):
        facts(TINY, ["*"])


def test_layers_are_counted_as_numbers() -> None:
    tensors = {f"model.layers.{n}.mlp.down_proj.weight": ("BF16", (64, 64)) for n in (10, 2, 1)}
    assert [name.split(".")[2] for name in exclude.linears(tensors)] == ["1", "2", "10"]
    experts = [f"model.layers.0.mlp.experts.{n}.{x}_proj" for n in (0, 1) for x in ("gate", "up", "down")]
    assert list(exclude.groups(experts)) == ["model.layers.0.mlp.experts"]


@pytest.mark.parametrize("name", exports.MODELS)
def test_the_tensorrt_llm_layout_is_modelopts_own(tmp_path: Path, name: str) -> None:
    patterns = ["model.layers.1.*", "*.0.self_attn.v_proj", "*.0.mlp.gate_proj"]
    theirs_at, ours_at = export(name, patterns, tmp_path)
    ours, theirs = Tensors(ours_at), Tensors(theirs_at)
    assert {n: (ours[n].dtype, ours[n].shape) for n in ours} == {n: (theirs[n].dtype, theirs[n].shape) for n in theirs}
    assert not [n for n in ours if ours.read(n) != theirs.read(n)]
    excluded = [checkpoint_layouts.read_json(at / "config.json")["quantization"] for at in (ours_at, theirs_at)]
    linears = {n.removesuffix(".weight") for n in ours if n.endswith(".weight") and "norm" not in n and "ln_f" not in n}
    matched = [{n for n in linears if any(fnmatchcase(n, p) for p in q["exclude_modules"])} for q in excluded]
    plain = {n.removesuffix(".weight") for n in ours if n.endswith(".weight") and ours[n].dtype == "BF16"}
    # ModelOpt's wildcards and our full names mean the same layers to fnmatchcase (quantize.py@89fd9b74).
    assert matched[0] == matched[1] == {n for n in plain & linears if n != "transformer.vocab_embedding"}
    assert {q["quant_algo"] for q in excluded} == {"NVFP4"}
    assert excluded[0]["exclude_modules"] == sorted(matched[0])


@pytest.mark.parametrize(("tp", "pp", "patterns"), [(2, 1, PATTERNS), (8, 1, PATTERNS), (2, 3, SECOND), (1, 3, SECOND)])
def test_every_rank_is_modelopts_own(tmp_path: Path, tp: int, pp: int, patterns: list[str]) -> None:
    theirs, ours = export("qwen3", patterns, tmp_path, tp=tp, pp=pp)
    sharding.split(ours, tmp_path / "split", Parallel(tp, pp))
    assert not validate.inspect(tmp_path / "split").findings
    for rank in range(tp * pp):
        held = [Tensors(at, [at / f"rank{rank}.safetensors"]) for at in (tmp_path / "split", theirs)]
        assert {n: held[0].read(n) for n in held[0]} == {n: held[1].read(n) for n in held[1]}
    whole, split = (ReferenceModel.load(at) for at in (ours, tmp_path / "split"))
    ids = torch.arange(3, 4000, 97)
    assert torch.equal(whole.forward(ids, whole.new_cache()), split.forward(ids, split.new_cache()))


def test_stages_that_disagree_are_refused_before_anything_runs() -> None:
    config = {**facts(TINY).config}
    exclude.check_split(facts(TINY, SECOND).single, config, Parallel(1, 3))
    with pytest.raises(UnsupportedError, match="not the same in all 3 pipeline stages"):
        exclude.check_split(facts(TINY, PATTERNS).single, config, Parallel(1, 3))


@pytest.mark.parametrize("name", exports.MODELS)
def test_the_price_is_to_the_byte_what_is_written(tmp_path: Path, name: str) -> None:
    patterns = ["model.layers.1.*", "*.0.self_attn.v_proj"]
    layouts = [export(name, patterns, tmp_path / "kept")[1], export(name, [], tmp_path / "plain")[1]]
    model = facts(exports.MODELS[name], patterns)
    for tp in (1, 2, 4):
        asked, written = replace(ASKED, tp=tp), []
        for whole in layouts:
            sharding.split(whole, whole.parent / f"tp{tp}", Parallel(tp))
            held = sorted((whole.parent / f"tp{tp}").glob("rank*.safetensors"))
            written.append([sum(info.nbytes for info in Tensors(file.parent, [file]).values()) for file in held])
        assert memory.rank_bytes(model, asked) == written[0]
        assert memory.price(model, asked, BF16) == sum(written[0]) - sum(written[1]) > 0
    assert memory.sizes(model, ASKED).unified == sum(i.nbytes for i in Tensors(tmp_path / "kept" / "unified").values())


def test_the_inspection_accepts_and_counts_them(made: Path) -> None:
    found = validate.inspect(made)
    assert not found.findings
    kept = facts(TINY, PATTERNS).modules("bf16")
    unified, ours = found.layouts["unified"], found.layouts["tensorrt_llm"]
    assert (unified.linears["kept"], unified.linears["nvfp4"]) == (len(kept), 42 - len(kept))
    assert (ours.linears["kept"], ours.linears["nvfp4"]) == (5 + 1 + 2 + 1 + 1, 30 - 10)
    assert 4.5 < unified.bits_per_weight < 4.52
    weights = {
        name: n
        for name, n in ((k, Tensors(TINY)[f"{k}.weight"].nbytes // 2) for k in exclude.linears(facts(TINY).tensors))
    }
    expected = sum(n * (16 if name in kept else unified.bits_per_weight) for name, n in weights.items())
    assert unified.effective_bits == pytest.approx(expected / sum(weights.values()), abs=1e-3)
    assert found.facts()["layouts"]["unified"]["nbytes"]["kept_linears"] == 2 * sum(weights[name] for name in kept)


@pytest.mark.parametrize("layout", ["unified", "tensorrt_llm"])
def test_a_layer_in_bf16_that_the_configuration_does_not_name_is_a_problem(
    made: Path, tmp_path: Path, layout: str
) -> None:
    copy = exports.rewrite(made / layout, tmp_path / layout, {})
    file = copy / ("hf_quant_config.json" if layout == "unified" else "config.json")
    config = json.loads(file.read_text())
    config["quantization"]["exclude_modules"] = ["lm_head"]
    file.write_text(json.dumps(config))
    problems = {(problem.tensor, problem.what) for problem in validate.inspect(copy).findings}
    name = "model.layers.3.mlp.down_proj" if layout == "unified" else "transformer.layers.3.mlp.proj"
    assert (f"{name}.weight", "is BF16, not U8") in problems


def test_half_a_group_is_refused_by_the_layout(tmp_path: Path) -> None:
    model = exports.quantized(TINY, kept=["model.layers.0.self_attn.q_proj"])
    exports.export(model, tmp_path / "unified")
    with pytest.raises(IntegrityError, match="differ in dtype"):
        checkpoint_layouts.write_tensorrt_llm(tmp_path / "unified", dict(facts(TINY).config), tmp_path / "ours")


def test_the_executor_computes_what_modelopt_simulates(tmp_path: Path, rows: Path) -> None:
    """As in test_reference_model.py, in float64: no KV cache, so that its clamped scales don't matter."""
    job = {"model": str(TINY), "rows": str(rows), "seq_len": 128, "batch_size": 1, "trust_remote_code": False}
    kept = facts(TINY, PATTERNS).modules("bf16")

    formats = ModelFormats(layers={BF16: kept})
    simulated, batches = worker.load(job)
    assert worker.calibrate(simulated, batches, formats)["kept_linears"] == len(kept)
    ids = batches[0].flatten()[:100]
    exports.written(simulated, TINY, formats, tmp_path)
    enable_cpu_simulation()
    from modelopt.torch.export import unified_export_hf

    with torch.inference_mode():
        unified_export_hf.requantize_resmooth_fused_llm_layers(simulated)
        theirs = simulated.double()(ids[None], use_cache=False).logits[0].float()
    reference = ReferenceModel.load(tmp_path / "tensorrt_llm", torch.float64)
    ours = reference.forward(ids, reference.new_cache())
    assert (ours - theirs).abs().max() <= 2e-6
    assert "input_scale" not in reference.layers[1].qkv.stored
    assert "input_scale" in reference.layers[0].qkv.stored


def test_the_stage_keeps_them_bit_by_bit_and_knows_them_in_its_key(tmp_path: Path, rows: Path) -> None:
    store = Store(tmp_path, Output("quiet"))
    part = schema.Calibration(data=str(rows), samples=4, seq_len=64)
    snapshot, calibration = fetch(schema.Model(id=str(TINY)), store=store), calibrate(part, store=store)

    def run(patterns: list[str], store: Store = store) -> Checkpoint:
        asked = Quantization(keep_bf16=tuple(patterns))
        return quantize(snapshot, calibration, QuantizeRequest(asked, part, facts(TINY, patterns).layers), store=store)

    made = run(["*.0.self_attn.q_proj"])
    source, stored = Tensors(TINY), Tensors(made.unified)
    for x in "qkv":
        name = f"model.layers.0.self_attn.{x}_proj.weight"
        assert stored.read(name) == source.read(name)
    assert made.facts["layers"]["bf16"] == [f"model.layers.0.self_attn.{x}_proj" for x in "kqv"]
    assert (made.facts["quantized_linears"], made.facts["kept_linears"]) == (39, 3)
    assert made.facts["kv_scales"] == 12
    dry = Store(tmp_path, Output("quiet"), dry=True)
    assert run(["model.layers.0.self_attn.[kv]_proj"], dry).path == made.path  # other words for the same layers
    with pytest.raises(WouldRun):
        run(["model.layers.0.self_attn.*"], dry)


def test_the_simulation_that_is_evaluated_keeps_them_too(rows: Path) -> None:
    kept = facts(exports.MODELS["llama"], ["*.1.mlp.down_proj"]).modules("bf16")
    job = {"model": str(exports.MODELS["llama"]), "trust_remote_code": False, "dtype": "auto", "batch_tokens": 512}
    job |= {
        "kv_cache_dtype": "fp8",
        "calibration": {"rows": str(rows), "seq_len": 32, "batch_size": 1, "layers": {"bf16": kept}},
    }
    with local.simulated(job) as runner:
        first, second = (layer.mlp.down_proj for layer in runner.model.model.layers)
        assert (first.input_quantizer.is_enabled, second.input_quantizer.is_enabled) == (True, False)
        stored = Tensors(exports.MODELS["llama"]).read("model.layers.1.mlp.down_proj.weight")
        assert second.weight.bfloat16().view(torch.uint8).numpy().tobytes() == bytes(stored)


def test_an_expert_is_kept_with_all_experts_of_its_layer(rows: Path) -> None:
    """transformers 5 joins them in one module; transformers 4 has a module for each."""
    source = exports.DATA / "arch-variants" / "qwen3_moe"
    job = {"model": str(source), "rows": str(rows), "seq_len": 32, "batch_size": 1, "trust_remote_code": False}
    model, batches = worker.load(job)
    kept = facts(source, ["*.0.mlp.experts.0.down_proj"]).modules("bf16")
    assert len(kept) == 3 * model.config.num_experts
    formats = ModelFormats(layers={BF16: kept}, cache=kv_cache.FP8)
    assert worker.calibrate(model, batches, formats)["kept_linears"] == len(kept)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    assert not [n for n, one in experts.named_modules() if "quantizer" in n and getattr(one, "is_enabled", False)]


def test_a_part_of_experts_that_are_one_module_is_refused(rows: Path) -> None:
    source = exports.DATA / "arch-variants" / "qwen3_moe"
    job = {"model": str(source), "rows": str(rows), "seq_len": 32, "batch_size": 1, "trust_remote_code": False}
    model, batches = worker.load(job)
    if "model.layers.0.mlp.experts.0.down_proj" in dict(model.named_modules()):
        pytest.skip("transformers 4 has a module for each expert")
    kept = ["model.layers.0.mlp.experts.0.down_proj", "model.layers.0.mlp.experts.1.down_proj"]
    with pytest.raises(UnsupportedError, match="not modules of their own"):
        worker.calibrate(model, batches, ModelFormats(layers={BF16: kept}, cache=kv_cache.FP8))


@pytest.mark.parametrize(
    ("gpu", "extra", "refused"),
    [
        ("sm120", {}, ""),
        ("cpu", {}, ""),
        ("sm100", {}, "FP8 context FMHA is on"),
        ("sm120-fmha", {}, "FP8 context FMHA is on"),
        ("sm100", {"quantization.kv_cache_dtype": "auto", "engine.flags.use_fp8_context_fmha": "disable"}, ""),
        ("sm120-fmha", {"quantization.kv_cache_dtype": "auto", "engine.flags.fuse_fp4_quant": "enable"}, "fuse_fp4"),
    ],
)
def test_attentions_output_is_kept_only_where_the_kernel_can_do_without_its_scale(
    gpu: str, extra: dict[str, str], refused: str
) -> None:
    flags = {"model.id": str(TINY), "gpu": gpu, "quantization.keep_bf16": "*.o_proj", **extra}
    resolved, model = schema.resolve(flags), facts(TINY)
    config = {**model.config, "head_dim": 128}
    if refused:
        with pytest.raises(UnsupportedError, match=refused):
            checks.keep_patterns(resolved.recipe, model, trtllm_flags.resolve(resolved, config))
    else:
        assert (
            len(checks.keep_patterns(resolved.recipe, model, trtllm_flags.resolve(resolved, config)).modules("bf16"))
            == 6
        )


@pytest.mark.parametrize(
    ("gpu", "extra"),
    [
        ("sm89", {"quantization.format": "fp8"}),
        ("sm90", {"quantization.format": "fp8"}),
        ("sm100", {}),
        ("sm100", {"quantization.format": "fp8"}),
        ("sm120-fmha", {"engine.flags.fuse_fp4_quant": "enable"}),
        ("sm120-fmha", {"quantization.kv_cache_dtype": "auto", "engine.flags.fuse_fp4_quant": "enable"}),
        ("sm100", {"engine.flags.use_paged_context_fmha": "disable"}),
    ],
)
def test_what_the_refusal_of_an_output_says_to_type_is_accepted(gpu: str, extra: dict[str, str]) -> None:
    """Each of its alternatives, on the card that was asked for."""
    model = facts(TINY)
    config = {**model.config, "head_dim": 128}

    def check(**more: str) -> None:
        flags = {"model.id": str(TINY), "gpu": gpu, "quantization.keep_bf16": "*.o_proj", **extra, **more}
        asked = schema.resolve({**flags, "target": "engine"})
        checks.keep_patterns(asked.recipe, model, trtllm_flags.resolve(asked, config))

    with pytest.raises(UnsupportedError, match="can't stay in BF16 in this engine") as caught:
        check()
    title = schema.resolve({"model.id": str(TINY), "gpu": gpu, **extra}).recipe.quantization.number_format.title
    assert f"scaled for a layer in {title}" in caught.value.why
    *alternatives, last = caught.value.hint.split(", or ")
    assert last == "keep other layers (--keep-bf16)."
    assert ("--kv-cache-dtype auto" in alternatives[0]) == (len(alternatives) == 2)
    for alternative in alternatives:
        check(**advice.settings(alternative))


def test_norm_quant_fusion_takes_every_layer_for_quantized() -> None:
    with pytest.raises(UnsupportedError, match="norm_quant_fusion"):
        exclude.check_flags({"model.layers.0.mlp.down_proj": BF16}, {"norm_quant_fusion": "enable"})


@pytest.mark.parametrize("value", ["''", "[1, 2]", "{a: b}"])
def test_a_recipe_wants_patterns(value: str) -> None:
    with pytest.raises(BuilderError, match="keep_bf16"):
        schema.resolve({"model.id": "m", "gpu": "cpu"}, sets=[f"quantization.keep_bf16={value}"])


def test_the_plan_names_the_price(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "builder", "plan", "--model", str(TINY), "--gpu", "cpu", "--output", str(tmp_path)]
    argv += ["--keep-bf16", "*.down_proj", "--keep-bf16", "*.0.self_attn.q_proj"]
    done = subprocess.run([*argv, "--json"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)["kept"]
    assert len(found["layers"]["bf16"]) == 6 + 3
    model = facts(TINY, ["*.down_proj", "*.0.self_attn.q_proj"])
    assert found["bytes"]["bf16"] == memory.price(model, ASKED, BF16)
    assert "9 linear layers" in subprocess.run(argv, capture_output=True, text=True, check=True).stdout
