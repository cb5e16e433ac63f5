"""Results in files: no row is lost or doubled, other versions are refused; and what follows from the figures."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from sweep_results import result, served

from builder.cli import main
from builder.core.errors import UsageError
from builder.evaluate.metrics import Estimate, Sums
from builder.sweep import measured, page, results

ROOT = Path(__file__).parents[2]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.floats(1e-6, 10)), min_size=1, max_size=8))
def test_each_point_has_its_newest_rows_once(tmp_path_factory: pytest.TempPathFactory, changes: list[Any]) -> None:
    directory = tmp_path_factory.mktemp("sweep")
    for name, kl in changes:
        results.update(directory, [result(kl, point=name)])
    found = results.read(directory / results.CSV)
    assert {(row["point"], row["name"]): row["kl"] for row in found if row["kind"] == "texts"} == {
        (name, "prose"): pytest.approx(kl) for name, kl in dict(changes).items()
    }
    assert len(found) == 2 * len(dict(changes))
    table = parquet.read_table(directory / results.PARQUET).to_pylist()
    assert [(row["point"], row["kind"], row["kl"]) for row in table] == [
        (row["point"], row["kind"], row["kl"]) for row in found
    ]
    assert table[0]["ppl_high"] is None, "infinity is no number in a table"


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, "tests/support")
from sweep_results import result
from builder.sweep import results
for number in range(15):
    mine = result(float(sys.argv[2]), point=f"{sys.argv[2]}-{number}")
    results.update(Path(sys.argv[1]), [mine, result(float(sys.argv[2]) + number / 100, point="both")])
"""


def test_sweeps_that_write_at_once_lose_no_row_and_double_none(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", WRITER, str(tmp_path)]
    names = ("1", "2", "3")
    running = [subprocess.Popen([*argv, name], cwd=ROOT, env=None) for name in names]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    found = [row for row in results.read(tmp_path / results.CSV) if row["kind"] == "texts"]
    points = [row["point"] for row in found]
    assert sorted(points) == sorted([*(f"{name}-{number}" for name in names for number in range(15)), "both"])
    [both] = [row["kl"] for row in found if row["point"] == "both"]
    assert both in [pytest.approx(int(name) + 0.14) for name in names], "the last one of a writer"
    table = parquet.read_table(tmp_path / results.PARQUET).to_pylist()
    assert [(row["point"], row["kl"]) for row in table if row["kind"] == "texts"] == [
        (row["point"], row["kl"]) for row in found
    ]
    assert {path.name for path in tmp_path.iterdir()} == {results.CSV, results.PARQUET, results.LOCK}


def test_other_files_are_refused_and_left_alone(tmp_path: Path) -> None:
    file = tmp_path / results.CSV
    results.update(tmp_path, [result(1.0, point="a")])
    ours = file.read_text()
    newer = ours.replace("\n2,", "\n3,")
    others = [
        "a,b\n1,2\n",
        "\0",
        f'{ours}"half',
        f"{ours}2,a\n",
        f"{ours[:-1]},more\n",
        ours.replace("kl_low", "else"),
        ours.replace("1000", "1 k"),
    ]
    for text, said in ((newer, "has version 3"), *((text, "is not a file of a sweep's results") for text in others)):
        file.write_text(text)
        with pytest.raises(UsageError, match=said):
            results.update(tmp_path, [result(1.0, point="b")])
        assert file.read_text() == text


def test_a_failed_point_has_one_row_that_says_why() -> None:
    [row] = results.rows(result(0, why="line 1\nout of memory", point="a"))
    assert (row["status"], row["why"]) == ("failed", "line 1 out of memory")


def test_what_a_served_point_did_has_a_row_for_each_concurrency() -> None:
    found = results.rows(served(result(1.0, point="a"), 80))
    assert [(row["kind"], row["name"]) for row in found][2:] == [("load", "concurrency 1"), ("load", "concurrency 4")]
    figures = ("tokens_per_second", "ttft", "inter_token_latency", "latency")
    assert [found[2][name] for name in figures] == [40, 0.1, 0.1, 0.1]
    assert [found[3][name] for name in figures] == [80, None, None, 0.1]
    assert {row["verdict"] for row in found} == {"passed"}


def test_a_build_that_was_rejected_is_measured_but_not_recommended() -> None:
    rejected, other = served(result(0.1, 100, point="a"), 1, "failed"), result(0.2, 200, point="b")
    assert {(row["status"], row["verdict"], row["why"]) for row in results.rows(rejected)} == {
        ("measured", "failed", "why")
    }
    chosen = measured.recommended([rejected, other])
    assert chosen is not None
    assert chosen[0] is other


@pytest.mark.parametrize(("score", "verdict"), [(95, "passed"), (80, "failed"), (90.5, "unsure")])
def test_without_a_build_the_verdict_follows_from_the_score(score: float, verdict: str) -> None:
    assert result(1.0, score=score, point="a").verdict == verdict


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=12))
def test_the_front_of_three_figures_is_that_of_the_definition(found: list[tuple[int, int, int]]) -> None:
    every = {n: served(result(kl, nbytes, point=str(n)), speed) for n, (nbytes, kl, speed) in enumerate(found)}
    on_front = {int(one.point.name) for one in measured.front([*every.values()], served=True)}
    for n, (nbytes, kl, speed) in enumerate(found):
        beaten = any((b <= nbytes and k <= kl and s >= speed) and (b, k, s) != (nbytes, kl, speed) for b, k, s in found)
        same = {m for m, other in enumerate(found) if other == found[n]}
        assert len(on_front & same) == (0 if beaten else 1)


