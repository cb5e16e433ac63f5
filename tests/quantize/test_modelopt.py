"""The quantize stage with the installed ModelOpt and transformers: in its own process and, where it is enough, here."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from builder.architectures.catalog import UNKNOWN
from builder.calibration.rows import Calibration, calibrate
from builder.checkpoint.layouts import Checkpoint
from builder.core.errors import StageError, UnsupportedError
from builder.core.output import Output
from builder.core.safetensors_io import Tensors
from builder.core.store import Store
from builder.formats import kv_cache, registry
from builder.formats.arithmetic import nvfp4
from builder.formats.assignment import ModelFormats
from builder.hub.snapshot import Snapshot, fetch
from builder.quantize import modelopt, quantizers, worker
from builder.quantize.modelopt import QuantizeRequest, check, quantize
from builder.recipe import schema
from builder.recipe.quantization import Quantization

DATA = Path(__file__).parents[1] / "data"
TINY = DATA / "tiny-qwen3"
LLAMA = DATA / "arch-variants" / "llama"
LINEARS = 6 * 7  # layers, projections

Build = Callable[..., Checkpoint]


def inputs(store: Store, model: Path, rows: Path) -> tuple[Snapshot, Calibration, schema.Calibration]:
    part = schema.Calibration(data=str(rows), samples=4, seq_len=64)
    return fetch(schema.Model(id=str(model)), store=store), calibrate(part, store=store), part


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join((DATA / "eval" / "prose.jsonl").read_text().splitlines(keepends=True)[:4]))
    return file


@pytest.fixture(scope="module")
def build(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Runs the stage on the tiny model in a store of its own, or in a given one."""

    def run(store: Store | None = None, model: Path = TINY) -> Checkpoint:
        store = store or Store(tmp_path_factory.mktemp("store"), Output("quiet"))
        snapshot, calibration, part = inputs(store, model, rows)
        return quantize(snapshot, calibration, QuantizeRequest(Quantization(), part), store=store)

    return run


@pytest.fixture(scope="module")
def checkpoint(build: Build) -> Checkpoint:
    return build()


@pytest.fixture
def run_here(rows: Path, tmp_path: Path) -> Iterator[Callable[..., dict[str, Any]]]:
    """The child's work in this process, which has ModelOpt loaded already; what it changes is put back."""
    show, handlers = warnings.showwarning, list(logging.getLogger("modelopt").handlers)

    def run(model: Path, **job: Any) -> dict[str, Any]:
        defaults = {"seq_len": 64, "batch_size": 1, "kv_cache_dtype": "fp8", "trust_remote_code": False}
        job = {**defaults, "rows": str(rows), **job}
        return worker.run({**job, "model": str(model), "destination": str(tmp_path / "made")})

    yield run
    warnings.showwarning = show
    logging.getLogger("modelopt").handlers = handlers


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A copy whose weights and configuration may be changed."""
    return Path(shutil.copytree(LLAMA, tmp_path / "llama"))


def change_weights(model: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    file = model / "model.safetensors"
    changed = {name: change(name, tensor).contiguous() for name, tensor in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_the_same_input_gives_the_same_bytes(checkpoint: Checkpoint, build: Build) -> None:
    again = build()
    assert again.path != checkpoint.path
    assert bytes_of(again.unified) == bytes_of(checkpoint.unified)
    assert bytes_of(again.tensorrt_llm) == bytes_of(checkpoint.tensorrt_llm)
    assert again.digest == checkpoint.digest


def test_it_is_found_the_second_time_and_remembers_what_it_saw(checkpoint: Checkpoint, build: Build) -> None:
    store = Store(checkpoint.path.parents[1], Output("quiet"))
    assert build(store).path == checkpoint.path
    assert store.done[-1].stage == "checkpoint"
    assert store.done[-1].cached
    facts = checkpoint.facts
    assert (facts["quantized_linears"], facts["kv_scales"], facts["large_kv"]) == (LINEARS, 12, 0)
    assert facts["calibration_tokens"] > 100
    assert "builder.quantize.worker" in Path(facts["log"]).read_text()


def test_only_linear_layers_are_quantized(checkpoint: Checkpoint) -> None:
    """Norms, embedding and lm_head are the source's, bit by bit; each linear layer has its four tensors."""
    source = {name: t for file in TINY.glob("*.safetensors") for name, t in load_file(file).items()}
    made = load_file(checkpoint.unified / "model.safetensors")
    quantized = {name for name in source if "_proj." in name}
    assert len(quantized) == LINEARS
    for name, tensor in source.items():
        if name not in quantized:
            assert torch.equal(made[name].view(torch.int16), tensor.view(torch.int16)), name
            continue
        stem = name.removesuffix(".weight")
        scale, whole, input_scale = (made[f"{stem}.{s}"] for s in ("weight_scale", "weight_scale_2", "input_scale"))
        assert made[name].dtype == torch.uint8
        assert scale.dtype == torch.float8_e4m3fn
        assert whole > 0
        assert input_scale > 0
        again = nvfp4.quantize(tensor, whole)
        assert torch.equal(made[name], again[0]), name
        assert torch.equal(scale.float(), again[1].float()), name
        error = nvfp4.dequantize(made[name], scale, whole, torch.float32) - tensor.float()
        assert 0.08 < error.norm() / tensor.float().norm() < 0.11, name
    kv = [name for name in made if name.endswith(("k_scale", "v_scale"))]
    assert len(kv) == 12
    assert len(made) == len(source) + 3 * LINEARS + len(kv)


