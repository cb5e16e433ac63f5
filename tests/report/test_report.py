"""The report: what it shows and never claims, and that nothing in it can become markup."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import report_store
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from builder.core.errors import UsageError
from builder.core.store import Artifact
from builder.recipe.target_facts import TARGETS
from builder.report.gather import REFERENCE, gather, judge, results
from builder.report.render import code, escape_markdown, fenced, html, markdown, visible
from builder.report.results import Evaluation, Interval, Score
from builder.serving.smoke import Check, SmokeReport

HOSTILE = (
    "</pre></bdi><script>alert(1)</script><img src=x onerror=alert(2)>|`````[x](http://evil.example)\u202e\x00\x1b[2J"
)
GOOD = SmokeReport((Check("HTTP infer", True, "", 0.1),))
BAD = SmokeReport((Check("HTTP infer", False, "refused", 0.1),))


class Page(HTMLParser):
    """Parses a page: tags with their attributes, sections, and the visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.sections: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section" and (name := dict(attrs).get("id")):
            self.sections.append(name)

        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with everything: build record, smoke test, an evaluation that passed its gate, tasks."""
    made = report_store.build(tmp_path_factory.mktemp("report") / "out")
    report_store.evaluate(made)
    report_store.ask(made)
    report_store.put_benchmark(made)
    report_store.put_aiperf(made)
    return made


def test_a_benchmark_under_its_old_name_is_read(tmp_path: Path) -> None:
    made = report_store.build(tmp_path / "out")
    report_store.put_load(made)
    found = gather(made).benchmark
    assert found is not None
    assert [(level.concurrency, level.completed) for level in found.levels] == [(3, 32)]
    assert "<h2>Benchmark</h2>" in html(gather(made))


def report(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "builder", "report", *argv], capture_output=True, text=True)


def evaluation(passed: bool | None, failed: tuple[str, ...] = ()) -> Evaluation:
    limits = {} if passed is None else {"score": 98.0}
    return Evaluation("digest", (), passed, limits, failed)


@pytest.mark.parametrize(
    ("smoke", "measured", "status", "words"),
    [
        (GOOD, evaluation(True), "passed", "passed the accuracy gate"),
        (GOOD, evaluation(False, ("score is 91",)), "failed", "failed the accuracy gate"),
        (BAD, evaluation(True), "failed", "failed the smoke test"),
        (None, evaluation(False, ("score is 91",)), "failed", "failed the accuracy gate"),
        (GOOD, evaluation(None), "incomplete", "no gate was set"),
        (GOOD, Evaluation("digest", (), None, {"score": 98.0}), "incomplete", "gate could not be judged"),
        (GOOD, None, "incomplete", "accuracy was not measured"),
        (None, evaluation(True), "incomplete", "not served"),
        (None, None, "incomplete", "not served and not tested"),
    ],
)
def test_only_what_was_served_and_passed_a_gate_passes(
    smoke: SmokeReport | None, measured: Evaluation | None, status: str, words: str
) -> None:
    verdict = judge(smoke, measured, "engine")
    assert (verdict.status, words in verdict.headline) == (status, True), verdict
    if status == "failed":
        assert any("91" in reason or "refused" in reason for reason in verdict.reasons)


def test_everything_that_is_known_is_gathered(link: Path) -> None:
    found = gather(link)
    assert (found.model.id, found.model.gpu, found.model.target) == (report_store.MODEL, "sm120", "engine")
    assert found.verdict.status == "passed"
    assert ("engine.max_batch_size", 4, "command line") in found.values
    assert [stage.name for stage in found.stages][:3] == ["snapshot", "calibration", "checkpoint"]
    assert found.versions["nvidia-modelopt"] == "0.47.0"
    assert found.versions["tritonclient"] == "2.73.0"
    assert found.size.peaks == [("checkpoint", 814_452_736)]
    assert found.size.weights
    assert found.size.weights[0] == sum(f.stat().st_size for f in Path(report_store.MODEL).glob("*.safetensors"))
    assert found.command
    assert found.command.startswith("builder build --model tests/data/tiny-qwen3 --gpu sm120")
    assert found.engine_command == "trtllm-build --max_batch_size 4"
    assert found.evaluation
    assert found.evaluation.scores[-1].score == Interval(98.7, pytest.approx(98.1), pytest.approx(99.2))
    assert gather(link.resolve()) == found, "by its directory as by its link"


def test_the_page_stands_alone_and_has_every_section_once(link: Path) -> None:
    text = html(gather(link))
    page = Page(text)
    assert page.open == []
    assert page.sections == [
        "not-measured", "accuracy", "tasks", "size", "smoke", "load", "benchmark",
        "warnings", "times", "recipe", "versions", "reproduce",
    ]  # fmt: skip
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    assert not [name for _, attrs in page.tags for name in attrs if name in ("src", "href") or name.startswith("on")]
    assert not re.search(r"url\(|@import|https?:", text)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert "It serves, and passed the accuracy gate" in page.text
    assert "98.10 to 99.20" in page.text
    assert "engine.max_batch_size" in page.text
    assert "&lt;" not in page.text
    assert "<" not in page.text
    assert "Return the number of" in page.text
    assert sum(tag == "svg" for tag, _ in page.tags) == 6 + 8, (
        "six charts of the build, and four each of a closed and an open loop"
    )


def test_the_same_report_is_the_same_page(link: Path) -> None:
    assert html(gather(link)) == html(gather(link))
    assert markdown(gather(link)) == markdown(gather(link))


def test_what_is_not_known_is_absent_and_said(tmp_path: Path) -> None:
    found = gather(report_store.build(tmp_path, gpu="cpu", recorded=False, smoke=False))
    page = Page(html(found))
    assert not {"accuracy", "smoke", "loss", "warnings"} & set(page.sections)
    assert found.verdict.status == "incomplete"
    assert ("quantization.format", "nvfp4", "manifest") in found.values
    for said in (
        REFERENCE,
        "Accuracy was not measured",
        "Serving was not benchmarked",
        "no build record",
        "not served",
    ):
        assert said in page.text
        assert escape_markdown(said)[:20] in markdown(found)
    assert "The command was not recorded" in page.text
    assert found.model.gpu == "cpu"


def test_a_gpu_engine_is_not_said_to_be_the_reference_executor(link: Path) -> None:
    assert REFERENCE not in gather(link).unmeasured
    assert "Accuracy was not measured on the served model, only on: checkpoint on disk." in gather(link).unmeasured


@pytest.mark.parametrize(
    ("target", "server"),
    [("engine", "TensorRT engine"), ("llmapi", "LLM API"), ("reference", "reference executor")],
)
def test_the_report_names_what_serves(link: Path, target: str, server: str) -> None:
    found = gather(link)
    found = replace(found, model=replace(found.model, target=target), verdict=judge(GOOD, None, target))
    assert f"served by {TARGETS[target].served_by}." in found.verdict.reasons[0]
    assert server in TARGETS[target].served_by
    others = {"TensorRT engine", "LLM API", "reference executor"} - {server}
    for text in (Page(html(found)).text, markdown(found)):
        top = text.partition("Not measured")[0]
        assert server in top
        assert not [other for other in others if other in top]


def test_a_repository_outside_any_store_still_gets_a_report(tmp_path: Path) -> None:
    link = report_store.build(tmp_path / "out")
    alone = shutil.copytree(link.resolve(), tmp_path / "carried-away")
    found = gather(alone)
    assert (found.model.id, found.model.name) == ("unknown", "repository-carried-away")
    assert "repository" in [stage.name for stage in found.stages]
    html(found)
    markdown(found)


def test_tasks_stand_beside_the_evaluation_on_texts(link: Path, tmp_path: Path) -> None:
    """The newest evaluation by tasks does not hide the one on texts. Both are in the page, the card and the table."""
    found = gather(link)
    assert found.evaluation is not None
    assert [(row.runner, row.value, row.flips) for row in found.tasks] == [
        ("bf16", 0.531, None),
        ("checkpoint", 0.512, 0.083),
        ("checkpoint", 0.4, None),
    ]
    assert found.verdict.status == "passed"
    page = Page(html(found)).text
    for text in ("0.5120", "± 0.0138", "-0.0190", "8.3 %", "1,319", "exact_match (strict-match)"):
        assert text in page, text
    assert "checkpoint on disk | 0.5120 ± 0.0138 | -0.0190 | 8.3 % | 1,319 | 5 |" in markdown(found)
    table = tmp_path / "table.csv"
    for _ in range(2):
        argv = ["--html", str(tmp_path / "p.html"), "--markdown", str(tmp_path / "c.md"), "--csv", str(table)]
        assert report(str(link), *argv).returncode == 0
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["data"], row["runner"], row["value"]) for row in rows[4:]] == [
        ("gsm8k", "bf16", "0.531"),
        ("gsm8k", "checkpoint", "0.512"),
        ("gsm8k", "checkpoint", "0.4"),
    ]
    assert {row["value"] for row in rows[:4]} == {""}


def test_tasks_alone_are_said_to_be_tasks_alone(tmp_path: Path) -> None:
    link = report_store.build(tmp_path)
    report_store.ask(link)
    found = gather(link)
    assert found.evaluation is None
    assert found.verdict.headline == "It serves; accuracy was measured by tasks only, no gate was set"
    assert any("not measured on texts" in text for text in found.unmeasured)
    assert not any("No task" in text for text in found.unmeasured)


def test_what_is_no_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a finished repository"):
        gather(tmp_path)
    done = report(str(tmp_path / "absent"))
    assert (done.returncode, "builder build" in done.stderr) == (2, True)


def test_an_evaluation_of_another_checkpoint_is_not_taken(tmp_path: Path) -> None:
    link = report_store.build(tmp_path)
    report_store.evaluate(link, score=91.0, limit=None)
    report_store.evaluate(link, score=99.0, limit=95.0)
    found = gather(link).evaluation
    assert found
    assert found.limits == {"score": 95.0}, "one with a gate goes before one without"
    for path in (tmp_path / "scores").glob("*/manifest.json"):
        manifest = json.loads(path.read_text())
        if manifest["ingredients"]["runner"] == "checkpoint":
            manifest["ingredients"]["of"] = ["the digest of another checkpoint"]
            path.write_text(json.dumps(manifest))
    assert gather(link).evaluation is None


def test_a_failed_gate_is_the_verdict_and_says_what_failed(tmp_path: Path) -> None:
    link = report_store.build(tmp_path)
    report_store.evaluate(link, score=91.2, limit=98.0)
    found = gather(link)
    assert found.verdict.status == "failed"
    assert "score of checkpoint on wikitext is 91.20, below 98" in found.verdict.reasons
    assert "FAILED: It failed the accuracy gate" in markdown(found)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with a hostile model directory, answer and warning."""
    root = tmp_path_factory.mktemp("hostile")
    model = shutil.copytree(report_store.MODEL, root / "<img src=x onerror=alert(3)>|`*_[x](javascript:alert(4))")
    sample = {"prompt": HOSTILE, "answer": HOSTILE}
    return report_store.build(
        root / "out", gpu="cpu", model=str(model), sample=sample, warnings={HOSTILE: 2}, link="{{7*7}}<b>"
    )


