"""Worker process of the quality check: python -m builder.quality.worker JOB.json

Opens BF16, then the checkpoint (or ModelOpt's simulation, if no runner opens the checkpoint) in one process, so that
torch is imported once. Scores go into files that the parent reads (runners.worker.score_set); everything else is in the
summary.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from builder.core.errors import BuilderError, IntegrityError, NotMeasurable, UsageError, out_of_memory
from builder.core.worker import emit, worker_main
from builder.evaluate.datasets import Sequences, sequences, shuffled
from builder.evaluate.runners import scoring, worker
from builder.evaluate.runners.language import check_known_language, check_vocabulary, knows
from builder.evaluate.runners.scoring import Runner
from builder.quality.answers import lost

CHECK_TEXTS = 4  # texts of each set in the language check
REMEDIES_BELOW = 93.0  # the score from which no remedies are estimated


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of the check without its figures, which are in the column files; or the reason it can't be made."""
    import torch

    try:
        with torch.inference_mode():
            return _compared(job)
    except UnknownLanguage as error:
        return {"unmeasured": str(error)}
    except NotMeasurable as error:
        return {"unmeasured": " ".join(f"{error.what} {error.why}".split())}


def _compared(job: Mapping[str, Any]) -> dict[str, Any]:
    from transformers import AutoTokenizer

    bf16, *others = job["variants"]
    tokenizer = AutoTokenizer.from_pretrained(
        bf16["model"], local_files_only=True, trust_remote_code=bf16["trust_remote_code"]
    )
    sets = dict(_sequences(job, tokenizer))
    prompts = [_prompt(tokenizer, one) for one in job["prompts"]]
    with _open(bf16) as runner:
        checked = _score(runner, sets, job, "bf16")
        sets, notes = _known_sets(runner, sets, checked)
        original = _answers(runner, tokenizer, prompts, job["answer_tokens"])
    del runner  # one model at a time
    gc.collect()
    with _first(others) as (label, runner):
        collapsed = not all(map(knows, _score(runner, sets, job, "quantized").values()))
        ours = _answers(runner, tokenizer, prompts, job["answer_tokens"])
        remedies = _remedies(runner, sets, job, label)
    answers = [  # some runners give none
        {"prompt": shown, "bf16": theirs, "quantized": mine, "lost": lost(asked["fact"], theirs, mine)}
        for (shown, _), asked, theirs, mine in zip(prompts, job["prompts"], original, ours, strict=False)
    ]
    return {
        "runner": label,
        "texts": {name: len(one.ids) for name, one in sets.items()},
        "tokens": sum(one.starts[-1] for one in sets.values()),
        "answers": answers,
        "remedies": remedies,
        "collapsed": collapsed,
        "notes": notes,
    }


class UnknownLanguage(Exception):
    """The BF16 model knows the language of none of the texts, so no figure would mean anything."""


def _sequences(job: Mapping[str, Any], tokenizer: Any) -> Iterator[tuple[str, Sequences]]:
    """Token ids by set. A set whose texts are all too short is left out; UsageError if none remains."""
    errors = []
    for name, rows in job["sets"].items():
        try:
            yield name, sequences(Path(rows), tokenizer, name=name, **job["lengths"])
        except UsageError as error:
            errors.append(error)
    if len(errors) == len(job["sets"]):
        raise errors[0]


@contextmanager
def _open(variant: Mapping[str, Any]) -> Iterator[Runner]:
    emit(progress={"label": f"quality, {variant['label']}: loading", "done": 0, "total": None})
    with worker.opener(variant["runner"])(variant) as runner:
        yield runner


@contextmanager
def _first(variants: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Runner]]:
    """Opens the first variant that can be opened. NotMeasurable with the first one's reason if none can."""
    refused: NotMeasurable | None = None
    for variant in variants:
        opened = _open(variant)
        try:
            runner = opened.__enter__()
        except NotMeasurable as error:
            refused = refused or error
            continue
        try:
            yield variant["label"], runner
        finally:
            opened.__exit__(None, None, None)
        return
    assert refused is not None
    raise refused


def _known_sets(
    runner: Runner, sets: Mapping[str, Sequences], checked: Mapping[str, Mapping[str, float]]
) -> tuple[dict[str, Sequences], list[str]]:
    """The sets whose language BF16 knows, and notes about the others. UnknownLanguage if it knows none."""
    found, notes, refused = {}, [], ""
    for name, texts in sets.items():
        try:
            check_known_language(checked[name], name, runner.vocab_size)
            found[name] = texts
        except IntegrityError as error:
            refused = error.why
            notes.append(f"the {name} texts were left out: the model does not know their language")
    if not found:
        raise UnknownLanguage(
            f"the BF16 model finds text no likelier than the same tokens shuffled. {refused} Its weights may be random "
            "or damaged, its tokenizer may belong to another model, or it may not know the language of the texts. "
            "Calibration rows beyond --calib-samples are used as texts too, if there are any"
        )
    return found, notes


