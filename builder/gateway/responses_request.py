"""The request of /v1/responses, as the request for a conversation that asks the same. Nothing is stored.

Supported is what has a counterpart there: text, functions, reasoning and their history as input items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from builder.gateway import requests, tools
from builder.gateway.errors import invalid
from builder.gateway.fields import known
from builder.gateway.guided import JsonSchema, ResponseFormat
from builder.gateway.requests import ChatRequest, MaxTokens

STRICT = ConfigDict(strict=True, extra="forbid")
IGNORED = (
    "metadata", "moderation", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "safety_identifier", "service_tier", "user",
)  # fmt: skip
# Field -> (values that ask for nothing, what it would need)
REFUSED: Mapping[str, tuple[Sequence[Any], str]] = {
    "access_programs": (([],), "access programs"),
    "background": ((False,), "responses in the background"),
    "background_options": ((), "responses in the background"),
    "context_management": (([],), "context management"),
    "conversation": ((), "stored conversations"),
    "image": ((), "images"),
    "max_tool_calls": ((), "tools that run on the server"),
    "previous_response_id": ((), "stored responses"),
    "prompt": ((), "stored prompts"),
    "store": ((False,), "stored responses"),
    "top_logprobs": ((0,), "log-probabilities in responses"),
    "truncation": (("disabled",), "truncation"),
}
LOGPROBS = "message.output_text.logprobs"  # in `include`; all else there is of tools, images and hidden reasoning
TEXTS = ("input_text", "output_text", "text", "reasoning_text")  # types of the parts of an item's content


class FunctionTool(BaseModel):
    """A function, as this API has it (see tools.Function)."""

    model_config = STRICT

    type: Literal["function"]
    name: tools.FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def as_tool(self) -> dict[str, Any]:
        """As conversations have it."""
        return {"type": "function", "function": self.model_dump(exclude_unset=True, exclude={"type"})}


class FunctionChoice(BaseModel):
    """A tool_choice that names a function."""

    model_config = STRICT

    type: Literal["function"]
    name: str


class ReasoningOptions(BaseModel):
    """How much to reason. A summary is ignored: the reasoning itself is in the response. So is what the others have by
    default; other values would need another model, or change what the chat template does."""

    model_config = STRICT

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class StreamOptions(BaseModel):
    """Nothing of them has an effect (see requests.StreamOptions)."""

    model_config = STRICT

    include_obfuscation: bool = False


class TextFormat(BaseModel):
    """The form of the text: response_format, without its inner object."""

    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    content: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    def response_format(self) -> ResponseFormat:
        """As conversations have it. ApiError for a form without its schema."""
        made = ResponseFormat(type=self.type)
        if self.type == "json_schema":
            if self.content is None:
                raise invalid("text.format.schema is missing.", "text.format")
            made.json_schema = JsonSchema(content=self.content, strict=self.strict)
        made._param = "text.format"
        return made

    def as_dict(self) -> dict[str, Any]:
        """OpenAI's object."""
        return self.model_dump(by_alias=True, exclude_none=True)


class TextOptions(BaseModel):
    """How the text is. The verbosity is ignored."""

    model_config = STRICT

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesRequest(BaseModel):
    """The body of /v1/responses."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    include: list[str] = []
    reasoning: ReasoningOptions = ReasoningOptions()
    text: TextOptions = TextOptions()
    tools: list[FunctionTool] = Field([], max_length=tools.MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice = "auto"
    parallel_tool_calls: bool = True

    @classmethod
    def parse(cls, body: bytes) -> ResponsesRequest:
        """A request from the bytes of its body. ApiError with the first field that is wrong."""
        made = requests.validated(cls, known(requests.json_object(body), cls.model_fields, IGNORED, REFUSED))
        if LOGPROBS in made.include:
            message = f"This server does not support log-probabilities in responses: omit {LOGPROBS} from include."
            raise invalid(message, "include", "unsupported_parameter")
        return made

    def conversation(self) -> ChatRequest:
        """The request for the same answer. ApiError for an input item that is not supported."""
        first = [{"role": "system", "content": self.instructions}] if self.instructions else []
        given = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else _messages(self.input)
        form = self.text.format.response_format() if self.text.format else None
        choice: Any = self.tool_choice
        if isinstance(choice, FunctionChoice):
            choice = {"type": "function", "function": {"name": choice.name}}
        values = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_completion_tokens": self.max_output_tokens,
            "reasoning_effort": self.reasoning.effort,
        }
        try:
            made = ChatRequest.model_validate({
                "model": self.model,
                "messages": first + given,
                "stream": self.stream,
                "tools": [tool.as_tool for tool in self.tools],
                "tool_choice": choice,
                "parallel_tool_calls": self.parallel_tool_calls,
                **{name: value for name, value in values.items() if value is not None},
            })  # fmt: skip
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)[0]
            raise invalid(f"input: {found['msg']}", "input") from None
        made.response_format = form
        return made


def _messages(items: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a conversation. Calls and reasoning belong to one message of the assistant."""
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "message":
            _add_message(messages, str(item.get("role")), _text(item.get("content"), number))
        elif kind == "reasoning":
            message = _assistant(messages)
            text = _text(item.get("content") or [], number)
            message["reasoning_content"] = message.get("reasoning_content", "") + text
        elif kind == "function_call":
            call = {"name": item.get("name"), "arguments": item.get("arguments")}
            made = {"id": item.get("call_id"), "type": "function", "function": call}
            _assistant(messages).setdefault("tool_calls", []).append(made)
        elif kind == "function_call_output":
            output = _text(item.get("output"), number)
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        else:
            raise invalid(
                f"input.{number}: this server does not support items of type {str(kind)[:50]!r}.",
                "input", "unsupported_parameter",
            )  # fmt: skip
    return messages


def _add_message(messages: list[dict[str, Any]], role: str, text: str) -> None:
    last = messages[-1] if messages else {}
    if role == "assistant" and last.get("role") == "assistant" and last["content"] is None:
        last["content"] = text
    else:
        messages.append({"role": role, "content": text})


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message at the end, or a new one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _text(content: Any, number: int) -> str:
    """The text of an item's content. ApiError if it has something else."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content if isinstance(content, list) else [None]:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") in TEXTS else None
        if not isinstance(text, str):
            raise invalid(f"input.{number}: the content must be a text, or parts that are texts.", "input")
        texts.append(text)
    return "".join(texts)
