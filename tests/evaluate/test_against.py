"""`builder eval --against`: other checkpoints of the same model, on the same texts.

The recipe is data-free, so that nothing is calibrated; the runners run in this process.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from builder import pipeline
from builder.checkpoint.conversion import convert
from builder.cli.main import main
from builder.core.errors import BuilderError, EvaluationError, UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.evaluate import candidates
from builder.evaluate import stage as evaluate_stage
from builder.evaluate.candidates import DATA_FREE, base_of, open_directories
from builder.evaluate.runners import worker
from builder.evaluate.stage import Evaluation
from builder.recipe import schema
from builder.recipe.schema import Resolved
from builder.report.gather import gather
from builder.report.render import html, markdown

DATA = Path(__file__).parents[1] / "data"
TINY = DATA / "tiny-qwen3"


def resolve(**more: Any) -> Resolved:
    flags = {
        "model.id": str(TINY),
        "gpu": "cpu",
        "calibration.samples": 0,
        "quality.check": False,
        "evaluation.data": [str(DATA / "eval" / name) for name in ("prose.jsonl", "chat.jsonl")],
        "evaluation.texts": 4,
        "evaluation.max_tokens": 48,
        "evaluation.resamples": 100,
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return schema.resolve(flags)


@pytest.fixture(scope="module", autouse=True)
def here() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_stage, "_run", lambda job, store: worker.run(json.loads(json.dumps(job))))
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("against") / "artifacts", Output("quiet"))


@pytest.fixture(scope="module")
def link(store: Store) -> Path:
    built = pipeline.build(resolve(), store, until="repository")
    assert built.repository is not None
    name = store.root / "models" / "ours"
    name.parent.mkdir(exist_ok=True)
    name.symlink_to(built.repository.path)
    return name


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory, link: Path, store: Store) -> dict[str, Path]:
    """Checkpoints as others publish them: this one in two layouts, and one in FP8."""
    root = tmp_path_factory.mktemp("published")
    ours = pipeline.build(resolve(), store, until="checkpoint").checkpoint
    assert ours is not None
    convert(ours.unified, root / "Tiny-NVFP4-ct", "compressed_tensors")
    shutil.copytree(ours.tensorrt_llm, root / "engine-input")
    fp8 = pipeline.build(resolve(quantization__format="fp8"), store, until="checkpoint").checkpoint
    assert fp8 is not None
    shutil.copytree(fp8.unified, root / "Tiny-FP8")
    return {path.name: path for path in root.iterdir()}


@pytest.fixture(scope="module")
def found(published: dict[str, Path], link: Path, store: Store) -> Evaluation:
    return pipeline.measure(resolve(), store, against=[*map(str, published.values()), str(link)])


def test_equal_weights_have_equal_figures_in_every_layout(found: Evaluation) -> None:
    ours = found.measured["checkpoint"]
    for label in ("Tiny-NVFP4-ct", "ours"):
        theirs = found.measured[label]
        assert {name: theirs["overall"][name] for name in ours["overall"]} == ours["overall"]
        ratio = theirs["overall"]["kl_ratio"]
        assert (ratio.value, ratio.low, ratio.high) == (1, 1, 1)
    # The layout keeps KV cache scales of at least 1, and data-free ones are 1.
    assert found.measured["engine-input"]["overall"]["kl"] == ours["overall"]["kl"]


def test_fp8_is_nearer_to_bf16_and_larger(found: Evaluation) -> None:
    theirs = found.measured["Tiny-FP8"]["overall"]
    assert theirs["kl_ratio"].high < 0.7
    assert theirs["kl"].value < found.measured["checkpoint"]["overall"]["kl"].value
    sizes = {label: one.nbytes for label, one in found.compared.items()}
    assert sizes["checkpoint"] < sizes["Tiny-FP8"] < sizes["bf16"]
    assert found.compared["Tiny-FP8"].formats == "FP8, FP8 KV cache"


def test_a_layout_that_quantize_wrote_is_opened_like_anybodys_checkpoint(store: Store) -> None:
    asked = resolve(quantization__format="int8_dynamic")
    layouts = pipeline.build(asked, store, until="checkpoint").layouts
    assert layouts is not None
    place = str(layouts.path / "compressed_tensors")
    [one] = candidates.open_directories([place], candidates.base_of(asked.recipe.model, store=store), store=store)
    assert {number_format.name for number_format in one.found.layers.values()} == {"int8_dynamic"}
    assert one.candidate(store).checkpoint.path.parent.name == "checkpoint"


def test_a_second_run_measures_nothing(found: Evaluation, published: dict[str, Path], link: Path, store: Store) -> None:
    again = Store(store.root, Output("quiet"))
    same = pipeline.measure(resolve(), again, against=[*map(str, published.values()), str(link)])
    assert same.as_dict() == found.as_dict()
    assert all(artifact.cached for artifact in again.done)


def test_bf16_is_scored_once_however_many_are_compared(found: Evaluation, store: Store) -> None:
    made = [json.loads(path.read_text())["ingredients"] for path in store.root.glob("scores/*/manifest.json")]
    assert sum(one["runner"] == "bf16" for one in made) == 2  # data sets
    assert len({one["reference"] for one in made if one["runner"] != "bf16"}) == 2


def test_the_report_shows_the_comparison(found: Evaluation, link: Path) -> None:
    report = gather(link)
    assert report.evaluation is not None
    assert [one.label for one in report.evaluation.compared] == list(found.compared)
    assert {score.runner for score in report.evaluation.scores} == {"bf16", "checkpoint"}
    page, card = html(report), markdown(report)
    assert 'id="compared-title"' in page
    for text in ("Tiny-FP8", "Tiny-NVFP4-ct", "engine-input"):
        assert text in page
        assert text in card.replace("\\", "")


def test_the_gate_judges_our_own_checkpoint_only(published: dict[str, Path], store: Store) -> None:
    """FP8 is ours here; NVFP4 would not pass."""
    ours = resolve(quantization__format="fp8", evaluation__max_kl=0.02)
    judged = pipeline.measure(ours, store, against=[str(published["Tiny-NVFP4-ct"])])
    assert judged.measured["Tiny-NVFP4-ct"]["overall"]["kl"].value > 0.02
    judged.check()
    with pytest.raises(EvaluationError):
        pipeline.measure(resolve(evaluation__max_kl=0.02), store, against=[str(published["Tiny-FP8"])]).check()


Change = Callable[[Path], None]


def other_size(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 5}))


def other_tokens(directory: Path) -> None:
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("engine-input", other_size, "num_hidden_layers is 5, not 6"),
        ("Tiny-NVFP4-ct", other_tokens, "tokenizer.json has other tokens"),
    ],
)
def test_checkpoints_of_another_model_are_refused(
    name: str, change: Change, words: str, published: dict[str, Path], tmp_path: Path, store: Store
) -> None:
    other = shutil.copytree(published[name], tmp_path / "other")
    change(other)
    with pytest.raises(UsageError, match="was not made from") as error:
        pipeline.measure(resolve(), store, against=[str(other)])
    assert words in error.value.why


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (str(TINY), "is not quantized"),
        ("no-such-directory", "There is no directory"),
        (str(DATA), "holds no quantized checkpoint"),
        (DATA_FREE, "There is no data-free checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_refused(place: str, words: str, store: Store) -> None:
    with pytest.raises(UsageError, match=words):
        pipeline.measure(resolve(), store, against=[place])


def test_a_changed_checkpoint_of_the_store_is_refused(link: Path, tmp_path: Path) -> None:
    copy = Store(shutil.copytree(link.parent.parent, tmp_path / "copy", symlinks=True), Output("quiet"))
    checkpoint = next(copy.root.glob("checkpoint/*/unified")).parent
    (checkpoint / "unified" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="can be measured"):
        pipeline.measure(resolve(), copy, against=[str(checkpoint)])


def test_later_stages_mean_the_checkpoint_that_they_were_made_from(link: Path, store: Store) -> None:
    made = pipeline.build(resolve(quantization__layouts="compressed-tensors"), store, until="checkpoint").layouts
    assert made is not None
    for place in (made.path, made.path / "compressed_tensors", link):
        taken = open_directories([str(place)], base_of(resolve().recipe.model, store=store), store=store)[0].take(store)
        assert taken.path.parent.name == "checkpoint"


def test_other_stages_are_refused_by_name(link: Path, store: Store) -> None:
    plain = resolve(quantization__format="bf16", quantization__kv_cache_dtype="auto")
    unquantized = pipeline.build(plain, store, until="checkpoint").checkpoint
    pseudo = pipeline.build(resolve(quantization__save_pseudo="bf16"), store, until="checkpoint").pseudo
    assert unquantized is not None
    assert pseudo is not None
    for path, words in (
        (next(store.root.glob("snapshot/*")), "the stage snapshot"),
        (pseudo.path, "the stage layouts"),
        (pseudo.path / "pseudo", "is not quantized"),
        (unquantized.path, "no quantization that is known"),
    ):
        with pytest.raises(BuilderError) as error:
            pipeline.measure(resolve(), store, against=[str(path)])
        assert words in f"{error.value} {error.value.why}"


def test_a_name_that_is_no_text_is_refused(published: dict[str, Path], tmp_path: Path, store: Store) -> None:
    other = shutil.copytree(published["Tiny-FP8"], os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    with pytest.raises(UsageError, match="is not UTF-8"):
        pipeline.measure(resolve(), store, against=[str(other)])


def test_an_empty_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["eval", "--model", str(TINY), "--gpu", "cpu", "--against", ""])
    assert "--against: an empty path" in capsys.readouterr().err


def test_names_are_text_in_the_report(published: dict[str, Path], link: Path, tmp_path: Path, store: Store) -> None:
    names = ["<img src=x onerror=alert(1)>", "a|b", "new\nline", "{{7*7}}"]
    places = [str(shutil.copytree(published["Tiny-FP8"], tmp_path / name)) for name in names]
    pipeline.measure(resolve(), store, against=places)
    page, card = html(gather(link)), markdown(gather(link))
    assert "<img" not in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page
    rows = [line for line in card.splitlines() if "FP8, FP8 KV cache | " in line]
    assert len(rows) == len(names)
    assert all(len(re.split(r"(?<!\\)\|", row)) == 11 for row in rows)
    assert "<img" not in card.replace("\\<", "")
    assert any("7\\*7" in row for row in rows)


def test_an_imported_checkpoint_is_described_by_its_files(published: dict[str, Path], store: Store) -> None:
    """Not by the recipe's default format."""
    imported = {"model__id": str(published["Tiny-FP8"]), "model__original": str(TINY), "calibration__samples": 512}
    found = pipeline.measure(resolve(**imported), store, against=[str(published["Tiny-NVFP4-ct"])])
    assert found.compared["checkpoint"].formats == "FP8, FP8 KV cache"
    assert found.compared["checkpoint"].tool.startswith("modelopt")


