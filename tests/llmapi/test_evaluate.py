"""What the llmapi target serves, measured through a real Triton, with a stand-in for TensorRT-LLM's LLM class."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import task_files
import yaml
from llmapi_stand_in import put_stand_in, render_with_stand_in
from transformers import AutoTokenizer

from builder import pipeline
from builder.core.errors import EvaluationError, NotMeasurable, ServingError
from builder.core.output import Output
from builder.core.store import Store, read
from builder.evaluate import stage as evaluate_stage
from builder.evaluate.runners import triton, worker
from builder.evaluate.stage import Evaluation
from builder.evaluate.variants import Models
from builder.llmapi import arguments as llmapi_arguments
from builder.llmapi import repository as llmapi_repository
from builder.preflight import checks
from builder.recipe import schema
from builder.serving.client import Client, ServerError
from builder.serving.server import Server, ServerOptions, serve

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[1] / "data"
TINY = DATA / "tiny-qwen3"
QUIET = Output("quiet")
IDS = list(range(5, 25))
FAILING_SEND = """

def send(sender, last, **flags):
    if last.output_tensors():
        raise MemoryError("no room in shared memory")
    sender.send(last, **flags)
"""


def resolve(**more: Any) -> schema.Resolved:
    flags = {
        "model.id": str(TINY),
        "gpu": "sm100",
        "target": "llmapi",
        "engine.max_input_len": 128,
        "engine.max_seq_len": 256,
        "calibration.data": "builtin:python-docs",
        "calibration.samples": 4,
        "quality.check": False,  # of builds whose quality is not what is tested
        "calibration.seq_len": 64,
        "evaluation.data": [str(DATA / "eval" / "prose.jsonl")],
        "evaluation.texts": 5,
        "evaluation.max_tokens": 60,
        "evaluation.resamples": 100,
        **{key.replace("__", "."): value for key, value in more.items()},
    }
    return schema.resolve(flags)


@pytest.fixture(scope="module", autouse=True)
def here() -> Iterator[None]:
    """Runners in this process, which has torch loaded, on a machine that counts as one with TensorRT-LLM."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_stage, "_run", lambda job, store: worker.run(json.loads(json.dumps(job))))
        patch.setattr(llmapi_arguments, "check_machine", lambda resolved: None)
        yield


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("llmapi") / "artifacts", QUIET)


@pytest.fixture(scope="module")
def models(store: Store) -> Models:
    """As far as the repository, by the pipeline; the stand-in is put beside the rendered model."""
    with pytest.MonkeyPatch.context() as patch:
        render_with_stand_in(patch)
        built = pipeline.build(resolve(), store, until="repository")
    return Models(built.snapshot, built.calibration, built.checkpoint, built.repository)


@pytest.fixture(scope="module")
def found(models: Models, store: Store) -> Evaluation:
    asked = resolve(evaluation__runners=["bf16", "reference", "served"], evaluation__min_score=50.0)
    checks.check_gate(asked.recipe, llmapi_arguments.resolve(asked, models.snapshot.config))  # what `build` does first
    return evaluate_stage.evaluate(models, asked.recipe, store=store)


def other(models: Models, destination: Path, llm: str) -> Models:
    """The same repository around another class of the stand-in."""
    assert models.repository is not None
    shutil.copytree(models.repository.path, destination)
    put_stand_in(destination / "models", llm)
    return replace(models, repository=replace(models.repository, path=destination, digest=llm))


def nll(store: Store, runner: str, of: str | None = None) -> np.ndarray:
    made = [read(path.parent) for path in sorted(store.root.glob("scores/*/manifest.json"))]
    ours = [one for one in made if one and one.manifest["ingredients"]["runner"] == runner]
    [artifact] = [one for one in ours if of is None or one.manifest["ingredients"]["of"] == [of]]
    return np.load(artifact.path / "nll.npy")


