"""Output contains no secrets and no terminal escape codes, and paths are unchanged."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.calibration.rows import CALIBRATION, Rows, _write, read_jsonl
from builder.cli import main
from builder.core.errors import UsageError
from builder.core.output import Output, print_error
from builder.core.safe_text import printable, printable_bytes, printable_line, redact
from builder.core.store import Store
from builder.hub import client
from builder.recipe.schema import Calibration

TOKEN = "hf_" + "AbCdEfGhIjKlMnOpQ" * 2
NASTY = "\x1b]0;owned\x07\x1b[2J\x9b31m\x08\r\u202e\u2066\x00\x7f"
CODES = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


@pytest.mark.parametrize(
    "text",
    [
        "./hf_checkpoints",
        "/data/hf_models/hf_checkpoints_2026/model.safetensors",
        "hf_quant_config.json",
        "hf_hub_download",
        "hf_0123456789abcdef0123456789abcdef01234567",  # a directory named by a commit
        "hf_" + "a" * 33,
        "https://hub.example/Qwen/Qwen3-8B?user=me@example.org",
        "git@example.org:owner/name",
        "see //a/b@c",
        "a basic understanding of bearer bonds",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact(text, {"HOME": "/root", "TOKENIZERS_PARALLELISM": "hf_checkpoints"}) == text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"HF_TOKEN={TOKEN}", "HF_TOKEN=hf_***"),
        (f'{{"authorization": "Bearer {TOKEN}"}}', '{"authorization": "Bearer ***"}'),
        ("Authorization: Basic dXNlcjpzZWNyZXQ=", "Authorization: Basic ***"),
        (f"?token={TOKEN}&x", "?token=hf_***&x"),
        ("api_org_" + "x" * 34, "api_org_***"),
        ("http://user:secret@hub.example/a", "http://hub.example/a"),
        ("socks5h://user:p@ss@proxy:1080", "socks5h://proxy:1080"),
        ("('http://u:p@h:80', 'https://t@h')", "('http://h:80', 'https://h')"),
    ],
)
def test_secrets_go(text: str, clean: str) -> None:
    assert redact(text, {}) == clean


def test_secrets_of_the_environment_go_whatever_they_look_like() -> None:
    environment = {
        "HF_TOKEN": "an-unusual-token-1234",
        "PGPASSWORD": "correct horse battery",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG",
        "HF_ENDPOINT": "https://someone:p%40ss/word99@mirror.example",
        "https_proxy": "http://proxyuser:proxypassword@proxy:3128",
        "SHORT_TOKEN": "models",
    }
    text = (
        "an-unusual-token-1234 correct horse battery wJalrXUtnFEMI/K7MDENG p@ss/word99 proxypassword "
        "proxyuser:proxypassword ./models"
    )
    assert redact(text, environment) == "*** *** *** *** *** *** ./models"
    # A password that is also a word: only where it stands alone.
    assert redact("hf_checkpoints checkpoint", {"X_PASSWORD": "checkpoint"}) == "hf_checkpoints ***"


@given(st.text())
def test_printable_text_has_no_codes_and_is_stable(text: str) -> None:
    shown = printable(text)
    assert not CODES.search(shown)
    assert printable(shown) == shown
    shown.encode()  # no lone surrogates
    assert "\n" not in printable_line(text)


def test_plain_text_of_any_language_is_shown_as_it_is() -> None:
    text = "naïve 数学 עברית 😀👩‍🔬 a\tb\nc"
    assert printable(text) == text
    assert printable("\x1b[31mred\x9b0m\u202e") == "\\x1b[31mred\\x9b0m\\u202e"
    assert printable_bytes(b"\x1b[31m\xff ok\r\n") == b"\\x1b[31m\\xff ok\n"


@pytest.mark.parametrize("live", [False, True])
def test_no_code_reaches_the_terminal(live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through every output function, on a terminal (drawn by rich) and without one. rich rejects `[/]` as markup."""
    texts = []
    for stream in ("stdout", "stderr"):
        made = io.StringIO()
        made.isatty = lambda: live  # type: ignore[method-assign]
        monkeypatch.setattr(sys, stream, made)
        texts.append(made)
    monkeypatch.setenv("TERM", "dumb")  # no codes of rich's own
    out = Output("human")
    nasty = f"[bold]x[/] [/nope] :smile: {NASTY}"
    out.info(nasty)
    out.warn(nasty)
    out.stage(nasty, nasty)
    out.table(nasty, [nasty, "b"], [[nasty, 1], [f"two\nlines\tand a tab {NASTY}", 2]])
    out.text(nasty)
    out.result({nasty: nasty})
    with out.progress(nasty, 10, nasty) as bar:
        bar.update(5, 10, nasty)
    print_error(UsageError(nasty, why=f"{nasty}\n{nasty}", hint=nasty))
    out = Output("json")
    out.result({nasty: nasty})
    out.finish()
    for made in texts:
        assert not CODES.search(made.getvalue()), made.getvalue()
        assert "[bold]x[/]" in made.getvalue()
        assert ":smile:" in made.getvalue()


def test_the_endpoint_of_a_manifest_has_no_part_of_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "https://me:p@ss@word@mirror.example/hub/")
    assert client.endpoint() == "https://mirror.example/hub"


def test_cells_stay_in_their_row(capsys: pytest.CaptureFixture[str]) -> None:
    Output("human").table("t", ["a", "b"], [["one\ntwo", "three\tfour"]])
    assert capsys.readouterr().out == "# t\na\tb\none\\ntwo\tthree\\tfour\n"


def test_secrets_reach_neither_messages_nor_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://someone:mirrorpassword@127.0.0.1:9")
    text = "http://someone:mirrorpassword@127.0.0.1:9/a and 'mirrorpassword'"
    Output("human").info(text)
    Output("human").table("t", ["a"], [[text]])
    out = Output("json")
    out.result({"url": text})
    out.finish()
    print_error(UsageError(text, why=text, hint=text))
    said = capsys.readouterr()
    assert "mirrorpassword" not in said.out + said.err
    assert json.loads(said.out[said.out.index("{") :])["url"] == "http://127.0.0.1:9/a and '***'"


def test_a_calibration_row_s_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error for a missing column quotes them."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({NASTY + "x" * 1000: 1}) + '\n{"text": "good"}\n')
    rows = read_jsonl(file, 8, None)
    assert len(rows.usable) == 1
    _write(rows, tmp_path / "out", Calibration(data=str(file)), Store(tmp_path, Output("human")), CALIBRATION)
    said = capsys.readouterr().err
    assert "skipped" in said
    assert not CODES.search(said)
    assert "x" * 100 not in said
    with pytest.raises(UsageError) as caught:
        _write(Rows([], rows.unusable), tmp_path / "out", Calibration(data="x"), Store(tmp_path, Output()), CALIBRATION)
    print_error(caught.value)
    assert not CODES.search(capsys.readouterr().err)


def test_what_was_typed_is_quoted_safely(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for argv in (["plan", NASTY], ["plan", "--gpu=cpu", "--model", NASTY], ["bild\x1b[31m"], ["explain", NASTY]):
        try:
            code = main.main([argument.replace("\0", "") for argument in argv])
        except SystemExit as ended:
            code = int(str(ended.code))
        assert code == 2
        said = capsys.readouterr()
        assert not CODES.search(said.out + said.err), argv
    assert os.environ.get("HF_TOKEN") is None
