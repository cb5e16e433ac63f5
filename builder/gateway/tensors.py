"""A generation request as the input tensors of the engine model or of the llmapi model, and their responses.

Tensors travel as raw little-endian bytes, as Triton's gRPC protocol has them; names and shapes are those of
configs/trtllm/1.2.1/triton-tensors.json and configs/trtllm/llmapi-tensors.json.
"""

from __future__ import annotations

import math
import struct
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tritonclient.grpc import service_pb2

from builder.gateway.settings import Model
from builder.grammar.guides import Guide
from builder.triton import adapter_files

FINAL = "triton_final_response"
# Greedy with log-probabilities: with runtime_top_k 1 TensorRT-LLM normalizes over the single candidate and reports 0
# (samplingTopKKernels.cu, normalize_log_probs). A top-p this small leaves the most likely token only, unnormalized.
MOST_LIKELY = 1e-6
COLDEST = 1e-5  # a lower temperature is greedy: logits divided by it would exceed what 32 bits can tell apart


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; top_k 0 and top_p 1 mean the whole vocabulary."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_tokens: int = 0
    bias: Mapping[int, float] = field(default_factory=dict)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is chosen."""
        return self.temperature < COLDEST or self.top_k == 1 or self.top_p <= MOST_LIKELY


@dataclass(frozen=True)
class TokenRequest:
    """A prompt of token ids, and how to continue it.

    log_probs: also return each token's log-probability. guide: the grammar of the answer.
    """

    ids: Sequence[int]
    max_tokens: int
    sampling: Sampling
    end_ids: Sequence[int]
    streaming: bool
    log_probs: bool = False
    guide: Guide | None = None


class Step(NamedTuple):
    """One response: new token ids (an engine's) or new text (the llmapi model's), their log-probabilities if they were
    requested, and whether it is the last. `reason`: why the llmapi model ended."""

    ids: Sequence[int]
    text: str
    log_probs: Sequence[float]
    final: bool
    reason: str = ""


class Tensor(NamedTuple):
    """An input: name, Triton's data type, shape without the batch dimension, and content."""

    name: str
    kind: str
    shape: tuple[int, ...]
    content: bytes


def encode(model: Model, request: TokenRequest, request_id: str, adapter: Iterable[Tensor] = ()) -> Any:
    """The protobuf message of a request. adapter: the tensors of its LoRA adapter, for an engine that lacks them."""
    tensors, outputs = _llmapi(model, request) if model.llmapi else _engine(model, request)
    return _message(model, request_id, [*tensors, *adapter], outputs)


def read_adapter(model: Model) -> list[Tensor]:
    """The tensors of the model's LoRA adapter, from its file."""
    return [Tensor(*one) for one in adapter_files.read(model.adapters[model.adapter].file)]


def encode_stop(model: Model, request_id: str) -> Any:
    """The protobuf message of a request that ends the one with this id."""
    required = (
        [] if model.llmapi else [_ints(name, [1]) for name in ("input_ids", "input_lengths", "request_output_len")]
    )
    return _message(model, request_id, [*required, _flag("stop", True)], [])


def _message(model: Model, request_id: str, tensors: Sequence[Tensor], outputs: Sequence[str]) -> Any:
    batch = () if model.llmapi else (1,)
    message = service_pb2.ModelInferRequest(model_name=model.name, id=request_id)
    for tensor in tensors:
        message.inputs.add(name=tensor.name, datatype=tensor.kind, shape=(*batch, *tensor.shape))
        message.raw_input_contents.append(tensor.content)
    for name in outputs:
        message.outputs.add(name=name)
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    return message


def _engine(model: Model, request: TokenRequest) -> tuple[list[Tensor], list[str]]:
    how, first, others = request.sampling, request.end_ids[:1], request.end_ids[1:]
    tensors = [
        _ints("input_ids", request.ids),
        _ints("input_lengths", [len(request.ids)]),
        _ints("request_output_len", [request.max_tokens]),
        _ints("end_id", first or [-1]),
        _ints("pad_id", [model.pad_id]),
        _flag("streaming", request.streaming),
        _flag("exclude_input_in_output", True),
        *_floats({"repetition_penalty": how.repetition_penalty}, neutral=1.0),
        *_floats({"presence_penalty": how.presence_penalty, "frequency_penalty": how.frequency_penalty}, neutral=0.0),
    ]
    if how.greedy and not request.log_probs:
        tensors.append(_ints("runtime_top_k", [1]))
    elif how.greedy:
        tensors.append(_float("runtime_top_p", MOST_LIKELY))
    else:
        tensors += [_float("runtime_top_p", how.top_p), _float("temperature", how.temperature)]
        tensors += [_ints("runtime_top_k", [how.top_k])] if how.top_k else []
        tensors.append(Tensor("seed", "UINT64", (1,), struct.pack("<Q", how.seed)))
    if how.min_tokens:
        tensors.append(_ints("min_tokens", [how.min_tokens]))
    if others:  # the engine takes one end id; each of the others is a stop word of one token
        flat = [*others, *range(1, len(others) + 1)]
        tensors.append(Tensor("stop_words_list", "INT32", (2, len(others)), array("i", flat).tobytes()))
    if how.bias:
        bias = array("f", bytes(4 * model.vocab_size))
        for id, value in how.bias.items():
            bias[id] = value
        tensors.append(Tensor("embedding_bias", "FP32", (model.vocab_size,), bias.tobytes()))
    tensors += _guide(request.guide)
    if model.adapter:
        number = struct.pack("<Q", model.adapters[model.adapter].task_id)
        tensors.append(Tensor("lora_task_id", "UINT64", (1,), number))
    if request.log_probs:
        tensors.append(_flag("return_log_probs", True))
    return tensors, ["output_ids", "sequence_length", *(["output_log_probs"] if request.log_probs else [])]


