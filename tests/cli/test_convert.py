"""`builder convert`: what it prints, and how it refuses."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from builder.checkpoint import conversion
from builder.cli import keep, main
from builder.core.safetensors_io import NewTensor, write

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 16,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
LINEARS = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (16, 32), "self_attn.v_proj": (16, 32),
           "self_attn.o_proj": (32, 32), "mlp.gate_proj": (64, 32), "mlp.up_proj": (64, 32),
           "mlp.down_proj": (32, 64)}  # fmt: skip

SLOW = """
import os, sys, time
copy = os.copy_file_range
os.copy_file_range = lambda source, target, n, *at: (time.sleep(0.02), copy(source, target, min(n, 1 << 20), *at))[1]
from builder.cli.main import main
sys.exit(main(["convert", *sys.argv[1:], "--to", "compressed-tensors"]))
"""


def checkpoint(directory: Path, *, scale: float = 0.001, wide: int = 0) -> Path:
    """A unified NVFP4 checkpoint of one layer; `wide` megabytes of an embedding make it slow to convert."""
    directory.mkdir(parents=True)
    norms = {"model.norm": 32, "model.layers.0.self_attn.q_norm": 16, "model.layers.0.self_attn.k_norm": 16}
    norms |= {f"model.layers.0.{name}_layernorm": 32 for name in ("input", "post_attention")}
    floats = {"model.embed_tokens": (16 + wide * 15625, 32)} | {name: (size,) for name, size in norms.items()}
    made = [NewTensor(f"{n}.weight", "BF16", s, [b"\x80\x3f" * (s[0] * (s[1:] or (1,))[0])]) for n, s in floats.items()]
    for name, (rows, columns) in LINEARS.items():
        module = f"model.layers.0.{name}"
        made.append(NewTensor(f"{module}.weight", "U8", (rows, columns // 2), [b"\x21" * (rows * columns // 2)]))
        made.append(
            NewTensor(f"{module}.weight_scale", "F8_E4M3", (rows, columns // 16), [b"\x38" * (rows * columns // 16)])
        )
        for leaf, value in (("weight_scale_2", scale), ("input_scale", 0.01)):
            made.append(NewTensor(f"{module}.{leaf}", "F32", (), [struct.pack("<f", value)]))
    write(directory / "model.safetensors", made, {"format": "pt"})
    quantization = {
        "quant_algo": "NVFP4",
        "kv_cache_quant_algo": None,
        "group_size": 16,
        "exclude_modules": ["lm_head"],
    }
    content = {"producer": {"name": "modelopt", "version": "0.47.0"}, "quantization": quantization}
    (directory / "hf_quant_config.json").write_text(json.dumps(content))
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer_config.json").write_text("{}")
    return directory


def run(*argv: object) -> int:
    return main.main([str(word) for word in argv])


def test_it_says_what_it_wrote_and_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(tmp_path / "here")
    assert run("convert", source, tmp_path / "there", "--to", "compressed-tensors") == 0
    said = capsys.readouterr().out
    assert f"Check it: builder inspect {tmp_path / 'there'}" in said
    assert (tmp_path / "there" / "tokenizer_config.json").read_text() == "{}"
    assert run("convert", tmp_path / "there", tmp_path / "back", "--to", "unified", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["layout"] == "unified"
    assert told["files"] == ["model.safetensors"]
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_checkpoint_of_the_store_is_found_by_its_layouts(tmp_path: Path) -> None:
    checkpoint(tmp_path / "artifact" / "unified")
    assert run("convert", tmp_path / "artifact", tmp_path / "there", "--to", "compressed-tensors", "-q") == 0


def test_scales_that_can_not_be_right_are_converted_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = checkpoint(tmp_path / "here", scale=float("nan"))
    assert run("convert", source, tmp_path / "there", "--to", "compressed-tensors") == 0
    said = capsys.readouterr().err
    assert "7 scales are not finite and positive: model.layers.0.mlp.down_proj.weight_scale_2, " in said


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["nowhere", "new", "--to", "unified"], 2, "There is no directory nowhere"),
        (["empty", "new", "--to", "unified"], 2, "empty holds no quantized checkpoint"),
        (["here", "new", "--to", "unified"], 2, "in this layout already"),
        (["here", "empty", "--to", "compressed-tensors"], 2, "empty exists"),
        (["here", "new", "--to", "compressed-tensors", "--shard-size", "0GB"], 2, "'0GB' is not a size"),
        (["here", "new", "--to", "compressed-tensors", "--shard-size", "5"], 2, "Write it as 500MB or 5GB"),
        (["lying", "new", "--to", "compressed-tensors"], 6, "the index and the files disagree"),
        (["cut", "new", "--to", "compressed-tensors"], 6, "is truncated"),
        (["plain", "new", "--to", "compressed-tensors"], 3, "has no quantization that is known here"),
    ],
)
def test_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    words: list[str], code: int, message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("here", "lying", "cut", "plain"):
        checkpoint(tmp_path / name)
    Path("empty").mkdir()
    index = {"weight_map": {"model.norm.weight": "model.safetensors"}}
    Path("lying/model.safetensors.index.json").write_text(json.dumps(index))
    with open("cut/model.safetensors", "r+b") as file:
        file.truncate(os.path.getsize("cut/model.safetensors") - 1)
    Path("plain/hf_quant_config.json").unlink()
    assert run("convert", *words) == code
    assert message in capsys.readouterr().err
    assert not Path("new").exists()
    assert not list(Path().glob(".*"))


def test_an_unknown_layout_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run("convert", tmp_path, tmp_path / "new", "--to", "gguf")
    assert ended.value.code == 2
    assert "compressed-tensors" in capsys.readouterr().err
    assert set(keep.LAYOUTS) == set(conversion.LAYOUTS)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_conversion_leaves_no_destination(tmp_path: Path, how: signal.Signals) -> None:
    source = checkpoint(tmp_path / "here", wide=200)
    child = subprocess.Popen([sys.executable, "-c", SLOW, source, tmp_path / "there"])
    until = time.monotonic() + 60
    while not list(tmp_path.glob(".there.*/model.safetensors")) and time.monotonic() < until:
        time.sleep(0.02)
    child.send_signal(how)
    assert child.wait(60) != 0
    assert not (tmp_path / "there").exists()
    assert bool(list(tmp_path.glob(".there.*"))) == (how is signal.SIGKILL)
    assert run("convert", source, tmp_path / "there", "--to", "compressed-tensors", "-q") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "there"]


def test_a_type_without_effect_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = checkpoint(tmp_path / "source")
    assert main.main(["convert", str(source), str(tmp_path / "made"), "--to", "unified", "--dtype", "fp16"]) != 0
    assert "--dtype has no effect with --to unified" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()