def _score(
    runner: Runner, sets: Mapping[str, Sequences], job: Mapping[str, Any], variant: str
) -> dict[str, dict[str, float]]:
    """Scores all sets. Returns for each the mean NLL of a few texts and of the same tokens shuffled, in nats per token
    (language.py). All is measured together, because some runners read the weights for each measurement."""
    scores, others = {}, {}
    for name, texts in sets.items():
        check_vocabulary(max(int(ids.max()) for ids in texts.ids), runner.vocab_size)
        directory = Path(job["work"]) / variant / name
        directory.mkdir(parents=True)
        bf16 = variant == "bf16"
        reference = None if bf16 else Path(job["work"]) / "bf16" / name
        scores[name] = worker.Scores(texts, directory, top=job["top"] if bf16 else 0, reference=reference)
        others[name] = worker.MeanNll(shuffled([texts.ids[index] for index in _some(texts)], job["seed"]))
    works = [*(one.work for one in scores.values()), *(one.work for one in others.values())]
    scoring.measure(runner, works, worker.told(f"quality, {variant}"))
    for one in scores.values():
        one.finish(runner)
    return {
        name: {"checked_nll": _mean_of_some(job, variant, name, sets[name]), "shuffled_nll": others[name].value()}
        for name in sets
    }


def _some(texts: Sequences) -> range:
    """The texts of the language check."""
    return range(0, len(texts.ids), max(1, len(texts.ids) // CHECK_TEXTS))[:CHECK_TEXTS]


def _mean_of_some(job: Mapping[str, Any], variant: str, name: str, texts: Sequences) -> float:
    """The mean NLL of the texts of the language check, from their scores."""
    nll, starts = np.load(Path(job["work"]) / variant / name / "nll.npy"), texts.starts
    return float(np.concatenate([nll[starts[i] : starts[i + 1]] for i in _some(texts)]).mean(dtype=np.float64))


def _prompt(tokenizer: Any, prompt: Mapping[str, str]) -> tuple[str, list[int]]:
    """The prompt to show, and its token ids: a question in the chat template, or a text to continue without one."""
    if getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt["ask"]}]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            return prompt["ask"], list(tokenizer(text, add_special_tokens=False)["input_ids"])
        except Exception:  # a template is its author's code and may raise anything
            emit(info="the chat template rejects a plain question, so texts are continued instead")
    return prompt["continue"], list(tokenizer(prompt["continue"])["input_ids"])


def _answers(runner: Any, tokenizer: Any, prompts: Sequence[tuple[str, list[int]]], most: int) -> list[str]:
    """Greedy answers of at most `most` tokens; none from a runner without a transformers model."""
    import torch
    from transformers import GenerationConfig

    model = getattr(runner, "model", None)
    if model is None:
        return []
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    ends = [*dict.fromkeys([*ends, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])]
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=most, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    found = []
    for _, ids in prompts:
        batch = torch.tensor([ids], device=model.device)
        answer = model.generate(batch, attention_mask=torch.ones_like(batch), generation_config=greedy)
        found.append(tokenizer.decode(answer[0][len(ids) :], skip_special_tokens=True).strip())
    return found


def _remedies(runner: Any, sets: Mapping[str, Sequences], job: Mapping[str, Any], label: str) -> list[dict[str, Any]]:
    """The estimated remedies, if the score is low and the checkpoint itself was measured."""
    work = Path(job["work"])

    def mean(variant: str) -> float:
        return float(
            np.concatenate([np.load(work / variant / name / "nll.npy") for name in sets]).mean(dtype=np.float64)
        )

    if not hasattr(runner, "model"):  # they change the weights of a model in memory
        return []
    if not job["remedies"] or label != "checkpoint" or 100 * np.exp(mean("bf16") - mean("quantized")) >= REMEDIES_BELOW:
        return []
    from builder.quality import remedies

    return remedies.estimate(runner, sets, work, job["remedies"], Path(job["variants"][0]["model"]))


def known(error: BaseException, job: Mapping[str, Any]) -> BuilderError | None:
    """NotMeasurable if memory ran out; None for any other error.

    If neither GPUs nor host memory hold the model, accelerate wants to offload to disk and raises without a folder.
    """
    if not (out_of_memory(error) or "offload" in str(error)):
        return None
    why = (str(error).splitlines() or [type(error).__name__])[0]
    return NotMeasurable(f"it needs about {job['needs']} of memory, and this machine has less:", why=why)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(worker_main(sys.argv, run, known))