def _llmapi(model: Model, request: TokenRequest) -> tuple[list[Tensor], list[str]]:
    """Log-probabilities and biases are refused before: this model has neither. End ids are a parameter of the model."""
    how, prefix = request.sampling, "sampling_param_"
    tensors = [
        _ints("input_ids", request.ids),
        _ints(f"{prefix}max_tokens", [request.max_tokens]),
        _flag("streaming", request.streaming),
        _flag(f"{prefix}exclude_input_from_output", True),
        _flag("return_finish_reason", True),
        *_floats({f"{prefix}repetition_penalty": how.repetition_penalty}, neutral=1.0),
        *_floats({f"{prefix}presence_penalty": how.presence_penalty,
                  f"{prefix}frequency_penalty": how.frequency_penalty}, neutral=0.0),
    ]  # fmt: skip
    if how.greedy:
        tensors.append(_ints(f"{prefix}top_k", [1]))
    else:
        tensors += [_float(f"{prefix}top_p", how.top_p), _float(f"{prefix}temperature", how.temperature)]
        tensors += [_ints(f"{prefix}top_k", [how.top_k])] if how.top_k else []
        tensors.append(Tensor(f"{prefix}seed", "UINT64", (1,), struct.pack("<Q", how.seed)))
    if how.min_tokens:
        tensors.append(_ints(f"{prefix}min_tokens", [how.min_tokens]))
    tensors += _guide(request.guide)
    if model.adapter:
        tensors.append(Tensor("lora_name", "BYTES", (1,), _bytes(model.adapter)))
    return tensors, ["text_output", "finish_reason"]


def _guide(guide: Guide | None) -> list[Tensor]:
    if guide is None:
        return []
    names = ("guided_decoding_guide_type", "guided_decoding_guide")
    found = [Tensor(name, "BYTES", (1,), _bytes(text)) for name, text in zip(names, guide, strict=True)]
    return found if guide.text else found[:1]


def _bytes(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<I", len(raw)) + raw


def _ints(name: str, values: Sequence[int]) -> Tensor:
    return Tensor(name, "INT32", (len(values),), array("i", values).tobytes())


def _float(name: str, value: float) -> Tensor:
    return Tensor(name, "FP32", (1,), struct.pack("<f", value))


def _floats(values: Mapping[str, float], neutral: float) -> Iterable[Tensor]:
    return (_float(name, value) for name, value in values.items() if value != neutral)


def _flag(name: str, value: bool) -> Tensor:
    return Tensor(name, "BOOL", (1,), bytes([value]))


def is_final(response: Any) -> bool:
    """Whether a response's protobuf message (ModelInferResponse) is the last of its request."""
    return bool(response.parameters[FINAL].bool_param)


class Decoder:
    """Reads the responses to one request. Those with as many outputs have them in the same order, so names are looked
    up once."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}
        self._seen = 0  # tokens

    def step(self, response: Any, *, final: bool) -> Step:
        """A response's protobuf message (ModelInferResponse). `final`: what `is_final` says of it."""
        contents = response.raw_output_contents
        if not contents:
            return Step((), "", (), final)
        if len(self._places) != len(contents):  # the llmapi model's last response also has a reason
            self._places = {output.name: place for place, output in enumerate(response.outputs)}
        places = self._places
        if "output_ids" not in places:
            reason = places.get("finish_reason")
            text = _text(contents[places["text_output"]])
            return Step((), text, (), final, "" if reason is None else _text(contents[reason]))
        (length,) = struct.unpack_from("<i", contents[places["sequence_length"]])
        ids = struct.unpack_from(f"<{length}i", contents[places["output_ids"]])
        place = places.get("output_log_probs")
        log_probs = () if place is None else self._own(contents[place], length)
        self._seen += length
        return Step(ids, "", log_probs, final)

    def _own(self, raw: bytes, length: int) -> list[float]:
        """The last tokens' log-probabilities: an engine returns those of the whole answer with each token."""
        values = array("f", raw)
        own = values if len(values) <= length else values[self._seen : self._seen + length]
        return [value if math.isfinite(value) else -9999.0 for value in own]


def _text(raw: bytes) -> str:
    """The strings of a BYTES tensor, each behind its length of four bytes, joined."""
    found, at = [], 0
    while at + 4 <= len(raw):
        (length,) = struct.unpack_from("<I", raw, at)
        found.append(raw[at + 4 : at + 4 + length].decode("utf-8"))
        at += 4 + length
    return "".join(found)
