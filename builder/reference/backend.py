"""A python-based Triton backend named `tensorrtllm` which runs a checkpoint on the CPU: the reference executor.

Its directory in Triton's backend directory holds a model.py of one line, importing `TritonPythonModel` from here. The
contract is that of TensorRT-LLM's C++ backend (inflight_batcher_llm/src/model_instance_state.cc@0c8de69a), so the
rendered repository loads unchanged. Imports torch; `triton_python_backend_utils` exists only inside Triton's stub, and
its classes only once `initialize` is called.
"""

from __future__ import annotations

import json
import os
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from builder.reference.request import Limits, Tensors, Wish, is_stop, read
from builder.reference.sampling import RequestError
from builder.reference.scheduler import Scheduler, Sequence

THREADS = "reference_threads"  # model parameter; the environment's OMP_NUM_THREADS comes next


class TritonPythonModel:
    """One engine. `execute` hands requests to the scheduler's thread; when decoupled, it answers from there."""

    def initialize(self, args: Mapping[str, str]) -> None:
        import triton_python_backend_utils as pb_utils

        from builder.reference.model import ReferenceModel

        self._pb = pb_utils
        config = json.loads(args["model_config"])
        self._parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
        self._decoupled = bool(config.get("model_transaction_policy", {}).get("decoupled", False))
        self._inputs = [tensor["name"] for tensor in config["input"]]
        self._logits_dtypes = {t["name"]: pb_utils.triton_string_to_numpy(t["data_type"]) for t in config["output"]}
        self._limit_threads()
        engine = self._engine_directory()
        self._limits = Limits.read(
            json.loads((engine / "config.json").read_text(encoding="utf-8")),
            chunked_context=self._flag("enable_chunked_context", False),
        )
        self._scheduler = Scheduler(ReferenceModel.load(engine), self._limits.max_batch_size, pb_utils.Logger.log_error)

    def execute(self, requests: list[Any]) -> list[Any] | None:
        """Decoupled: returns None at once. Otherwise waits for the answers of the whole batch."""
        replies = [Reply(self._pb, request, self._decoupled, self._logits_dtypes) for request in requests]
        for reply, request in zip(replies, requests, strict=True):
            self._start(reply, request)
        return None if self._decoupled else [reply.wait() for reply in replies]

    def finalize(self) -> None:
        self._scheduler.close()

    def _start(self, reply: Reply, request: Any) -> None:
        """Queues the request's rows, or answers at once: an error here is this request's alone."""
        try:
            tensors = self._tensors(request)
            if is_stop(tensors):
                if not request.request_id():
                    raise RequestError("Trying to stop a request but request ID is not provided.")
                self._scheduler.stop(request.request_id())
                reply.send([], final=True)
                return
            reply.wishes = read(
                tensors,
                self._limits,
                exclude_input=self._flag("exclude_input_in_output", False),
                normalize_log_probs=self._flag("normalize_log_probs", True),
            )
            if not self._decoupled and len(reply.wishes) > 1:
                raise RequestError("A batch of more than one prompt in a request needs decoupled mode.")
            if not self._decoupled and reply.wishes[0].streaming:
                raise RequestError("Streaming is only supported if the model is deployed in decoupled mode.")
            self._scheduler.submit([_sequence(wish, row, reply) for row, wish in enumerate(reply.wishes)])
        except Exception as error:  # every request is answered, whatever is wrong with it
            reply.send_error(error)

    def _tensors(self, request: Any) -> Tensors:
        found = ((name, self._pb.get_input_tensor_by_name(request, name)) for name in self._inputs)
        return {name: tensor.as_numpy() for name, tensor in found if tensor is not None}

    def _engine_directory(self) -> Path:
        path = self._parameters.get("gpt_model_path", "")
        if not path:
            raise ValueError("the parameter gpt_model_path, the directory of the engine, is missing")
        directory = Path(path)
        if not (directory / "config.json").is_file():
            raise ValueError(f"gpt_model_path {directory} has no config.json")
        return directory

    def _flag(self, name: str, default: bool) -> bool:
        value = self._parameters.get(name, "").strip().lower()
        return value in ("1", "true") if value else default

    def _limit_threads(self) -> None:
        """Pre- and postprocessing need the CPU too: half of it is enough here."""
        wanted = self._parameters.get(THREADS) or os.environ.get("OMP_NUM_THREADS") or ""
        torch.set_num_threads(int(wanted) if wanted.isdigit() and int(wanted) else max(1, (os.cpu_count() or 2) // 2))


def _sequence(wish: Wish, row: int, reply: Reply) -> Sequence:
    return Sequence(
        prompt=wish.prompt,
        max_tokens=wish.max_tokens,
        sampling=wish.sampling,
        listener=reply,
        end_id=wish.end_id,
        stop_words=wish.stop_words,
        keep_context_logits=wish.context_logits,
        keep_generation_logits=wish.generation_logits,
        request_id=reply.request_id,
        row=row,
    )


class Reply:
    """The way back to one client: what each of its rows has become is sent, or kept for `wait` if not decoupled."""

    def __init__(self, pb_utils: Any, request: Any, decoupled: bool, dtypes: Mapping[str, Any]) -> None:
        self._pb, self._dtypes = pb_utils, dtypes
        self._sender: Any = request.get_response_sender() if decoupled else None
        self._cancellable: Any = self._sender or request
        self._outputs = set(request.requested_output_names())
        self._answer: Any = None
        self._done = threading.Event()
        self._ended_rows: set[int] = set()
        self.request_id: str = request.request_id()
        self.wishes: list[Wish] = []

    def advanced(self, sequence: Sequence) -> None:
        if self._done.is_set():
            return
        wish = self.wishes[sequence.row]
        if sequence.ending:
            self._ended_rows.add(sequence.row)
        if sequence.ending or wish.streaming:
            outputs = arrays(wish, sequence, rows=len(self.wishes))
            self.send(self._tensors(outputs), final=len(self._ended_rows) == len(self.wishes))

    def failed(self, sequence: Sequence, error: Exception) -> None:
        if not self._done.is_set():
            self.send_error(error)

    def gone(self) -> bool:
        """The client has left, or another row's error has already answered it."""
        return self._done.is_set() or bool(self._cancellable.is_cancelled())

    def send(self, tensors: list[Any], *, final: bool, error: Any = None) -> None:
        response = self._pb.InferenceResponse(output_tensors=tensors, error=error)
        if self._sender is None:
            self._answer = response
        elif final:
            self._sender.send(response, flags=self._pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        else:
            self._sender.send(response)
        if final:
            self._done.set()

    def send_error(self, error: Exception) -> None:
        """A wrong request gets its reason. A bug of ours goes to the server's log; the client learns its kind."""
        if isinstance(error, RequestError):
            self.send([], final=True, error=self._pb.TritonError(str(error), self._pb.TritonError.INVALID_ARG))
            return
        self._pb.Logger.log_error("".join(traceback.format_exception(error)))
        text = f"The reference executor failed on this request ({type(error).__name__}); the server's log tells more."
        self.send([], final=True, error=self._pb.TritonError(text, self._pb.TritonError.INTERNAL))

    def wait(self) -> Any:
        self._done.wait()
        return self._answer

    def _tensors(self, outputs: Mapping[str, np.ndarray[Any, Any]]) -> list[Any]:
        return [
            self._pb.Tensor(name, array.astype(self._dtypes[name], copy=False))
            for name, array in outputs.items()
            if name in self._outputs
        ]


def arrays(wish: Wish, sequence: Sequence, *, rows: int) -> dict[str, np.ndarray[Any, Any]]:
    """The output tensors of one response, batch dimension first. A streamed one holds only the newest token."""
    new = [] if sequence.ending in ("end_id", "cancelled") else sequence.generated[-1:]
    if wish.streaming:
        ids = new
    else:
        ids = [] if sequence.ending == "cancelled" else sequence.generated
        ids = ids if wish.exclude_input else wish.prompt + ids
    out: dict[str, np.ndarray[Any, Any]] = {
        "output_ids": np.array([[ids]], dtype=np.int32).reshape(1, 1, len(ids)),
        "sequence_length": np.array([[len(ids)]], dtype=np.int32),
    }
    if rows > 1:
        out["batch_index"] = np.array([[sequence.row]], dtype=np.int32)
    if wish.count_input:
        out["num_input_tokens"] = np.array([[len(wish.prompt)]], dtype=np.int32)
    if wish.count_output:
        out["num_output_tokens"] = np.array([[len(ids)]], dtype=np.int32)
    if wish.log_probs:
        out["cum_log_probs"] = np.array([[sequence.cumulative_log_prob]], dtype=np.float32)
        out["output_log_probs"] = np.array([[sequence.log_probs]], dtype=np.float32).reshape(1, 1, -1)
    if wish.context_logits and sequence.context_logits is not None:
        out["context_logits"] = sequence.context_logits.numpy()[None]
    if sequence.generation_logits:
        out["generation_logits"] = _generation_logits(wish, sequence, len(new))
    return out


def _generation_logits(wish: Wish, sequence: Sequence, new: int) -> np.ndarray[Any, Any]:
    """Streamed [1, new, 1, vocab]; else [1, 1, max_tokens, vocab], zeros after the end, as in the C++ backend."""
    logits = torch.stack(sequence.generation_logits).numpy()
    if wish.streaming:
        return logits[len(logits) - new :][None, :, None]
    padded = np.zeros((1, 1, wish.max_tokens, logits.shape[1]), np.float32)
    padded[0, 0, : len(logits)] = logits
    return padded
