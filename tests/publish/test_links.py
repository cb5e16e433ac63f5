"""Whose link is whose: nothing takes the link of another build, and a rerun finds its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import report_store

from builder.core import file_names, manifest
from builder.core.errors import UsageError
from builder.core.store import Store
from builder.publish import build_record, links
from builder.recipe import schema

HUB = "Qwen/Qwen3-8B"


def resolve(model: str = HUB, **values: Any) -> schema.Resolved:
    return schema.resolve({"model.id": model, "gpu": "sm120", **{k.replace("__", "."): v for k, v in values.items()}})


def published(store: Store, resolved: schema.Resolved, key: str) -> str:
    """As the pipeline does it, with a repository that is only a directory; the name of the link."""
    repository = store.root / "repository" / key
    repository.mkdir(parents=True, exist_ok=True)
    name = links.link(resolved, repository, store)
    path = store.root / build_record.DIRECTORY / f"{name.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    source = links.source_of(resolved.recipe.model)
    values = [list(row) for row in resolved.explained()]
    told = {"format": build_record.FORMAT, "repository": f"repository/{key}", "written": 1.0, "values": values}
    told |= {"source": source, "source_digest": links.digest_of(source)}
    path.write_text(json.dumps(manifest.seal(told)))
    links.move(name, repository)
    assert name.resolve() == repository
    return name.name


def models(store: Store) -> dict[str, str]:
    return {path.name: path.resolve().name for path in (store.root / "models").iterdir()}


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({}, "Qwen3-8B-sm120-nvfp4"),
        ({"engine__tp": 2}, "Qwen3-8B-sm120-nvfp4-tp2"),
        ({"engine__pp": 2}, "Qwen3-8B-sm120-nvfp4-pp2"),
        ({"engine__tp": 4, "engine__pp": 2}, "Qwen3-8B-sm120-nvfp4-tp4-pp2"),
        ({"quantization__keep_bf16": ["*.down_proj"]}, "Qwen3-8B-sm120-nvfp4-keep-bf16"),
        ({"quantization__keep_fp8": ["*.down_proj"], "engine__tp": 2}, "Qwen3-8B-sm120-nvfp4-keep-fp8-tp2"),
        ({"name": "prod"}, "prod"),
    ],
)
def test_the_first_of_a_name_has_the_short_one(store: Store, values: dict[str, Any], name: str) -> None:
    assert published(store, resolve(**values), "key") == name
    assert os.readlink(store.root / "models" / name) == "../repository/key"


@pytest.mark.parametrize(
    ("second", "name"),
    [
        ({"model": "other/Qwen3-8B"}, "other-Qwen3-8B-sm120-nvfp4"),
        ({"model__revision": "v2"}, "Qwen3-8B-sm120-nvfp4-v2"),
        ({"model__revision": "0123456789abcdef0123456789abcdef01234567"}, "Qwen3-8B-sm120-nvfp4-0123456"),
        ({"quantization__kv_cache_dtype": "auto"}, "Qwen3-8B-sm120-nvfp4-kv-auto"),
        ({"engine__max_seq_len": 8192}, "Qwen3-8B-sm120-nvfp4-seq8192"),
        ({"engine__max_batch_size": 8, "engine__max_num_tokens": 4096}, "Qwen3-8B-sm120-nvfp4-batch8-tokens4096"),
        ({"model": "other/Qwen3-8B", "engine__max_batch_size": 8}, "other-Qwen3-8B-sm120-nvfp4-batch8"),
    ],
)
def test_what_collides_is_named_by_what_distinguishes_it_and_both_stay(
    store: Store, second: dict[str, Any], name: str
) -> None:
    one, two = resolve(), resolve(**second)
    assert published(store, one, "one") == "Qwen3-8B-sm120-nvfp4"
    assert published(store, two, "two") == name
    both = {"Qwen3-8B-sm120-nvfp4": "one", name: "two"}
    assert models(store) == both
    assert published(store, one, "one") == "Qwen3-8B-sm120-nvfp4"
    assert published(store, two, "two") == name
    assert models(store) == both, "reruns move nothing"
    assert published(store, two, "three") == name, "another repository of the same source and recipe takes its own link"
    assert models(store) == {**both, name: "three"}


def test_directories_of_the_same_name_are_named_by_their_parents(store: Store, tmp_path: Path) -> None:
    made = {}
    for run in ("run-a", "run-b", "again/run-b"):
        directory = tmp_path / run / "checkpoint-500"
        directory.mkdir(parents=True)
        made[run] = published(store, resolve(str(directory)), run.replace("/", "-"))
    assert made["run-a"] == "checkpoint-500-sm120-nvfp4"
    assert made["run-b"] == "run-b-checkpoint-500-sm120-nvfp4"
    assert made["again/run-b"].startswith("run-b-checkpoint-500-sm120-nvfp4-")
    assert sorted(models(store).values()) == ["again-run-b", "run-a", "run-b"]


def test_a_rerun_keeps_its_name_when_the_other_is_gone(store: Store) -> None:
    published(store, resolve(), "one")
    second = resolve("other/Qwen3-8B")
    name = published(store, second, "two")
    (store.root / "models" / "Qwen3-8B-sm120-nvfp4").unlink()
    assert published(store, second, "two") == name
    assert list(models(store)) == [name]


def test_other_patterns_of_kept_layers_are_another_model(store: Store) -> None:
    first = published(store, resolve(quantization__keep_fp8=["*.down_proj"]), "one")
    second = published(store, resolve(quantization__keep_fp8=["*.mlp.*"]), "two")
    assert second.startswith(f"{first}-")
    assert len(models(store)) == 2


def test_flags_of_the_engine_are_told_apart_and_calibration_is_not(store: Store) -> None:
    short = published(store, resolve(), "one")
    assert published(store, resolve(calibration__samples=8, quality__min_score=50.0), "two") == short
    assert published(store, resolve(engine__flags={"multiple_profiles": "enable"}), "three") != short


def test_a_link_without_a_record_or_a_directory_in_its_place_is_left_alone(store: Store) -> None:
    place = store.root / "models" / "Qwen3-8B-sm120-nvfp4"
    place.mkdir(parents=True)
    name = published(store, resolve(), "one")
    assert name.startswith("Qwen3-8B-sm120-nvfp4-")
    assert place.is_dir()
    assert published(store, resolve(), "two") == name


def test_the_same_content_from_another_place_has_one_link(store: Store) -> None:
    assert published(store, resolve(), "one") == published(store, resolve(model__revision="v1"), "one")


def test_a_record_of_an_older_version_knows_whose_link_it_is(store: Store, tmp_path: Path) -> None:
    """Without a source, and without the keys that recipes have got since."""
    resolved = resolve()
    name = published(store, resolved, "one")
    path = store.root / "builds" / f"{name}.json"
    told = json.loads(path.read_text())
    told = {key: value for key, value in told.items() if not key.startswith("source")}
    told["values"] = [row for row in told["values"] if row[0] not in ("name", "repository.max_queue_size")]
    path.write_text(json.dumps({**told, "format": 1}))
    assert published(store, resolved, "two") == name
    assert published(store, resolve("other/Qwen3-8B"), "three") != name


@pytest.mark.parametrize("values", [[1, 2], "x", None, [["a"]], {"model.id": 1}])
def test_a_damaged_record_is_nobodys(store: Store, values: Any) -> None:
    name = published(store, resolve(), "one")
    path = store.root / "builds" / f"{name}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "values": values}))
    assert published(store, resolve(), "two").startswith(f"{name}-")
    assert models(store)[name] == "one"


def test_a_given_name_takes_the_link_whatever_it_named(store: Store) -> None:
    assert published(store, resolve(name="prod"), "one") == "prod"
    assert published(store, resolve("other/Qwen3-8B", name="prod"), "two") == "prod"
    assert models(store) == {"prod": "two"}


def test_a_given_name_takes_no_directory_away(store: Store) -> None:
    place = store.root / "models" / "prod"
    place.mkdir(parents=True)
    with pytest.raises(UsageError, match="is not a link"):
        links.move(place, store.root / "repository" / "one")
    assert place.is_dir()


@pytest.mark.parametrize("name", ["../x", "", ".hidden", "a b", "-x", "x" * 129])
def test_a_given_name_is_one_safe_file_name(name: str) -> None:
    with pytest.raises(Exception, match="name"):
        resolve(name=name)


@pytest.mark.parametrize("directory", ["m" * 240, "模型" * 40, "模型", "...", "a b&c;d'e"])
def test_any_name_of_a_directory_gives_a_name_that_fits_with_its_suffixes(
    store: Store, tmp_path: Path, directory: str
) -> None:
    model = tmp_path / "parent" / directory
    model.mkdir(parents=True)
    name = published(store, resolve(str(model)), "one")
    other = tmp_path / "other" / directory
    other.mkdir(parents=True)
    second = published(store, resolve(str(other), engine__max_batch_size=8, engine__tp=2), "two")
    for one in (name, second):
        assert len(f".{one}.json.4194304.tmp".encode()) <= 255
        assert one == file_names.sanitized(one)
    assert len(models(store)) == 2


def test_shortened_names_of_different_words_differ() -> None:
    assert file_names.truncated("x" * 180) == "x" * 180
    long = [file_names.truncated("x" * 200 + end) for end in "ab"]
    assert len(set(long)) == 2
    assert all(len(name) <= 180 for name in long)


def test_the_real_record_names_the_source(store: Store) -> None:
    link = report_store.build(store.root)
    told = json.loads((store.root / "builds" / f"{link.name}.json").read_text())
    assert told["source"] == str(Path(report_store.MODEL).resolve())
    resolved = schema.resolve({"model.id": report_store.MODEL, "gpu": "sm120", "engine.max_batch_size": 4})
    assert links.link(resolved, link.resolve(), store) == link
