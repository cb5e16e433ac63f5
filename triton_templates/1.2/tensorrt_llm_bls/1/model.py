"""Triton model: text to streamed text. Calls preprocessing, then the engine, and detokenizes incrementally.

As tensorrt_llm_bls it streams; as ensemble_infer it does not. One process carries many requests, each in a thread of
its own. One more thread stops the engine for clients that are gone.
Needs numpy and tokenizers. Triton loads each model.py by itself, so functions that several of them need are repeated.
The same file runs in NVIDIA's container and with the reference executor.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
import traceback
import uuid
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

OWN_OUTPUTS = ("output_ids", "sequence_length")
# The Python backend of Triton 24.10 releases a finished stream in another thread without holding the GIL. If that is
# the last reference, Python objects are freed there and the process crashes: always on Python 3.12, sometimes on 3.11
# (python_backend r24.10, Stub::SendCleanupId). So a reference is kept here for longer than the backend needs, which is
# milliseconds, or more under load.
HELD_SECONDS = 2.0
CANCELLATION_SECONDS = 0.1  # between two looks at which clients are gone; each look costs one call per running request
STOPPERS = (
    8  # requests that are stopped at the same time: each takes some milliseconds, and many clients may leave at once
)
# One thread sends at a time. With a stand-in engine in Python whose threads sent concurrently, streams of Triton 24.10
# stalled after seconds at a concurrency of 32; one after the other, they stalled after minutes. The cause is not known.
SENDING = threading.Lock()
# Source files, stack frames and the log prefix in TensorRT-LLM's C++ errors, which clients should not see.
INTERNALS = re.compile(
    r"\s*\(?(?<![\w:/])/(?:[\w.+-]+/)*[\w.+-]+(?::\d+)?\)?"
    r"|\s*\b[\w-]+\.(?:cpp|cc|cu|h|py)(?::\d+)?|\[TensorRT-LLM\](?:\[\w+\])?\s*|\b0x[0-9a-f]{6,}"
)


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        parameters = {key: v["string_value"] for key, v in config["parameters"].items()}
        root = Path(args["model_repository"]).parent
        self.name = args["model_name"]
        self.tokenizer = Tokenizer.from_file(str(root / parameters["tokenizer_dir"] / "tokenizer.json"))
        self.skip_special_tokens = parameters["skip_special_tokens"] == "true"
        self.incomplete_ids = incomplete_ids(self.tokenizer, self.skip_special_tokens)
        self.context = context_ids(self.tokenizer)
        self.exclude_input = parameters["exclude_input_in_output"] == "true"
        self.can_stream = config.get("model_transaction_policy", {}).get("decoupled", False)
        self.engine_streams = parameters["engine_decoupled"] == "true"
        self.maps = {key: json.loads(value) for key, value in parameters.items() if "_from_" in key}
        self.held, self.releasing = deque(), threading.Lock()
        self.running, self.counting = set(), threading.Lock()
        threads, waiting = int(parameters["threads"]), int(parameters["max_queue_size"])
        self.most = threads + waiting if waiting else sys.maxsize
        self.queue_seconds = float(parameters["queue_timeout_seconds"]) or sys.maxsize
        self.pool = ThreadPoolExecutor(threads)
        self.stoppers, self.closing = ThreadPoolExecutor(STOPPERS), threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()

    def execute(self, requests):
        for request in requests:
            answer = Answer(request, request.get_response_sender())
            with self.counting:
                accepted = len(self.running) < self.most
                if accepted:
                    self.running.add(answer)
            if accepted:
                self.pool.submit(self.answer, answer)
            else:
                answer.fail(pb_utils.TritonError("Exceeds maximum queue size", pb_utils.TritonError.UNAVAILABLE))

    def finalize(self):
        self.pool.shutdown()
        self.closing.set()
        self.watcher.join()
        self.stoppers.shutdown()

    def watch(self):
        """Stops the engine for the requests whose clients are gone."""
        while not self.closing.wait(CANCELLATION_SECONDS):
            with self.counting:
                running = list(self.running)
            list(self.stoppers.map(self.stop_if_cancelled, running))

    def stop_if_cancelled(self, answer):
        try:  # a problem with one request must not end the watch over the others
            if answer.is_cancelled() and answer.engine_request and self.engine_streams:
                self.stop(answer.engine_request)  # again in the next round if the engine has not seen it yet
        except Exception:
            traceback.print_exc()

    def answer(self, answer):
        """Handles a request. Always sends a final response, because the client would otherwise wait forever."""
        try:
            if time.monotonic() - answer.arrived > self.queue_seconds:
                raise Rejected(pb_utils.TritonError("Request timeout expired", pb_utils.TritonError.UNAVAILABLE))
            self.serve(answer)
        except Rejected as rejected:
            answer.fail(rejected.error)
        except pb_utils.TritonModelException as error:
            answer.fail(pb_utils.TritonError(public_message(str(error))))
        except Exception as error:
            traceback.print_exc()
            message = f"{self.name} failed: {type(error).__name__}; see the server's log"
            answer.fail(pb_utils.TritonError(message))
        finally:
            with self.counting:
                self.running.discard(answer)

    def serve(self, answer):
        """Answers one request, streamed or not. Rejected for an invalid one."""
        request = answer.request
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        streaming = flag(inputs, "stream")
        self.check(inputs, streaming)
        engine_inputs = self.preprocess(inputs)
        extra = [name for name in request.requested_output_names() if name != "text_output"]
        engine_request = pb_utils.InferenceRequest(
            model_name="tensorrt_llm",
            # A new id: the engine stops requests by id, and clients may reuse ids or send none.
            request_id=uuid.uuid4().hex,
            inputs=[pb_utils.Tensor(name, value) for name, value in engine_inputs.items()],
            requested_output_names=[*OWN_OUTPUTS, *extra],
        )
        answer.check_cancelled()  # while it waited, or while preprocessing ran
        answer.engine_request = engine_request
        if streaming:
            self.stream(answer)
        else:
            exclude = inputs.get("exclude_input_in_output")
            has_prompt = not (self.exclude_input if exclude is None else exclude.any())
            self.answer_once(answer, [] if has_prompt else self.context)

    def check(self, inputs, streaming):
        """Rejects a request without a required input, or one that cannot be streamed."""
        for name in ("text_input", "max_tokens"):
            if name not in inputs:
                invalid(f"{name} is missing")
        if streaming and not self.can_stream:
            invalid(f"{self.name} does not stream; tensorrt_llm_bls does, in a repository with decoupled: true")
        for name in ("beam_width", "num_return_sequences"):
            if streaming and name in inputs and inputs[name].max() > 1:
                invalid(f"{name} is {inputs[name].max()}; only one answer can be streamed")

    def preprocess(self, inputs):
        """The engine's inputs by name: preprocessing's outputs, and the client's other inputs."""
        tensors = [
            pb_utils.Tensor(name, inputs[source])
            for name, source in self.maps["preprocessing_from_request"].items()
            if source in inputs
        ]
        from_preprocessing = self.maps["tensorrt_llm_from_preprocessing"]
        request = pb_utils.InferenceRequest(
            model_name="preprocessing", inputs=tensors, requested_output_names=list(from_preprocessing.values())
        )
        response = request.exec()
        if response.has_error():
            # Preprocessing rejects invalid requests only. Triton 24.10 drops the error code on the way here.
            invalid(response.error().message())
        made = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        engine = {name: made[source] for name, source in from_preprocessing.items()}
        from_request = self.maps["tensorrt_llm_from_request"]
        return engine | {name: inputs[source] for name, source in from_request.items() if source in inputs}

    def engine_responses(self, request):
        """Yields the engine's responses that have outputs, as they arrive."""
        responses = request.exec(decoupled=True) if self.engine_streams else [request.exec()]
        try:
            for response in responses:
                if without_error(response).output_tensors():
                    yield response
        finally:
            self.hold(responses)

    def hold(self, responses):
        """Keeps a reference for HELD_SECONDS (see there), and releases older ones."""
        now = time.monotonic()
        self.held.append((now, responses))
        with self.releasing:
            while self.held[0][0] < now - HELD_SECONDS:
                self.held.popleft()

    def answer_once(self, answer, context):
        """Sends the whole answer as one response."""
        answers = list(self.engine_responses(answer.engine_request))
        answer.check_cancelled()
        if len(answers) != 1:
            invalid(f"the engine returned {len(answers)} answers to one request")
        beams, extra = read(answers[0])
        texts = [decode_after(self.tokenizer, context, ids, self.skip_special_tokens) for ids in beams]
        answer.finish(text_response(texts, extra))

    def stream(self, answer):
        """Sends new text as the engine generates it."""
        text = Detokenizer(self.tokenizer, self.skip_special_tokens, self.incomplete_ids, self.context)
        sent = False
        for response in self.engine_responses(answer.engine_request):
            if answer.cancelled:
                continue  # the engine stops soon
            beams, extra = read(response)
            new = text.add(beams[0])
            if new or extra:
                answer.send(text_response([new], extra))
                sent = True
        answer.check_cancelled()
        rest = text.rest()
        # A client must get at least one response, even if the model ends immediately.
        answer.finish(text_response([rest], []) if rest or not sent else None)

    def stop(self, engine_request):
        """Tells the engine to end the request with the same id. The caller still reads and drops its responses."""
        one = np.ones((1, 1), np.int32)
        inputs = {"input_ids": one, "input_lengths": one, "request_output_len": one, "stop": np.array([[True]])}
        request = pb_utils.InferenceRequest(
            model_name="tensorrt_llm",
            request_id=engine_request.request_id(),
            inputs=[pb_utils.Tensor(name, value) for name, value in inputs.items()],
            requested_output_names=list(OWN_OUTPUTS),
        )
        for _ in self.engine_responses(request):
            pass


