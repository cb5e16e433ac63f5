"""--format bf16: the model's own weights in both layouts, without ModelOpt and without calibration."""

from __future__ import annotations

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any

import exports
import families
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from builder import pipeline
from builder.checkpoint import layouts, sharding
from builder.checkpoint.layouts import Checkpoint
from builder.checkpoint.sharding import Parallel
from builder.core.errors import IntegrityError, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.safetensors_io import Tensors
from builder.core.store import Store
from builder.evaluate.runners import local
from builder.hub.snapshot import fetch
from builder.plan import plan
from builder.preflight.model_facts import ModelFacts
from builder.preflight.prepare import prepare
from builder.quantize import unquantized
from builder.recipe import schema
from builder.reference.model import ReferenceModel


def asked(model: Path, **more: Any) -> schema.Resolved:
    values = {
        "model.id": str(model),
        "gpu": "cpu",
        "quantization.format": "bf16",
        "quantization.kv_cache_dtype": "auto",
    }
    return schema.resolve(values | {key.replace("__", "."): value for key, value in more.items()})


def built(model: Path, root: Path) -> Checkpoint:
    made = pipeline.build(asked(model), Store(root, Output("quiet")), until="checkpoint")
    assert made.calibration is None
    assert made.checkpoint is not None
    return made.checkpoint


