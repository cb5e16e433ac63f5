"""Linear layers left in FP8: what patterns mean, and what becomes of them in every form of the model."""

from __future__ import annotations

import copy
import json
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import exports
import pytest
import torch

from builder import pipeline
from builder.checkpoint import layouts, sharding, validate
from builder.checkpoint.sharding import Parallel
from builder.core.errors import IntegrityError, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.safetensors_io import NewTensor, Tensors
from builder.core.store import Store
from builder.evaluate.runners import local
from builder.evaluate.sensitivity import worker as measuring
from builder.formats import kv_cache
from builder.formats.assignment import ModelFormats
from builder.formats.registry import BF16 as BF16_FORMAT
from builder.formats.registry import FP8
from builder.preflight import checks, memory
from builder.preflight.memory import Serving
from builder.preflight.model_facts import ModelFacts
from builder.quantize import exclude, quantizers, worker
from builder.quantize.simulation import enable_cpu_simulation
from builder.recipe import schema
from builder.reference.model import ReferenceModel
from builder.trtllm import flags as trtllm_flags

TINY, LLAMA = exports.MODELS["qwen3"], exports.MODELS["llama"]
PROSE = exports.DATA / "eval" / "prose.jsonl"
PATTERNS = ["model.layers.1.*", "*.2.self_attn.k_proj", "*.0.mlp.up_proj", "*.3.mlp.down_proj"]
BF16 = ["*.4.self_attn.o_proj"]
ASKED = Serving(max_batch_size=1, max_input_len=64, max_seq_len=128, max_num_tokens=128)
# Two layers to each of three pipeline stages: they agree on their second ones.
SECOND = ["model.layers.1.mlp.*", "model.layers.3.mlp.*", "model.layers.5.mlp.*"]


def facts(source: Path, fp8: list[str] | None = None, kept: list[str] | None = None) -> ModelFacts:
    tensors = {name: (info.dtype, info.shape) for name, info in Tensors(source).items()}
    known = exclude.linears(tensors)
    layers = {"bf16": exclude.keep(kept or [], known), "fp8": exclude.keep(fp8 or [], known, "--keep-fp8")}
    return ModelFacts(layouts.read_json(source / "config.json"), tensors, layers)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(PROSE.read_text().splitlines(keepends=True)[:4]))
    return file


def job(source: Path, rows: Path) -> dict[str, Any]:
    return {"model": str(source), "rows": str(rows), "seq_len": 128, "batch_size": 1, "trust_remote_code": False}


def formats(model: ModelFacts, *, fp8_kv: bool = True) -> ModelFormats:
    cache = kv_cache.FP8 if fp8_kv else kv_cache.AUTO
    return ModelFormats(layers={BF16_FORMAT: model.modules("bf16"), FP8: model.modules("fp8")}, cache=cache)


def calibrated(source: Path, rows: Path, model: ModelFacts, *, fp8_kv: bool = True) -> Any:
    made, batches = worker.load(job(source, rows))
    counts = worker.calibrate(made, batches, formats(model, fp8_kv=fp8_kv))
    assert (counts["fp8_linears"], counts["kept_linears"]) == (len(model.modules("fp8")), len(model.modules("bf16")))
    return made


def write(made: Any, source: Path, directory: Path, model: ModelFacts, *, fp8_kv: bool = True) -> Path:
    """Both layouts, as the quantize stage does. The model stays as it is."""
    return exports.written(made, source, formats(model, fp8_kv=fp8_kv), directory)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Path:
    model = facts(TINY, PATTERNS, BF16)
    return write(calibrated(TINY, rows, model), TINY, tmp_path_factory.mktemp("fp8"), model)


def test_patterns_take_along_what_is_multiplied_with_them() -> None:
    model = facts(TINY, PATTERNS, BF16)
    assert len(model.modules("fp8")) == 7 + 3 + 2 + 1
    assert {f"model.layers.2.self_attn.{x}_proj" for x in "qkv"} < set(model.modules("fp8"))
    assert model.modules("bf16") == ("model.layers.4.self_attn.o_proj",)


