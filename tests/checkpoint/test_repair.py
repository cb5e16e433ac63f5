"""`builder repair` replaces scales that are not numbers, by its rules; its patch can be undone, byte for byte."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import struct
from pathlib import Path

import exports
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.checkpoint import conversion, layouts, repair, validate
from builder.checkpoint.repair_rules import Scale, propose
from builder.cli import main
from builder.core.errors import IntegrityError, UnsupportedError, UsageError
from builder.core.safetensors_io import NewTensor, Tensors, read_header, read_metadata
from builder.model import completeness

L = "model.layers."
NAN = math.nan


def scale(name: str, value: float) -> NewTensor:
    return NewTensor(name, "F32", (), [struct.pack("<f", value)])


def number(tensors: Tensors, name: str) -> float:
    return float(struct.unpack("<f", tensors.read(name))[0])


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


@pytest.fixture
def sound(checkpoints: dict[str, Path]) -> Path:
    return checkpoints["qwen3"] / "unified"


BAD = {
    f"{L}0.mlp.up_proj.input_scale": NAN,
    f"{L}1.mlp.down_proj.input_scale": 1e-44,
    f"{L}2.self_attn.k_proj.k_scale": -1.0,
    f"{L}3.self_attn.q_proj.weight_scale_2": math.inf,
    f"{L}4.mlp.down_proj.weight_scale_2": 0.0,
    f"{L}2.mlp.down_proj.input_scale": 1.8e25,
}


@pytest.fixture
def damaged(sound: Path, tmp_path: Path) -> Path:
    changes: dict[str, NewTensor | None] = {name: scale(name, value) for name, value in BAD.items()}
    return exports.rewrite(sound, tmp_path / "damaged", {**changes, f"{L}5.self_attn.o_proj.input_scale": None})


def test_a_repaired_checkpoint_is_sound_and_undone_byte_for_byte(damaged: Path, sound: Path) -> None:
    before, original = hashes(damaged), Tensors(sound)
    assert len(validate.inspect(damaged).errors) == 7
    done = repair.repair(damaged)
    assert {one.tensor for one in done.changes} == {*BAD, f"{L}5.self_attn.o_proj.input_scale"}
    assert not validate.inspect(damaged).findings
    tensors = Tensors(damaged)
    exact = f"{L}0.mlp.up_proj.input_scale", f"{L}3.self_attn.q_proj.weight_scale_2"
    for name in exact:  # another projection of the served layer has the same scale
        assert number(tensors, name) == number(original, name)
    inputs = [number(original, f"{L}{n}.mlp.down_proj.input_scale") for n in (0, 3, 4, 5)]
    assert number(tensors, f"{L}1.mlp.down_proj.input_scale") == max(inputs)
    assert all(tensors.read(n) == original.read(n) for n in original if n not in BAD and "5." not in n)
    assert [one.tensor for one in done.changes if not one.sure] == [f"{L}4.mlp.down_proj.weight_scale_2"]
    # The files that were there keep their bytes; one has another name.
    kept = {"model.safetensors": "model-00001-of-00001.safetensors"}
    assert {name: hashes(damaged)[kept.get(name, name)] for name in before} == before
    assert repair.undo(damaged) == ["repair-0001.safetensors"]
    assert hashes(damaged) == before
    with pytest.raises(UsageError, match="nothing was repaired"):
        repair.undo(damaged)


def test_repairing_twice_changes_nothing_and_a_later_fault_gets_a_patch_of_its_own(damaged: Path) -> None:
    before = hashes(damaged)
    repair.repair(damaged)
    once = hashes(damaged)
    assert not repair.repair(damaged).changes
    assert hashes(damaged) == once
    index = layouts.read_json(damaged / "model.safetensors.index.json")
    name = f"{L}1.mlp.up_proj.input_scale"
    shard = damaged / index["weight_map"][name]
    content, info = bytearray(shard.read_bytes()), Tensors(damaged)[name]
    sound_bytes, content[info.begin : info.end] = bytes(content[info.begin : info.end]), struct.pack("<f", NAN)
    shard.write_bytes(content)
    assert repair.repair(damaged).patch == "repair-0002.safetensors"
    assert not validate.inspect(damaged).findings
    content[info.begin : info.end] = sound_bytes
    shard.write_bytes(content)
    assert len(repair.undo(damaged)) == 2
    assert hashes(damaged) == before


def test_transformers_and_our_readers_take_the_patch(damaged: Path) -> None:
    """transformers reads the files of the index in order, so that the patch comes last."""
    from transformers.utils.hub import get_checkpoint_shard_files

    repair.repair(damaged)
    assert not (damaged / "model.safetensors").exists()  # transformers prefers it to the index
    index = str(damaged / "model.safetensors.index.json")
    files, metadata = get_checkpoint_shard_files(str(damaged), index)
    assert [Path(file).name for file in files] == ["model-00001-of-00001.safetensors", "repair-0001.safetensors"]
    assert set(metadata["all_checkpoint_keys"]) == set(Tensors(damaged))
    config = layouts.read_json(damaged / "config.json")
    headers = {
        file.name: {name: (info.dtype, info.shape) for name, info in read_header(file).items()}
        for file in damaged.glob("*.safetensors")
    }
    weight_map = layouts.read_json(Path(index))["weight_map"]
    assert completeness._patched(headers, weight_map).keys() == headers.keys()
    kept = completeness._merged(completeness._patched(headers, weight_map), "x")
    assert kept.keys() == weight_map.keys()
    completeness._check_index(completeness._patched(headers, weight_map), weight_map, "x")
    layouts.write_tensorrt_llm(damaged, config, damaged / "t")
    assert not validate.inspect(damaged / "t").findings


def test_a_copy_has_the_values_in_the_files_themselves(damaged: Path, tmp_path: Path) -> None:
    before = hashes(damaged)
    repair.repair(damaged, output=tmp_path / "copy")
    assert hashes(damaged) == before
    assert not validate.inspect(tmp_path / "copy").findings
    assert {file.name for file in (tmp_path / "copy").iterdir()} == set(before)
    repair.repair(damaged)
    repair.repair(damaged, output=tmp_path / "second")
    assert hashes(tmp_path / "second") == hashes(tmp_path / "copy")
    with pytest.raises(UsageError, match="exists"):
        repair.repair(damaged, output=tmp_path / "copy")


def test_scales_that_no_calibration_filled_are_all_replaced(sound: Path, tmp_path: Path) -> None:
    """As llm-compressor's data-free pipeline leaves them: some of the leftovers of memory look like scales."""
    leftovers = [1e-44, -1.3e-05, 1.8e25, -9.5e24, 0.0, NAN, 3.1e-3, 7e-5]
    names = sorted(name for name in Tensors(sound) if name.endswith(".input_scale"))
    changes = {name: scale(name, leftovers[n % len(leftovers)]) for n, name in enumerate(names)}
    folder = exports.rewrite(sound, tmp_path / "u", changes)
    done = repair.repair(folder)
    assert {one.tensor for one in done.changes} == set(names)
    assert {one.new for one in done.changes} == {1.0}
    assert not any(one.sure for one in done.changes)
    assert not validate.inspect(folder).findings