def test_what_was_written_loads_and_generates(checkpoint: Checkpoint) -> None:
    """By the installed transformers, 4.57 or 5: configuration, tokenizer, and the weights once they are unpacked."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(checkpoint.unified)
    assert config.quantization_config["quant_algo"] == "NVFP4"
    del config.quantization_config  # transformers does not run ModelOpt's NVFP4 itself
    made = load_file(checkpoint.unified / "model.safetensors")
    weights = {}
    for name, tensor in made.items():
        if name.endswith(".weight") and tensor.dtype == torch.uint8:
            scale, whole = made[f"{name}_scale"], made[f"{name}_scale_2"]
            tensor = nvfp4.dequantize(tensor, scale, whole, torch.bfloat16)
        if name.endswith((".weight", ".bias")):
            weights[name] = tensor
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.load_state_dict(weights, strict=True)
    original = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.bfloat16).eval()

    tokenizer, theirs = AutoTokenizer.from_pretrained(checkpoint.unified), AutoTokenizer.from_pretrained(TINY)
    chat = [{"role": "user", "content": "What does dict.get do? é日本"}]
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    assert torch.equal(ids, theirs(prompt, return_tensors="pt").input_ids)
    with torch.inference_mode():
        ours, full = model(ids).logits.float(), original(ids).logits.float()
        answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert torch.corrcoef(torch.stack((ours.flatten(), full.flatten())))[0, 1] > 0.98
    assert len(answer) > 3
    assert tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_both_spellings_of_the_rotary_base_are_there(checkpoint: Checkpoint) -> None:
    """transformers 4.57 reads rope_theta, and takes 10000 where it is absent; 5 reads rope_parameters."""
    config = json.loads((checkpoint.unified / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0


def test_kv_cache_auto_leaves_the_cache_alone(run_here: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    assert run_here(LLAMA, kv_cache_dtype="auto")["kv_scales"] == 0
    assert not [name for name in load_file(tmp_path / "made/unified/model.safetensors") if name.endswith("v_scale")]
    config = json.loads((tmp_path / "made/tensorrt_llm/config.json").read_text())
    assert config["quantization"]["kv_cache_quant_algo"] is None


def test_large_kv_activations_are_counted(run_here: Callable[..., dict[str, Any]], llama: Path) -> None:
    change_weights(llama, lambda name, t: t * 1000 if "v_proj" in name else t)
    summary = run_here(llama)
    assert (summary["large_kv"], summary["kv_scales"]) == (2, 4)


def test_large_scales_are_reported_by_the_title_of_the_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = {"quantized_linears": 1, "large_kv": 2, "kv_scales": 4, "no_tensorrt_llm": ""}
    summary = {**counts, "calibration_tokens": 0, "coverage": {}}
    modelopt.checkpoint_facts(summary, Store(tmp_path, Output("plain")), {}, ModelFormats(cache=kv_cache.NVFP4))
    assert "so an NVFP4 KV cache may cost accuracy" in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["phi3", "gemma2", "gemma3_text", "qwen3_moe"])
def test_other_decoders_get_the_unified_layout(
    run_here: Callable[..., dict[str, Any]], tmp_path: Path, variant: str
) -> None:
    """ModelOpt quantizes them; their TensorRT-LLM layout isn't known here, and the summary says so."""
    summary = run_here(DATA / "arch-variants" / variant)
    assert "no TensorRT-LLM layout" in summary["no_tensorrt_llm"]
    assert summary["quantized_linears"]
    assert summary["kv_scales"] == 4
    assert (tmp_path / "made/unified/hf_quant_config.json").is_file()
    assert not (tmp_path / "made/tensorrt_llm").exists()