def test_the_page_of_served_points_shows_their_speed() -> None:
    found = [served(result(1.0, 200, point="a"), 50), served(result(2.0, 100, point="b"), 80)]
    text = page.page("t", found, [one.point for one in found])
    assert "Accuracy and throughput" in text
    assert "80.0<small>concurrency 4</small>" in text
    assert "100.0 ms" in text
    assert "tokens/s" not in page.page("t", [one := result(1.0, point="a")], [one.point])


def test_ratios_and_effects_are_those_of_the_pairs() -> None:
    of = {("x", "p"): 1.0, ("y", "p"): 0.5, ("x", "q"): 4.0, ("y", "q"): 1.0}
    found = [result(kl, a=a, b=b) for (a, b), kl in of.items()]
    ratios = {one.point.name: one.texts["prose"].get("kl_ratio") for one in measured.with_ratios(found)}
    assert ratios["x, p"] is None
    assert ratios["x, q"] is None
    assert ratios["y, p"].value == pytest.approx(0.5)  # type: ignore[union-attr]
    assert ratios["y, q"].value == pytest.approx(0.25)  # type: ignore[union-attr]
    listed = [result(kl, point=name) for name, kl in (("first", 1.0), ("second", 2.0), ("third", 4.0))]
    [_, third] = measured.with_ratios(listed[1:], points=[one.point for one in listed])
    assert "kl_ratio" not in third.texts["prose"], "the base has not ended yet"
    effects = measured.effects(found)
    assert effects["a: y"].mean.value == pytest.approx((0.5 * 0.25) ** 0.5)
    assert effects["b: q"].mean.value == pytest.approx((4 * 2) ** 0.5)
    assert effects["a: y"].mean.low == pytest.approx(effects["a: y"].mean.value), "all texts agree here"
    assert measured.effects(found[1:2], [one.point for one in found]) == {}, "the base has not ended yet"
    assert [*measured.effects(found[1:], [one.point for one in found])] == ["a: y", "b: q"], "by the file's first"


def test_points_that_were_measured_on_other_texts_or_lose_nothing_are_not_compared() -> None:
    base, fewer, same, bf16 = (result(kl, form=name) for name, kl in (("a", 1.0), ("b", 0.5), ("c", 2.0), ("d", 0.0)))
    ten = Sums(*[np.ones(10)] * 3, kl=np.ones(10))
    found = [base, replace(fewer, sums=(ten,)), same, bf16]
    assert ["kl_ratio" in one.texts["prose"] for one in measured.with_ratios(found)] == [False, False, True, True]
    effects = measured.effects(found)
    assert {name: one.mean.value for name, one in effects.items()} == {"form: c": pytest.approx(2)}


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0.01, 2)), min_size=1, max_size=12))
def test_nothing_beats_a_point_of_the_front(pairs: list[tuple[int, float]]) -> None:
    found = [result(kl, nbytes, point=str(number)) for number, (nbytes, kl) in enumerate(pairs)]
    front = measured.front(found)
    for one in found:
        beaten = [other for other in front if other.nbytes <= one.nbytes and other.kl.value <= one.kl.value]  # type: ignore[operator, union-attr]
        assert beaten
    assert [one.nbytes for one in front] == sorted(one.nbytes for one in front)  # type: ignore[type-var]


