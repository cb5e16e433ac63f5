"""What commands print: tables with and without a terminal, and progress."""

from __future__ import annotations

import ast
from pathlib import Path
from types import SimpleNamespace

import pytest

from builder.core.output import BYTES, Output


def test_piped_tables_keep_title_and_column_names(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output("human")
    out.table("cards", ["card", "GB"], [["RTX 5090", 34.2]])
    out.table("notes", ["rule", "note"], [["R26", "no reuse"]])
    out.text("next")
    assert capsys.readouterr().out.splitlines() == [
        "# cards", "card\tGB", "RTX 5090\t34.2", "", "# notes", "rule\tnote", "R26\tno reuse", "next",
    ]  # fmt: skip


@pytest.mark.parametrize("mode", ["json", "quiet"])
def test_tables_and_text_are_for_people_only(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(mode)  # type: ignore[arg-type]
    out.table("cards", ["card"], [["RTX 5090"]])
    out.text("next")
    assert capsys.readouterr().out == ""


def test_every_column_has_a_name() -> None:
    """A list of column names, in a call of `table` or in a constant that one uses, has no empty name."""
    empty = []
    for file in Path("builder").rglob("*.py"):
        tree = ast.parse(file.read_text())
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "attr", "") == "table"]
        used = {name.id for call in calls for name in call.args[1:2] if isinstance(name, ast.Name)}
        lists = [call.args[1] for call in calls if len(call.args) > 1]
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and {getattr(target, "id", "") for target in node.targets} & used:
                lists.append(node.value)
        for columns in lists:
            if isinstance(columns, ast.List) and any(getattr(e, "value", None) == "" for e in columns.elts):
                empty.append(f"{file}:{columns.lineno}")
    assert not empty


def test_plain_progress_has_an_estimate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.core.output.PLAIN_PROGRESS_SECONDS", 0.0)
    with Output("human").progress("calibrate", 10, "rows") as bar:
        bar.update(5)
    assert "calibrate: 5/10 rows, about" in capsys.readouterr().err


def test_bytes_are_printed_as_sizes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.core.output.PLAIN_PROGRESS_SECONDS", 0.0)
    with Output("human").progress("layer 3 of 36", 16_380_000_000, BYTES) as bar:
        bar.update(1_200_000)
    assert "layer 3 of 36: 1.20 MB of 16.38 GB, about " in capsys.readouterr().err


def test_restarting_progress_restarts_its_estimate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("builder.core.output.time", SimpleNamespace(monotonic=lambda: clock.now))
    with Output("human").progress("loading", unit="tokens") as bar:
        for clock.now, done, label in ((100, 0, "prose"), (110, 50, "prose"), (200, 0, "chat"), (230, 50, "chat")):
            bar.update(done, 100, label)
    said = capsys.readouterr().err
    assert "prose: 50/100 tokens, about 10.0s left" in said
    assert "chat: 50/100 tokens, about 30.0s left" in said
