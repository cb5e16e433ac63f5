"""What `builder plan` prints: decisions first, defaults only with --all, everything with --json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from builder.cli import main
from builder.machine.gpus import Seen
from builder.preflight import rotating, ways
from builder.preflight.model_facts import ModelFacts
from builder.quantize import modelopt
from builder.recipe import schema

MODEL = "tests/data/tiny-qwen3"


def tables(*argv: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, list[list[str]]]:
    """The printed tables in their order: {title: [header, row, ...]}. Text below the last table is its last rows."""
    assert main.main(["plan", "--model", MODEL, *argv]) == code
    found: dict[str, list[list[str]]] = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("# "):
            rows = found[line[2:].partition(":")[0]] = []
        elif line:
            rows.append(line.split("\t"))
    return found


def test_decisions_come_first_and_defaults_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--gpu", "sm120", "--output", str(tmp_path), "--max-seq-len", "1024", "--max-input-len", "512"]
    found = tables(*argv, "--keep-bf16", "*.down_proj", capsys=capsys)
    assert list(found) == [
        "plan", "stages", "values that are not defaults", "trtllm-build flags that are not defaults",
        "ways to quantize", "notes", "sizes", "memory at run time",
    ]  # fmt: skip
    decisions = {row[0]: row[1] for row in found["plan"]}
    assert decisions["target"].startswith("engine, TensorRT-LLM")
    assert decisions["format"] == "NVFP4"
    assert decisions["left in BF16"].startswith("6 linear layers")
    assert decisions["fits"].startswith("yes, on ")
    values = {row[0]: row[2] for row in found["values that are not defaults"][1:]}
    assert values["engine.max_seq_len"] == "command line"
    assert "default" not in values.values()
    assert len(found["memory at run time"]) > 1
    everything = tables(*argv, "--all", capsys=capsys)
    assert len(everything["values"]) > len(values) + 20
    assert {"engine.max_num_tokens", "repository.decoupled"} <= {row[0] for row in everything["values"]}
    assert any(row[0].startswith("trtllm-build --max_batch_size") for row in everything["memory at run time"])


def test_what_an_algorithm_costs_is_a_decision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--gpu", "cpu", "--output", str(tmp_path), "--calib-data", "builtin:python-docs"]
    assert all(row[0] != "algorithm costs" for row in tables(*argv, capsys=capsys)["plan"])
    [cost] = [
        row for row in tables(*argv, "--preset", "accuracy", capsys=capsys)["plan"] if row[0] == "algorithm costs"
    ]
    assert re.match(r"about .+s and 47\.\d+ MB of memory more than max; one decoder layer at a time", cost[1])
    [cost] = [row for row in tables(*argv, "--algorithm", "mse", capsys=capsys)["plan"] if row[0] == "algorithm costs"]
    assert cost[1] == "less than a second more than max; whole model in memory"


def test_the_time_that_rotations_take_is_a_decision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--gpu", "cpu", "--output", str(tmp_path), "--transform", "spinquant"]
    [cost] = [row for row in tables(*argv, capsys=capsys)["plan"] if row[0] == "rotating costs"]
    assert re.match(r"less than a second, beside reading and writing [\d.]+ MB$", cost[1])
    small = ModelFacts({"hidden_size": 4096}, {"w.weight": ("BF16", (4096, 4096))})
    took = [
        rotating.seconds(
            schema.resolve({"model.id": MODEL, "gpu": "cpu", **{f"transform.{k}": v for k, v in part.items()}}).recipe,
            small,
        )
        for part in (
            {},
            {"name": "spinquant"},
            {"name": "spinquant", "kind": "orthogonal"},
            {"name": "spinquant", "kind": "orthogonal", "rotations": "r2"},
        )
    ]
    assert took[0] is None
    assert (took[2] or 0) > (took[1] or 0) == took[3]


def test_nothing_of_a_bf16_model_is_called_quantized(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--gpu", "sm120", "--target", "llmapi", "--format", "bf16", "--output", str(tmp_path)]
    found = tables(*argv, capsys=capsys)
    assert next(row for row in found["plan"] if row[0] == "calibration")[1:] == ["none", "nothing is quantized"]


def test_json_is_complete_with_and_without_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = []
    for more in ([], ["--all"]):
        argv = ["plan", "--model", MODEL, "--gpu", "sm120", "--output", str(tmp_path), "--json", *more]
        assert main.main(argv) == 0
        plan = json.loads(capsys.readouterr().out)
        printed.append({key: value for key, value in plan.items() if key != "machine"})
    assert printed[0] == printed[1]
    assert printed[0]["values"]["repository.decoupled"] == {"value": True, "from": "default"}


def keys(value: Any) -> Any:
    """The keys of nested objects, without values; of lists those of their elements, each once."""
    if isinstance(value, dict):
        return {key: keys(one) for key, one in value.items()}
    return [one for n, one in enumerate(found) if one not in found[:n]] if (found := elements(value)) else None


def elements(value: Any) -> list[Any]:
    return [keys(one) for one in value] if isinstance(value, list) else []


@pytest.mark.parametrize("more", [["--algorithm", "mse"], ["--memory", "low"], ["--data-free"]])
def test_json_has_the_same_keys_with_and_without_a_gpu(
    more: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["plan", "--model", MODEL, "--gpu", "sm120", "--output", str(tmp_path), "--json", *more]
    printed = []
    for seen in ([], [Seen("NVIDIA H200", 9, 0, "580", 141 << 30)]):
        monkeypatch.setattr(ways, "visible", lambda seen=seen: seen)
        monkeypatch.setattr(modelopt, "calibrating", lambda seen=seen: [one.name for one in seen])
        assert main.main(argv) == 0
        printed.append(json.loads(capsys.readouterr().out))
    assert [plan["ways"]["device"]["gpu"] for plan in printed] == [False, True]
    assert keys(printed[0]) == keys(printed[1])


def test_json_has_the_same_keys_for_every_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for target in (["sm120"], ["sm120", "--target", "llmapi", "--kv-cache-dtype", "auto"], ["cpu"]):
        assert main.main(["plan", "--model", MODEL, "--output", str(tmp_path), "--json", "--gpu", *target]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0].keys() == found[1].keys() == found[2].keys()
    assert [bool(one["flags"]) for one in found] == [True, False, True]
    assert [bool(one["arguments"]) for one in found] == [False, True, False]


def test_the_next_command_builds_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--gpu", "cpu", "--output", str(tmp_path), "--calib-samples", "8"]
    assert main.main(["plan", "--model", MODEL, *argv]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    words = last.split()
    assert words[:3] == ["next", "builder", "build"]
    arguments = main.parser().parse_args(words[2:])
    assert (vars(arguments)["model.id"], vars(arguments)["calibration.samples"]) == (MODEL, 8)


def test_a_plan_that_does_not_fit_says_so_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--gpu", "RTX 5090", "--output", str(tmp_path), "--max-batch-size", "8000"]
    found = tables(*argv, capsys=capsys, code=3)
    decisions = {row[0]: row[1] for row in found["plan"]}
    assert decisions["fits"].startswith("no: ")


def test_without_the_hub_a_data_set_is_a_row_and_an_unknown_model_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is in the store, so that planning gets as far as the data sets. None of them was ever seen."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    argv = ["--gpu", "cpu", "--output", str(tmp_path / "out"), "--calib-samples", "8", "--calib-seq-len", "64"]
    assert main.main(["fetch", "--model", MODEL, *argv, "-q"]) == 0
    found = tables(*argv, "--calib-data", "owner/rows", capsys=capsys)
    rows = {row[0]: row[2] for row in found["stages"]}
    assert "the commit of owner/rows is unknown" in rows["calibration"]
    gated = tables(*argv, "--min-score", "95", "--data", "owner/texts", capsys=capsys)
    assert {row[0]: row[1] for row in gated["stages"]}["evaluation"] == "will run"
    assert main.main(["plan", "--model", "owner/model", *argv]) == 2
    said = capsys.readouterr().err
    assert "owner/model" in said
    assert "give a local directory" in said
