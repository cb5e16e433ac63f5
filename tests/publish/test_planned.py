"""`builder plan --with`: several models on one GPU, before any of them is built."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import sparse_models
import yaml

from builder.cli import main
from builder.core.errors import UnsupportedError
from builder.core.output import Output
from builder.core.store import Store
from builder.preflight import beside as beside_models
from builder.publish.combination import Change, change
from tests.publish.test_combination import CARD, published

TINY = "tests/data/tiny-qwen3"
SMALL = {**sparse_models.QWEN3_8B, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
         "num_attention_heads": 16}  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sparse_models.write(sparse_models.QWEN3_8B, tmp_path_factory.mktemp("models") / "qwen3-8b")


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of a smaller model."""
    place = tmp_path_factory.mktemp("models")
    return recipe(place / "code.yaml", sparse_models.write(SMALL, place / "small"))


def recipe(file: Path, model: Path, **parts: Any) -> Path:
    file.write_text(yaml.safe_dump({"model": {"id": str(model)}, **parts}))
    return file


def plan(output: Path, *argv: str | Path) -> list[str]:
    return ["plan", *map(str, argv), "--output", str(output)]


def beside(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> dict[str, Any]:
    assert main.main([*argv, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["beside"]
    return found


def test_the_memory_is_divided_so_that_both_fit(
    large: Path, code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = plan(tmp_path, "--model", large, "--gpu", "RTX 5090", "--as", "chat", "--with", f"{code}=code")
    found = beside(argv, capsys)
    assert (found["card"], found["fits"], found["refusal"]) == ("RTX 5090", True, None)
    models = {model["model"]: model for model in found["models"]}
    assert list(models) == ["chat", "code"]
    assert round(models["chat"]["weights"] / 1e9, 2) == 6.40
    for model in models.values():
        assert model["from"] == "so that all fit"
        assert 0 < model["fraction"] < 0.9
        assert model["sequence"] <= model["kv_cache"]["least"] < model["kv_cache"]["most"]
    most = sum(m["weights"] + m["workspace"] + m["adapters"] + m["kv_cache"]["most"] for m in models.values())
    assert found["left"] == found["memory"] - most > 0
    assert main.main(argv) == 0
    shown = capsys.readouterr().out
    assert shown.count("# plan: ") == 2
    assert "# beside each other on RTX 5090" in shown
    command = shlex.split(next(line for line in shown.splitlines() if "builder combine" in line))
    typed = main.parser().parse_args(command[command.index("combine") :])
    assert typed.kv_fraction == [f"{name}={model['fraction']:g}" for name, model in models.items()]
    assert [text.rpartition("=")[2] for text in typed.add] == ["chat", "code"]


def test_a_fraction_that_someone_chose_is_kept(
    large: Path, code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = plan(tmp_path, "--model", large, "--gpu", "RTX 5090", "--preset", "latency", "--as", "chat")
    argv += ["--with", f"{code}=code", "--kv-fraction", "chat=0.4"]
    models = {model["model"]: model for model in beside(argv, capsys)["models"]}
    assert (models["chat"]["fraction"], models["chat"]["from"]) == (0.4, "--kv-fraction")
    assert models["code"]["from"] == "so that all fit"
    own = {"engine": {"max_batch_size": 8}, "repository": {"kv_cache_free_gpu_mem_fraction": 0.25}}
    chosen = recipe(tmp_path / "own.yaml", large, **own)
    argv = plan(tmp_path, "--recipe", code, "--gpu", "RTX 5090", "--as", "code", "--with", f"{chosen}=chat")
    models = {model["model"]: model for model in beside(argv, capsys)["models"]}
    assert (models["chat"]["fraction"], models["chat"]["from"]) == (0.25, str(chosen))


def test_fractions_that_do_not_fit_are_refused_with_some_that_do(
    large: Path, code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = plan(tmp_path, "--model", large, "--gpu", "RTX 5090", "--preset", "latency", "--as", "chat")
    argv += ["--with", f"{code}=code"]
    assert main.main([*argv, "--kv-fraction", "chat=0.6", "--kv-fraction", "code=0.5"]) == 3
    said = capsys.readouterr().err
    assert "The 2 models do not fit beside each other on RTX 5090" in said
    better = re.findall(r"--kv-fraction \S+=[\d.]+", said)
    assert len(better) == 2
    assert main.main([*argv, *shlex.split(" ".join(better))]) == 0


def test_the_change_that_is_suggested_makes_them_fit(
    large: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two with a workspace of 14 GB each on a card of 34 GB."""
    twin = recipe(tmp_path / "twin.yaml", large)
    argv = plan(tmp_path, "--model", large, "--gpu", "RTX 5090", "--as", "chat", "--with", f"{twin}=twin")
    found = beside(argv, capsys, 3)
    assert "do not fit beside each other" in found["refusal"]
    assert main.main(argv) == 3
    said = capsys.readouterr().err
    [flags] = re.findall(r"The smallest change of chat with which they fit: (--[^.]*)", said)
    assert main.main([*argv, *shlex.split(flags)]) == 0
    assert re.search("On another card of the profile they fit as they are: .*RTX PRO 6000", said)


def test_a_model_that_does_not_fit_alone_is_named(
    large: Path, code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = plan(tmp_path, "--recipe", code, "--gpu", "RTX 5080", "--with", f"{recipe(tmp_path / 'l.yaml', large)}=big")
    assert main.main(argv) == 3
    assert "big: It does not fit on RTX 5080" in capsys.readouterr().err


def test_a_model_beside_those_that_are_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path, Output("quiet"))
    here = {**CARD, "card": "this machine", "memory": 64_000_000_000, "sequence": 123_000}
    a = published(store, "a", card={**here, "weights": 1_000_000})
    change("both", Change({"chat": a}), store=store)
    argv = plan(tmp_path, "--model", TINY, "--gpu", "cpu", "--as", "new")
    for what, name, repository in (
        (a, "a", "NAME"),
        (f"{a}=other", "other", "NAME"),
        (a.parent / "both", "chat", "both"),
    ):
        found = beside([*argv, "--with", str(what)], capsys)["models"]
        assert [model["model"] for model in found] == ["new", name]
        assert found[1]["sequence"] == 123_000
        assert main.main([*argv, "--with", str(what)]) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert f"builder combine {repository} " in last
        assert last.count("--add") == (1 if repository == "both" else 2)
    vast = published(store, "vast", card={**here, "weights": 10**15, "needed": 10**15})
    assert main.main([*argv, "--with", str(vast)]) == 3
    assert "do not fit beside each other on this machine" in capsys.readouterr().err
    unknown = published(store, "unknown")
    assert main.main([*argv, "--with", str(unknown)]) == 2
    assert "there is no build record" in capsys.readouterr().err


def test_a_model_that_could_not_be_added_is_not_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`builder render --add` checks the memory before the hour of building, and not only after it."""
    store = Store(tmp_path, Output("quiet"))
    vast = published(store, "vast", card={**CARD, "card": "this machine", "weights": 10**15, "needed": 10**15})
    with pytest.raises(UnsupportedError):
        change("both", Change({"chat": vast}), store=store)
    monkeypatch.setattr(beside_models, "check", lambda cards: None)
    change("both", Change({"chat": vast}), store=store)
    argv = ["render", "--model", TINY, "--gpu", "cpu", "--add", "both", "--output", str(tmp_path)]
    assert main.main(argv) == 3
    assert "The 2 models do not fit beside each other on this machine" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint").exists()


def test_wrong_options(large: Path, code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = recipe(tmp_path / "other.yaml", Path(TINY), gpu="sm90")
    target = recipe(tmp_path / "target.yaml", Path(TINY), target="llmapi", quantization={"kv_cache_dtype": "auto"})
    argv = plan(tmp_path, "--model", large, "--gpu", "RTX 5090", "--as", "chat")
    for more, status, message in (
        ([], 2, "--as has no effect without --with"),
        (["--with", f"{code}=chat"], 2, "Two of the models are called chat"),
        (["--with", f"{code}=b/c"], 2, "can't be the name of a model"),
        (["--with", str(tmp_path / "none.yaml")], 2, "Can't read the recipe"),
        (["--with", str(tmp_path / "none")], 2, "is not a finished repository"),
        (["--with", str(other)], 2, "is for another GPU: sm90, and the first model for RTX 5090"),
        (["--with", str(target)], 3, "The models have more than one target"),
        (["--with", "configs/recipes/nvfp4-kv_fp8.yaml"], 2, "names no model"),
        (["--with", f"{code}=code", "--kv-fraction", "cod=0.3"], 2, "there is no model 'cod'"),
    ):
        assert main.main([*argv, *more]) == status, more
        assert message in capsys.readouterr().err
