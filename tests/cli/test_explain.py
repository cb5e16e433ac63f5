"""`builder explain` on rules: one by its id, and all of them."""

from __future__ import annotations

import json

import pytest

from builder.cli import explain, main
from builder.core.errors import UsageError
from builder.trtllm import versions


@pytest.mark.parametrize("name", ["R26", "r26"])
def test_a_rule_is_explained_by_its_id(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["explain", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "R26"
    assert f"# TensorRT-LLM {', '.join(versions.versions())}" in lines, "the versions agree, so there is one table"
    assert "flags\t--context_fmha, --use_fp8_context_fmha, --use_paged_context_fmha" in lines


def test_a_rule_that_changed_has_a_table_for_each_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["explain", "R05"]) == 0
    titles = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    assert titles == ["# TensorRT-LLM 1.0.0, 1.1.0", "# TensorRT-LLM 1.2.1"]


def test_all_rules_are_listed_with_those_that_involve_no_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["explain", "--rules", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    newest = versions.load(versions.versions()[-1])
    assert (found["version"], [rule["id"] for rule in found["rules"]]) == (newest.version, list(newest.rules))
    without = [rule["id"] for rule in found["rules"] if not rule["flags"]]
    assert {"R07", "R32", "R48"} <= set(without)
    assert main.main(["explain", "--rules"]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()[2:]]
    assert {row[0] for row in rows if row[1] == "none"} == set(without)
    assert {row[4] for row in rows} <= set(explain.KINDS.values()), "every kind of rule has its words"


def test_every_rule_can_be_explained() -> None:
    for version in versions.versions():
        for rule in versions.load(version).rules:
            assert explain.is_rule(rule)
            assert explain.explain_rule(rule)["versions"][version]["source"]


def test_an_unknown_rule_and_no_name_are_usage_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="There is no rule R99"):
        explain.explain_rule("r99")
    for argv in (["explain"], ["explain", "context_fmha", "--rules"]):
        assert main.main(argv) == 2
        assert "takes one name, or --rules" in capsys.readouterr().err