def test_nothing_hostile_becomes_markup_in_the_page(hostile: Path, link: Path) -> None:
    text = html(gather(hostile))
    page, plain = Page(text), Page(html(gather(link)))
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in plain.tags}
    assert not [attrs for _, attrs in page.tags if {"src", "onerror", "href"} & set(attrs)]
    assert "<script>alert(1)</script>" in page.text, "it is shown as what it is"
    assert "{{7*7}}<b>" in page.text
    assert not {"\u202e", "\x00", "\x1b"} & set(text)
    assert "\\u202e" in page.text


def test_nothing_hostile_becomes_markup_in_the_card(hostile: Path) -> None:
    text = markdown(gather(hostile))
    rendered = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable("table").render(text)
    page = Page(rendered)
    assert not {"script", "img", "a", "b", "bdi", "em"} & {tag for tag, _ in page.tags}
    assert not {"\u202e", "\x00", "\x1b"} & set(text)
    rows = [line for line in text.splitlines() if line.startswith("| ") and "max_batch_size" in line]
    assert len(rows) == 1


@given(st.text(alphabet=st.sampled_from("ab1 |`#-+.)<>*_[](){}!&;~$@:/=\\\n")) | st.text())
@example("www.a.b http://a.b")
def test_markdown_of_any_text_is_that_text(text: str) -> None:
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    seen = " ".join(visible(text).split())
    table = Page(parser.render(f"| a | b |\n| --- | --- |\n| {escape_markdown(text)} | {code(text)} |\n"))
    assert {tag for tag, _ in table.tags} <= {"table", "thead", "tbody", "tr", "th", "td", "code"}
    cells = re.findall(
        r"<td>(.*?)</td>", parser.render(f"| a | b |\n| --- | --- |\n| {escape_markdown(text)} | {code(text)} |\n")
    )
    assert [" ".join(Page(cell).text.split()) for cell in cells] == [seen, seen]
    listed = Page(parser.render(f"- {escape_markdown(text)}\n"))
    assert " ".join(listed.text.split()) == seen
    assert {tag for tag, _ in listed.tags} <= {"ul", "li"}
    block = Page(parser.render(fenced(text)))
    assert (block.text.rstrip("\n"), [tag for tag, _ in block.tags]) == (visible(text).rstrip("\n"), ["pre", "code"])