def test_sizes_that_are_no_multiples_of_16_are_refused_before_anything_runs(llama: Path, build: Build) -> None:
    change_weights(llama, lambda name, t: t[:, :120] if "down_proj" in name else t[:120] if ".mlp." in name else t)
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "intermediate_size": 120}))
    with pytest.raises(UnsupportedError, match="not a multiple of 16") as caught:
        build(model=llama)
    assert "model.layers.0.mlp.down_proj.weight [64, 120]" in caught.value.why


def test_embeddings_and_routers_may_have_any_size(tmp_path: Path) -> None:
    names = ("model.embed_tokens", "lm_head", "model.layers.0.mlp.gate", "model.norm")
    save_file({f"{name}.weight": torch.zeros(4, 20) for name in names}, tmp_path / "model.safetensors")
    check(Tensors(tmp_path), UNKNOWN)


def test_the_child_refuses_such_sizes_too(rows: Path, tmp_path: Path) -> None:
    """The model's own modules decide, where the names in the files told nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    with pytest.raises(UnsupportedError, match="not a multiple of 16") as caught:
        worker.calibrate(model, [torch.ones(1, 4, dtype=torch.int64)], ModelFormats(cache=kv_cache.FP8))
    assert "model.layers.0.mlp.down_proj [32, 40]" in caught.value.why


def test_joined_experts_are_refused_with_every_format_that_needs_no_scales_of_inputs() -> None:
    model = torch.nn.Module()
    model.experts = torch.nn.Module()
    model.experts.down_proj = torch.nn.Parameter(torch.zeros(2, 4, 4))
    with pytest.raises(UnsupportedError, match="can't quantize the experts") as caught:
        quantizers._check_not_joined(model, registry.get("int4_awq"))
    assert caught.value.hint.endswith(
        "that the card runs (`builder gpus`): --format nvfp4, fp8, bf16, fp8_pc_pt, w4a16_nvfp4"
    )
    quantizers._check_not_joined(model, registry.get("nvfp4"))


def test_an_attention_that_modelopt_does_not_know_is_not_left_in_silence() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    model.config.num_hidden_layers = 2  # one layer more than ModelOpt finds attention in
    with pytest.raises(UnsupportedError, match="KV cache of") as caught:
        worker.calibrate(model, [torch.ones(1, 4, dtype=torch.int64)], ModelFormats(cache=kv_cache.FP8))
    assert "--kv-cache-dtype auto" in caught.value.hint


@pytest.mark.any_version
def test_the_childs_errors_keep_their_kind(llama: Path, build: Build, tmp_path: Path) -> None:
    """A model type that no causal LM of transformers has: found in the child, exit code 3 in the parent."""
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"model_type": "t5"}))
    store = Store(tmp_path / "store", Output("quiet"))
    with pytest.raises(UnsupportedError, match="no causal language model"):
        build(store, model=llama)
    assert not list((store.root / "checkpoint").iterdir())


@pytest.mark.any_version
def test_a_crash_of_the_child_shows_the_end_of_its_log(
    llama: Path, build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken installation: another package lies where ModelOpt should."""
    (tmp_path / "broken" / "modelopt").mkdir(parents=True)
    (tmp_path / "broken" / "modelopt" / "__init__.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.setitem(modelopt.ENVIRONMENT, "PYTHONPATH", str(tmp_path / "broken"))
    store = Store(tmp_path / "store", Output("quiet"))
    with pytest.raises(StageError) as caught:
        build(store, model=llama)
    log = Path(caught.value.hint.split()[-1])
    assert "Traceback" in log.read_text()
    assert caught.value.why
    assert not list((store.root / "checkpoint").iterdir())


@pytest.mark.parametrize(
    ("error", "kind", "what"),
    [
        (OSError(28, "No space left on device"), StageError, "is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), StageError, "is full"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), UnsupportedError, "does not fit"),
        (MemoryError(), UnsupportedError, "does not fit"),
    ],
)
def test_a_full_disk_and_too_little_memory_are_named(error: Exception, kind: type[Exception], what: str) -> None:
    known = worker.known(error, {"destination": "/somewhere"})
    assert type(known) is kind
    assert what in known.what
    assert worker.known(ZeroDivisionError(), {"destination": ""}) is None