class Answer:
    """A request that is being answered. `engine_request` is what the engine was sent for it, if it was."""

    def __init__(self, request, sender):
        self.request, self.sender, self.engine_request = request, sender, None
        self.arrived, self.cancelled, self.finished = time.monotonic(), False, False
        self.lock = threading.Lock()

    def is_cancelled(self):
        """Whether the client is gone. False after the final response: asking Triton 24.10 then crashes this process."""
        with self.lock:
            if not self.finished and not self.cancelled:
                self.cancelled = self.sender.is_cancelled()
            return self.cancelled and not self.finished

    def check_cancelled(self):
        """Rejected if the client is known to be gone."""
        if self.cancelled:
            raise Rejected(pb_utils.TritonError("the client cancelled the request", pb_utils.TritonError.CANCELLED))

    def send(self, response, flags=0):
        with SENDING:
            self.sender.send(response, flags=flags)

    def finish(self, response):
        """Sends the final response; None sends no more than the end."""
        with self.lock:
            self.finished = True
        self.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def fail(self, error):
        """Sends an error as the final response."""
        self.finish(pb_utils.InferenceResponse(error=error))


class Detokenizer:
    """Converts token ids to text incrementally. Text is returned only when later ids can no longer change it."""

    def __init__(self, tokenizer, skip_special_tokens, incomplete_ids, context):
        self.tokenizer, self.skip_special_tokens, self.incomplete_ids = tokenizer, skip_special_tokens, incomplete_ids
        self.decoder, self.context = DecodeStream(skip_special_tokens=skip_special_tokens), context
        for id in context:
            self.decoder.step(tokenizer, id)
        self.ids, self.pending, self.returned = [], [], 0

    def add(self, ids):
        """The new text after these ids; "" if it is not complete yet."""
        self.ids += ids
        texts = []
        for id in ids:
            self.pending.append(id)
            if id not in self.incomplete_ids:
                texts.append(self.decoder.step(self.tokenizer, self.pending) or "")
                self.pending = []
        new = "".join(texts)
        self.returned += len(new)
        return new

    def rest(self):
        """The remaining text at the end: what decoding all ids yields for a character that was never completed."""
        return decode_after(self.tokenizer, self.context, self.ids, self.skip_special_tokens)[self.returned :]


