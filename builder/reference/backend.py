"""The reference executor: a python-based Triton backend named `tensorrtllm` that runs a checkpoint on the CPU.

Its directory among Triton's backends holds a one-line model.py that imports `TritonPythonModel` from here. Inputs and
outputs are those of TensorRT-LLM's C++ backend (inflight_batcher_llm/src/model_instance_state.cc@0c8de69a), so the
rendered repository loads unchanged. Imports torch. `triton_python_backend_utils` exists only in Triton's stub process,
and its classes only from `initialize` on.
"""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builder.grammar.matching import NOT_INSTALLED, Compiler, Match
from builder.lora.cache import HOST_DEFAULT
from builder.reference.adapters import Adapter, AdapterCache, AdapterLimits
from builder.reference.request import Limits, Request, Tensors, is_stop, read
from builder.reference.sampling import RequestError
from builder.reference.scheduler import Scheduler, Sequence

THREADS = "reference_threads"  # a parameter of the model; OMP_NUM_THREADS applies without it


class TritonPythonModel:
    """One engine. `execute` queues requests for the scheduler's thread, which sends the responses if decoupled."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Loads the engine that the model's parameter gpt_model_path names. args: `model_config` as JSON, and
        `model_repository`, the model's directory."""
        import triton_python_backend_utils as pb_utils

        from builder.reference.model import ReferenceModel

        self._pb = pb_utils
        config = json.loads(args["model_config"])
        self._parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        self._decoupled = bool(config.get("model_transaction_policy", {}).get("decoupled", False))
        self._inputs = {tensor["name"]: tensor["data_type"] for tensor in config["input"]}
        self._logits_dtypes = {t["name"]: pb_utils.triton_string_to_numpy(t["data_type"]) for t in config["output"]}
        self._limit_threads()
        engine = self._engine_directory(Path(args.get("model_repository", "")))
        self._vocabulary = self._vocabulary_file(args)
        self._compiler: Compiler | None = None
        built = json.loads((engine / "config.json").read_text(encoding="utf-8"))
        self._limits = Limits.read(built, chunked_context=self._flag("enable_chunked_context", False))
        room = int(self._parameters.get("lora_cache_host_memory_bytes") or HOST_DEFAULT)
        self._adapters = AdapterCache(AdapterLimits.read(built), room)
        self._scheduler = Scheduler(ReferenceModel.load(engine), self._limits.max_batch_size, pb_utils.Logger.log_error)

    def execute(self, requests: list[Any]) -> list[Any] | None:
        """Starts the requests. Returns None immediately if decoupled, else waits for the responses of all of them."""
        replies = [Reply(self._pb, request, self._decoupled, self._logits_dtypes) for request in requests]
        for reply, request in zip(replies, requests, strict=True):
            self._start(reply, request)
        return None if self._decoupled else [reply.wait() for reply in replies]

    def finalize(self) -> None:
        """Stops the scheduler when the model is unloaded."""
        self._scheduler.close()

    def _start(self, reply: Reply, request: Any) -> None:
        """Queues the rows of a request. An invalid request gets an error response; others are not affected."""
        try:
            tensors = self._tensors(request)
            if is_stop(tensors):
                if not request.request_id():
                    raise RequestError("Trying to stop a request but request ID is not provided.")
                self._scheduler.stop(request.request_id())
                reply.send([], final=True)
                return
            reply.rows = read(
                tensors,
                self._limits,
                exclude_input=self._flag("exclude_input_in_output", False),
                normalize_log_probs=self._flag("normalize_log_probs", True),
            )
            if not self._decoupled and len(reply.rows) > 1:
                raise RequestError("A request with more than one prompt needs decoupled mode.")
            if not self._decoupled and reply.rows[0].streaming:
                raise RequestError("Streaming is only supported if the model is deployed in decoupled mode.")
            matches = [self._match(row) for row in reply.rows]
            adapters = [self._adapter(tensors, index, reply) for index in range(len(reply.rows))]
            self._scheduler.submit(
                [_sequence(row, index, reply, matches[index], adapters[index]) for index, row in enumerate(reply.rows)]
            )
        except Exception as error:  # every request gets a response
            reply.send_error(error)

    def _adapter(self, tensors: Tensors, row: int, reply: Reply) -> Adapter | None:
        """The LoRA adapter of a row, which is in use until the reply has ended."""
        taken = self._adapters.take(tensors, row)
        if taken is None:
            return None
        task, adapter = taken
        reply.at_end.append(lambda: self._adapters.release(task))
        return adapter

    def _tensors(self, request: Any) -> Tensors:
        found = ((name, self._pb.get_input_tensor_by_name(request, name)) for name in self._inputs)
        return {name: _array(tensor, self._inputs[name]) for name, tensor in found if tensor is not None}

    def _engine_directory(self, model: Path) -> Path:
        path = self._parameters.get("gpt_model_path", "")
        if not path:
            raise ValueError("the parameter gpt_model_path, the directory of the engine, is missing")
        directory: Path = model / path
        if not (directory / "config.json").is_file():
            raise ValueError(f"gpt_model_path {directory} has no config.json")
        return directory

    def _vocabulary_file(self, args: Mapping[str, str]) -> Path | None:
        """The file that guided decoding reads, as the C++ backend finds it (getGuidedDecodingConfigFromParams); None if
        the parameters do not turn it on. A relative path begins at the model's directory."""
        name: str = self._parameters.get("xgrammar_tokenizer_info_path", "")
        kind = self._parameters.get("guided_decoding_backend", "")
        if not name or not kind:
            return None
        if kind != "xgrammar":
            raise ValueError(f"guided_decoding_backend is {kind}; only xgrammar is supported")
        file = Path(str(args["model_repository"])) / name
        if not file.is_file():
            raise ValueError(f"xgrammar_tokenizer_info_path {file} does not exist")
        return file

    def _match(self, row: Request) -> Match | None:
        """The place in a row's grammar. RequestError if it can't be compiled, or this model has none."""
        if row.guide is None:
            return None
        if self._vocabulary is None:
            raise RequestError("This model has no guided decoding (guided_decoding_backend is empty).")
        try:
            if self._compiler is None:
                self._compiler = Compiler(self._vocabulary, self._limits.vocab_size)
            return self._compiler.match(row.guide)
        except ModuleNotFoundError:
            raise RequestError(f"{NOT_INSTALLED}.") from None
        except ValueError as error:
            raise RequestError(f"guided_decoding_guide can't be used: {error}") from None

    def _flag(self, name: str, default: bool) -> bool:
        value = self._parameters.get(name, "").strip().lower()
        return value in ("1", "true") if value else default

    def _limit_threads(self) -> None:
        """Uses half of the CPUs by default, because preprocessing and postprocessing need some too."""
        wanted = self._parameters.get(THREADS) or os.environ.get("OMP_NUM_THREADS") or ""
        torch.set_num_threads(int(wanted) if wanted.isdigit() and int(wanted) else max(1, (os.cpu_count() or 2) // 2))


def _array(tensor: Any, data_type: str) -> np.ndarray[Any, Any]:
    """An input as numpy has it. numpy has no bfloat16, in which adapters come: float32 then."""
    if data_type == "TYPE_BF16":
        return torch.utils.dlpack.from_dlpack(tensor.to_dlpack()).float().numpy()
    array: np.ndarray[Any, Any] = tensor.as_numpy()
    return array


def _sequence(request: Request, row: int, reply: Reply, match: Match | None, adapter: Adapter | None) -> Sequence:
    return Sequence(
        prompt=request.prompt,
        max_tokens=request.max_tokens,
        sampling=request.sampling,
        listener=reply,
        end_id=request.end_id,
        stop_words=request.stop_words,
        keep_context_logits=request.context_logits,
        keep_generation_logits=request.generation_logits,
        request_id=reply.request_id,
        row=row,
        match=match,
        adapter=adapter,
    )


class Reply:
    """Sends the responses of one request; if not decoupled, keeps the response for `wait`.

    dtypes: of the outputs, {name: numpy dtype}. rows: the request's rows, in the order of their sequences' `row`.
    at_end: called once, before the last response.
    """

    def __init__(self, pb_utils: Any, request: Any, decoupled: bool, dtypes: Mapping[str, Any]) -> None:
        self._pb, self._dtypes = pb_utils, dtypes
        self._sender: Any = request.get_response_sender() if decoupled else None
        self._cancellable: Any = self._sender or request
        self._outputs = set(request.requested_output_names())
        self._response: Any = None
        self._done = threading.Event()
        self._finished_rows: set[int] = set()
        self.request_id: str = request.request_id()
        self.rows: list[Request] = []
        self.at_end: list[Callable[[], None]] = []

    def advanced(self, sequence: Sequence) -> None:
        """Sends the newest token if the request streams, or the result of a finished row."""
        if self._done.is_set():
            return
        request = self.rows[sequence.row]
        if sequence.finish_reason:
            self._finished_rows.add(sequence.row)
        if sequence.finish_reason or request.streaming:
            outputs = arrays(request, sequence, rows=len(self.rows))
            self.send(self._tensors(outputs), final=len(self._finished_rows) == len(self.rows))

    def failed(self, sequence: Sequence, error: Exception) -> None:
        """Sends an error response, once for all rows."""
        if not self._done.is_set():
            self.send_error(error)

    def cancelled(self) -> bool:
        """Whether the client cancelled the request, or the error of another row has already ended it."""
        return self._done.is_set() or bool(self._cancellable.is_cancelled())

    def send(self, tensors: list[Any], *, final: bool, error: Any = None) -> None:
        """Sends a response, or keeps it for `wait`. final: no more follow."""
        response = self._pb.InferenceResponse(output_tensors=tensors, error=error)
        while final and self.at_end:  # first: a client may send its next request as soon as it has the response
            self.at_end.pop()()
        if self._sender is None:
            self._response = response
        elif final:
            self._sender.send(response, flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        else:
            self._sender.send(response)
        if final:
            self._done.set()

    def send_error(self, error: Exception) -> None:
        """The text of a RequestError goes to the client. Any other error is logged; the client gets its class."""
        if isinstance(error, RequestError):
            self.send([], final=True, error=self._pb.TritonError(str(error), self._pb.TritonError.INVALID_ARG))
            return
        self._pb.Logger.log_error("".join(traceback.format_exception(error)))
        text = f"The reference executor failed on this request ({type(error).__name__}). See the server's log."
        self.send([], final=True, error=self._pb.TritonError(text, self._pb.TritonError.INTERNAL))

    def wait(self) -> Any:
        """The response, once it is complete."""
        self._done.wait()
        return self._response

    def _tensors(self, outputs: Mapping[str, np.ndarray[Any, Any]]) -> list[Any]:
        return [
            self._pb.Tensor(name, array.astype(self._dtypes[name], copy=False))
            for name, array in outputs.items()
            if name in self._outputs
        ]


def arrays(request: Request, sequence: Sequence, *, rows: int) -> dict[str, np.ndarray[Any, Any]]:
    """The outputs of a response, {name: array}, batch dimension first. A streamed response has only the newest token.

    rows: of the whole request; with several of them batch_index says which one this is.
    """
    new = [] if sequence.finish_reason in ("end_id", "cancelled") else sequence.generated[-1:]
    if request.streaming:
        ids = new
    else:
        ids = [] if sequence.finish_reason == "cancelled" else sequence.generated
        ids = ids if request.exclude_input else request.prompt + ids
    out: dict[str, np.ndarray[Any, Any]] = {
        "output_ids": np.array([[ids]], dtype=np.int32).reshape(1, 1, len(ids)),
        "sequence_length": np.array([[len(ids)]], dtype=np.int32),
    }
    if rows > 1:
        out["batch_index"] = np.array([[sequence.row]], dtype=np.int32)
    if request.count_input:
        out["num_input_tokens"] = np.array([[len(request.prompt)]], dtype=np.int32)
    if request.count_output:
        out["num_output_tokens"] = np.array([[len(ids)]], dtype=np.int32)
    if request.log_probs:
        out["cum_log_probs"] = np.array([[sequence.cumulative_log_prob]], dtype=np.float32)
        out["output_log_probs"] = np.array([[sequence.log_probs]], dtype=np.float32).reshape(1, 1, -1)
    if request.context_logits and sequence.context_logits is not None:
        out["context_logits"] = sequence.context_logits.numpy()[None]
    if sequence.generation_logits:
        out["generation_logits"] = _generation_logits(request, sequence, len(new))
    return out


def _generation_logits(request: Request, sequence: Sequence, new: int) -> np.ndarray[Any, Any]:
    """[1, new, 1, vocab] if streamed, else [1, 1, max_tokens, vocab], zeros after the end, as in the C++ backend."""
    logits = torch.stack(sequence.generation_logits).numpy()
    if request.streaming:
        return logits[len(logits) - new :][None, :, None]
    padded = np.zeros((1, 1, request.max_tokens, logits.shape[1]), np.float32)
    padded[0, 0, : len(logits)] = logits
    return padded