def test_characters_that_would_be_obeyed_are_seen() -> None:
    assert visible("a\u202eb\x1b[0m\ud800\tc\nd é 你 \u200d") == "a\\u202eb\\x1b[0m\\ud800\tc\nd é 你 \u200d"


def test_the_card_has_front_matter_that_the_hub_reads(link: Path) -> None:
    import yaml

    front = yaml.safe_load(markdown(gather(link)).split("---\n")[1])
    assert front["library_name"] == "tensorrt-llm"
    assert "nvfp4" in front["tags"]
    assert "base_model" not in front, "a local directory is no id that others could fetch"


def test_the_command_writes_three_files_and_says_where(tmp_path: Path) -> None:
    link = report_store.build(tmp_path / "out")
    report_store.evaluate(link)
    done = report(str(link))
    assert done.returncode == 0, done.stderr
    files = {path.name for path in (tmp_path / "out" / "reports").iterdir() if not path.name.startswith(".")}
    assert files == {f"{link.name}.html", f"{link.name}.md", "results.csv"}
    assert done.stdout.splitlines()[-1].startswith("next ")
    elsewhere = [
        "--html",
        str(tmp_path / "p.html"),
        "--markdown",
        str(tmp_path / "c.md"),
        "--csv",
        str(tmp_path / "t.csv"),
    ]
    told = json.loads(report(str(link), *elsewhere, "--json").stdout)
    assert told["verdict"]["status"] == "passed"
    assert told["rows"] == 4
    assert all(Path(path).parent == tmp_path and Path(path).is_file() for path in told["files"].values())
    below_a_file = str(tmp_path / "p.html" / "deeper.x")
    for option, path in (("--html", str(tmp_path)), ("--markdown", below_a_file), ("--csv", below_a_file)):
        refused = report(str(link), option, path)
        assert (refused.returncode, "Traceback" in refused.stderr) == (2, False), refused.stderr


