"""models/NAME for several models: what can be added, updated and removed; and earlier versions of a link."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from builder.clean import removal
from builder.clean.reachability import Request
from builder.cli import main
from builder.core import manifest
from builder.core.errors import EvaluationError, IntegrityError, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.publish import build_record, links, verdict, versions
from builder.publish.combination import Change, change, check_beside
from builder.publish.verdict import BuildVerdict
from builder.triton import combined
from builder.triton.repository import open_repository
from tests.triton.test_combined import rendered
from tests.triton.test_repository import configs, parameters

MODEL = ("--model", "tests/data/tiny-qwen3", "--gpu", "cpu")
CARD = {"card": "L4", "memory": 24_000_000_000, "weights": 4_000_000_000, "workspace": 0, "needed": 5_000_000_000}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", Output("quiet"))


def published(store: Store, name: str, key: str = "", card: Mapping[str, Any] | None = None) -> Path:
    """A link to a repository of one model; with `card` also a build record."""
    found = rendered(store, key or name)
    link = store.root / "models" / name
    versions.remember(store.root, link, found.path)
    if card:
        record = {"format": build_record.FORMAT, "repository": f"repository/{found.path.name}", "written": 1.0,
                  "values": [], "memory": [card], "stages": []}  # fmt: skip
        file = store.root / build_record.DIRECTORY / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(manifest.seal(record)))
    links.move(link, found.path)
    return link


def models(store: Store, name: str = "both") -> dict[str, str]:
    """The models of a combined repository, and the repositories that they came from."""
    found = open_repository(store.root / "models" / name)
    return {model: facts["repository"] for model, facts in found.members.items()}


def fraction(store: Store, model: str) -> str:
    found = configs(open_repository(store.root / "models" / "both").models)
    return parameters(found[f"{model}_tensorrt_llm"])[combined.FRACTION]


def test_models_are_added_updated_and_removed(store: Store) -> None:
    a, b = published(store, "a"), published(store, "b")
    change("both", Change({"chat": a, "code": b}), store=store)
    first = models(store)
    assert list(first) == ["chat", "code"]
    published(store, "a", "a2")
    assert models(store) == first  # a new version of a member is taken when asked
    change("both", Change(update=["chat"]), store=store)
    assert models(store) == {"chat": a.resolve().name, "code": first["code"]}
    change("both", Change(remove=["code"], add={"extra": b}, fractions={"extra": 0.25}), store=store)
    assert list(models(store)) == ["chat", "extra"]
    assert fraction(store, "extra") == "0.25"
    change("both", Change(remove=["chat"]), store=store)
    assert fraction(store, "extra") == "0.25"
    published(store, "b", "b2")
    change("both", Change(update=["extra"]), store=store)
    assert fraction(store, "extra") == "0.25"


def test_what_is_refused_changes_nothing(store: Store) -> None:
    a, b = published(store, "a"), published(store, "b")
    change("both", Change({"chat": a}), store=store)
    before = sorted(str(path) for path in store.root.rglob("*") if path.parent.name != "locks")
    target = os.readlink(store.root / "models" / "both")
    for asked, message in (
        (Change({"chat": b}), "already has a model 'chat'"),
        (Change({"b c": b}), "can't be the name of a model"),
        (Change(remove=["code"]), "has no model 'code'"),
        (Change(update=["code"]), "has no model 'code'"),
        (Change(fractions={"code": 0.5}), "there is no model 'code'"),
        (Change(remove=["chat"]), "would have no model"),
        (Change({"x": b.parent / "both"}), "has several models itself"),
        (Change({"x": b.parent / "nothing"}), "is not a finished repository"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            change("both", asked, store=store)
        assert caught.value.hint
    assert os.readlink(store.root / "models" / "both") == target
    assert sorted(str(path) for path in store.root.rglob("*") if path.parent.name != "locks") == before


def test_a_name_that_a_build_has(store: Store) -> None:
    a = published(store, "a")
    with pytest.raises(UsageError, match="serves one model of its own"):
        change("a", Change({"chat": a}), store=store)
    change("both", Change({"chat": a}), store=store)
    with pytest.raises(UsageError, match="has several models"):
        links.check_free("both", store.root)


def test_a_model_of_another_store_and_one_that_failed(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other", Output("quiet"))
    with pytest.raises(UsageError, match="is not in"):
        change("both", Change({"x": published(other, "x")}), store=store)
    a = published(store, "a")
    failed = BuildVerdict("failed", ("it lost too much",))
    verdict.keep(failed, [open_repository(a).digest], {}, store=store)
    with pytest.raises(EvaluationError, match="it lost too much"):
        change("both", Change({"a": a}), store=store)
    change("both", Change({"a": a}, ungated=True), store=store)


def test_models_that_do_not_fit_beside_each_other(store: Store) -> None:
    small = {**CARD, "memory": 9_000_000_000}
    a, b = published(store, "a", card=small), published(store, "b", card=small)
    change("both", Change({"a": a}), store=store)
    with pytest.raises(UnsupportedError, match="The 2 models do not fit beside each other on L4") as caught:
        change("both", Change({"b": b}), store=store)
    assert "Together they may take 10.00 GB" in caught.value.why
    assert list(models(store)) == ["a"]
    made = change("three", Change({"b": b}), store=Store(store.root, Output("quiet"), dry=True))
    assert (made.repository, made.unknown) == (None, ())
    assert not (store.root / "models" / "three").exists()


def test_two_versions_of_one_model_that_do_not_fit(store: Store) -> None:
    """What `builder serve --auto-update` asks: the record of the earlier version is only in the history."""
    small = {**CARD, "memory": 9_000_000_000}
    old = published(store, "a", "1", card=small).resolve()
    new = published(store, "a", "2", card=small).resolve()
    with pytest.raises(UnsupportedError, match="The 2 models do not fit beside each other on L4"):
        check_beside({"old": old, "new": new})
    check_beside({"new": new})


def test_rollback_goes_back_version_by_version(store: Store) -> None:
    keys = [published(store, "a", key, card=CARD).resolve().name for key in ("1", "2", "3")]
    record = store.root / "builds" / "a.json"
    assert versions.rollback(store, "a")[1].key == keys[1]
    assert json.loads(record.read_text())["repository"] == f"repository/{keys[1]}"  # so is the record
    assert versions.rollback(store, "a")[0] == keys[1]
    assert (store.root / "models" / "a").resolve().name == keys[0]
    with pytest.raises(UsageError, match="a has no earlier version"):
        versions.rollback(store, "a")
    assert versions.rollback(store, "a", keys[2][:8])[1].key == keys[2]
    assert build_record.find(store.root, store.root / "repository" / keys[2])
    with pytest.raises(UsageError, match="'nope' of a is not known"):
        versions.rollback(store, "a", "nope")
    with pytest.raises(UsageError, match="no link 'b'"):
        versions.rollback(store, "b")
    assert [version.key for version in versions.read(store.root, "a")] == keys


def test_a_version_that_is_built_again_is_the_newest(store: Store) -> None:
    keys = [published(store, "a", key).resolve().name for key in ("1", "2", "1")]
    assert [version.key for version in versions.read(store.root, "a")] == [keys[1], keys[0]]
    assert versions.rollback(store, "a")[1].key == keys[1]


def test_a_version_that_is_published_again_stays_where_it_is(store: Store) -> None:
    keys = [published(store, "a", key).resolve().name for key in ("1", "2")]
    versions.rollback(store, "a")
    before = versions.read(store.root, "a")
    published(store, "a", "1")
    assert versions.read(store.root, "a") == before
    assert [version.key for version in before] == keys


def test_a_link_of_an_older_builder_has_a_version(store: Store) -> None:
    link = published(store, "a", "1")
    (store.root / "history" / "a.json").unlink()
    first = link.resolve().name
    published(store, "a", "2")
    assert versions.rollback(store, "a")[1].key == first


def test_a_history_that_was_edited_is_reported(store: Store) -> None:
    published(store, "a")
    file = store.root / "history" / "a.json"
    file.write_text(file.read_text().replace("since", "sinse"))
    with pytest.raises(IntegrityError, match="can't be read"):
        versions.read(store.root, "a")


def test_clean_keeps_the_version_before_and_forgets_what_is_removed(store: Store) -> None:
    keys = [published(store, "a", key).resolve().name for key in ("1", "2", "3")]
    made = removal.plan(store.root, Request(older_than=0))
    kept = {entry.path.name: entry.why for entry in made.keep}
    assert kept[keys[1]] == "models/a can return to it (builder rollback)"
    assert removal.carry_out(made) == []
    assert {path.name for path in (store.root / "repository").iterdir()} == set(keys[1:])
    with pytest.raises(UsageError, match="is removed"):
        versions.rollback(store, "a", keys[0])
    assert versions.rollback(store, "a")[1].key == keys[1]
    assert removal.carry_out(removal.plan(store.root, Request(names=("a",)))) == []
    assert not (store.root / "history" / "a.json").exists()


def test_clean_keeps_the_members(store: Store) -> None:
    a, b = published(store, "a"), published(store, "b")
    change("both", Change({"a": a, "b": b}), store=store)
    for link in (a, b):
        link.unlink()
    assert removal.carry_out(removal.plan(store.root, Request(older_than=0))) == []
    assert len(models(store)) == 2


def test_the_commands(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    published(store, "a", card=CARD)
    published(store, "a", "a2", card=CARD)
    output = ["--output", str(store.root)]
    place = str(store.root / "models" / "a")
    assert main.main(["combine", "both", "--add", f"{place}=chat", *output, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"] == {"chat": "a"}
    assert main.main(["combine", "both", "--dry-run", *output]) == 0
    shown = capsys.readouterr().out
    assert "L4, 24.00 GB" in shown
    assert "builder serve" not in shown  # nothing was made
    assert main.main(["rollback", "a", "--list", *output]) == 0
    assert capsys.readouterr().out.count("current") == 1
    assert main.main(["rollback", place, "--list", *output]) == 0
    assert capsys.readouterr().out.count("current") == 1
    assert main.main(["rollback", "a", *output]) == 0
    assert "models/a is version" in capsys.readouterr().out
    long = "a" * 150  # as links.py may name a build
    published(store, long, "a")
    assert main.main(["rollback", long, "--list", *output]) == 0
    capsys.readouterr()
    for argv, code, message in (
        (["combine", "both"], 2, "nothing to change"),
        (["combine", "both", "--kv-fraction", "chat=2"], 2, "is not MODEL=X"),
        (["combine", "both", "--add", place, "--add", place], 2, "called the same"),
        (["combine", "b/../", "--add", place], 2, "can't be the name"),
        (["bench", str(store.root / "models" / "both")], 2, "takes a repository of one model, and"),
        (["report", str(store.root / "models" / "both")], 2, "builder report takes a repository of one model, and"),
        (["render", *MODEL, "--as", "x"], 2, "--as names a model for --add"),
        (["render", *MODEL, "--add", "both", "--as", "chat"], 2, "already has a model"),
    ):
        with_output = argv if argv[0] == "report" else [*argv, *output]
        assert main.main(with_output) == code, argv
        assert message in capsys.readouterr().err
