"""The ways to ask a served repository: HTTP infer, HTTP generate, gRPC infer, a gRPC stream; and the engine itself.

Imports tritonclient and numpy: only what talks to a server imports this file. Every call has a timeout.
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
from typing import Any

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
}  # the others are INT32


# A proxy of the environment is for the world outside: the server is addressed directly, by HTTP and by gRPC.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_DIRECT_GRPC = [
    ("grpc.enable_http_proxy", 0),
    # These two are tritonclient's own, which it leaves out where arguments are given: a prompt's logits are large.
    ("grpc.max_send_message_length", triton_grpc.MAX_GRPC_MESSAGE_SIZE),
    ("grpc.max_receive_message_length", triton_grpc.MAX_GRPC_MESSAGE_SIZE),
]


class Refused(Exception):
    """The server answered with an error: its text, as a client sees it."""


class Withheld(Exception):
    """The server answered, and left out what it was asked for."""


class Stalled(Exception):
    """No answer, or no next piece, within the timeout."""


@dataclass(frozen=True)
class Ask:
    """A request for text. `text` is bytes to send what is no UTF-8; None leaves the input out. Greedy by default."""

    text: str | bytes | None
    max_tokens: int | None = 16
    options: Mapping[str, Any] = field(default_factory=dict)

    def inputs(self, **more: Any) -> dict[str, Any]:
        given = {"text_input": self.text, "max_tokens": self.max_tokens, "top_k": 1, **self.options, **more}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Answer:
    """The text, and the pieces that it came in (one where it was not streamed)."""

    text: str
    pieces: tuple[str, ...]


@dataclass(frozen=True)
class Client:
    """One server. `models` says which model answers which way: the keys generate, infer, stream and engine.

    `names` are the repository's for inputs that it calls otherwise; without `batched` no tensor has a batch dimension.
    """

    http_url: str
    grpc_url: str
    models: Mapping[str, str]
    timeout: float
    names: Mapping[str, str] = field(default_factory=dict)
    batched: bool = True

    @classmethod
    def of(cls, http_url: str, grpc_url: str, facts: Mapping[str, Any], timeout: float) -> Client:
        """Of a server of the repository with these facts."""
        return cls(http_url, grpc_url, facts["models"], timeout, facts.get("names", {}), facts.get("batched", True))

    def ready(self, model: str | None = None) -> bool:
        """The server, or one of its models, by gRPC."""
        with self._grpc() as grpc:
            if model is None:
                return bool(grpc.is_server_live() and grpc.is_server_ready())
            return bool(grpc.is_model_ready(model))

    def http_infer(self, ask: Ask) -> Answer:
        client = triton_http.InferenceServerClient(
            _address(self.http_url), connection_timeout=self.timeout, network_timeout=self.timeout
        )
        try:
            with _errors():
                outputs = [triton_http.InferRequestedOutput("text_output")]
                result = client.infer(self.models["infer"], self._inputs(triton_http, ask), outputs=outputs)
            return _whole(result)
        finally:
            client.close()

    def http_generate(self, ask: Ask) -> Answer:
        """JSON by the standard library: tritonclient has no call for it."""
        request = urllib.request.Request(
            f"http://{_address(self.http_url)}/v2/models/{self.models['generate']}/generate",
            data=_json(self._named(ask.inputs())),
            headers={"Content-Type": "application/json"},
        )
        try:
            with _DIRECT.open(request, timeout=self.timeout) as response:
                body = json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:  # an open connection keeps the server from ending
                raise Refused(_json_error(error.read())) from None
        except (OSError, http.client.HTTPException) as error:  # also a server that ends in the middle of an answer
            raise Stalled(str(error)) from None
        # A decoupled model that fails answers 200 with an error in the body.
        if "error" in body:
            raise Refused(body["error"])
        return Answer(body["text_output"], (body["text_output"],))

    def grpc_infer(self, ask: Ask) -> Answer:
        with self._grpc() as grpc, _errors():
            outputs = [triton_grpc.InferRequestedOutput("text_output")]
            result = grpc.infer(
                self.models["infer"],
                self._inputs(triton_grpc, ask),
                outputs=outputs,
                client_timeout=self.timeout,
            )
            return _whole(result)

    def grpc_stream(self, ask: Ask) -> Answer:
        """Piece by piece. A piece that does not come in time is Stalled, not a wait for ever."""
        pieces = tuple(self.grpc_pieces(ask))
        return Answer("".join(pieces), pieces)

    def grpc_pieces(self, ask: Ask, sent: Callable[[], None] = lambda: None) -> Iterator[str]:
        """Each piece when it comes. `sent` is called when the connection stands, before the request goes out."""
        inputs = self._inputs(triton_grpc, ask, stream=True)
        for result in self._stream(self.models["stream"], inputs, ["text_output"], sent):
            yield _text(result)

    def engine(self, ids: Sequence[int], max_tokens: int) -> list[int]:
        """The tokens that the engine itself makes of these, without text around it; nothing ends it but max_tokens."""
        inputs = {"input_ids": ids, "input_lengths": len(ids), "request_output_len": max_tokens, "runtime_top_k": 1}
        streamed = {**inputs, "streaming": True, "exclude_input_in_output": True}
        results = self._stream(
            self.models["engine"], _tensors(triton_grpc, streamed), ["output_ids", "sequence_length"]
        )
        return [int(token) for result in results for token in result.as_numpy("output_ids").reshape(-1)]

    def context_logits(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        """The served model's logits at tokens of a prompt, float32 [rows, vocab]; whether each has its row the caller
        checks. Withheld if there are none. The engine answers, or where there is none the llmapi target's one model.
        """
        inputs = {"input_ids": ids, "return_context_logits": True}
        if model := self.models.get("engine"):
            inputs |= {"input_lengths": len(ids), "request_output_len": 1, "runtime_top_k": 1}
            outputs = ["output_ids", "context_logits"]
        else:
            model, inputs = self.models["generate"], {**inputs, "max_tokens": 1, "top_k": 1}
            outputs = ["text_output", "context_logits"]
        asked = _tensors(triton_grpc, inputs, names=self.names, batched=self.batched)
        with _errors():  # read to its end: a stream that is left early leaves its request behind
            answers = [r.as_numpy("context_logits") for r in self._stream(model, asked, outputs)]
        found = next((logits for logits in answers if logits is not None and logits.size), None)
        if found is None:
            raise Withheld("the answer holds no context_logits")
        # Copied in any case: what a message holds is not writable.
        logits: np.ndarray[Any, Any] = found.reshape(-1, found.shape[-1]).astype(np.float32)
        return logits

    def _inputs(self, module: Any, ask: Ask, **more: Any) -> list[Any]:
        return _tensors(module, ask.inputs(**more), names=self.names, batched=self.batched)

    def _named(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {self.names.get(name, name): value for name, value in inputs.items()}

    def _stream(
        self, model: str, inputs: Sequence[Any], outputs: Sequence[str], sent: Callable[[], None] = lambda: None
    ) -> Iterator[Any]:
        """The responses that carry outputs, up to the final one."""
        answers: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()
        with self._grpc() as grpc:
            grpc.start_stream(lambda result, error: answers.put((result, error)))
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
                    result = self._next(answers)
                    response = result.get_response()
                    final = response.parameters["triton_final_response"].bool_param
                    if len(response.outputs):
                        yield result
            except Refused:
                final = True
                raise
            finally:
                # In 24.10, cancelling a stream that just ended leaves its request behind: the model never unloads.
                grpc.stop_stream(cancel_requests=not final)

    def _next(self, answers: queue.Queue[tuple[Any, Exception | None]]) -> Any:
        try:
            result, error = answers.get(timeout=self.timeout)
        except queue.Empty:
            raise Stalled(f"the stream stood still for {self.timeout:.0f} s") from None
        if error is not None:
            raise Refused(_message(error))
        return result

    @contextmanager
    def _grpc(self) -> Iterator[Any]:
        client = triton_grpc.InferenceServerClient(_address(self.grpc_url), channel_args=_DIRECT_GRPC)
        try:
            yield client
        finally:
            client.close()


Way = Callable[[Ask], Answer]


def _address(url: str) -> str:
    return url.removeprefix("http://").removeprefix("grpc://").rstrip("/")


def _tensors(
    module: Any, inputs: Mapping[str, Any], *, names: Mapping[str, str] | None = None, batched: bool = True
) -> list[Any]:
    """Every tensor with a batch dimension of 1: scalars are [1, 1], lists [1, n]; without `batched` [1] and [n]."""
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


def _json(inputs: Mapping[str, Any]) -> bytes:
    """The body of a generate request. Bytes go in as they are, which JSON itself would not allow."""
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
            raise Stalled(_message(error)) from None
        raise Refused(_message(error)) from None
    except (TimeoutError, OSError) as error:
        raise Stalled(str(error)) from None


def _message(error: Exception) -> str:
    return str(error.message()) if isinstance(error, InferenceServerException) else str(error)


def _whole(result: Any) -> Answer:
    text = _text(result)
    return Answer(text, (text,))


def _text(result: Any) -> str:
    """Strict UTF-8: a cut character is an error here, not a replacement character."""
    array = result.as_numpy("text_output")
    return b"".join(array.reshape(-1).tolist()).decode("utf-8") if array is not None else ""
