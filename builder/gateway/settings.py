"""What the gateway knows of a repository, and its own settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from builder.core.errors import UnsupportedError
from builder.gateway.chat_forms import AUTO, NONE, ReasoningForm, ToolCallForm, reasoning_form, tool_call_form
from builder.gateway.limits import Limits
from builder.tokenizer import files as tokenizer_files
from builder.tokenizer.chat_template import ChatTemplate
from builder.tokenizer.detokenizer import Vocabulary
from builder.tokenizer.worker import load
from builder.triton.repository import Repository, open_repository
from builder.trtllm import references


@dataclass(frozen=True)
class Guided:
    """What guided decoding of a model needs: the file of its vocabulary (builder.grammar.vocabulary), and the ids that
    its grammars allow after a complete answer."""

    file: Path
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA adapter of an engine model: its tensors, and the number that the engine knows it by (lora_task_id)."""

    file: Path
    task_id: int


@dataclass(frozen=True)
class TextSettings:
    """What the recipe says of texts (`repository`). sampling_defaults: values of requests that have none."""

    add_special_tokens: bool = True
    skip_special_tokens: bool = True
    parse_special_tokens: str = "prompts"
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> TextSettings:
        """From a repository's facts."""
        return cls(**{one.name: facts[one.name] for one in fields(cls) if one.name in facts})


@dataclass(frozen=True)
class Model:
    """The served model: Triton's name for it, its limits and its texts.

    name: of the Triton model that takes token ids. llmapi: it is TensorRT-LLM's LLM class, which returns text;
    otherwise an engine, which returns token ids. streams: it can answer token by token.
    guided: None if the model can't follow a grammar.
    end_ids: the ids that end an answer, those of the files and the token that the chat template writes after one.
    tool_calls, reasoning: how the model writes either; None: not at all, or in no way that is known.
    special_tokens: ids of the tokens that have no text in an answer. turn_end: the end id of the chat template.
    texts: the recipe's values.
    adapter: the LoRA adapter that requests use, "" for none. adapters: those of an engine model, by name.
    """

    name: str
    llmapi: bool
    streams: bool
    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    vocab_size: int
    end_ids: tuple[int, ...]
    pad_id: int
    vocabulary: Vocabulary
    template: ChatTemplate | None
    tool_calls: ToolCallForm | None = None
    reasoning: ReasoningForm | None = None
    special_tokens: Mapping[str, int] = field(default_factory=dict)
    turn_end: int | None = None
    texts: TextSettings = field(default_factory=TextSettings)
    guided: Guided | None = None
    adapter: str = ""
    adapters: Mapping[str, AdapterFile] = field(default_factory=dict)

    def explained(self) -> dict[str, Any]:
        """What was derived from the model's files, for the log."""
        ends = {f"{id} {self.vocabulary.tokenizer.id_to_token(id)}": id == self.turn_end for id in self.end_ids}
        return {
            "end_ids": [f"{end} (ends a turn of the chat template)" if turn else end for end, turn in ends.items()],
            "tool_calls": self.tool_calls.name if self.tool_calls else NONE,
            "reasoning": self.reasoning.name if self.reasoning else NONE,
            "sampling_defaults": dict(self.texts.sampling_defaults),
        }

    @classmethod
    def read(cls, models: Path, facts: Mapping[str, Any]) -> Model:
        """Reads a repository: its directory of models, and the facts in its manifest."""
        directory = tokenizer_directory(models, facts)
        found = tokenizer_files.read(directory)
        turn_end = [found.end_of_turn[0]] if found.end_of_turn else []
        tokenizer = load(directory)
        template, names = found.template.text if found.template else "", tokenizer.get_vocab()
        return cls(
            name=_token_model(facts),
            llmapi="engine" not in facts["models"],
            streams=bool(facts["decoupled"]),
            max_batch_size=facts["max_batch_size"],
            max_input_len=facts["max_input_len"],
            max_seq_len=facts["max_seq_len"],
            vocab_size=facts["vocab_size"],
            end_ids=tuple(dict.fromkeys([*facts["end_ids"], *turn_end])),
            turn_end=turn_end[0] if turn_end else None,
            pad_id=facts["pad_id"],
            vocabulary=Vocabulary.of(tokenizer),
            template=found.template,
            tool_calls=tool_call_form(template, names, facts.get("tool_calls", AUTO)),
            reasoning=reasoning_form(template, names, facts.get("reasoning", AUTO)),
            special_tokens={one.content: id for id, one in tokenizer.get_added_tokens_decoder().items() if one.special},
            texts=TextSettings.read(facts),
            guided=_guided(models, facts),
            adapters=_adapters(models, facts),
        )