def test_it_is_the_same_model_in_this_process_bit_by_bit(
    models: Models, store: Store, found: Evaluation, tmp_path: Path
) -> None:
    """The stand-in is the reference executor, and logits travel as float32: nothing may differ. The prompts begin
    alike (the check of the language reads beginnings of the texts that are scored), and block reuse is on, as it is
    by default. Rows that are one off are a text that the model finds less likely than chance."""
    assert models.repository is not None
    assert np.array_equal(nll(store, "served", models.repository.digest), nll(store, "reference"))
    shifted = other(models, tmp_path / "shifted", "Shifted")
    wrong = evaluate_stage.evaluate(shifted, resolve(evaluation__runners=["served"]).recipe, store=store)
    assert wrong.measured["served"]["prose"]["nll"].value > math.log(models.snapshot.config["vocab_size"])
    assert found.measured["served"]["prose"]["nll"].value < 5


def test_it_answers_tasks_as_the_engine_target_does(models: Models, store: Store, tmp_path: Path) -> None:
    """By HTTP, with this target's names of the inputs: stop words, lengths, greedy; the executor's own text."""
    more = {"tasks__names": "next_word", "tasks__limit": 6, "tasks__directory": str(task_files.write(tmp_path))}
    table = task_files.measure_here(models, resolve(evaluation__runners=["served"], **more).recipe, store)
    assert [(row.runner, row.documents) for row in table.rows] == [("served", 6)]
    lines = (store.root / table.paths["served"]["next_word"] / "samples_next_word.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    prompts = [sample["arguments"][0][0] for sample in samples]
    assert models.checkpoint is not None
    wanted = task_files.answers_of(models.checkpoint.tensorrt_llm, AutoTokenizer.from_pretrained(TINY), prompts)
    assert [sample["resps"][0][0] for sample in samples] == wanted


def test_it_has_the_tables_of_every_other_form(found: Evaluation) -> None:
    figures = found.measured["served"]["prose"]
    assert set(figures) == set(found.measured["reference"]["prose"])
    assert 80 < figures["score"].value < 105
    assert not found.not_measured
    assert found.verdict is not None
    assert found.verdict.passed


def test_one_that_gives_no_logits_is_not_measurable(models: Models, store: Store, tmp_path: Path) -> None:
    without = other(models, tmp_path / "without", "WithoutLogits")
    measured = evaluate_stage.evaluate(without, resolve(evaluation__runners=["bf16", "served"]).recipe, store=store)
    assert list(measured.measured) == ["bf16"]
    assert "returns no prompt logits" in measured.not_measured["served"]
    with pytest.raises(NotMeasurable, match="served can't be measured"):
        measured.check()
    gated = resolve(evaluation__runners=["bf16", "served"], evaluation__min_score=1.0)
    with pytest.raises(EvaluationError, match="score of served was not measured"):
        evaluate_stage.evaluate(without, gated.recipe, store=store)


@pytest.mark.parametrize(
    ("llm", "message", "hint"),
    [
        ("WithoutSalt", r"\d+ rows of logits for a prompt of \d+ tokens", "repository.enable_kv_cache_reuse=false"),
        ("OutOfMemory", "CUDA out of memory", "--set repository.kv_cache_free_gpu_mem_fraction="),
    ],
)
def test_too_few_logits_or_none_for_a_fault_are_an_error_and_no_figure(
    models: Models, store: Store, tmp_path: Path, llm: str, message: str, hint: str
) -> None:
    with pytest.raises(ServingError) as caught:
        evaluate_stage.evaluate(
            other(models, tmp_path / llm, llm), resolve(evaluation__runners=["served"]).recipe, store=store
        )
    assert re.search(message, str(caught.value))
    assert hint in caught.value.hint


def test_logits_that_find_no_room_on_their_way_are_refused_before_the_server_starts() -> None:
    facts = {"target": "llmapi", "vocab_size": 151_936}
    triton.check(facts, True, 2040, free=8 << 30)
    with pytest.raises(NotMeasurable, match="shared memory") as caught:
        triton.check(facts, True, 2040, free=64 << 20)
    assert "evaluation.max_tokens=55" in caught.value.hint
    assert "SHM_SIZE=8gb" in caught.value.hint


def test_an_answer_that_can_not_be_sent_is_told(models: Models, tmp_path: Path) -> None:
    """As when shared memory has no room for it: without a last response its client would wait for ever."""
    faulty = other(models, tmp_path / "faulty", "LLM").repository
    assert faulty is not None
    file = faulty.models / "tensorrt_llm" / "1" / "model.py"
    code, sends = file.read_text(), "sender.submit(sender.send, last"
    assert sends in code
    file.write_text(code.replace(sends, "sender.submit(send, sender, last") + FAILING_SEND)
    with (
        serve(
            faulty.models, out=QUIET, log=tmp_path / "log", options=ServerOptions(environment=triton.ENVIRONMENT)
        ) as server,
        pytest.raises(ServerError, match="MemoryError; see the server's log"),
    ):
        client(server, models).context_logits(IDS)


# ---- what a client sees


@pytest.fixture(scope="module")
def server(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One that gives logits, as an evaluation starts it, and looks for clients that left all the time."""
    root = tmp_path_factory.mktemp("server")
    repository = other(models, root / "repository", "LLM").repository
    assert repository is not None
    file = repository.models / "tensorrt_llm" / "1" / "model.yaml"
    content = yaml.safe_load(file.read_text())
    content["triton_config"]["cancellation_check_period_ms"] = 1
    file.write_text(yaml.safe_dump(content))
    with serve(
        repository.models, out=QUIET, log=root / "log", options=ServerOptions(environment=triton.ENVIRONMENT)
    ) as server:
        yield server


def client(server: Server, models: Models) -> Client:
    assert models.repository is not None
    facts = models.repository.facts
    urls = server.http_url, server.grpc_url
    return Client(*urls, facts["models"], timeout=120, names=facts["names"], batched=facts["batched"])


def test_logits_have_a_row_for_each_token_of_the_prompt(server: Server, models: Models) -> None:
    asking = client(server, models)
    first = asking.context_logits(IDS)
    assert (first.shape, first.dtype) == ((len(IDS), models.snapshot.config["vocab_size"]), np.float32)
    assert np.array_equal(asking.context_logits(IDS), first)
    assert asking.context_logits(IDS[:1]).shape[0] == 1
    for _ in range(50):  # Triton 24.10 dies of a question after a request that is over
        asking.context_logits(IDS)
    assert np.array_equal(asking.context_logits(IDS[:7]).argmax(-1), first[:7].argmax(-1)), (
        "each from what is before it"
    )


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([5, 4096], "this model knows 0 to 4095"),
        ([-1, 5], "input_ids has -1 to 5"),
        ([7] * 129, "the prompt has 129 tokens; this model takes 128"),
    ],
)
def test_a_wrong_prompt_of_ids_is_told_what_is_wrong(
    server: Server, models: Models, ids: list[int], message: str
) -> None:
    with pytest.raises(ServerError, match=message):
        client(server, models).context_logits(ids)


def test_without_the_evaluations_switch_nobody_gets_logits(models: Models, tmp_path: Path) -> None:
    """And a repository that does not stream answers all the same."""
    asked = resolve(repository__decoupled=False)
    assert models.checkpoint is not None
    arguments = llmapi_arguments.resolve(asked, models.snapshot.config)
    facts = llmapi_repository.write(
        tmp_path / "models", models.checkpoint.unified.resolve(), models.snapshot.path, arguments, asked
    )
    put_stand_in(tmp_path / "models")
    for environment, gives in (({}, False), (triton.ENVIRONMENT, True)):
        with serve(
            tmp_path / "models", out=QUIET, log=tmp_path / "log", options=ServerOptions(environment=environment)
        ) as server:
            asking = Client(server.http_url, server.grpc_url, facts["models"], timeout=120, names=facts["names"],
                            batched=False)  # fmt: skip
            if gives:
                assert len(asking.context_logits(IDS)) == len(IDS)
            else:
                with pytest.raises(ServerError, match="started without BUILDER_CONTEXT_LOGITS=1"):
                    asking.context_logits(IDS)