def incomplete_ids(tokenizer, skip_special_tokens):
    """Ids whose text depends on the ids after them.

    These are the single bytes of a byte-fallback vocabulary, which decodes a run of bytes together, and skipped special
    tokens, which do not end such a run.
    """
    ids = {id for token, id in tokenizer.get_vocab().items() if len(token) == 6 and token.startswith("<0x")}
    if skip_special_tokens:
        ids |= {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return ids


def context_ids(tokenizer):
    """The ids of an ordinary token, to decode answers after it; empty if there is none.

    At the start of a text, tokenizers like Llama 2's drop the leading space of the first token. The prompt and its
    answer would run together.
    """
    byte_ids = {id for token, id in tokenizer.get_vocab().items() if len(token) == 6 and token.startswith("<0x")}
    for text in ("a", "b", "1", "."):
        ids = tokenizer.encode(text, add_special_tokens=False).ids[-1:]
        if ids and ids[0] not in byte_ids and tokenizer.decode(ids):
            return ids
    return []


def decode_after(tokenizer, context, ids, skip_special_tokens):
    """The text of the ids as the continuation of a text, here of the context."""
    before = tokenizer.decode(context, skip_special_tokens=skip_special_tokens)
    whole = tokenizer.decode([*context, *ids], skip_special_tokens=skip_special_tokens)
    if not whole.startswith(before):
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    return whole[len(before) :]


class Rejected(Exception):
    """A request that failed. `error` is the TritonError for the client."""

    def __init__(self, error):
        super().__init__(error.message())
        self.error = error


def invalid(message):
    """Rejects the request as the client's mistake."""
    raise Rejected(pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))


def without_error(response):
    """The response; Rejected if it is an error."""
    if response.has_error():
        error = response.error()
        raise Rejected(pb_utils.TritonError(public_message(error.message()), error.code()))
    return response


def public_message(message):
    """An engine's error without the server's internals. If it had any, the whole message goes to the log."""
    first = message.strip().partition("\n")[0]
    public = INTERNALS.sub("", first).strip()
    if public == message.strip():
        return public
    print(f"The engine's error: {message}", file=sys.stderr, flush=True)
    return f"{public or 'the engine failed on this request'}; see the server's log"


def flag(inputs, name):
    """Whether a boolean input is there and true."""
    return name in inputs and bool(inputs[name].any())


def read(response):
    """The token ids of each beam, and the other output tensors, which the client gets unchanged."""
    tensors = {tensor.name(): tensor for tensor in response.output_tensors()}
    ids = tensors["output_ids"].as_numpy()
    lengths = tensors["sequence_length"].as_numpy().reshape(-1)
    beams = [row[:length].tolist() for row, length in zip(ids.reshape(len(lengths), -1), lengths, strict=True)]
    return beams, [tensor for name, tensor in tensors.items() if name not in OWN_OUTPUTS]


def text_response(texts, extra):
    """A response with the text of each beam, [1, beams], and the other output tensors."""
    output = np.array([[text.encode("utf-8") for text in texts]], dtype=object)
    return pb_utils.InferenceResponse([pb_utils.Tensor("text_output", output), *extra])
