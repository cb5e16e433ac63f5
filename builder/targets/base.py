"""What a target is asked, in the order of a build. Each target delegates to the packages that do the work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from builder.architectures.catalog import UNKNOWN
from builder.architectures.facts import Architecture
from builder.checkpoint.layouts import Checkpoint
from builder.core.errors import UsageError
from builder.core.store import Artifact, Store
from builder.formats.base import NumberFormat
from builder.formats.registry import NVFP4
from builder.hub.snapshot import Snapshot
from builder.llmapi.arguments import Argument
from builder.lora.adapter import Adapter
from builder.recipe.schema import Resolved
from builder.recipe.target_facts import TargetFacts
from builder.triton.engine_parameters import Parameter
from builder.triton.repository import Repository
from builder.trtllm.engine import Engine
from builder.trtllm.probe_results import Answer
from builder.trtllm.rules import Flag, Note

# trtllm-build's flags, or the arguments of the LLM class: both have name, value, reason and source.
Settings = Sequence[Flag] | Sequence[Argument]


@dataclass(frozen=True)
class Inputs:
    """What a target's settings follow from: recipe and GPU profile, the model's config.json, what cards of this kind
    answered to probes, and the LoRA adapters that the recipe names."""

    resolved: Resolved
    config: Mapping[str, Any]
    answers: Sequence[Answer] = ()
    adapters: Sequence[Adapter] = ()


@dataclass(frozen=True)
class Excluded:
    """The linear layers in a format of their own, all linear layers of the model, and the format of the others."""

    formats: Mapping[str, NumberFormat]
    known: Sequence[str]
    whole: NumberFormat = NVFP4
    architecture: Architecture = UNKNOWN


@dataclass(frozen=True)
class Served:
    """What a target made of a checkpoint; a part is None where the build stops before it, or where there is none."""

    engine: Engine | None = None
    repository: Repository | None = None


@dataclass(frozen=True)
class Launch:
    """What a plan shows of the last stages: trtllm-build's command line, or the model.yaml of the LLM API.

    placeholder: the word in the command for a checkpoint that does not exist yet.
    """

    command: list[str] | None = None
    placeholder: str | None = None
    model_yaml: str | None = None


class Target(Protocol):
    """What serves a checkpoint: `engine`, `llmapi` or `reference`."""

    @property
    def facts(self) -> TargetFacts:
        """The properties that lower packages may ask for."""

    def check_machine(self, resolved: Resolved, *, serving: bool) -> None:
        """UnsupportedError if this machine cannot build the target or, with `serving`, cannot serve it."""

    def check_templates(self, tensorrt_llm: str) -> None:
        """UnsupportedError where no Triton templates exist for this version."""

    def check_model(self, inputs: Inputs) -> None:
        """UnsupportedError for a model, by its config.json, that the target cannot load."""

    def settings(self, inputs: Inputs) -> Settings:
        """The resolved settings, each with its reason and source. UsageError or UnsupportedError for a bad one."""

    def check_excluded(self, excluded: Excluded, settings: Settings) -> None:
        """UnsupportedError for layers in a format of their own that the target would load in another."""

    def why_output_is_quantized(self, settings: Settings, number_format: str) -> str:
        """Why attention's output projections must not be left in `number_format`; "" if they may."""

    def returns_logits(self, settings: Settings) -> bool:
        """Whether the served model returns the logits of a prompt."""

    def notes(self, inputs: Inputs, settings: Settings) -> list[Note]:
        """What a user should know about these settings, for the plan and the report."""

    def warnings(self, inputs: Inputs, settings: Settings) -> list[Note]:
        """Those of the notes that a build also prints."""

    def serve_layout(self, checkpoint: Checkpoint, snapshot: Snapshot, stages: Stages) -> Served:
        """Makes what Triton loads, as far as `stages` wants it."""

    def launch(self, inputs: Inputs, settings: Settings, made: Made) -> Launch:
        """The command or file that a plan prints."""

    def parameters(self, inputs: Inputs, settings: Settings) -> list[Parameter]:
        """The parameters of the model in Triton that runs the engine, without paths. UsageError for a bad one."""

    def streams(self, inputs: Inputs, max_batch_size: int) -> tuple[int, int, str] | None:
        """Concurrent streams, host memory of their processes in bytes, and why that many; None if there is no limit."""


@dataclass(frozen=True)
class Stages:
    """The rest of a build, after the checkpoint: which stages are wanted, from which settings, in which store."""

    inputs: Inputs
    settings: Settings
    wanted: Sequence[str]
    store: Store


@dataclass(frozen=True)
class Made:
    """What a plan found: the output directory and the artifacts in it."""

    root: Path
    artifacts: Sequence[Artifact]


def flags_of(settings: Settings) -> list[Flag]:
    """The settings of a target whose settings are trtllm-build's flags."""
    return [setting for setting in settings if isinstance(setting, Flag)]


def arguments_of(settings: Settings) -> list[Argument]:
    """The settings of a target whose settings are arguments of the LLM class."""
    return [setting for setting in settings if isinstance(setting, Argument)]


def no_engine() -> UsageError:
    """The error for `builder engine`, or its command, with a target that has none."""
    return UsageError(
        "The llmapi target has no engine: it loads the checkpoint directly.",
        hint="To make the Triton repository without serving it: `builder render`.",
    )