@pytest.mark.parametrize(
    ("flags", "error", "says"),
    [
        ({"keep_fp8": "*.donw_proj"}, UsageError, "--keep-fp8 '.*donw_proj' matches no linear layer"),
        ({"keep_fp8": "*"}, UnsupportedError, "All 42 linear layers would stay in FP8"),
        ({"keep_fp8": "*mlp*", "keep_bf16": "*self_attn*"}, UnsupportedError, "nothing is left to quantize"),
        ({"keep_fp8": "*.1.*.q_proj", "keep_bf16": "*.1.*.v_proj"}, UsageError, "both in BF16 and in FP8"),
        ({"keep_fp8": "''"}, UsageError, "matches no linear layer"),
    ],
)
def test_patterns_that_mean_nothing_or_too_much(flags: dict[str, str], error: type[Exception], says: str) -> None:
    asked = schema.resolve({"model.id": str(TINY), "gpu": "cpu", **{f"quantization.{k}": v for k, v in flags.items()}})
    with pytest.raises(error, match=says):
        checks.keep_patterns(asked.recipe, facts(TINY), [])


def test_auto_is_said_for_one_format() -> None:
    base = {"model.id": "m", "gpu": "cpu", "sensitivity.data": "texts.jsonl"}
    with pytest.raises(UsageError, match="both say auto"):
        schema.resolve({**base, "quantization.keep_fp8": "auto:0.1", "quantization.keep_bf16": "auto:0.2"})
    part = schema.resolve({**base, "quantization.keep_fp8": ["auto:0.1", "*.o_proj"]}).recipe.quantization
    assert (part.kept_budget, part.kept_format, part.fp8_patterns) == (0.1, "fp8", ("*.o_proj",))
    with pytest.raises(UsageError, match="keep_fp8: auto chooses"):
        schema.resolve({"model.id": "m", "gpu": "cpu", "quantization.keep_fp8": "auto:0.1"})


@pytest.mark.parametrize("name", exports.MODELS)
@pytest.mark.parametrize("tp", [1, 2])
def test_the_tensorrt_llm_layout_is_modelopts_own(tmp_path: Path, rows: Path, name: str, tp: int) -> None:
    """Byte for byte, in every rank, with quant_cfg.json and what config.json says of the formats."""
    source = exports.MODELS[name]
    model = facts(source, ["*.1.self_attn.*", "*.0.mlp.gate_proj"], ["*.0.self_attn.v_proj"])
    made = calibrated(source, rows, model)
    with torch.inference_mode():
        quantizers.round_weights(made, formats(model))
    exports.export(copy.deepcopy(made), tmp_path / "unused", tmp_path / "modelopt", tp=tp)
    write(made, source, tmp_path, model)
    sharding.split(tmp_path / "tensorrt_llm", tmp_path / "ours", Parallel(tp))
    for rank in range(tp):
        ours, theirs = (
            Tensors(at, [at / f"rank{rank}.safetensors"]) for at in (tmp_path / "ours", tmp_path / "modelopt")
        )
        assert {n: (i.dtype, i.shape) for n, i in ours.items()} == {n: (i.dtype, i.shape) for n, i in theirs.items()}
        assert not [n for n in ours if ours.read(n) != theirs.read(n)]
    layers, configs = (
        [layouts.read_json(tmp_path / at / file) for at in ("ours", "modelopt")]
        for file in ("quant_cfg.json", "config.json")
    )
    assert layers[0] == layers[1]
    assert (
        configs[0]["quantization"]
        == configs[1]["quantization"]
        == {
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": "FP8",
        }
    )
    assert not validate.inspect(tmp_path / "ours").findings


def test_the_hugging_face_layout_says_what_modelopt_says(tmp_path: Path, made: Path) -> None:
    model = facts(TINY, PATTERNS, BF16)
    exports.export(exports.quantized(TINY, kept=model.modules("bf16"), fp8=model.modules("fp8")), tmp_path)
    assert exports.documents(made / "unified") == exports.documents(tmp_path)
    names = {at: {n: (i.dtype, i.shape) for n, i in Tensors(at).items()} for at in (made / "unified", tmp_path)}
    assert names[made / "unified"] == names[tmp_path]
    # TensorRT-LLM 1.2's PyTorch backend takes the layers from a file of their own (_torch/model_config.py).
    layers = layouts.read_json(made / "unified" / "quant_cfg.json")
    said = layouts.read_json(made / "unified" / "hf_quant_config.json")["quantization"]
    assert layers == {key: said[key] for key in ("quant_algo", "kv_cache_quant_algo", "quantized_layers")}
    assert layers["quantized_layers"]["model.layers.2.self_attn.q_proj"] == {"quant_algo": "FP8"}
    assert "model.layers.4.self_attn.o_proj" not in layers["quantized_layers"]