def _guided(models: Path, facts: Mapping[str, Any]) -> Guided | None:
    found = facts.get("guided_decoding")
    if not found:
        return None
    return Guided(models / _token_model(facts) / found["file"], tuple(found["stop_token_ids"]))


def _token_model(facts: Mapping[str, Any]) -> str:
    """Triton's name of the model that takes token ids."""
    models: Mapping[str, str] = facts["models"]
    return models.get("engine") or models["generate"]


def _adapters(models: Path, facts: Mapping[str, Any]) -> dict[str, AdapterFile]:
    """Those of an engine model. The llmapi model has adapters too, and loads them by their names."""
    return {
        name: AdapterFile(models / facts["models"]["engine"] / one["file"], int(one["task_id"]))
        for name, one in facts.get("adapter_files", {}).items()
    }


def tokenizer_directory(models: Path, facts: Mapping[str, Any]) -> Path:
    """Where a repository's tokenizer is. UnsupportedError if it has no tokenizer.json."""
    bundled = "tokenizer_dir" in facts
    directory = models / facts["tokenizer_dir"] if bundled else references.resolved(facts["checkpoint"], models.parent)
    if not (directory / "tokenizer.json").is_file():
        raise UnsupportedError(
            f"{directory} has no tokenizer.json, so the gateway can't serve this repository.",
            hint="Serve it without the gateway: builder serve REPOSITORY --no-gateway",
        )
    return directory


@dataclass(frozen=True)
class Place:
    """Where a model is served: the name that clients use, its repository and its name there ("" if the repository has
    one model only), its server's gRPC port, and the LoRA adapter that is applied ("" for none)."""

    name: str
    repository: Path
    member: str
    grpc: str
    adapter: str = ""

    def read(self) -> Model:
        """The model. UsageError, IntegrityError or UnsupportedError if its repository can't be served."""
        opened = open_repository(self.repository)
        return Model.read(opened.models, opened.members[self.member])


def places(opened: Repository, names: Mapping[str, str], grpc: str) -> tuple[Place, ...]:
    """Where the models of a repository are served, if `grpc` serves it. Adapters are models called MODEL:ADAPTER.

    names: {name in the repository: name for clients}.
    """
    return tuple(
        Place(f"{name}:{adapter}" if adapter else name, opened.path, member, grpc, adapter)
        for member, name in names.items()
        for adapter in ("", *opened.members[member].get("adapters", ()))
    )


def read_models(found: Iterable[Place]) -> list[tuple[Place, Model]]:
    """The models at these places; adapters share the tokenizer of their model. Errors as for `Place.read`."""
    read: dict[tuple[Path, str], Model] = {}
    models = []
    for place in found:
        key = (place.repository, place.member)
        if key not in read:
            read[key] = place.read()
        models.append((place, replace(read[key], adapter=place.adapter)))
    return models


@dataclass(frozen=True)
class Settings:
    """A gateway: the models that it serves first, limits and API keys.

    routes: a file that names the models instead, and is read again when it changes (routes.py).
    watchdog: a file that says what the watchdog of `builder serve` has seen (watchdog.py).
    """

    places: tuple[Place, ...]
    limits: Limits = field(default_factory=Limits)
    keys: tuple[str, ...] = ()
    routes: Path | None = None
    watchdog: Path | None = None