@pytest.mark.parametrize("name", exports.MODELS)
def test_both_layouts_hold_the_models_own_bytes(tmp_path: Path, name: str) -> None:
    source = exports.MODELS[name]
    made = built(source, tmp_path / "out")
    original, unified = Tensors(source), Tensors(made.unified)
    assert all(unified.read(name) == original.read(name) for name in unified)
    assert set(original) - set(unified) <= {"lm_head.weight"}
    assert not (made.unified / "hf_quant_config.json").exists()
    for tp in (1, 2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
        exports.export(copy.deepcopy(model), tmp_path / "unused", tmp_path / f"tp{tp}", tp=tp)
        sharding.split(made.tensorrt_llm, tmp_path / f"split{tp}", Parallel(tp))
        for rank in range(tp):
            held = [Tensors(tmp_path, [tmp_path / f"{at}{tp}" / f"rank{rank}.safetensors"]) for at in ("split", "tp")]
            ours, theirs = ({n: (i.dtype, i.shape, one.read(n)) for n, i in one.items()} for one in held)
            assert ours == theirs
    said = layouts.read_json(made.tensorrt_llm / "config.json")["quantization"]
    assert said == {"quant_algo": None, "kv_cache_quant_algo": None}


def test_the_plan_knows_its_bytes_and_that_nothing_is_calibrated(tmp_path: Path) -> None:
    source, store = exports.MODELS["llama"], Store(tmp_path, Output("quiet"))
    prepared = prepare(asked(source), store)
    made = built(source, tmp_path)
    assert prepared.sizes.unified == sum(info.nbytes for info in Tensors(made.unified).values())
    assert prepared.sizes.checkpoint == sum(info.nbytes for info in Tensors(made.tensorrt_llm).values())
    found = plan(asked(source), Store(tmp_path, Output("quiet"), dry=True))
    states = {stage: state for stage, state, _ in found.stages}
    assert states["checkpoint"] == "cached"
    assert found.prepared.calibration is None


def test_the_executor_and_eval_compute_what_the_model_computes(tmp_path: Path) -> None:
    source = exports.MODELS["llama"]
    made = built(source, tmp_path)
    job = {"model": str(source), "trust_remote_code": False, "dtype": "float32", "batch_tokens": 512}
    ids = np.arange(5, 60)
    with torch.no_grad(), local.bf16({**job, "kv_cache_dtype": "auto"}) as runner:
        theirs = next(iter(runner.logits([ids]))).clone()
    with torch.no_grad(), local.checkpoint({**job, "kv_cache_dtype": "auto", "unified": str(made.unified)}) as runner:
        assert torch.equal(next(iter(runner.logits([ids]))), theirs)
    model = ReferenceModel.load(made.tensorrt_llm)
    assert (model.forward(torch.from_numpy(ids), model.new_cache()) - theirs).abs().max() < 1e-4


@pytest.mark.parametrize(("stored", "served"), [(torch.float32, "bfloat16"), (torch.float16, "float16")])
def test_weights_are_rounded_to_the_dtype_that_is_served(tmp_path: Path, stored: torch.dtype, served: str) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for file in exports.MODELS["llama"].iterdir():
        if file.suffix == ".json":
            (source / file.name).write_bytes(file.read_bytes())
    config = layouts.read_json(source / "config.json")
    layouts.write_json(source / "config.json", {**config, "dtype": served, "torch_dtype": served})
    tensors = {
        name: tensor.to(stored) * 1.0009
        for name, tensor in load_file(exports.MODELS["llama"] / "model.safetensors").items()
    }
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    made = load_file(built(source, tmp_path / "out").unified / "model.safetensors")
    for name, tensor in made.items():
        assert torch.equal(tensor, tensors[name].to(getattr(torch, served))), name


def test_an_fp8_cache_beside_bf16_weights_is_for_engines_only(
    tmp_path: Path,
) -> None:
    source = exports.MODELS["llama"]
    flags = {"quantization__kv_cache_dtype": "fp8", "calibration__data": str(exports.DATA / "eval" / "prose.jsonl")}
    part = asked(source, **flags, calibration__samples=4, calibration__seq_len=64)
    made = pipeline.build(part, Store(tmp_path, Output("quiet")), until="checkpoint")
    assert made.checkpoint is not None
    said = layouts.read_json(made.checkpoint.tensorrt_llm / "config.json")["quantization"]
    assert said == {"quant_algo": None, "kv_cache_quant_algo": "FP8"}
    scales = [name for name in Tensors(made.checkpoint.tensorrt_llm) if name.endswith("cache_scaling_factor")]
    assert len(scales) == 2 * 3
    model = ReferenceModel.load(made.checkpoint.tensorrt_llm)
    assert bool(torch.isfinite(model.forward(torch.arange(5, 60), model.new_cache())).all())
    with pytest.raises(UnsupportedError, match="takes no FP8 KV cache beside weights in BF16") as caught:
        prepare(asked(source, gpu="sm120", target="llmapi", **flags), Store(tmp_path, Output("quiet"), dry=True))
    assert "--kv-cache-dtype auto" in caught.value.hint


def test_there_is_nothing_to_keep(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        asked(exports.MODELS["llama"], quantization__keep_bf16="*.down_proj")
    assert "bf16 quantizes no layer" in f"{caught.value.what} {caught.value.why}"


def test_other_families_get_the_tensors_of_the_plan(tmp_path: Path) -> None:
    """GLM-4.5: a router's bias stays in float32, layers that predict further tokens are left out, and what has no
    TensorRT-LLM layout is inspected too."""
    source = tmp_path / "model"
    config = families.write("glm4_moe", source) | {"num_nextn_predict_layers": 1}  # transformers 4 leaves it out
    layouts.write_json(source / "config.json", config)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(exports.DATA / "tiny-qwen3" / file, source)
    tensors = load_file(source / "model.safetensors")
    [bias] = [name for name in tensors if name.endswith("e_score_correction_bias")]
    tensors |= {bias: torch.full_like(tensors[bias], 1.001, dtype=torch.float32)}
    tensors |= {f"model.layers.{config['num_hidden_layers']}.eh_proj.weight": torch.ones(64, 128, dtype=torch.bfloat16)}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    store = Store(tmp_path / "out", Output("quiet"))
    snapshot = fetch(schema.Model(id=str(source)), store=store)
    made = unquantized.write_checkpoint(snapshot, store=store)
    stored = {name: (info.dtype, info.shape) for name, info in Tensors(made.unified).items()}
    assert stored == ModelFacts(snapshot.config, {n: (i.dtype, i.shape) for n, i in Tensors(source).items()}).written
    assert torch.equal(load_file(made.unified / "model.safetensors")[bias], tensors[bias])
    assert set(made.facts["inspection"]["layouts"]) == {"unified"}
    tensors["model.layers.1.self_attn.o_proj.weight"][3, 5] = torch.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IntegrityError, match=r"o_proj\.weight.* NaN"):
        unquantized.write_checkpoint(fetch(schema.Model(id=str(source)), store=store), store=store)
