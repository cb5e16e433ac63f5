"""A client for each endpoint of a served repository: HTTP infer, HTTP generate, gRPC infer and gRPC streaming.

It can also call the engine model directly, with token ids. Every call has a timeout. This module imports tritonclient
and numpy, so import it only where a server is called.
"""

from __future__ import annotations

import http.client
import json
import queue
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

_NUMPY = {"BYTES": np.object_, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_}
_TYPES = {
    "text_input": "BYTES",
    "stop_words": "BYTES",
    "bad_words": "BYTES",
    "embedding_bias_words": "BYTES",
    "embedding_bias_weights": "FP32",
    "temperature": "FP32",
    "top_p": "FP32",
    "frequency_penalty": "FP32",
    "presence_penalty": "FP32",
    "repetition_penalty": "FP32",
    "seed": "UINT64",
    "stream": "BOOL",
    "streaming": "BOOL",
    "return_context_logits": "BOOL",
}  # every other input is INT32

# HTTP_PROXY and friends are for external hosts. The server is local, so both protocols bypass the proxy.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_DIRECT_GRPC = [
    ("grpc.enable_http_proxy", 0),
    # tritonclient sets these two itself, but not if it is given other arguments. The logits of a prompt are large.
    ("grpc.max_send_message_length", triton_grpc.MAX_GRPC_MESSAGE_SIZE),
    ("grpc.max_receive_message_length", triton_grpc.MAX_GRPC_MESSAGE_SIZE),
]


class Raw(NamedTuple):
    """An input as bytes: name, Triton's data type, shape without the batch dimension, and content."""

    name: str
    kind: str
    shape: Sequence[int]
    content: bytes


class ServerError(Exception):
    """The server answered with an error. The message is the error's text as a client sees it."""


class MissingOutput(Exception):
    """The response lacks an output that the request asked for."""


class ResponseTimeout(Exception):
    """No response, or no next chunk of a stream, arrived within the timeout; or the connection broke."""


@dataclass(frozen=True)
class Request:
    """A generation request, greedy by default. `options` are further inputs by name, such as `stop_words`.

    `text` is bytes to send invalid UTF-8. None omits the input, and so does `max_tokens` None. The answer is without
    the prompt, whatever the repository's default is.
    """

    text: str | bytes | None
    max_tokens: int | None = 16
    options: Mapping[str, Any] = field(default_factory=dict)

    def inputs(self, **more: Any) -> dict[str, Any]:
        """Input values by name; those that are None are left out."""
        own = {"text_input": self.text, "max_tokens": self.max_tokens, "top_k": 1, "exclude_input_in_output": True}
        values = {**own, **self.options, **more}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Response:
    """The generated text, and the chunks that it arrived in: one if it was not streamed."""

    text: str
    chunks: tuple[str, ...]