def test_inputs_of_one_served_layer_get_one_scale(sound: Path, tmp_path: Path) -> None:
    name = f"{L}0.self_attn.k_proj.input_scale"
    folder = exports.rewrite(sound, tmp_path / "u", {name: scale(name, 2 * number(Tensors(sound), name))})
    assert [one.kind for one in validate.inspect(folder).findings] == ["unequal-input"]
    assert len(repair.repair(folder).changes) == 2  # q and v
    assert not validate.inspect(folder).findings


def test_a_sharded_checkpoint_keeps_its_index(damaged: Path, tmp_path: Path) -> None:
    tensors, folder = Tensors(damaged), tmp_path / "shards"
    shutil.copytree(damaged, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    shards = {f"model-0000{n + 1}-of-00002.safetensors": sorted(tensors)[n::2] for n in range(2)}
    for file, names in shards.items():
        exports.write(
            folder / file, [NewTensor(n, tensors[n].dtype, tensors[n].shape, tensors.chunks(n)) for n in names]
        )
    index = {
        "metadata": {"total_size": sum(info.nbytes for info in tensors.values())},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    before = hashes(folder)
    repair.repair(folder)
    assert not validate.inspect(folder).findings
    repair.repair(folder, output=tmp_path / "copy")
    assert not validate.inspect(tmp_path / "copy").findings
    repair.undo(folder)
    assert hashes(folder) == before


def test_what_belongs_to_others_is_not_changed(damaged: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub/models--a--b/snapshots/0123"
    shutil.copytree(damaged, snapshot)
    with pytest.raises(UsageError, match="in place") as caught:
        repair.repair(snapshot)
    assert f"builder repair {snapshot} --output" in caught.value.hint
    artifact = tmp_path / "checkpoint"
    shutil.copytree(damaged, artifact / "unified")
    (artifact / "manifest.json").write_text("{}")
    with pytest.raises(UsageError, match="in place"):
        repair.repair(artifact / "unified")
    with pytest.raises(UsageError, match="holds no quantized checkpoint") as caught:
        repair.repair(artifact)
    assert caught.value.hint == f"builder repair {artifact / 'unified'}"


def test_what_can_not_be_repaired(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="TensorRT-LLM's layout"):
        repair.repair(checkpoints["qwen3"] / "tensorrt_llm")
    folder = tmp_path / "u"
    shutil.copytree(checkpoints["llama"] / "unified", folder)
    os.truncate(folder / "model.safetensors", 900_000)
    with pytest.raises(IntegrityError, match="are damaged"):
        repair.repair(folder)


def test_the_command(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["inspect", str(damaged)]) == 6
    assert f"builder repair {damaged}" in capsys.readouterr().err
    assert main.main(["repair", str(damaged), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["changes"][0]["old"] == "nan"
    assert facts["findings"] == []
    assert main.main(["inspect", str(damaged)]) == 0
    assert main.main(["repair", str(damaged), "--undo"]) == 0
    assert main.main(["repair", str(damaged), "--undo"]) == 2


VALUES = st.one_of(st.none(), st.floats(width=32), st.floats(min_value=2.0**-20, max_value=1.0, width=32))


@given(st.lists(VALUES, min_size=1, max_size=12), st.lists(VALUES, min_size=1, max_size=12))
def test_every_input_and_kv_scale_becomes_a_number_and_stays_it(
    inputs: list[float | None], cache: list[float | None]
) -> None:
    """After a repair nothing is left to repair, whatever the values were."""
    scales = [
        Scale(f"layers.{n}.{'gu'[i]}.input_scale", "input", v, f"{n}") for n, v in enumerate(inputs) for i in (0, 1)
    ]
    scales += [Scale(f"layers.{n}.k_scale", "cache", v, f"{n}") for n, v in enumerate(cache)]
    changes, lost = propose(scales)
    assert not lost
    new = {one.tensor: one.new for one in changes}
    after = [Scale(s.tensor, s.kind, new.get(s.tensor, s.value), s.group) for s in scales]
    assert all(one.sound for one in after)
    assert propose(after) == ([], [])


def test_a_report_from_elsewhere_removes_nothing(damaged: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("here")
    hostile = {"index": None, "renamed": False, "patches": [{"file": str(victim)}]}
    outside = {**hostile, "patches": [{"file": "../victim"}]}
    index = {"index": 7, "renamed": False, "patches": [{"file": "repair-0001.safetensors"}]}
    for report in (hostile, outside, index, {}, {"patches": [], "index": None, "renamed": False}):
        (damaged / "repair.json").write_text(json.dumps(report))
        for again in (repair.undo, repair.repair):
            with pytest.raises(IntegrityError, match="not written by a repair"):
                again(damaged)
    assert victim.is_file()


def test_a_repair_that_was_killed_before_the_index_is_undone_or_done_again(
    damaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (damaged / "model.safetensors").rename(damaged / "model-00001-of-00001.safetensors")
    names = read_header(damaged / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (damaged / "model.safetensors.index.json").write_text(json.dumps(index))
    before, replace_file = hashes(damaged), repair.atomic.replace_file

    def killed(path: Path, text: str) -> None:
        if path.name.endswith("index.json"):
            raise KeyboardInterrupt
        replace_file(path, text)

    for again in (repair.undo, repair.repair):
        monkeypatch.setattr(repair.atomic, "replace_file", killed)
        with pytest.raises(KeyboardInterrupt):
            repair.repair(damaged)
        monkeypatch.setattr(repair.atomic, "replace_file", replace_file)
        assert (damaged / "repair-0001.safetensors").is_file()
        again(damaged)
    assert not validate.inspect(damaged).errors
    repair.undo(damaged)
    assert hashes(damaged) == before


def test_a_value_that_half_precision_can_not_hold_is_written_in_single(sound: Path, tmp_path: Path) -> None:
    compressed = tmp_path / "compressed"
    conversion.convert(sound, compressed, "compressed_tensors")
    name = f"{L}3.mlp.down_proj.input_global_scale"
    half = NewTensor(name, "F16", Tensors(compressed)[name].shape, [struct.pack("<e", math.inf)])
    [layout] = repair.open_all(exports.rewrite(compressed, tmp_path / "half", {name: half}))
    want = repair.expected.of(layout)[name]
    made = {scale: repair._tensor(layout, repair.Change(name, None, scale, ""), want) for scale in (1e-3, 1e-6)}
    assert [one.dtype for one in made.values()] == ["F16", "F32"]


def test_a_conversion_leaves_the_report_behind_and_a_copy_keeps_the_notes(damaged: Path, tmp_path: Path) -> None:
    repair.repair(damaged)
    broken, name = tmp_path / "compressed", f"{L}0.self_attn.o_proj.input_global_scale"
    conversion.convert(damaged, broken, "compressed_tensors")
    assert not (broken / "repair.json").exists()
    tensors = Tensors(broken)
    [file] = tensors.files
    notes, content, place = read_metadata(file), bytearray(file.read_bytes()), tensors[name]
    assert "converted_from" in notes
    content[place.begin : place.end] = struct.pack("<f", NAN)
    file.write_bytes(content)
    assert repair.repair(broken, output=tmp_path / "copy").changes
    assert read_metadata(tmp_path / "copy" / "model.safetensors") == notes