def test_a_page_is_replaced_in_one_step(tmp_path: Path) -> None:
    link = report_store.build(tmp_path / "out")
    page = tmp_path / "page.html"
    page.write_text("old")
    with open(page) as reader:
        assert report(str(link), "--html", str(page)).returncode == 0
        assert reader.read() == "old", "who reads the old page reads it to its end"
    assert page.read_text().startswith("<!doctype html>")
    assert not list(tmp_path.glob(".*.tmp"))


FULL = """
import resource, sys
from builder.cli import main as cli
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
sys.exit(cli.main(["report", *sys.argv[1:]]))
"""


def test_a_disk_that_takes_no_more_leaves_the_old_page(tmp_path: Path) -> None:
    link = report_store.build(tmp_path / "out")
    page = tmp_path / "page.html"
    page.write_text("old")
    done = subprocess.run([sys.executable, "-c", FULL, str(link), "--html", str(page)], capture_output=True, text=True)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
    assert page.read_text() == "old"
    assert not list(tmp_path.glob(".*.tmp"))


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_repeated_report_doubles_no_row_and_another_evaluation_adds_its_own(tmp_path: Path) -> None:
    link = report_store.build(tmp_path / "out")
    report_store.evaluate(link)
    for _ in range(2):
        assert report(str(link), "-q").returncode == 0
    rows = table(tmp_path / "out" / "reports" / "results.csv")
    assert len(rows) == 4
    assert {(row["data"], row["runner"]) for row in rows} == {
        (data, runner) for data in ("wikitext", "overall") for runner in ("bf16", "checkpoint")
    }
    assert (rows[2]["score"], rows[2]["score_low"], rows[2]["gate"]) == ("98.7", "98.1", "passed")
    assert rows[0]["score"] == ""
    report_store.evaluate(link, score=97.0)
    assert report(str(link), "-q").returncode == 0
    again = table(tmp_path / "out" / "reports" / "results.csv")
    assert again[:4] == rows
    assert len({row["id"] for row in again}) == 8


