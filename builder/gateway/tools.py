"""The functions that a request offers to the model, and whether it must call one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from builder.gateway.errors import invalid
from builder.gateway.settings import Model

MAX_TOOLS = 128
STRICT = ConfigDict(strict=True, extra="forbid")

FunctionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


class Function(BaseModel):
    """A function. parameters: a JSON schema. strict: its arguments must fulfil it (guided_calls.py)."""

    model_config = STRICT

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A tool as OpenAI's API has it. Only functions."""

    model_config = STRICT

    type: Literal["function"]
    function: Function
    _sent: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, value: Any, validate: ModelWrapValidatorHandler[Tool]) -> Tool:
        made = validate(value)
        made._sent = value
        return made

    @property
    def sent(self) -> dict[str, Any]:
        """As the client sent it: templates write its keys in that order."""
        return self._sent


class ChosenFunction(BaseModel):
    """The name of the function to call."""

    model_config = STRICT

    name: str


class Choice(BaseModel):
    """A tool_choice that names a function."""

    model_config = STRICT

    type: Literal["function"]
    function: ChosenFunction


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | Choice


def check(tools: Sequence[Tool], choice: ToolChoice | None, model: Model) -> None:
    """ApiError for tools that this model can't call, and a tool_choice that does not fit them."""
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise invalid("tools: two functions have the same name.", "tools")
    if isinstance(choice, Choice) and choice.function.name not in names:
        raise invalid(f"tool_choice: tools has no function {choice.function.name[:64]!r}.", "tool_choice")
    if choice == "required" and not tools:
        raise invalid("tool_choice is required, but there are no tools.", "tool_choice")
    if not tools or choice == "none":
        return
    if model.tool_calls is None:
        raise invalid(
            "This server does not support tools with this model: its chat template has none of the known forms of "
            "tool calls. Omit tools.",
            "tools", "unsupported_parameter",
        )  # fmt: skip
    if model.llmapi and all(mark in model.special_tokens for mark in model.tool_calls.openings):
        raise invalid(
            "This server does not support tools: it does not return the special tokens that begin this model's calls.",
            "tools", "unsupported_parameter",
        )  # fmt: skip


def used(tools: Sequence[Tool], choice: ToolChoice | None) -> list[Tool]:
    """The tools that the model is offered."""
    return [] if choice == "none" else list(tools)


def function_to_call(tools: Sequence[Tool], choice: ToolChoice | None) -> str | None:
    """The function that must be called: "" for any, None if the model decides."""
    if isinstance(choice, Choice):
        return choice.function.name
    if choice == "required" and tools:
        return tools[0].function.name if len(tools) == 1 else ""
    return None