@dataclass(frozen=True)
class Client:
    """A client of one server. URLs have no scheme; `timeout` is in seconds, for a response or a chunk.

    `models` names the Triton model of each endpoint, under the keys generate, infer, stream and engine. `names` maps
    our input names to the repository's where they differ. `batched` says whether tensors have a batch dimension.
    """

    http_url: str
    grpc_url: str
    models: Mapping[str, str]
    timeout: float
    names: Mapping[str, str] = field(default_factory=dict)
    batched: bool = True

    @classmethod
    def for_repository(cls, http_url: str, grpc_url: str, facts: Mapping[str, Any], timeout: float) -> Client:
        """A client of a server of the repository with these facts (`Repository.facts`)."""
        return cls(http_url, grpc_url, facts["models"], timeout, facts.get("names", {}), facts.get("batched", True))

    def ready(self, model: str | None = None) -> bool:
        """Whether the server, or one of its models, is ready (by gRPC)."""
        with self._grpc() as grpc:
            if model is None:
                return bool(grpc.is_server_live() and grpc.is_server_ready())
            return bool(grpc.is_model_ready(model))

    def http_infer(self, request: Request) -> Response:
        """KServe v2 inference over HTTP. ServerError and ResponseTimeout as for every call below."""
        client = triton_http.InferenceServerClient(
            _address(self.http_url), connection_timeout=self.timeout, network_timeout=self.timeout
        )
        try:
            with _errors():
                outputs = [triton_http.InferRequestedOutput("text_output")]
                result = client.infer(self.models["infer"], self._inputs(triton_http, request), outputs=outputs)
            return _response(result)
        finally:
            client.close()

    def http_generate(self, request: Request) -> Response:
        """Triton's generate extension, with JSON bodies. tritonclient does not support it, so this uses urllib."""
        http_request = urllib.request.Request(
            f"http://{_address(self.http_url)}/v2/models/{self.models['generate']}/generate",
            data=_json(self._named(request.inputs())),
            headers={"Content-Type": "application/json"},
        )
        try:
            with _DIRECT.open(http_request, timeout=self.timeout) as response:
                body = json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:  # an open connection delays the server's exit
                raise ServerError(_json_error(error.read())) from None
        except (OSError, http.client.HTTPException) as error:  # such as a server that exits during a response
            raise ResponseTimeout(str(error)) from None
        # When a decoupled model fails, Triton answers 200 with an error in the body.
        if "error" in body:
            raise ServerError(body["error"])
        return Response(body["text_output"], (body["text_output"],))

    def grpc_infer(self, request: Request) -> Response:
        """KServe v2 inference over gRPC."""
        with self._grpc() as grpc, _errors():
            outputs = [triton_grpc.InferRequestedOutput("text_output")]
            result = grpc.infer(
                self.models["infer"],
                self._inputs(triton_grpc, request),
                outputs=outputs,
                client_timeout=self.timeout,
            )
            return _response(result)

    def grpc_stream(self, request: Request) -> Response:
        """A gRPC stream, read to its end. ResponseTimeout if a chunk does not arrive in time."""
        chunks = tuple(self.grpc_chunks(request))
        return Response("".join(chunks), chunks)

    def grpc_chunks(self, request: Request, sent: Callable[[], None] = lambda: None) -> Iterator[str]:
        """Yields each chunk of a gRPC stream as it arrives.

        `sent` is called once, after connecting and before the request is sent, so that it can start a clock.
        """
        inputs = self._inputs(triton_grpc, request, stream=True)
        for result in self._stream(self.models["stream"], inputs, ["text_output"], sent):
            yield _text(result)

    def engine_tokens(self, ids: Sequence[int], max_tokens: int, adapter: Sequence[Raw] = ()) -> list[int]:
        """The token ids that the engine model generates for a prompt of token ids. Only max_tokens ends it. adapter:
        the inputs of a LoRA adapter."""
        inputs = {"input_ids": ids, "input_lengths": len(ids), "request_output_len": max_tokens, "runtime_top_k": 1}
        streamed = {**inputs, "streaming": True, "exclude_input_in_output": True}
        tensors = [*_tensors(triton_grpc, streamed), *map(_raw, adapter)]
        results = self._stream(self.models["engine"], tensors, ["output_ids", "sequence_length"])
        return [int(token) for result in results for token in result.as_numpy("output_ids").reshape(-1)]

    def context_logits(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """The served model's logits for each token of a prompt, float32 [rows, vocab_size].

        The caller must check that there are as many rows as tokens. Calls the engine model, or the llmapi target's only
        model if there is no engine model. MissingOutput if the response has no logits.
        """
        inputs = {"input_ids": ids, "return_context_logits": True}
        if model := self.models.get("engine"):
            inputs |= {"input_lengths": len(ids), "request_output_len": 1, "runtime_top_k": 1}
            outputs = ["output_ids", "context_logits"]
        else:
            model, inputs = self.models["generate"], {**inputs, "max_tokens": 1, "top_k": 1}
            outputs = ["text_output", "context_logits"]
        tensors = _tensors(triton_grpc, inputs, names=self.names, batched=self.batched)
        with _errors():  # read to the end: the server keeps a request whose stream is left early
            responses = [r.as_numpy("context_logits") for r in self._stream(model, tensors, outputs)]
        found = next((logits for logits in responses if logits is not None and logits.size), None)
        if found is None:
            raise MissingOutput("the response has no context_logits")
        # astype always copies: arrays backed by a protobuf message are read-only.
        logits: np.ndarray[Any, Any] = found.reshape(-1, found.shape[-1]).astype(np.float32)
        return logits

    def _inputs(self, module: Any, request: Request, **more: Any) -> list[Any]:
        return _tensors(module, request.inputs(**more), names=self.names, batched=self.batched)

    def _named(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {self.names.get(name, name): value for name, value in inputs.items()}

    def _stream(
        self, model: str, inputs: Sequence[Any], outputs: Sequence[str], sent: Callable[[], None] = lambda: None
    ) -> Iterator[Any]:
        """Yields the responses that have outputs, until the final response."""
        responses: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()
        with self._grpc() as grpc:
            grpc.start_stream(lambda result, error: responses.put((result, error)))
            final = False
            try:
                sent()
                grpc.async_stream_infer(
                    model,
                    inputs,
                    outputs=[triton_grpc.InferRequestedOutput(name) for name in outputs],
                    enable_empty_final_response=True,
                )
                while not final:
                    result = self._next(responses)
                    response = result.get_response()
                    final = response.parameters["triton_final_response"].bool_param
                    if len(response.outputs):
                        yield result
            except ServerError:
                final = True
                raise
            finally:
                # Cancelling a stream that has just ended leaks its request in Triton 24.10 (no fix is known): the model
                # never unloads.
                grpc.stop_stream(cancel_requests=not final)

    def _next(self, responses: queue.Queue[tuple[Any, Exception | None]]) -> Any:
        try:
            result, error = responses.get(timeout=self.timeout)
        except queue.Empty:
            raise ResponseTimeout(f"no chunk arrived for {self.timeout:.0f} s") from None
        if error is not None:
            raise ServerError(_message(error))
        return result

    @contextmanager
    def _grpc(self) -> Iterator[Any]:
        client = triton_grpc.InferenceServerClient(_address(self.grpc_url), channel_args=_DIRECT_GRPC)
        try:
            yield client
        finally:
            client.close()


Endpoint = Callable[[Request], Response]


def _address(url: str) -> str:
    return url.removeprefix("http://").removeprefix("grpc://").rstrip("/")


def _tensors(
    module: Any, inputs: Mapping[str, Any], *, names: Mapping[str, str] | None = None, batched: bool = True
) -> list[Any]:
    """Input tensors. Scalars have shape [1, 1] and lists [1, n]; without `batched` [1] and [n]."""
    made = []
    for name, value in inputs.items():
        kind = "BOOL" if isinstance(value, bool) else _TYPES.get(name, "INT32")
        values = [value] if isinstance(value, (str, bytes, int, float)) else list(value)
        array = np.array([values], dtype=_NUMPY[kind])
        if kind == "BYTES":
            array = np.array([[v.encode() if isinstance(v, str) else v for v in values]], dtype=np.object_)
        array = array if batched else array[0]
        tensor = module.InferInput((names or {}).get(name, name), list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def _raw(one: Raw) -> Any:
    """An input tensor from bytes: tritonclient takes BF16 of no type of numpy."""
    tensor = triton_grpc.InferInput(one.name, [1, *one.shape], one.kind)
    tensor._raw_content = one.content
    return tensor


def _json(inputs: Mapping[str, Any]) -> bytes:
    """The body of a generate request. Bytes are inserted unchanged, so the body may be invalid JSON on purpose."""
    text = inputs.get("text_input")
    if not isinstance(text, bytes):
        return json.dumps(inputs).encode()
    return json.dumps({**inputs, "text_input": "@TEXT@"}).encode().replace(b"@TEXT@", text)


def _json_error(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        return body.decode("utf-8", "replace")


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except InferenceServerException as error:
        if "Deadline Exceeded" in _message(error):
            raise ResponseTimeout(_message(error)) from None
        raise ServerError(_message(error)) from None
    except (TimeoutError, OSError) as error:
        raise ResponseTimeout(str(error)) from None


def _message(error: Exception) -> str:
    return str(error.message()) if isinstance(error, InferenceServerException) else str(error)


def _response(result: Any) -> Response:
    text = _text(result)
    return Response(text, (text,))


def _text(result: Any) -> str:
    """Decodes strictly: a truncated character is an error, not a replacement character."""
    array = result.as_numpy("text_output")
    return b"".join(array.reshape(-1).tolist()).decode("utf-8") if array is not None else ""
