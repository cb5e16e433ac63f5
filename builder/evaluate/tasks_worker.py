"""The child process of one model's tasks: python -m builder.evaluate.tasks_worker JOB.json

lm-eval (EleutherAI's lm-evaluation-harness) reads the tasks, asks the questions and judges the answers: models in
transformers through its own `HFLM`, a served one through an LM of ours. Each task is published in the store by itself,
so that a run which dies goes on at the first task that it did not finish. Imports lm_eval, transformers and torch.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import lm_eval
import torch
from jinja2.exceptions import TemplateError
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable

from builder.core.errors import BuilderError, NotMeasurable, StageError, UnsupportedError, UsageError
from builder.core.file_names import truncated
from builder.core.output import Output
from builder.core.store import Store
from builder.core.worker import emit, worker_main
from builder.evaluate.runners.worker import known, opener
from builder.evaluate.task_names import manager_of
from builder.hub.errors import translate
from builder.model.hashed_files import SourceFiles
from builder.quantize.device import check_device
from builder.tokenizer import loading as tokenizer_loading
from builder.tokenizer.chat_template import ChatTemplate, Renderer, TemplateProblem
from builder.tokenizer.special_tokens import encoder

if TYPE_CHECKING:
    from builder.evaluate.runners.triton import Served

ANSWER_TOKENS = 256  # where a task does not say: lm-eval's own default (HFLM.max_gen_toks)
CPU_BATCH = 8  # questions; lm-eval's own search for the largest batch would fill a CPU's memory


def run(job: Mapping[str, Any]) -> None:
    """Reads the tasks and their data, then opens the model and does the tasks that the store lacks."""
    emit(progress={"label": f"{job['label']}: reading tasks", "done": 0, "total": None})
    os.chdir(job["working_directory"])  # which a task's file may name its data relative to
    manager = manager_of([one["name"] for one in job["tasks"]], job["directory"])
    loaded = [_load(manager, one["name"], job["max_length"]) for one in job["tasks"]]
    emit(progress={"label": f"{job['label']}: loading", "done": 0, "total": None})
    tokenizer = tokenizer_loading.load(Path(job["model"]), trust_remote_code=job["trust_remote_code"])
    check_device(job.get("gpus", ()))
    store = Store(Path(job["root"]), Output("quiet"), force=job["force"])
    model_of: Callable[..., LM] = Endpoint if job["runner"] == "served" else _in_transformers
    with (
        _limited_template(tokenizer, wanted=job["chat_template"]),
        torch.inference_mode(),
        opener(job["runner"])(job) as runner,
    ):
        model = model_of(runner, tokenizer, job)
        refused: dict[str, str] = {}
        for one, tasks in zip(job["tasks"], loaded, strict=True):
            try:
                store.stage("tasks", one["ingredients"], _maker(job, one["name"], tasks, model, manager))
            except NotMeasurable as error:
                refused[one["name"]] = str(error)
        emit(not_measured=refused)


@contextmanager
def _limited_template(tokenizer: Any, *, wanted: bool) -> Iterator[None]:
    """Lets lm-eval render the model's chat template in a process with limits. UsageError where there is none, before a
    model is loaded, and for a template that does not end."""
    if not wanted or type(tokenizer).__module__.startswith("transformers_modules"):
        yield
        return
    hint = "Ask without it: --set tasks.chat_template=false"
    if not tokenizer.chat_template:
        raise UsageError("The tasks are to be asked by the chat template, and this model has none.", hint=hint)
    template = ChatTemplate(tokenizer.get_chat_template(), "chat_template", tokenizer.special_tokens_map)

    def apply(messages: Any, *, tokenize: bool = False, continue_final_message: bool = False, **more: Any) -> str:
        try:
            return (renderer.render_open if continue_final_message else renderer.render)(messages, **more)
        except TemplateProblem as problem:
            if problem.kind != "refused":
                raise
            raise TemplateError(problem.why) from None  # lm-eval leaves the system message out, and tries again

    try:
        with Renderer(template) as renderer:
            tokenizer.apply_chat_template = apply
            yield
    except TemplateProblem as problem:
        raise problem.error(template.file, hint=hint) from None


def _load(manager: TaskManager, name: str, max_length: int) -> list[Any]:
    """A task, a group, or the tasks of a tag, with their data. What the Hub answers becomes an error for people."""
    try:
        loaded = manager.load([name])
    except Exception as error:
        raise _no_data(error, name) from error
    for task in loaded["tasks"].values():
        _check(task, name, max_length)
    groups = loaded.get("groups", {})
    inner = {child for names in loaded.get("group_map", {}).values() for child in names}
    whole = [group for key, group in groups.items() if key not in inner]
    return whole or list(loaded["tasks"].values())


def _check(task: Any, name: str, max_length: int) -> None:
    """UnsupportedError for what a model's program could do to this machine, and for answers that leave no room."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UnsupportedError(
            f"The task {name} runs programs that the model writes, and that is not done here.",
            why="A model's program may do anything that you may.",
            hint="Run that task with lm-eval itself, in a container that can be thrown away.",
        )
    if task.get_config("output_type") != "generate_until":
        return
    tokens = normalize_gen_kwargs(task.get_config("generation_kwargs") or {}, ANSWER_TOKENS)["max_gen_toks"]
    if tokens >= max_length:
        raise UnsupportedError(
            f"The task {name} asks for answers of {tokens} tokens, and {max_length} are all for prompt and answer.",
            hint=f"Build for longer ones: --max-seq-len {2 * tokens}",
        )


