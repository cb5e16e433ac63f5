"""The build record: a command that comes to the same recipe, no secret, and gone with its repository."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import report_store
from hypothesis import given
from hypothesis import strategies as st

from builder.cli import main, options
from builder.core import manifest
from builder.publish import build_record
from builder.recipe import schema

MODEL = report_store.MODEL


def read(root: Path) -> dict[str, Any]:
    [path] = (root / "builds").glob("*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def again(command: list[str]) -> schema.Resolved:
    """What the recorded command comes to, through the command line's own parser."""
    assert command[:2] == ["builder", "build"]
    return options.resolve(main.parser().parse_args(command[1:]))


def test_a_record_holds_the_recipe_with_origins_the_profile_flags_and_stages(tmp_path: Path) -> None:
    link = report_store.build(tmp_path)
    found = read(tmp_path)
    values = {key: (value, origin) for key, value, origin in found["values"]}
    assert values["engine.max_batch_size"] == (4, "command line")
    assert values["engine.max_seq_len"][1] == "default"
    assert found["gpu"]["name"] == "sm120"
    assert {flag["name"] for flag in found["flags"]} >= {"context_fmha", "gemm_plugin"}
    assert all(flag["reason"] and flag["source"] for flag in found["flags"])
    assert [stage["stage"] for stage in found["stages"]][-2:] == ["repository", "smoke"]
    assert all((tmp_path / stage["path"] / "manifest.json").is_file() for stage in found["stages"])
    assert (tmp_path / found["repository"]).resolve() == link.resolve()
    assert found["memory"][0]["card"]


@pytest.mark.parametrize("preset", [None, "latency", "throughput"])
@pytest.mark.parametrize("gpu", ["cpu", "sm120", "sm120-fmha"])
def test_the_command_comes_to_the_same_recipe_without_file_or_preset(gpu: str, preset: str | None) -> None:
    file = Path("configs/recipes/nvfp4-kv_fp8.yaml")
    flags = {"model.id": MODEL, "gpu": gpu, "engine.max_seq_len": 3072}
    sets = ["engine.flags.multiple_profiles=enable", "calibration.data='it''s here.jsonl'"]
    resolved = schema.resolve(flags, sets=sets, recipe_file=file, preset=preset)
    command = build_record.command(resolved)
    assert not {"--recipe", "--preset"} & set(command)
    assert again(command).recipe == resolved.recipe
    commit = "0123456789abcdef0123456789abcdef01234567"
    pinned = again(build_record.command(resolved, {"model.revision": commit})).recipe
    assert pinned.model_dump() == resolved.recipe.model_dump() | {
        "model": {**dict(resolved.recipe.model), "revision": commit}
    }


@given(st.text(min_size=1))
def test_any_text_comes_back_as_it_was(text: str) -> None:
    """As a value of --set: `yes`, `1e5`, `null`, quotes, line ends."""
    resolved = schema.resolve({"model.id": MODEL, "gpu": "cpu", "calibration.data": text})
    assert again(build_record.command(resolved)).recipe.calibration.data == text


def test_no_token_gets_into_a_record_and_paths_stay_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "an-unusual-token-1234")
    token = "hf_" + "abcdefghijklmnopq" * 2
    model = shutil.copytree(MODEL, tmp_path / "hf_checkpoints" / f"{token}-an-unusual-token-1234")
    report_store.build(tmp_path / "out", model=str(model), link="model")
    text = (tmp_path / "out" / "builds" / "model.json").read_text()
    assert token not in text
    assert "an-unusual-token-1234" not in text
    assert "/hf_checkpoints/hf_***-***" in text
    assert build_record.find(tmp_path / "out", (tmp_path / "out" / "models" / "model").resolve())


def test_an_output_directory_that_was_moved_keeps_its_records(tmp_path: Path) -> None:
    key = report_store.build(tmp_path / "a").resolve().name
    (tmp_path / "a").rename(tmp_path / "b")
    assert build_record.find(tmp_path / "b", tmp_path / "b" / "repository" / key)
    assert build_record.find(tmp_path / "b", tmp_path / "b" / "repository" / "other") is None


def test_of_two_records_the_newer_counts_and_a_broken_one_does_not(tmp_path: Path) -> None:
    link = report_store.build(tmp_path)
    [path] = (tmp_path / "builds").glob("*.json")
    changed = {key: value for key, value in read(tmp_path).items() if key != manifest.SEAL}
    newer = manifest.seal({**changed, "name": "second", "written": 9e9})
    path.with_name("edited.json").write_text(json.dumps({**newer, "name": "edited", "written": 9.5e9}))
    path.with_name("second.json").write_text(json.dumps(newer))
    path.with_name("broken.json").write_text('{"format": 1, "repository')
    path.with_name("odd.json").write_text('["not", "a", "record"]')
    found = build_record.find(tmp_path, link.resolve())
    assert found is not None
    assert found["name"] == "second"


def test_clean_removes_records_with_their_repositories_and_half_written_ones(tmp_path: Path) -> None:
    kept = report_store.build(tmp_path, gpu="sm120")
    gone = report_store.build(tmp_path, gpu="cpu")
    gone.unlink()
    (tmp_path / "builds" / ".half.json.1.tmp").write_text("{")
    records = tmp_path / "builds"

    def clean(*argv: str) -> list[str]:
        argv = (sys.executable, "-m", "builder", "clean", *argv, "--output", str(tmp_path), "--json")
        done = subprocess.run(argv, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [Path(path).name for path in json.loads(done.stdout)["removed"]]

    said = clean("--dry-run")
    assert {f"{gone.name}.json", ".half.json.1.tmp"} <= set(said)
    assert f"{kept.name}.json" not in said
    assert (records / f"{gone.name}.json").exists()
    assert clean() == said
    assert [path.name for path in records.iterdir()] == [f"{kept.name}.json"]
    assert (tmp_path / "smoke").exists(), "the smoke test of a kept repository stays"
    clean("--all")
    assert not any(records.iterdir())
    assert not any((tmp_path / "smoke").iterdir())


def test_a_second_build_replaces_the_record_in_one_step(tmp_path: Path) -> None:
    report_store.build(tmp_path)
    before = (tmp_path / "builds").stat().st_mtime_ns
    inode = next((tmp_path / "builds").iterdir()).stat().st_ino
    next((tmp_path / "models").iterdir()).unlink()
    report_store.build(tmp_path)
    [path] = (tmp_path / "builds").iterdir()
    assert path.stat().st_ino != inode
    assert (tmp_path / "builds").stat().st_mtime_ns > before
