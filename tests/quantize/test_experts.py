"""Tokens of each expert while the model runs, and the ranges of experts that saw few."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exports
import pytest
import torch
import transformers
from torch import nn

from builder.calibration.coverage import EXPERT_TOKENS
from builder.core.safetensors_io import Tensors
from builder.formats import kv_cache
from builder.formats.assignment import ModelFormats
from builder.quantize import experts, worker

MOE = Path(__file__).parents[1] / "data" / "arch-variants" / "qwen3_moe"
FUSED = int(transformers.__version__.split(".")[0]) >= 5
LAYERS = [f"model.layers.{n}.mlp.experts" for n in range(2)]


def load() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(MOE, dtype=torch.float32).eval()


def routed(model: Any, ids: torch.Tensor) -> dict[str, list[int]]:
    """The choices of each router, from its logits alone."""
    found = {}
    wanted = model.config.num_experts_per_tok

    def record(name: str) -> Any:
        def hook(_: Any, args: Any, out: Any) -> None:
            logits = out[0] if isinstance(out, tuple) else out
            found[name] = torch.bincount(logits.topk(wanted)[1].flatten(), minlength=model.config.num_experts).tolist()

        return hook

    hooks = [
        layer.mlp.gate.register_forward_hook(record(f"model.layers.{n}.mlp.experts"))
        for n, layer in enumerate(model.model.layers)
    ]
    with torch.inference_mode():
        model(ids)
    for hook in hooks:
        hook.remove()
    return found


def test_counts_are_the_routers_choices_and_hooks_are_removed() -> None:
    model, ids = load(), torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode(), experts.counted(model) as tokens:
        model(ids)
        model(ids)
    expected = routed(model, ids)
    assert list(tokens.layers) == LAYERS
    assert tokens.layers == {name: [2 * n for n in seen] for name, seen in expected.items()}
    assert all(sum(seen) == 2 * ids.numel() * 2 for seen in tokens.layers.values())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_dense_model_has_none() -> None:
    with experts.counted(nn.Sequential(nn.Linear(4, 4))) as tokens:
        pass
    assert tokens.facts() == {}
    assert experts.widen_ranges(nn.Linear(4, 4), tokens) == {}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], Path]]:
    """The worker's facts and directory for a text of a few tokens."""
    directory = tmp_path_factory.mktemp("moe")
    rows = directory / "rows.jsonl"
    rows.write_text('{"text": "Some experts see little of a short text."}\n')
    show, handlers = warnings.showwarning, list(logging.getLogger("modelopt").handlers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        facts = worker.run(
            {
                "model": str(MOE), "rows": str(rows), "destination": str(directory / "made"), "seq_len": 64,
                "batch_size": 1, "kv_cache_dtype": "auto", "trust_remote_code": False,
            }
        )  # fmt: skip
    yield facts, directory / "made" / "unified"
    warnings.showwarning = show
    logging.getLogger("modelopt").handlers = handlers


def test_the_workers_facts_hold_the_tokens_and_the_rare_experts(made: tuple[dict[str, Any], Path]) -> None:
    facts, _ = made
    tokens = facts["coverage"]["tokens"]
    assert list(facts["experts"]) == LAYERS
    assert all(sum(seen) == 2 * tokens for seen in facts["experts"].values())
    assert tokens < EXPERT_TOKENS
    # ModelOpt 0.37 sends all tokens to all experts of this family.
    assert facts["experts_see_all"] is not FUSED
    assert facts.get("rare_experts", {}) == ({layer: [0, 1, 2, 3] for layer in LAYERS} if FUSED else {})


def test_every_expert_has_an_input_scale(made: tuple[dict[str, Any], Path]) -> None:
    """Also one that no token reached; with transformers 5, where all share a quantizer, the same."""
    _, unified = made
    stored = Tensors(unified)
    for layer in LAYERS:
        for projection in ("gate_proj", "up_proj", "down_proj"):
            scales = [stored.read(f"{layer}.{n}.{projection}.input_scale") for n in range(4)]
            assert all(torch.frombuffer(bytearray(one), dtype=torch.float32).item() > 0 for one in scales)
            assert not FUSED or len({bytes(one) for one in scales}) == 1


@pytest.mark.parametrize("variant", ["llama", "qwen3_moe"])
def test_weights_are_read_once_and_all_ranges_stay_those_of_modelopt(variant: str) -> None:
    """Also those of experts, of which 0.37 reads a weight first when a token reaches it."""
    source, formats = MOE.with_name(variant), ModelFormats(cache=kv_cache.FP8)
    batches = exports.batches()
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    ids = [batch % model.config.vocab_size for batch in batches]
    seen: dict[str, int] = {}
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        from modelopt.torch.quantization.calib import MaxCalibrator

        collect = MaxCalibrator.collect

        def counted(self: Any, x: torch.Tensor) -> None:
            if isinstance(x, nn.Parameter):
                seen[str(x.data_ptr())] = seen.get(str(x.data_ptr()), 0) + 1
            collect(self, x)

        patch.setattr(MaxCalibrator, "collect", counted)
        worker.calibrate(model, ids, formats)
    theirs = dict(exports.quantized(source).named_modules())
    ours = {name: one for name, one in model.named_modules() if getattr(one, "_amax", None) is not None}
    assert sum("weight_quantizer" in name for name in ours) >= 14
    assert max(seen.values()) == (1 if exports.MODELOPT > (0, 40) or variant == "llama" else 2)  # see_all, in one batch
    for name, one in ours.items():
        assert torch.equal(one.amax, theirs[name].amax), name


class Quantizer(nn.Module):
    """As much of ModelOpt's TensorQuantizer as holds a range."""

    is_enabled = True

    @property
    def amax(self) -> torch.Tensor | None:
        return getattr(self, "_amax", None)

    @amax.setter
    def amax(self, value: torch.Tensor) -> None:
        self.register_buffer("_amax", value)


def expert(amax: float | None) -> nn.Module:
    made = nn.Module()
    made.up_proj = nn.Module()
    made.up_proj.input_quantizer = Quantizer()
    if amax is not None:
        made.up_proj.input_quantizer.amax = torch.tensor(amax)
    return made


def test_rare_experts_of_their_own_modules_get_the_layers_widest_range() -> None:
    model = nn.Module()
    model.experts = nn.ModuleList([expert(2.0), expert(8.0), expert(0.5), expert(None), expert(1.0)])
    kept = model.experts[4].up_proj.input_quantizer
    kept.is_enabled = False  # left in BF16
    tokens = experts.RoutedTokens({"experts": [500, 600, EXPERT_TOKENS - 1, 0, 3]})
    assert experts.widen_ranges(model, tokens) == {"experts": [2, 3, 4]}
    assert [one.up_proj.input_quantizer.amax.item() for one in model.experts] == [2.0, 8.0, 8.0, 8.0, 1.0]
    tokens.see_all = True
    assert experts.widen_ranges(model, tokens) == {}