def test_an_unquantized_recipe_has_no_ratio(published: dict[str, Path], store: Store) -> None:
    plain = resolve(quantization__format="bf16", quantization__kv_cache_dtype="auto")
    found = pipeline.measure(plain, store, against=[str(published["Tiny-FP8"])])
    assert (found.compared["checkpoint"].formats, found.compared["checkpoint"].tool) == (
        "BF16", "this recipe, unquantized")  # fmt: skip
    assert "kl_ratio" not in found.measured["Tiny-FP8"]["overall"]


def test_a_later_evaluation_keeps_the_comparison_in_the_report(found: Evaluation, link: Path, store: Store) -> None:
    before = gather(link).evaluation
    pipeline.measure(resolve(evaluation__texts=3), store)
    after = gather(link).evaluation
    assert before is not None
    assert after is not None
    assert after.scores != before.scores or after.limits
    assert before.compared == after.compared != ()


def test_directories_are_named_by_as_much_of_their_path_as_needed(
    published: dict[str, Path], tmp_path: Path, store: Store
) -> None:
    twin = shutil.copytree(published["Tiny-FP8"], tmp_path / "Tiny-FP8")
    both = pipeline.measure(resolve(), store, against=[str(published["Tiny-FP8"]), str(twin)])
    assert both.candidates == ["Tiny-FP8", f"{tmp_path.name}/Tiny-FP8"]
    with pytest.raises(UsageError, match="twice"):
        pipeline.measure(resolve(), store, against=[str(twin), f"{twin.parent}/../{tmp_path.name}/Tiny-FP8"])


def test_the_order_of_candidates_does_not_matter(found: Evaluation, published: dict[str, Path], store: Store) -> None:
    turned = pipeline.measure(resolve(), store, against=[str(p) for p in reversed(published.values())])
    for label in turned.candidates:
        assert turned.measured[label] == found.measured[label]
        assert turned.scores[label] == found.scores[label]
    same = {"path": Path(), "compared": {}, "measured": {}, "sets": {}, "scores": {}}
    assert replace(turned, **same) == replace(found, **same)
