"""Tasks through the real lm-eval: on local weights, and of the model that a real Triton serves.

Task files made of the evaluation texts (task_files.py), and lm-eval's own gsm8k with made-up questions on a local Hub.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import task_files
import torch
from hub_server import Hub
from hypothesis import given
from hypothesis import strategies as st
from task_files import measure_here
from transformers import AutoTokenizer

from builder import pipeline
from builder.clean import removal
from builder.clean.reachability import Request
from builder.cli import main
from builder.core.errors import NotMeasurable, ServingError, StageError, UnsupportedError, UsageError
from builder.core.output import Output
from builder.core.store import Artifact, Store
from builder.evaluate import stage as evaluate_stage
from builder.evaluate import task_names, tasks, tasks_worker
from builder.evaluate.runners import triton
from builder.evaluate.tasks import Row
from builder.evaluate.variants import Models
from builder.pipeline import Built
from builder.recipe import schema
from builder.recipe.evaluation import Tasks
from builder.recipe.schema import Resolved

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[1] / "data"
TINY = DATA / "tiny-qwen3"
QUIET = Output("quiet")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return task_files.write(tmp_path_factory.mktemp("tasks"))


def resolve(directory: Path | None, **more: Any) -> Resolved:
    flags = {
        "model.id": str(TINY),
        "gpu": "cpu",
        "calibration.samples": 6,
        "calibration.seq_len": 128,
        "quality.check": False,  # of builds whose quality is not what is tested
        "evaluation.data": [],
        "evaluation.runners": ["bf16", "checkpoint"],
        "tasks.names": "follows,next_word",
        "tasks.directory": str(directory) if directory else None,
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return schema.resolve(flags)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("tasks-store") / "artifacts", QUIET)


@pytest.fixture(scope="module")
def built(store: Store, directory: Path) -> Built:
    return pipeline.build(resolve(directory), store, until="repository")


@pytest.fixture(scope="module")
def models(built: Built) -> Models:
    return Models(built.snapshot, built.calibration, built.checkpoint, built.repository)


@pytest.fixture(scope="module")
def found(models: Models, store: Store, directory: Path) -> tasks.TaskTable:
    """Every form, two kinds of tasks."""
    asked = resolve(directory, evaluation__runners=["bf16", "simulated", "checkpoint", "reference", "served"])
    return measure_here(models, asked.recipe, store)


def samples(store: Store, found: tasks.TaskTable, runner: str, task: str) -> list[dict[str, Any]]:
    path = store.root / found.paths[runner][task]
    return [json.loads(line) for line in (path / f"samples_{task}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_task_of_any_name_has_a_file_for_its_samples() -> None:
    assert tasks_worker._samples("mmlu/anatomy") == "samples_mmlu_anatomy.jsonl"
    assert len(tasks_worker._samples("t" * 250)) < 255


def test_each_form_has_its_rows_and_what_can_not_be_asked_is_said(found: tasks.TaskTable) -> None:
    kinds = {(row.runner, row.task): row for row in found.rows}
    local = ["bf16", "simulated", "checkpoint"]
    both = ["follows", "next_word"]
    assert list(kinds) == [(runner, task) for runner in local for task in both] + [("served", "next_word")]
    assert {row.documents for row in found.rows} == {24}
    assert [(row.metric, row.fewshot) for row in found.rows[:2]] == [("acc", 0), ("exact_match (first-word)", 1)]
    assert all(0 < row.value < 1 and row.stderr for row in found.rows)
    assert list(found.not_measured["reference"]) == both
    assert list(found.not_measured["served"]) == ["follows"]
    assert "how likely given answers are" in found.not_measured["served"]["follows"]


def test_a_model_answers_better_than_chance(found: tasks.TaskTable) -> None:
    """One answer of four is chance: BF16 must be above it, or the questions reach the model garbled."""
    [row] = [row for row in found.rows if (row.runner, row.task) == ("bf16", "follows")]
    assert row.stderr is not None
    assert row.value > 0.25 + row.stderr


def test_the_figures_are_lm_evals_own(store: Store, found: tasks.TaskTable) -> None:
    """Everything that lm-eval returned is kept, and the rows are what stands there."""
    for row in found.rows:
        whole = json.loads(
            (store.root / found.paths[row.runner][row.task] / "results.json").read_text(encoding="utf-8")
        )
        metric, _, kept = row.metric.partition(" (")
        key = f"{metric},{kept.rstrip(')') or 'none'}"
        assert row.value == whole["results"][row.task][key]
        assert row.stderr == whole["results"][row.task][key.replace(",", "_stderr,")]
        assert whole["lm_eval_version"] == "0.4.13"
        assert whole["config"]["fewshot_seed"] == 1234
        judged = [sample[metric] for sample in samples(store, found, row.runner, row.task)]
        assert row.value == pytest.approx(sum(judged) / len(judged))


def test_the_quantized_model_is_asked_and_not_bf16_again(store: Store, found: tasks.TaskTable) -> None:
    """The likelihoods of the checkpoint are the simulation's, and others than BF16's."""
    of = {
        runner: torch.tensor(
            [[choice[0][0] for choice in s["resps"]] for s in samples(store, found, runner, "follows")]
        )
        for runner in ("bf16", "simulated", "checkpoint")
    }
    # A sum over some eight tokens. On some processors one of the 96 is 0.052 away, most are within 0.01.
    torch.testing.assert_close(of["checkpoint"], of["simulated"], atol=0.1, rtol=0)
    assert float((of["checkpoint"] - of["simulated"]).abs().median()) < 0.02
    assert (of["checkpoint"] - of["bf16"]).abs().mean() > 0.1


def test_what_is_served_answers_as_its_executor_does(store: Store, found: tasks.TaskTable, models: Models) -> None:
    """lm-eval's prompts through HTTP, Triton and its stop words, against the executor's own greedy tokens."""
    some = samples(store, found, "served", "next_word")[:6]
    prompts = [sample["arguments"][0][0] for sample in some]
    assert models.checkpoint is not None
    wanted = task_files.answers_of(models.checkpoint.tensorrt_llm, AutoTokenizer.from_pretrained(TINY), prompts)
    assert [sample["resps"][0][0] for sample in some] == wanted


def test_changes_are_against_bf16(found: tasks.TaskTable) -> None:
    values = {(row.runner, row.task): row.value for row in found.rows}
    for row in found.rows:
        if row.runner == "bf16":
            assert row.change is None
            assert row.flips is None
        else:
            assert row.change == pytest.approx(row.value - values["bf16", row.task])
            assert row.flips is not None
            assert row.flips >= abs(row.change) - 1e-9


def test_what_was_asked_is_not_asked_again(
    found: tasks.TaskTable, models: Models, store: Store, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_run", lambda job, store: pytest.fail("asked again"))
    again = tasks.measure(models, resolve(directory).recipe, store=store)
    assert again.rows == tuple(row for row in found.rows if row.runner in ("bf16", "checkpoint"))


def test_a_model_that_is_not_held_whole_is_not_asked(
    found: tasks.TaskTable, models: Models, store: Store, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_run", lambda job, store: pytest.fail("asked"))
    little = resolve(directory, quantization__memory="low").recipe
    assert (
        tasks.measure(models, little, store=store).rows
        == tasks.measure(models, resolve(directory).recipe, store=store).rows
    )
    other = tasks.measure(models, little, store=Store(store.root.parent / "other", QUIET))
    assert not other.rows
    assert {why for refused in other.not_measured.values() for why in refused.values()} == {
        "Tasks need the whole model in memory, which does not fit or which --memory low excludes. "
        "Ask the served model: --runner served"
    }


def test_what_is_forced_is_asked_again(models: Models, store: Store, directory: Path) -> None:
    asked = resolve(directory, evaluation__runners=["bf16"], tasks__names="follows", tasks__limit=3)
    first = measure_here(models, asked.recipe, store)
    manifest = store.root / first.paths["bf16"]["follows"] / "manifest.json"
    before = manifest.stat().st_mtime_ns
    assert measure_here(models, asked.recipe, Store(store.root, QUIET, force=["tasks"])).rows == first.rows
    assert manifest.stat().st_mtime_ns > before


def test_cleaning_keeps_what_was_asked_of_a_kept_model(found: tasks.TaskTable, models: Models, store: Store) -> None:
    assert models.repository is not None
    (store.root / "models").mkdir(exist_ok=True)
    (store.root / "models" / "kept").symlink_to(models.repository.path)
    removed = [entry.path for entry in removal.plan(store.root, Request(older_than=0)).remove]
    assert not [path for path in removed if path.parent.name == "tasks"]
    removed = [entry.path for entry in removal.plan(store.root, Request(everything=True)).remove]
    assert {str(path.relative_to(store.root)) for path in removed} >= {
        p for of in found.paths.values() for p in of.values()
    }


def test_limit_examples_and_seed_are_lm_evals(models: Models, store: Store, directory: Path) -> None:
    def prompts(**more: Any) -> list[str]:
        asked = resolve(directory, evaluation__runners=["bf16"], tasks__names="next_word", tasks__limit=4, **more)
        table = measure_here(models, asked.recipe, store)
        assert table.rows[0].documents == 4
        return [sample["arguments"][0][0] for sample in samples(store, table, "bf16", "next_word")]

    plain = prompts()
    assert all(prompt.count("Text: ") == 2 for prompt in plain), "one example, by the task's file"
    assert all(prompt.count("Text: ") == 4 for prompt in prompts(tasks__fewshot=3))
    assert prompts(tasks__seed=1) != plain
    assert all(prompt.endswith("assistant\n") for prompt in prompts(tasks__chat_template=True))


def test_another_file_is_another_task(models: Models, store: Store, tmp_path: Path) -> None:
    """The directory is an ingredient: its data too."""
    mine = task_files.write(tmp_path / "mine", documents=5)
    asked = resolve(mine, evaluation__runners=["bf16"], tasks__names="follows")
    assert measure_here(models, asked.recipe, store).rows[0].documents == 5
    task_files.write(mine, documents=6)
    assert measure_here(models, asked.recipe, store).rows[0].documents == 6


def test_a_server_that_dies_is_an_error_and_what_was_finished_is_kept(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = task_files.write(tmp_path / "mine", documents=6)
    text = (mine / "next_word.yaml").read_text().replace("task: next_word", "task: next_word_again")
    (mine / "again.yaml").write_text(text)
    other = Store(tmp_path / "artifacts", QUIET)
    asked = resolve(mine, evaluation__runners=["served"], tasks__names="next_word,next_word_again")
    whole, count = triton.Served.generate, []

    def dying(self: triton.Served, *more: Any) -> str:
        count.append(1)
        if len(count) == 9:
            self._server.child.kill()
            self._server.child.wait()
        return whole(self, *more)

    monkeypatch.setattr(triton.Served, "generate", dying)
    with pytest.raises(ServingError, match="during the measurement") as caught:
        measure_here(models, asked.recipe, other)
    assert "same command again" in caught.value.hint
    [kept] = other.root.glob("tasks/*/manifest.json")
    before = kept.stat().st_mtime_ns
    monkeypatch.setattr(triton.Served, "generate", whole)
    rows = measure_here(models, asked.recipe, other).rows
    assert [row.task for row in rows] == ["next_word", "next_word_again"]
    assert rows[0].value == rows[1].value
    assert kept.stat().st_mtime_ns == before


def test_prompts_that_do_not_fit_are_cut_on_the_left_and_counted(models: Models) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    asked: list[str] = []

    class Server:
        def generate(self, prompt: str, tokens: int, options: Any) -> str:
            asked.append(prompt)
            return f"{tokens} {sorted(options)}\nmore"

    job = {"max_length": 40, "max_input_len": 30, "concurrency": 2}
    endpoint = tasks_worker.Endpoint(Server(), tokenizer, job)  # type: ignore[arg-type]
    text = "The parser repeats the offending line and displays a little arrow. " * 8
    options = {"until": ["\n"], "max_gen_toks": 16, "do_sample": True, "temperature": 0.5}
    assert endpoint._answer((text, options)) == "16 ['stop_words', 'temperature', 'top_k', 'top_p']"
    assert endpoint._answer(("short", {"max_gen_toks": 8})) == "8 []\nmore", "greedy, and nothing to stop at"
    assert endpoint.cut == 1
    assert len(tokenizer.encode(asked[0])) <= 40 - 16
    assert text.endswith(asked[0])


def test_answers_that_leave_no_room_for_a_question_are_refused(directory: Path) -> None:
    manager = task_names.manager_of(["next_word"], str(directory))
    assert tasks_worker._load(manager, "next_word", 7)
    with pytest.raises(UnsupportedError, match=r"answers of 6 tokens, and 6") as caught:
        tasks_worker._load(manager, "next_word", 6)
    assert "--max-seq-len" in caught.value.hint


def test_a_group_has_its_own_figure_and_a_tag_those_of_its_tasks() -> None:
    counts = {name: {"original": 3, "effective": 3} for name in ("one", "two")}
    leaves = {name: {"acc,none": 0.5, "acc_stderr,none": 0.1, "alias": name} for name in counts}
    whole = {"results": leaves, "n-samples": counts, "n-shot": {"one": 2, "two": 2}}
    grouped = {**whole, "groups": {"both": {"acc,none": 0.5, "acc_stderr,none": "N/A"}}}
    [row] = tasks_worker._rows(grouped, "both", counts)
    assert (row["task"], row["documents"], row["stderr"], row["fewshot"]) == ("both", 6, None, 2)
    assert row["samples"] == {"one": "samples_one.jsonl", "two": "samples_two.jsonl"}
    assert [row["task"] for row in tasks_worker._rows(whole, "a_tag", counts)] == ["one", "two"]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_flips_are_the_documents_that_one_alone_has_right(answers: list[tuple[bool, bool]]) -> None:
    import tempfile

    row = {"samples": {"t": "samples_t.jsonl"}, "metric": "acc", "filter": "none"}
    with tempfile.TemporaryDirectory() as root:
        made = []
        for side in (0, 1):
            path = Path(root) / str(side)
            path.mkdir()
            lines = [{"doc_id": n, "filter": "none", "acc": float(pair[side])} for n, pair in enumerate(answers)]
            (path / "samples_t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            made.append(Artifact("tasks", path, "", {}, False, {}))
        flips = tasks._flips(made[0], made[1], row)
        assert flips == pytest.approx(sum(a != b for a, b in answers) / len(answers))
        change = sum(a - b for a, b in answers) / len(answers)
        assert flips >= abs(change) - 1e-9


# ---- the whole command, in processes of its own


def test_the_command_asks_and_keeps_it(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`builder eval --tasks`: real children, exit codes, --json, the table, and nothing done twice."""
    command = ["eval", "--model", str(TINY), "--gpu", "cpu", "--output", str(tmp_path / "artifacts")]
    command += ["--set", "evaluation.data=[]", "--task-dir", str(directory), "--task-limit", "6", "--tasks", "follows"]
    assert main.main([*command, "--runner", "bf16", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    [row] = told["tasks"]["rows"]
    assert (row["runner"], row["task"], row["documents"]) == ("bf16", "follows", 6)
    assert told["measured"] == {}
    assert main.main([*command, "--runner", "bf16"]) == 0
    said = capsys.readouterr()
    assert "follows" in said.out
    assert "found in the store" in said.err
    assert "making" not in said.err
    assert main.main([*command, "--runner", "reference"]) == 4
    assert "--runner served" in capsys.readouterr().err


def test_lm_evals_own_gsm8k_with_data_of_the_hub(
    hub: Hub, models: Models, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The task's file is lm-eval's; its questions come from a Hub that has made-up ones under that name."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    source = tmp_path / "gsm8k"
    (source / "main").mkdir(parents=True)
    for split, count in (("train", 12), ("test", 4)):
        rows = [{"question": f"What is {n} plus {n}?", "answer": f"Add them.\n#### {2 * n}"} for n in range(count)]
        (source / "main" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = "".join(f"  - split: {split}\n    path: main/{split}.jsonl\n" for split in ("train", "test"))
    (source / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{paths}---\n")
    hub.add("openai/gsm8k", source, repo_type="dataset")
    asked = resolve(None, evaluation__runners=["bf16"], tasks__names="gsm8k", tasks__limit=3)
    table = tasks.measure(models, asked.recipe, store=store)
    assert [(row.metric, row.documents, row.fewshot) for row in table.rows] == [
        ("exact_match (strict-match)", 3, 5),
        ("exact_match (flexible-extract)", 3, 5),
    ]
    prompt = samples(store, table, "bf16", "gsm8k")[0]["arguments"][0][0]
    assert prompt.count("Question: What is") == 6
    assert prompt.endswith("Answer:")


# ---- what is refused


def test_a_name_that_is_no_task_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "artifacts"
    command = ["eval", "--model", str(TINY), "--gpu", "cpu", "--output", str(root), "--tasks", "gsm8kk"]
    assert main.main(command) == 2
    said = capsys.readouterr().err
    assert "lm-eval has no task 'gsm8kk'" in said
    assert "gsm8k" in said.split("Did you mean", 1)[1]
    assert not (root / "snapshot").exists()


def test_a_directory_that_is_not_there_and_lm_eval_that_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no directory"):
        tasks.check(Tasks(names="follows", directory=str(tmp_path / "none")), Store(tmp_path, QUIET))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match="not installed") as caught:
        tasks.check(Tasks(names="gsm8k"), Store(tmp_path, QUIET))
    assert "trtllm-builder[tasks]" in caught.value.hint


def test_data_that_is_not_there_is_told(directory: Path, tmp_path: Path) -> None:
    mine = task_files.write(tmp_path / "mine", documents=3)
    (mine / "documents.jsonl").unlink()
    manager = task_names.manager_of(["follows"], str(mine))
    with pytest.raises((StageError, UsageError), match="The task follows can't be read"):
        tasks_worker._load(manager, "follows", 256)


def test_programs_that_a_model_writes_are_not_run(tmp_path: Path) -> None:
    mine = task_files.write(tmp_path / "mine", documents=3)
    file = mine / "next_word.yaml"
    file.write_text(file.read_text() + "unsafe_code: true\n")
    manager = task_names.manager_of(["next_word"], str(mine))
    with pytest.raises(UnsupportedError, match="runs programs that the model writes"):
        tasks_worker._load(manager, "next_word", 256)


@given(st.lists(st.sampled_from(["mmlu", "gsm8k", " arc_easy", "ifeval "]), min_size=1))
def test_names_stand_between_commas_or_one_by_one(names: list[str]) -> None:
    wanted = tuple(dict.fromkeys(name.strip() for name in names))
    assert Tasks(names=",".join(names)).names == wanted  # type: ignore[arg-type]
    assert Tasks(names=names).names == wanted  # type: ignore[arg-type]


def test_recipes_that_measure_nothing_or_judge_nothing_are_refused(directory: Path) -> None:
    with pytest.raises(UsageError, match="no task is named"):
        resolve(directory, tasks__names=" , ")
    with pytest.raises(UsageError, match=r"evaluation\.data is empty and no task is named"):
        resolve(directory, tasks__names=())
    with pytest.raises(UsageError, match="a gate needs texts"):
        resolve(directory, evaluation__min_score=98.0)


def test_where_nothing_could_be_asked_the_command_fails() -> None:
    refused = tasks.TaskTable(not_measured={"served": {"mmlu": "can't be had"}})
    with pytest.raises(NotMeasurable, match="served"):
        evaluate_stage.Evaluation({}, {}, {}, {}, tasks=refused).check()
    answered = tasks.TaskTable((Row("served", "gsm8k", "exact_match", 0.5, None, 2, 5),), refused.not_measured)
    evaluate_stage.Evaluation({}, {}, {}, {}, tasks=answered).check()


def test_a_chat_template_that_is_absent_or_never_ends() -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    ours = tokenizer.chat_template
    asked = [{"role": "user", "content": "Grüße?"}]
    expected = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    with tasks_worker._limited_template(tokenizer, wanted=True):
        found = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert found == expected
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="this model has none"), tasks_worker._limited_template(tokenizer, wanted=True):
        pytest.fail("a model would be loaded")
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = ours + endless
    with (
        pytest.raises(UsageError, match=r"does not end(.|\n)*tasks\.chat_template=false"),
        tasks_worker._limited_template(tokenizer, wanted=True),
    ):
        tokenizer.apply_chat_template(asked, tokenize=False)
