"""The parts of a recipe that measure: on which texts, with which runners, and how much may be lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from builder.recipe.base import MOST, Natural, Part, Positive

RUNNERS = ("bf16", "simulated", "checkpoint", "reference", "served")
# Of 100. A fraction such as 0.95 would pass everything.
Score = Annotated[float, Field(ge=1, le=200)]
Runner = Literal["bf16", "simulated", "checkpoint", "reference", "served"]
# What of these is evaluated on, where nothing else is said: published comparisons use the same parts. The commits are
# what `main` has been since 2024, so that figures of different days are of the same texts. Sources: what `datasets`
# resolved it to on 17 June 2024, huggingface_hub_load_dataset_17Jun2024.py of
# Mr-Jack-Tung/huggingface-hub-list-datasets-164k@0689af38; "8049631 verified" on the data set's own page
# (huggingface.co/datasets/HuggingFaceH4/ultrachat_200k/blob/main/README.md) and in full in others' pins.
KNOWN_SETS: Mapping[str, Mapping[str, str]] = {
    "Salesforce/wikitext": {
        "config": "wikitext-2-raw-v1",
        "split": "test",
        "column": "text",
        "revision": "b08601e04326c79dfdd32d625aee71d232d685c3",
    },
    "HuggingFaceH4/ultrachat_200k": {
        "split": "test_sft",
        "column": "messages",
        "revision": "8049631c405ae6576f93f445c6b8166f76f5505a",
    },
}


class DataSet(Part):
    """Texts to score."""

    data: Annotated[str, Field(min_length=1, description="a .jsonl file, a Hub dataset id, or builtin:python-docs")]
    config: Annotated[str | None, Field(description="configuration of a Hub dataset")] = None
    split: Annotated[str, Field(description="split of a Hub dataset")] = "test"
    column: Annotated[str | None, Field(description="column with the text; default: the first of the usual names")] = (
        None
    )
    revision: Annotated[
        str | None, Field(description="revision of a Hub dataset; the commit is kept, and of the default sets pinned")
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        """A bare name is a data set too; of the known ones it means the usual part."""
        given = {"data": value} if isinstance(value, str) else value
        return {**KNOWN_SETS.get(str(given.get("data")), {}), **given} if isinstance(given, Mapping) else given


class Evaluation(Part):
    """How the loss is measured, and how much of it is too much. Texts are scored token by token."""

    data: Annotated[tuple[DataSet, ...], Field(description="the data sets; none where tasks alone are measured")] = (
        DataSet.model_validate("Salesforce/wikitext"),
        DataSet.model_validate("HuggingFaceH4/ultrachat_200k"),
    )
    runners: Annotated[tuple[Runner, ...], Field(min_length=1, description="what is measured")] = ("bf16", "checkpoint")
    compare_kv: Annotated[bool, Field(description="the checkpoint also with its KV cache left in the model's type")] = (
        False
    )
    texts: Annotated[Positive, Field(description="texts of a data set, from the first that is not empty on")] = 200
    min_tokens: Annotated[int, Field(ge=2, le=MOST, description="shorter texts are dropped")] = 16
    reserve: Annotated[Natural, Field(description="a text is cut at max_seq_len less these tokens")] = 8
    max_tokens: Annotated[int | None, Field(ge=2, le=MOST, description="a text is cut here; default: see reserve")] = (
        None
    )
    # On the fixture the KL of 64, 1024 and all 4096 tokens is 0.0235, 0.0296 and 0.0303; 8 bytes each on disk.
    top: Annotated[Positive, Field(description="likeliest tokens of a position that are kept of BF16, for the KL")] = (
        1024
    )
    batch_tokens: Annotated[Positive, Field(description="tokens of the first batch; halved while memory is short")] = (
        8192
    )
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(description="of the arithmetic; auto: the model's own on a GPU, float32 on a CPU"),
    ] = "auto"
    resamples: Annotated[int, Field(ge=100, le=1_000_000, description="bootstrap resamples of the texts")] = 1000
    seed: Annotated[Natural, Field(description="of the resamples and of the shuffled texts")] = 0
    min_score: Annotated[Score | None, Field(description="gate: PPL of BF16 / PPL x 100 must reach it")] = None
    max_kl: Annotated[float | None, Field(gt=0, description="gate: mean KL(BF16 || model) must not pass it")] = None

    @property
    def limits(self) -> dict[str, float]:
        """The gate's, by metric; empty without a gate."""
        asked = {"score": self.min_score, "kl": self.max_kl}
        return {metric: limit for metric, limit in asked.items() if limit is not None}

    @model_validator(mode="after")
    def _gate_has_its_metric(self) -> Evaluation:
        if self.limits and ("bf16" not in self.runners or len(set(self.runners)) < 2):
            raise ValueError(
                f"a gate compares a runner with bf16, and only {', '.join(self.runners)} would be measured; "
                "take both: --runner bf16 --runner checkpoint"
            )
        if self.limits and not self.data:
            raise ValueError("a gate judges texts, and there are none; name some: --data FILE.jsonl")
        return self


class Quality(Part):
    """The check that every build makes: some texts by the BF16 model and by the checkpoint. A gate of `evaluation`
    replaces it."""

    check: Annotated[bool, Field(description="measure the checkpoint's quality before it is published")] = True
    min_score: Annotated[Score, Field(description="PPL of BF16 / PPL x 100 must reach it")] = 90
    texts: Annotated[Positive, Field(description="texts; up to half of them held-out rows of the calibration data")] = (
        32
    )
    max_tokens: Annotated[int, Field(ge=16, description="a text is cut here")] = 256


class Tasks(Part):
    """Questions whose answers can be judged, asked through lm-eval by `builder eval`; no gate looks at them."""

    names: Annotated[tuple[str, ...], Field(description="lm-eval's tasks, groups and tags")] = ()
    directory: Annotated[str | None, Field(description="a directory of more task files (YAML)")] = None
    limit: Annotated[Positive | None, Field(description="questions of each task; for trying out")] = None
    fewshot: Annotated[
        int | None, Field(ge=0, le=10_000, description="examples before a question; default: the task's own")
    ] = None
    seed: Annotated[
        int | None, Field(ge=0, le=MOST, description="of all that lm-eval draws; default: lm-eval's own seeds")
    ] = None
    batch_size: Annotated[
        Positive | None, Field(description="questions; default: found by trying on a GPU, 8 without")
    ] = None
    chat_template: Annotated[bool, Field(description="ask by the model's chat template")] = False

    @field_validator("names", mode="before")
    @classmethod
    def _by_commas(cls, value: Any) -> Any:
        """`--tasks mmlu,gsm8k`"""
        texts = (value,) if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            return value
        names = [name.strip() for text in texts for name in text.split(",")]
        if texts and not any(names):
            raise ValueError("no task is named; say gsm8k, or mmlu,gsm8k")
        return tuple(dict.fromkeys(name for name in names if name))


class Sensitivity(Part):
    """How it is measured which layers lose how much: for `builder sensitivity` and for auto."""

    data: Annotated[
        DataSet | None, Field(description="the texts; better others than those that the result is judged on")
    ] = None
    texts: Annotated[Positive, Field(description="texts, from the first that is not empty on")] = 32
    max_tokens: Annotated[int, Field(ge=16, le=MOST, description="a text is cut here")] = 512