def test_what_is_served_as_one_has_one_scale(made: Path) -> None:
    stored = Tensors(made / "unified")
    for members in (["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]):
        for scale in ("weight_scale", "input_scale"):
            assert len({stored.read(f"model.layers.1.{name}.{scale}") for name in members}) == 1


def test_pipeline_stages_share_one_quant_cfg(tmp_path: Path, rows: Path) -> None:
    model = facts(TINY, SECOND)
    exclude.check_split(model.single, model.config, Parallel(1, 3))
    write(calibrated(TINY, rows, model), TINY, tmp_path, model)
    sharding.split(tmp_path / "tensorrt_llm", tmp_path / "split", Parallel(2, 3))
    layers = layouts.read_json(tmp_path / "split" / "quant_cfg.json")["quantized_layers"]
    assert len(layers) == 2 * 5
    assert layers["transformer.layers.1.mlp.fc"] == {"quant_algo": "FP8"}
    assert layers["transformer.layers.0.mlp.fc"] == {"quant_algo": "NVFP4", "group_size": 16}
    assert not validate.inspect(tmp_path / "split").findings
    whole, split = (ReferenceModel.load(tmp_path / at) for at in ("tensorrt_llm", "split"))
    ids = torch.arange(3, 4000, 97)
    assert torch.equal(whole.forward(ids, whole.new_cache()), split.forward(ids, split.new_cache()))
    for other in (facts(TINY, ["*.0.mlp.*"]), facts(TINY, SECOND, ["*.5.self_attn.*"])):
        with pytest.raises(UnsupportedError, match="not the same in all 3 pipeline stages"):
            exclude.check_split(other.single, model.config, Parallel(1, 3))


@pytest.mark.parametrize("name", exports.MODELS)
def test_the_price_is_to_the_byte_what_is_written(tmp_path: Path, rows: Path, name: str) -> None:
    source = exports.MODELS[name]
    model = facts(source, ["*.1.*", "*.0.self_attn.v_proj"], ["*.0.mlp.down_proj"])
    write(calibrated(source, rows, model), source, tmp_path, model)
    unified = Tensors(tmp_path / "unified")
    assert memory.sizes(model, ASKED).unified == sum(info.nbytes for info in unified.values())
    for tp in (1, 2, 4):
        asked, at = replace(ASKED, tp=tp), tmp_path / f"tp{tp}"
        sharding.split(tmp_path / "tensorrt_llm", at, Parallel(tp))
        held = [Tensors(at, [at / f"rank{rank}.safetensors"]) for rank in range(tp)]
        assert memory.rank_bytes(model, asked) == [sum(info.nbytes for info in one.values()) for one in held]
        plain = memory.rank_bytes(replace(model, layers={}), asked)
        together = memory.price(model, asked, BF16_FORMAT) + memory.price(model, asked, FP8)
        assert together == sum(memory.rank_bytes(model, asked)) - sum(plain)
    # A byte a weight in place of 4.5 bits.
    weights = sum(
        model.tensors[f"{module}.weight"][1][0] * model.tensors[f"{module}.weight"][1][1]
        for module in model.modules("fp8")
    )
    assert memory.price(model, ASKED, FP8) == weights * 7 // 16


def test_the_inspection_accepts_and_counts_them(made: Path) -> None:
    found = validate.inspect(made)
    assert not found.findings
    unified, ours = found.layouts["unified"], found.layouts["tensorrt_llm"]
    assert (unified.linears["nvfp4"], unified.linears["fp8"], unified.linears["kept"]) == (42 - 13 - 1, 13, 1)
    assert (ours.linears["nvfp4"], ours.linears["fp8"], ours.linears["kept"]) == (30 - 9 - 1, 5 + 1 + 2 + 1, 1)
    model, weights = facts(TINY, PATTERNS, BF16), {n: i.nbytes // 2 for n, i in Tensors(TINY).items()}
    bits = {**dict.fromkeys(model.modules("fp8"), 8.0), **dict.fromkeys(model.modules("bf16"), 16.0)}
    linears = {name: weights[f"{name}.weight"] for name in exclude.linears(model.tensors)}
    expected = sum(n * bits.get(name, unified.bits_per_weight) for name, n in linears.items()) / sum(linears.values())
    assert unified.effective_bits == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("layout", ["unified", "tensorrt_llm"])
def test_the_inspection_finds_what_is_wrong_with_them(made: Path, tmp_path: Path, layout: str) -> None:
    unified = layout == "unified"
    module = "model.layers.3.mlp.down_proj" if unified else "transformer.layers.3.mlp.proj"
    names = ("weight_scale", "input_scale") if unified else ("weights_scaling_factor", "activation_scaling_factor")
    shape = () if unified else (1,)
    whole = Tensors(made / layout)[f"{module}.weight"]
    changes: dict[str, NewTensor | None] = {
        f"{module}.{names[0]}": NewTensor(f"{module}.{names[0]}", "F32", shape, [struct.pack("<f", float("nan"))]),
        f"{module}.{names[1]}": None,
        f"{module}.weight": NewTensor(f"{module}.weight", "F8_E4M3", whole.shape, [b"\x7f" * whole.nbytes]),
    }
    found = validate.inspect(exports.rewrite(made / layout, tmp_path / "changed", changes)).findings
    assert {problem.tensor for problem in found} == set(changes)
    copied = exports.rewrite(made / layout, tmp_path / "named", {})
    file = copied / ("hf_quant_config.json" if unified else "quant_cfg.json")
    config = json.loads(file.read_text())
    (config["quantization"] if unified else config)["quantized_layers"][module] = {"quant_algo": "NVFP4"}
    file.write_text(json.dumps(config))
    problems = {(problem.tensor, problem.what) for problem in validate.inspect(copied).findings}
    assert (f"{module}.weight", "is F8_E4M3, not U8") in problems
    if not unified:
        file.unlink()
        with pytest.raises(IntegrityError, match="quant_cfg"):
            validate.inspect(copied)


def test_the_executor_computes_what_modelopt_simulates(tmp_path: Path, rows: Path) -> None:
    """As in test_reference_model.py, in float64: no KV cache, so that its clamped scales don't matter."""
    model = facts(TINY, PATTERNS, BF16)
    simulated = calibrated(TINY, rows, model, fp8_kv=False)
    write(simulated, TINY, tmp_path, model, fp8_kv=False)
    ids = worker.load(job(TINY, rows))[1][0].flatten()[:100]
    enable_cpu_simulation()
    from modelopt.torch.export import unified_export_hf

    with torch.inference_mode():
        unified_export_hf.requantize_resmooth_fused_llm_layers(simulated)
        theirs = simulated.double()(ids[None], use_cache=False).logits[0].float()
    reference = ReferenceModel.load(tmp_path / "tensorrt_llm", torch.float64)
    ours = reference.forward(ids, reference.new_cache())
    assert (ours - theirs).abs().max() <= 2e-6


@pytest.fixture(scope="module")
def runner(rows: Path) -> Callable[..., list[torch.Tensor]]:
    """Logits of the first texts by a runner in transformers."""
    ids = [batch.flatten()[:100].numpy() for batch in worker.load(job(TINY, rows))[1]]
    base = {**job(TINY, rows), "dtype": "auto", "batch_tokens": 512, "kv_cache_dtype": "fp8"}

    def logits(name: str, model: ModelFacts = facts(TINY), **more: Any) -> list[torch.Tensor]:  # noqa: B008
        rules = {"rows": str(rows), "seq_len": 128, "batch_size": 1, "layers": model.layers}
        with torch.no_grad(), getattr(local, name)({**base, "calibration": rules, **more}) as found:
            return list(found.logits(ids))

    return logits


def kl(p: list[torch.Tensor], q: list[torch.Tensor]) -> float:
    pairs = [(a.double().log_softmax(-1), b.double().log_softmax(-1)) for a, b in zip(p, q, strict=True)]
    return float(torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in pairs]).mean())


def test_the_checkpoint_runner_agrees_with_the_simulation(
    made: Path, runner: Callable[..., list[torch.Tensor]]
) -> None:
    """Without the KV cache, whose scales ModelOpt 0.37 exports otherwise than it simulates them."""
    simulated = runner("simulated", facts(TINY, PATTERNS, BF16), kv_cache_dtype="auto")
    stored = runner("checkpoint", unified=str(made / "unified"), kv_cache_dtype="auto")
    assert kl(simulated, stored) < 1e-9  # the same numbers: what another order of a sum changes is left


def test_fp8_loses_less_than_nvfp4_and_more_than_bf16(runner: Callable[..., list[torch.Tensor]]) -> None:
    patterns = ["model.layers.[0-3].*"]
    bf16 = runner("bf16")
    lost = [
        kl(bf16, runner("simulated", model))
        for model in (facts(TINY), facts(TINY, patterns), facts(TINY, [], patterns))
    ]
    assert lost[0] > 1.5 * lost[1] > lost[1] > lost[2] > 0


def flags_of(**more: str) -> dict[str, trtllm_flags.Flag]:
    asked = schema.resolve({"model.id": str(TINY), "quantization.keep_fp8": "*.down_proj", **more})
    config = {**facts(TINY).config, "head_dim": 128}
    flags = trtllm_flags.resolve(asked, config)
    checks.keep_patterns(asked.recipe, facts(TINY), flags)
    return {flag.name: flag for flag in flags}


def test_trtllm_build_takes_the_mix_without_fp8_context_fmha() -> None:
    """builder.py, 1.2, build: NVFP4's GEMM plugin by any layer's format, FP8 FMHA by the checkpoint's."""
    flags = flags_of(gpu="sm100")
    assert flags["gemm_plugin"].value == "nvfp4"
    assert flags["use_fp8_context_fmha"].value == flags["use_paged_context_fmha"].value == "disable"
    assert "R27" in flags["use_paged_context_fmha"].source
    flags_of(gpu="sm100", **{"quantization.keep_bf16": "*.o_proj"})  # FP8 FMHA is off: its scale is not wanted
    with pytest.raises(UnsupportedError, match=r"o_proj can't stay in FP8 in this engine: fuse_fp4_quant"):
        flags_of(gpu="sm120-fmha", **{"quantization.keep_fp8": "*.o_proj", "engine.flags.fuse_fp4_quant": "enable"})


@pytest.mark.parametrize(
    ("fp8", "kept", "fine"),
    [
        ("*.mlp.*", [], True),
        ("*.self_attn.*", [], True),
        ("*.q_proj", [], True),
        ("*.o_proj", [], False),
        ("*.down_proj", ["*.q_proj"], False),
        ("*.down_proj", ["*.self_attn.*"], True),
        ("*.down_proj", ["*.o_proj"], True),
    ],
)
def test_the_llm_class_takes_the_attentions_format_of_q_proj(fp8: str, kept: list[str], fine: bool) -> None:
    asked = schema.resolve(
        {
            "model.id": str(TINY),
            "gpu": "sm120",
            "target": "llmapi",
            "quantization.keep_fp8": fp8,
            "quantization.keep_bf16": kept,
        }
    )
    if fine:
        checks.keep_patterns(asked.recipe, facts(TINY), [])
        return
    with pytest.raises(UnsupportedError, match=r"o_proj in \w+ can't follow"):
        checks.keep_patterns(asked.recipe, facts(TINY), [])


def test_the_llm_class_finds_no_format_for_a_fused_qkv() -> None:
    known = exclude.linears(facts(exports.DATA / "arch-variants" / "phi3").tensors)
    exclude.check_llm_class({known[0]: BF16_FORMAT}, known)
    with pytest.raises(UnsupportedError, match=r"finds no format for .*qkv_proj"):
        exclude.check_llm_class({known[-1]: FP8}, known)


def test_a_version_not_known_to_build_the_mix_is_refused_for_engines_alone() -> None:
    old = {"engine.tensorrt_llm": "1.1.0"}
    with pytest.raises(UnsupportedError, match=r"1\.1\.0 is not known to build NVFP4 with layers in FP8") as caught:
        flags_of(gpu="sm120", **old)
    assert "modeling_utils.py@01ea6d79" in caught.value.why
    flags_of(gpu="cpu", **old)


def test_a_group_in_fp8_is_simulated_as_if_calibrated_for_it(rows: Path, tmp_path: Path) -> None:
    """`auto` builds the mixture that it measured."""
    groups = exclude.groups(exclude.linears(facts(LLAMA).tensors))
    chosen = ["model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.gate_up_proj", "model.layers.1.mlp.down_proj"]
    asked = {"model": str(LLAMA), "calibration": job(LLAMA, rows), "groups": groups, "layers": {}}
    asked |= {"kv_cache_dtype": "fp8", "trust_remote_code": False, "dtype": "auto"}
    ids = torch.arange(5, 60)[None]
    model = measuring.Simulated(asked)
    rest = [group for group in groups if group not in chosen]
    fp8 = [module for group in chosen for module in groups[group]]
    named = measuring.Simulated({**asked, "layers": {"fp8": fp8}, "groups": {group: groups[group] for group in rest}})
    with torch.no_grad():
        before = model.model(ids).logits
        assert torch.equal(named.model(ids).logits, before)  # the layers named are FP8 only in the whole
        with model.quantized(measuring.Quantized(rest, chosen, cache=True)):
            switched = model.model(ids).logits
        assert torch.equal(model.model(ids).logits, before)
        with model.quantized(measuring.Quantized(list(groups), cache=True)):
            assert not torch.equal(model.model(ids).logits, switched)
        with named.quantized(measuring.Quantized(rest, cache=True, named=True)):
            assert torch.equal(named.model(ids).logits, switched)


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "builder", *argv], capture_output=True, text=True)