def _no_data(error: Exception, name: str) -> BuilderError:
    found = translate(error, "dataset", f"of the task {name}", None)
    return type(found)(f"The task {name} can't be read.", why=f"{found.what} {found.why}".strip(), hint=found.hint)


def _in_transformers(runner: Any, tokenizer: Any, job: Mapping[str, Any]) -> Local:
    batch = job["batch_size"] or (CPU_BATCH if runner.model.device.type == "cpu" else "auto")
    return Local(pretrained=runner.model, tokenizer=tokenizer, max_length=job["max_length"], batch_size=batch)


class Progress:
    """Hears of every answer, as lm-eval's cache of answers does (LM.set_cache_hook), and reports how many there are."""

    def __init__(self, label: str) -> None:
        self._label, self._done, self._total = label, 0, 0
        self._lock = threading.Lock()

    def expect(self, count: int) -> None:
        """From here the time that is left is estimated."""
        with self._lock:
            self._total += count
            emit(progress={"label": self._label, "done": self._done, "total": self._total})

    def add_partial(self, kind: str, question: Any, answer: Any) -> None:
        with self._lock:
            self._done += 1
            if self._done % max(1, self._total // 200) == 0 or self._done == self._total:
                emit(progress={"label": self._label, "done": self._done, "total": self._total})


class Local(HFLM):  # type: ignore[misc]
    """lm-eval's model around one of ours: BF16, ModelOpt's simulation, the checkpoint on disk. Its questions count."""

    def loglikelihood(self, requests: Sequence[Any], *more: Any, **options: Any) -> Any:
        self.cache_hook.expect(len(requests))
        return super().loglikelihood(requests, *more, **options)

    def loglikelihood_rolling(self, requests: Sequence[Any], *more: Any, **options: Any) -> Any:
        self.cache_hook.expect(len(requests))
        return super().loglikelihood_rolling(requests, *more, **options)

    def generate_until(self, requests: Sequence[Any], *more: Any, **options: Any) -> Any:
        self.cache_hook.expect(len(requests))
        return super().generate_until(requests, *more, **options)


class Endpoint(LM):  # type: ignore[misc]
    """A served model. It answers; how likely it finds answers of others can't be had from it this way."""

    def __init__(self, served: Served, tokenizer: Any, job: Mapping[str, Any]) -> None:
        super().__init__()
        self._served, self.tokenizer, self._encode = served, tokenizer, encoder(tokenizer)
        self._max_length, self._max_input = job["max_length"], job["max_input_len"]
        self._concurrency = job["concurrency"]
        self.cut = 0  # prompts that did not fit

    def loglikelihood(self, requests: Sequence[Any], *more: Any, **options: Any) -> Any:
        raise NotMeasurable(
            "The task compares how likely given answers are, and a served model is asked for its own answer only.",
            hint="Measure it on local weights: --runner checkpoint. Of a served model, tasks like gsm8k.",
        )

    loglikelihood_rolling = loglikelihood

    def generate_until(self, requests: Sequence[Any], *more: Any, **options: Any) -> list[str]:
        self.cache_hook.expect(len(requests))
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            return list(pool.map(self._answer, [request.args for request in requests]))
        finally:
            pool.shutdown(cancel_futures=True)  # where one failed, the others are not waited for

    def _answer(self, asked: tuple[str, Mapping[str, Any]]) -> str:
        """Cut at the first stop word as lm-eval does it: a server may stop later, at the end of a token."""
        prompt, options = asked[0], normalize_gen_kwargs(dict(asked[1]), ANSWER_TOKENS)
        until = handle_stop_sequences(options.get("until"), eos=None)
        tokens = options["max_gen_toks"]
        more: dict[str, Any] = {"stop_words": until} if until else {}
        if options["do_sample"]:
            more |= {"temperature": options.get("temperature", 1.0), "top_p": options.get("top_p", 1.0)}
            more |= {"top_k": options.get("top_k", 0)}
        text = self._served.generate(self._fitted(prompt, tokens), tokens, more)
        text = str(postprocess_generated_text(text, until, None))
        self.cache_hook.add_partial("generate_until", asked, text)
        return text

    def _fitted(self, prompt: str, tokens: int) -> str:
        """Cut on the left where it is longer than the server takes, as lm-eval cuts for a model in transformers."""
        room = min(self._max_input, self._max_length - tokens)
        ids = self._encode(prompt)
        if len(ids) <= room:
            return prompt
        self.cut += 1
        kept = ids[-room:]
        while len(self._encode(text := self.tokenizer.decode(kept))) > room:
            kept = kept[1:]  # the text's beginning makes other tokens than it did inside the text
        return str(text)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip
        return text

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path)