def test_the_smallest_that_passes_is_recommended() -> None:
    small, passing, large = (
        result(0.5, 100, score=80, point="small"),
        result(0.2, 150, score=95, point="passing"),
        result(0.1, 300, score=99, point="large"),
    )
    near = result(0.19, 151, score=95, point="near")
    several = [small, passing, large]
    for among, expected in (([*several, near], near), (several, passing), ([small], small)):
        chosen = measured.recommended(among)
        assert chosen is not None
        assert chosen[0] is expected
    assert measured.recommended([result(0, why="x", point="a")]) is None


def test_a_choice_that_helps_some_points_and_harms_others_is_named_as_mixed() -> None:
    of = {("x", "p"): 1.0, ("y", "p"): 0.05, ("x", "q"): 1.0, ("y", "q"): 3.5, ("x", "r"): 1.0, ("y", "r"): 1.0}
    found = [result(kl, a=a, b=b) for (a, b), kl in of.items()]
    assert measured.effects(found)["a: y"].mixed == "helps y, p (0.05), harms y, q (3.5)"
    assert "Look at single points: a: y helps y, p (0.05)" in page.page("t", found, [one.point for one in found])
    assert {one.mixed for one in measured.effects(found[:2] + found[4:]).values()} == {""}, "nothing is harmed"


def test_an_effect_keeps_the_digits_that_tell_it_from_none() -> None:
    effects = {0.9: "0.90 (0.81 to 0.99)", 0.0142: "0.014 (0.013 to 0.016)", 0.00265: "0.0027 (0.0024 to 0.0029)"}
    for value, shown in effects.items():
        assert page._ratio(Estimate(value, value * 0.9, value * 1.1)) == shown


def test_a_page_of_hostile_names_and_failures_is_whole() -> None:
    found = [result(1.0, a="<script>", b="p"), result(0.5, 900, a="y", b="p"), result(0, why="<b>x</b>", a="z", b="p")]
    later = result(1.0, a="later", b="p").point
    text = page.page("<title>", measured.with_ratios(found), [*(one.point for one in found), later])
    assert "<script>" not in text
    assert "<b>x" not in text
    assert "3 of 4 points" in text
    assert "Points that failed" in text


def test_compare_prints_both_figures_and_what_only_one_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, kl in (("first", 1.0), ("second", 0.5)):
        results.update(tmp_path / name, [served(result(kl, point="same"), 60 / kl), result(kl, point=name)])
    assert main.main(["compare", str(tmp_path / "first"), str(tmp_path / "second")]) == 0
    said = capsys.readouterr().out
    assert "same\tprose\tkl\t1 (0.9 to 1.1)\t0.5 (0.45 to 0.55)\t0.500" in said
    assert "same\tconcurrency 4\ttokens_per_second\t60\t120\t2.000" in said
    assert f"only in {tmp_path / 'second'}: second" in said
    results.update(tmp_path / "unserved", [result(1.0, point="same"), result(0, why="killed", point="first")])
    assert main.main(["compare", str(tmp_path / "first"), str(tmp_path / "unserved")]) == 0
    said = capsys.readouterr().out
    assert "same\tprose\tkl\t1 (0.9 to 1.1)\t1 (0.9 to 1.1)\t1.000" in said
    assert f"only in {tmp_path / 'first'}: first, same (concurrency 1), same (concurrency 4)" in said
    assert f"only in {tmp_path / 'unserved'}" not in said, "a point that failed there has no figures"
    assert main.main(["compare", str(tmp_path / "first"), str(tmp_path)]) == 2