@pytest.mark.any_version
def test_auto_holds_the_budget_with_fp8_and_the_plan_knows_the_price(tmp_path: Path) -> None:
    argv = ["--model", str(LLAMA), "--gpu", "cpu", "--output", str(tmp_path), "--calib-data", str(PROSE)]
    argv += ["--calib-samples", "8", "--calib-seq-len", "64", "--sensitivity-data", str(PROSE)]
    argv += ["--sensitivity-texts", "8", "--keep-bf16", "*.0.self_attn.o_proj"]
    done = run("sensitivity", *argv, "--json")
    assert done.returncode == 0, done.stderr
    whole = json.loads(done.stdout)["whole"]
    argv += ["--keep-fp8", f"auto:{0.7 * whole}"]
    done = run("quantize", *argv, "--json")
    assert done.returncode == 0, done.stderr
    stages = {stage["stage"]: Path(stage["path"]) for stage in json.loads(done.stdout)["stages"]}
    chosen = json.loads((stages["selection"] / "manifest.json").read_text())["facts"]
    assert chosen["kl"] <= 0.7 * whole < chosen["kl_before"]
    found = validate.inspect(stages["checkpoint"])
    assert not found.findings
    assert found.layouts["unified"].linears["fp8"] == len(chosen["modules"]) > 0
    assert found.layouts["unified"].linears["kept"] == 1
    told = json.loads(run("plan", *argv, "--json").stdout)
    assert set(told["kept"]["layers"]["fp8"]) == set(chosen["modules"])
    priced = replace(facts(LLAMA), layers={"fp8": tuple(chosen["modules"])})
    assert told["kept"]["bytes"]["fp8"] == memory.price(priced, ASKED, FP8)
    assert told["sizes"]["checkpoint"] == sum(found.layouts["tensorrt_llm"].nbytes.values())
    shown = run("plan", *argv).stdout
    assert f"{len(chosen['modules'])} linear layers" in next(
        line for line in shown.splitlines() if "left in FP8" in line
    )


def test_the_reference_engine_has_the_formats_beside_it(tmp_path: Path, rows: Path) -> None:
    asked = schema.resolve(
        {
            "model.id": str(LLAMA),
            "gpu": "cpu",
            "calibration.data": str(rows),
            "calibration.samples": 4,
            "calibration.seq_len": 64,
            "quantization.keep_fp8": "*.1.mlp.*",
        }
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        built = pipeline.build(asked, Store(tmp_path, Output("quiet")), until="engine")
    assert built.engine is not None
    assert built.checkpoint is not None
    assert built.checkpoint.facts["layers"]["fp8"] == [f"model.layers.1.mlp.{x}_proj" for x in ("down", "gate", "up")]
    assert not validate.inspect(built.engine.path).findings
    model = ReferenceModel.load(built.engine.path)
    logits = model.forward(torch.arange(5, 60), model.new_cache())
    assert bool(torch.isfinite(logits).all())