def _maker(
    job: Mapping[str, Any], name: str, tasks: Sequence[Any], model: Any, manager: TaskManager
) -> Callable[[Path], dict[str, Any]]:
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")

    def make(directory: Path) -> dict[str, Any]:
        start = monotonic()
        model.set_cache_hook(Progress(f"{job['label']}: {name}"))
        whole = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            num_fewshot=job["fewshot"],
            limit=job["limit"],
            task_manager=manager,
            apply_chat_template=job["chat_template"],
            **({} if job["seed"] is None else dict.fromkeys(seeds, job["seed"])),
        )
        if whole is None:
            raise StageError(f"lm-eval gave no results of {name}.")
        SourceFiles.of_job(job).check_unchanged()
        samples = whole.pop("samples", {})
        for task, answers in samples.items():
            with open(directory / _samples(task), "w", encoding="utf-8") as file:
                file.writelines(_json(answer) + "\n" for answer in answers)
        (directory / "results.json").write_text(_json(whole, indent=1), encoding="utf-8")
        cut = getattr(model, "cut", 0)
        if cut:
            emit(info=f"{cut} prompts of {name} were cut on the left: they are longer than what is served takes")
        return {"rows": list(_rows(whole, name, samples)), "cut": cut, "seconds": round(monotonic() - start, 3)}

    return make


def _rows(whole: Mapping[str, Any], name: str, samples: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Of each figure of the task or group: those of a tag's tasks, for a tag has none of its own."""
    results: Mapping[str, Mapping[str, Any]] = {**whole["results"], **(whole.get("groups") or {})}
    for task in [name] if name in results else sorted(samples):
        counts = whole["n-samples"]
        leaves = [task] if task in counts else sorted(samples)
        for key, value in results[task].items():
            metric, comma, kept = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            error = results[task].get(f"{metric}_stderr,{kept}")
            yield {
                "task": task,
                "metric": metric,
                "filter": kept,
                "value": float(value),
                "stderr": float(error) if isinstance(error, (int, float)) else None,
                "higher_is_better": whole.get("higher_is_better", {}).get(task, {}).get(metric),
                "documents": sum(counts[leaf]["effective"] for leaf in leaves),
                "fewshot": whole.get("n-shot", {}).get(leaves[0]),
                "samples": {leaf: _samples(leaf) for leaf in leaves},
            }


def _samples(task: str) -> str:
    """The file with its questions and answers."""
    return f"samples_{truncated(task.replace('/', '_'))}.jsonl"


def _json(value: Any, **options: Any) -> str:
    return json.dumps(value, default=handle_non_serializable, ensure_ascii=False, **options)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(worker_main(sys.argv, run, known))
