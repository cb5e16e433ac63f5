"""The parts of a recipe about measuring: which texts, which runners, and how much loss is accepted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from builder.recipe.base import MOST, Natural, Part, Positive

RUNNERS = ("bf16", "simulated", "checkpoint", "reference", "served")
# Of 100. A fraction such as 0.95 is refused, because every model would pass it.
Score = Annotated[float, Field(ge=1, le=200)]
Runner = Literal["bf16", "simulated", "checkpoint", "reference", "served"]
# The parts of well-known data sets that are used by default: those that published comparisons use. Each commit is the
# one that `main` has pointed to since 2024, so that results of different days use the same texts. Sources: what
# `datasets` resolved it to on 17 June 2024, huggingface_hub_load_dataset_17Jun2024.py of
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
    """A data set whose texts are scored."""

    data: Annotated[str, Field(min_length=1, description="a .jsonl file, a Hub dataset id, or builtin:python-docs")]
    config: Annotated[str | None, Field(description="configuration of a Hub dataset")] = None
    split: Annotated[str, Field(description="split of a Hub dataset")] = "test"
    column: Annotated[str | None, Field(description="column with the text; default: the first of the usual names")] = (
        None
    )
    revision: Annotated[
        str | None,
        Field(description="revision of a Hub dataset; default: main, or a fixed commit for a default set"),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        """Accepts a bare name, and fills in the usual part of a well-known data set."""
        given = {"data": value} if isinstance(value, str) else value
        return {**KNOWN_SETS.get(str(given.get("data")), {}), **given} if isinstance(given, Mapping) else given


class Evaluation(Part):
    """How the loss is measured, and the limits of the accuracy gate. Texts are scored token by token."""

    data: Annotated[tuple[DataSet, ...], Field(description="the data sets; empty to measure only tasks")] = (
        DataSet.model_validate("Salesforce/wikitext"),
        DataSet.model_validate("HuggingFaceH4/ultrachat_200k"),
    )
    runners: Annotated[tuple[Runner, ...], Field(min_length=1, description="what to measure")] = ("bf16", "checkpoint")
    compare_kv: Annotated[bool, Field(description="also measure without the FP8 KV cache")] = False
    texts: Annotated[Positive, Field(description="texts of each data set, from the first that is not empty")] = 200
    min_tokens: Annotated[int, Field(ge=2, le=MOST, description="texts with fewer tokens are dropped")] = 16
    reserve: Annotated[Natural, Field(description="a text is cut at max_seq_len minus this many tokens")] = 8
    max_tokens: Annotated[
        int | None, Field(ge=2, le=MOST, description="longest text, in tokens; default: see reserve")
    ] = None
    # On the bundled model the KL over 64, 1024 and all 4096 tokens is 0.0235, 0.0296 and 0.0303. 8 bytes each on disk.
    top: Annotated[Positive, Field(description="most likely BF16 tokens stored for each position, for the KL")] = 1024
    batch_tokens: Annotated[Positive, Field(description="tokens of the first batch; halved when memory runs out")] = (
        8192
    )
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Field(description="type of the computation; auto: the model's own on a GPU, float32 on a CPU"),
    ] = "auto"
    resamples: Annotated[int, Field(ge=100, le=1_000_000, description="bootstrap resamples, for the intervals")] = 1000
    seed: Annotated[Natural, Field(description="seed of the resamples and of shuffling the texts")] = 0
    min_score: Annotated[Score | None, Field(description="gate: minimum of PPL of BF16 / PPL x 100")] = None
    max_kl: Annotated[float | None, Field(gt=0, description="gate: maximum of mean KL(BF16 || model), in nats")] = None

    @property
    def limits(self) -> dict[str, float]:
        """The limits of the gate, by metric. Empty without a gate."""
        limits = {"score": self.min_score, "kl": self.max_kl}
        return {metric: limit for metric, limit in limits.items() if limit is not None}

    @model_validator(mode="after")
    def _gate_has_its_metric(self) -> Evaluation:
        if self.limits and ("bf16" not in self.runners or len(set(self.runners)) < 2):
            raise ValueError(
                f"a gate compares a runner with bf16, but only {', '.join(self.runners)} would be measured; "
                "use both: --runner bf16 --runner checkpoint"
            )
        if self.limits and not self.data:
            raise ValueError("a gate needs texts, and none are named; add --data FILE.jsonl")
        return self


class Quality(Part):
    """The quality check of every build, which compares the checkpoint with the BF16 model on a few texts.

    A gate in `evaluation` replaces it.
    """

    check: Annotated[bool, Field(description="measure the checkpoint's quality before it is published")] = True
    min_score: Annotated[Score, Field(description="minimum of PPL of BF16 / PPL x 100")] = 90
    texts: Annotated[Positive, Field(description="texts; up to half are held-out calibration rows")] = 32
    max_tokens: Annotated[int, Field(ge=16, description="a text is cut after this many tokens")] = 256


class Tasks(Part):
    """Tasks that `builder eval` runs through lm-eval. No gate depends on them."""

    names: Annotated[tuple[str, ...], Field(description="names of lm-eval tasks, groups and tags")] = ()
    directory: Annotated[str | None, Field(description="directory with more task files (YAML)")] = None
    limit: Annotated[Positive | None, Field(description="questions of each task, for a trial run; default: all")] = None
    fewshot: Annotated[
        int | None,
        Field(ge=0, le=10_000, description="few-shot examples; default: the task's own"),
    ] = None
    seed: Annotated[
        int | None, Field(ge=0, le=MOST, description="seed of everything that lm-eval draws; default: its own seeds")
    ] = None
    batch_size: Annotated[
        Positive | None, Field(description="questions per batch; default: found by trial on a GPU, 8 on a CPU")
    ] = None
    chat_template: Annotated[bool, Field(description="apply the model's chat template to the questions")] = False

    @field_validator("names", mode="before")
    @classmethod
    def _by_commas(cls, value: Any) -> Any:
        """Splits "mmlu,gsm8k" at commas and removes repetitions."""
        texts = (value,) if isinstance(value, str) else value
        if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
            return value
        names = [name.strip() for text in texts for name in text.split(",")]
        if texts and not any(names):
            raise ValueError("no task is named; write gsm8k, or mmlu,gsm8k")
        return tuple(dict.fromkeys(name for name in names if name))


class Sensitivity(Part):
    """How the loss of each layer is measured: for `builder sensitivity`, and for auto in keep_bf16 and keep_fp8."""

    data: Annotated[
        DataSet | None, Field(description="the texts; use others than those that the result is evaluated on")
    ] = None
    texts: Annotated[Positive, Field(description="number of texts, from the first that is not empty")] = 32
    max_tokens: Annotated[int, Field(ge=16, le=MOST, description="a text is cut after this many tokens")] = 512