APPEND = """
import sys
from pathlib import Path
from builder.report import results
file, name = Path(sys.argv[1]), sys.argv[2]
sys.stdin.readline()
for n in range(25):
    results.append(file, [{"id": f"{name}-{n}", "data": "x" * 2000}, {"id": f"both-{n}", "data": "y"}])
"""


def test_two_processes_at_once_lose_and_double_no_row(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    pair = [
        subprocess.Popen([sys.executable, "-c", APPEND, str(file), name], stdin=subprocess.PIPE, text=True)
        for name in ("first", "second")
    ]
    for child in pair:
        child.communicate("go\n", timeout=300)
    assert [child.returncode for child in pair] == [0, 0]
    ids = [row["id"] for row in table(file)]
    wanted = {f"{name}-{n}" for name in ("first", "second", "both") for n in range(25)}
    assert (len(ids), set(ids)) == (75, wanted)


def test_a_table_of_another_version_keeps_its_columns(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    file.write_text('id,note\r\nold,"two\nlines, and a comma"\r\n')
    assert results.append(file, [{"id": "new", "score": "99"}, {"id": "old", "score": "1"}]) == 1
    assert table(file) == [
        {"id": "old", "note": "two\nlines, and a comma", "score": ""},
        {"id": "new", "note": "", "score": "99"},
    ]


@pytest.mark.parametrize("text", ["name,score\nx,1\n", "id,score\nx,1,2,3\n", "id,score\nx\n", "\x00\x01"])
def test_a_file_that_is_no_such_table_is_left_alone(tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.csv"
    file.write_text(text)
    with pytest.raises(UsageError, match="not a table of results"):
        results.append(file, [{"id": "new"}])
    assert file.read_text() == text


def test_a_cell_is_no_formula() -> None:
    scores = (Score("checkpoint", "=cmd|'/c calc'!A1", 1, 2, 3.0, Interval(12.0)),)
    identity: dict[str, Any] = {"model": "+1", "repository": "key", "name": "a\nb"}
    [row] = results.rows(identity, Evaluation("digest", scores))
    assert (row["data"], row["model"], row["name"]) == ("'=cmd|'/c calc'!A1", "'+1", "a b")
    assert (row["perplexity"], row["kl"]) == ("12", "")


def test_the_loss_by_layer_is_that_of_this_model_and_calibration() -> None:
    layers = [{"name": "model.layers.0.mlp", "layer": "layers.0.mlp", "kl": 0.01, "bytes": 5, "proxy": 0.1}]
    layers += [{"name": "model.layers.1.mlp", "layer": "layers.1.mlp", "kl": None, "bytes": 5, "proxy": 0.1}]

    def artifact(stage: str, digest: str, of: list[str], started: float) -> Artifact:
        manifest = {"ingredients": {"of": of}, "started": started}
        return Artifact(stage, Path(digest), digest, {"layers": layers}, True, manifest)

    chain = {"snapshot": artifact("snapshot", "ours", [], 1), "calibration": artifact("calibration", "rows", [], 1)}
    mine, foreign = (artifact("sensitivity", "x", ["ours", rows], 2) for rows in ("rows", "other rows"))
    assert results.losses_of(chain, [mine, foreign]) == [results.Loss("layers.0.mlp", 0.01, 5)]
    assert results.losses_of(chain, [foreign]) == []


def test_the_loss_by_layer_is_drawn_where_it_was_measured(link: Path) -> None:
    from dataclasses import replace

    losses = [results.Loss(f"model.layers.{n}", 0.001 * (n % 7 + 1)) for n in range(36)]
    found = replace(gather(link), losses=losses)
    assert "loss" in Page(html(found)).sections
    assert "The worst: model.layers.6, 0.007." in Page(html(found)).text
    assert markdown(found).index("`model.layers.6`") < markdown(found).index("`model.layers.0`")


def test_the_loss_by_part_is_shown_for_the_model_and_by_layer(link: Path) -> None:
    from dataclasses import replace

    figure = {"kl": 0.01, "low": 0.005, "high": 0.02}
    names = ["everything", "weights", "everything but weights", "inputs", "everything but inputs", "weights of layer 3"]
    facts = {"results": dict.fromkeys(names, figure), "parts": ["weights", "inputs"], "tokens": 1234,
             "layers": {"3": "model.layers.3"}}  # fmt: skip
    measured = Artifact("parts", Path("x"), "x", facts, True, {"ingredients": {"of": ["bf16", "made"]}, "started": 2})
    chain = {"checkpoint": Artifact("checkpoint", Path("c"), "made", {}, True, {})}
    parts = results.parts_of(chain, [measured])
    assert parts is not None
    assert results.parts_of({}, [measured]) is None
    assert results.parts_of({"checkpoint": replace(chain["checkpoint"], digest="other")}, [measured]) is None
    found = replace(gather(link), parts=parts)
    page = Page(html(found))
    assert "parts" in page.sections
    assert "0.0100 (0.0050 to 0.0200)" in page.text
    card = markdown(found)
    assert "| inputs of layers | 0.0100 (0.0050 to 0.0200) | 0.0100 (0.0050 to 0.0200) |" in card
    assert "| layer | weights | inputs of layers |\n| --- | ---: | ---: |\n| 3 | 1.00e-02 | – |\n" in card
    assert gather(link).parts is None


def test_what_calibration_saw_is_a_row_and_what_it_lacks_a_warning(tmp_path: Path) -> None:
    coverage = {"rows": 8, "tokens": 4096, "cut": 0, "limit": 512}
    experts = {"model.layers.7.mlp.experts": [12, 900]}
    link = report_store.build(tmp_path / "out", calibrated={"coverage": coverage, "experts": experts})
    found = gather(link)
    row = "8 rows, 4,096 tokens; 2 experts in 1 layer, the least used saw 12 tokens"
    assert found.calibration == row
    assert [text for text in found.warnings if "covers little" in text] == [
        "Calibration covers little: only 8 rows of text, where at least 32 are advised.",
        "Calibration covers little: 1 of 2 experts of model.layers.7.mlp.experts saw fewer than 256 tokens.",
    ]
    assert f"Calibrated on {row}." in html(found)
    assert "| Calibrated on | 8 rows, 4,096 tokens" in markdown(found)
