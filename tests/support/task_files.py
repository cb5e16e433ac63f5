"""Tasks for lm-eval made of the evaluation texts: which words follow (choices), and the next word (an answer); and the
child process of tasks run in this one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from builder.core.store import Store
from builder.evaluate import tasks
from builder.evaluate.variants import Models
from builder.recipe.schema import Recipe

PROSE = Path(__file__).parents[1] / "data" / "eval" / "prose.jsonl"

FOLLOWS = """\
task: follows
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{beginning}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
NEXT_WORD = """\
task: next_word
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
fewshot_split: test
num_fewshot: 1
output_type: generate_until
doc_to_text: "Text: {{{{beginning}}}}"
doc_to_target: "{{{{word}}}}"
target_delimiter: " "
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
filter_list:
  - name: first-word
    filter:
      - {{function: regex, regex_pattern: "([\\\\w’]+)"}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
BOTH = """\
group: both_kinds
task: [follows, follows_again]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
metadata: {version: 1.0}
"""


def write(directory: Path, *, documents: int = 24, words: int = 12, seen_as: Path | None = None) -> Path:
    """The files; of each text that is long enough the first `words` words, and of others what follows there.

    `seen_as` is the directory's name where it is read, if that is in a container.
    """
    directory.mkdir(parents=True, exist_ok=True)
    texts = [json.loads(line)["text"].split() for line in PROSE.read_text(encoding="utf-8").splitlines()]
    usable = [text for text in texts if len(text) > words + 5][:documents]
    rows = []
    for number, text in enumerate(usable):
        others = [usable[(number + step) % len(usable)] for step in (0, 5, 9, 14)]
        choices = [" ".join(one[words : words + 5]) for one in others]
        answer = number % 4  # the right one is first in no list but every fourth
        choices[0], choices[answer] = choices[answer], choices[0]
        beginning = " ".join(text[:words])
        rows.append({"beginning": beginning, "choices": choices, "answer": answer, "word": text[words].strip(".,")})
    (directory / "documents.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = (seen_as or directory) / "documents.jsonl"
    (directory / "follows.yaml").write_text(FOLLOWS.format(data=data), encoding="utf-8")
    again = FOLLOWS.format(data=data).replace("task: follows", "task: follows_again")
    (directory / "follows_again.yaml").write_text(again, encoding="utf-8")
    (directory / "next_word.yaml").write_text(NEXT_WORD.format(data=data), encoding="utf-8")
    (directory / "both.yaml").write_text(BOTH, encoding="utf-8")
    return directory


def measure_here(models: Models, recipe: Recipe, store: Store) -> tasks.TaskTable:
    """Runs the worker's code in this process, where torch and lm-eval are loaded; the job still goes through JSON."""

    from builder.evaluate import tasks_worker  # lm-eval: not for those who write files only

    def run(job: Any, store: Store) -> dict[str, Any]:
        told: dict[str, Any] = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tasks_worker, "emit", lambda **event: told.update(event))
            tasks_worker.run(json.loads(json.dumps(job)))
        return told

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "_run", run)
        return tasks.measure(models, recipe, store=store)


def answers_of(checkpoint: Path, tokenizer: Any, prompts: list[str]) -> list[str]:
    """The answers to next_word from the executor's own greedy tokens, in this process."""
    import torch

    from builder.reference.model import ReferenceModel

    model, found = ReferenceModel.load(checkpoint), []
    for prompt in prompts:
        cache, answer = model.new_cache(), []
        logits = model.forward(torch.tensor(tokenizer.encode(prompt)), cache)
        while len(answer) < 6 and (token := int(logits[-1].argmax())) != tokenizer.eos_token_id:
            answer.append(token)
            logits = model.forward(torch.tensor([token]), cache)
        found.append(tokenizer.decode(answer).split("\n")[0])
    return found
