"""The requests of /v1/chat/completions and /v1/completions, validated. Values that JSON has in another type are errors.

Besides OpenAI's fields: top_k, min_tokens, repetition_penalty, ignore_eos and stop_token_ids, and for conversations
chat_template_kwargs and continue_final_message. The openai client sends these with extra_body.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from builder.gateway import guided, tools
from builder.gateway.errors import ApiError, invalid
from builder.gateway.fields import known
from builder.gateway.guided import ResponseFormat
from builder.gateway.prompts import RESERVED
from builder.gateway.settings import Model
from builder.gateway.tensors import Sampling
from builder.gateway.tools import ToolChoice, Tools

MAX_STOPS, MAX_STOP_LENGTH = 16, 1024
MAX_STOP_IDS = 256  # all of them are sent to the engine with each answer
COMPLETION_TOKENS = 16  # OpenAI's default of max_tokens for /v1/completions

LOST = ("audio", "function_call")  # fields of a message

# Values that a recipe can have defaults for.
SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "presence_penalty", "frequency_penalty")
TOKEN_ID = re.compile("[0-9]{1,10}")
MAX_INT = (1 << 31) - 1  # the engine's integers have 32 bits

Count = Annotated[int, Field(ge=0, le=MAX_INT)]
MaxTokens = Annotated[int, Field(ge=1, le=MAX_INT)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Finite = ConfigDict(strict=True, allow_inf_nan=False)


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against observers of the network; of no use behind TLS of one's own


class Generation(BaseModel):
    """What both requests have in common."""

    model_config = Finite

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: int = Field(1, ge=1, le=128)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    top_k: int = Field(0, ge=-1, le=MAX_INT)
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] = []
    stop_token_ids: list[Count] = Field([], max_length=MAX_STOP_IDS)
    ignore_eos: bool = False
    min_tokens: Count = 0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}
    max_tokens: MaxTokens | None = None
    response_format: ResponseFormat | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def log_probs(self) -> bool:
        """Whether the response has log-probabilities."""
        return False

    def sampling(self, model: Model) -> Sampling:
        """How to sample. Without `seed` a random one, because TensorRT-LLM's default is the same for every request.

        Values that the request does not name are the recipe's (`sampling_defaults`), or else those of OpenAI's API.
        ApiError for a logit_bias that this model does not take.
        """
        defaults = {
            name: value
            for name, value in model.texts.sampling_defaults.items()
            if name in SAMPLING and name not in self.model_fields_set
        }
        values = {name: getattr(self, name) for name in SAMPLING} | defaults
        values["top_k"] = max(values["top_k"], 0)
        seed = (random.getrandbits(63) if self.seed is None else self.seed) % (1 << 64)
        return Sampling(**values, seed=seed, min_tokens=self.min_tokens, bias=self._bias(model))

    def end_ids(self, model: Model) -> list[int]:
        """The ids that end an answer."""
        return [*([] if self.ignore_eos else model.end_ids), *self.stop_token_ids]

    def _bias(self, model: Model) -> dict[int, float]:
        if self.logit_bias and model.llmapi:
            raise invalid("This server does not support logit_bias.", "logit_bias", "unsupported_parameter")
        found = {int(id): value for id, value in self.logit_bias.items() if TOKEN_ID.fullmatch(id)}
        if len(found) < len(self.logit_bias) or max(found, default=0) >= model.vocab_size:
            raise invalid(f"logit_bias: keys must be token ids below {model.vocab_size}.", "logit_bias")
        return found


class Part(BaseModel):
    """A part of a message's content. Only text: the served models read nothing else. Other fields, such as marks for
    caching, are ignored."""

    model_config = ConfigDict(strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message. Further fields, such as `name` or `reasoning_content`, are passed on to the chat template, but not
    those that no template reads (LOST): the model would not see what the client believes to have sent."""

    model_config = ConfigDict(strict=True, extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    tool_calls: list[dict[str, Any]] | None = None

    @model_validator(mode="after")
    def _check(self) -> Message:
        for name in LOST:
            if (self.model_extra or {}).get(name) is not None:
                raise ValueError(f"this server does not support {name} in a message")
        if any(call.get("type") not in (None, "function") for call in self.tool_calls or ()):
            raise ValueError("tool_calls: this server supports calls of functions only")
        return self

    def for_template(self) -> dict[str, Any]:
        """As chat templates expect it: content is a string, and arguments of tool calls are objects."""
        found = self.model_dump(exclude_none=True)
        # Templates of the models that are served here know "system" only.
        found["role"] = "system" if self.role == "developer" else self.role
        if isinstance(self.content, list):
            found["content"] = "".join(part.text for part in self.content)
        refusal = found.pop("refusal", "")
        found["content"] = found.get("content") or refusal
        for call in found.get("tool_calls", []):
            function = call.get("function")
            if isinstance(function, dict) and isinstance(function.get("arguments"), str):
                function["arguments"] = _object(function["arguments"])
        return found


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


class ChatRequest(Generation):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    continue_final_message: bool = False
    tools: Tools = []
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True

    @property
    def log_probs(self) -> bool:
        """Whether the response has log-probabilities."""
        return self.logprobs


class CompletionRequest(Generation):
    """The body of /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool = False
    best_of: int | None = Field(None, ge=1)

    @property
    def log_probs(self) -> bool:
        """Whether the response has log-probabilities."""
        return self.logprobs is not None


Request = TypeVar("Request", ChatRequest, CompletionRequest)
Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Request], body: bytes, choose: Callable[[str], Model]) -> Request:
    """A request from the bytes of its body. ApiError with the first field that is wrong.

    `choose` returns the model that clients call so, or raises an ApiError.
    """
    request = validated(kind, known(json_object(body), kind.model_fields))
    check(request, choose(request.model))
    return request


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body. ApiError for anything else."""
    try:
        found = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise invalid(f"The body is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(found, dict):
        raise invalid("The body must be a JSON object.")
    return found


def validated(kind: type[Body], values: Mapping[str, Any]) -> Body:
    """The values as a model. ApiError with the first that is wrong."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _first(error) from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _first(error: ValidationError) -> ApiError:
    found = error.errors(include_url=False, include_input=False)[0]
    # Union types add the name of the alternative that was tried, which tells clients nothing.
    where = [str(part) for part in found["loc"] if "[" not in str(part) and str(part) not in ("str", "int")]
    name = ".".join(where)[:200]  # an unknown key of an object may be as long as the body
    return invalid(f"{name}: {found['msg']}", where[0] if where else None)


def check(request: ChatRequest | CompletionRequest, model: Model) -> None:
    """ApiError for what this model can't answer, and for fields that contradict each other."""
    if max(request.stop_token_ids, default=0) >= model.vocab_size:
        raise invalid(f"stop_token_ids: ids must be below {model.vocab_size}.", "stop_token_ids")
    guided_form = request.response_format is not None and request.response_format.guides
    if guided_form:
        guided.check(request, model)
    if request.log_probs and model.llmapi:
        raise invalid("This server does not support logprobs.", "logprobs", "unsupported_parameter")
    if isinstance(request, ChatRequest):
        if request.top_logprobs and not request.logprobs:
            raise invalid("top_logprobs needs logprobs: true.", "top_logprobs")
        _check_alternatives("top_logprobs", request.top_logprobs)
        if request.continue_final_message and request.messages[-1].role != "assistant":
            raise invalid("continue_final_message needs an assistant's message at the end.", "messages")
        tools.check(request.tools, request.tool_choice, model)
        if request.continue_final_message and request.tools:
            raise invalid("continue_final_message can't be combined with tools.", "continue_final_message")
    else:
        _check_alternatives("logprobs", request.logprobs or 0)
        if request.best_of not in (None, request.n):
            raise invalid("best_of must be equal to n: this server does not rank answers.", "best_of")


def _check_alternatives(name: str, number: int) -> None:
    """ApiError if a request asks for the log-probabilities of so many alternatives to the chosen token."""
    if number:
        raise invalid(
            f"{name} is {number}; this server returns the log-probability of the chosen token only, so it must be 0.",
            name, "unsupported_parameter",
        )  # fmt: skip


def token_limit(asked: int | None, prompt: int, model: Model) -> int:
    """max_tokens of a prompt with so many tokens; by default as many as the model's context holds. ApiError if more."""
    longest = model.max_seq_len - prompt
    if longest < 1 or (asked or 0) > longest:
        raise invalid(
            f"The prompt has {prompt} tokens and max_tokens is {asked or 1}, together {prompt + (asked or 1)}; this "
            f"model takes {model.max_seq_len} (max_seq_len): max_tokens can be {max(longest, 0)}.",
            "max_tokens", "context_length_exceeded",
        )  # fmt: skip
    return asked or longest


def template_variables(request: ChatRequest) -> Mapping[str, Any]:
    """What a request passes to the chat template. ApiError for a name that the gateway sets itself."""
    reserved = [name for name in RESERVED if name in request.chat_template_kwargs]
    if reserved:
        raise invalid(f"chat_template_kwargs can't set {', '.join(reserved)}.", "chat_template_kwargs")
    effort: dict[str, Any] = {"reasoning_effort": request.reasoning_effort} if request.reasoning_effort else {}
    if request.reasoning_effort == "none":
        effort["enable_thinking"] = False  # the variable of Qwen3's template and others
    return {**effort, **request.chat_template_kwargs}
