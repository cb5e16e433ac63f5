"""Triton model: text to streamed text. Calls preprocessing, then the engine, and detokenizes incrementally.

As tensorrt_llm_bls it streams; as ensemble_infer it does not. One process carries many requests, each in a thread of
its own, which waits until the answer is complete. One more thread reads the engine's responses, one sends what is
streamed, and one stops the engine for clients that are gone and ends the requests of an engine that is stuck.
It calls the engine over gRPC, at the address in BUILDER_TRITON_GRPC, and not with `exec(decoupled=True)`: with several
threads that can hang the process for ever. ResponseIterator::Next waits for the GIL while it holds the lock of its
queue, the thread that delivers responses waits for this lock while it holds that of the map of iterators, and
Stub::GetResponseIterator waits for the map while it holds the GIL (python_backend r24.10, still so in f9088ff, 2026).
Needs numpy, tokenizers and tritonclient[grpc]. Triton loads each model.py by itself, so functions that several of them
need are repeated. The same file runs in NVIDIA's container and with the reference executor.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import queue
import re
import sys
import threading
import time
import traceback
import uuid
from array import array
from bisect import bisect_left
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer
from tritonclient.grpc import service_pb2, service_pb2_grpc

OWN_OUTPUTS = ("output_ids", "sequence_length")
CANCELLATION_SECONDS = 0.1  # between two looks at which clients are gone; each look costs one call per running request
STOP_SECONDS = 10.0  # for the engine to end a request that was stopped, before its stream is cancelled
ADDRESS = os.environ.get("BUILDER_TRITON_GRPC", "127.0.0.1:8001")  # by default Triton's default
# A directory in which `builder serve` looks for requests in progress before it lets Triton close its gRPC port.
REQUESTS = os.environ.get("BUILDER_REQUESTS")
CHANNEL = [
    ("grpc.enable_http_proxy", 0),  # it is this machine
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
KINDS = {"BOOL": "bool", "INT32": "int32", "INT64": "int64", "UINT64": "uint64", "FP16": "float16", "FP32": "float32"}
# numpy has no bfloat16; the bits of such an input, which lora_weights can be, are kept as uint16.
TRITON_KINDS = {"uint16": "BF16"} | {name: kind for kind, name in KINDS.items()}
# In Triton's errors for a full queue, and for a request that waited in it too long. An error within a gRPC stream has
# no code: the header triton_grpc_error adds one, but with it Triton 24.10 can crash.
BUSY = ("maximum queue size", "Request timeout expired")
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
        path = root / parameters["tokenizer_dir"] / "tokenizer.json"
        self.read(path, parameters["skip_special_tokens"] == "true")
        self.exclude_input = parameters["exclude_input_in_output"] == "true"
        self.can_stream = config.get("model_transaction_policy", {}).get("decoupled", False)
        self.engine_streams = parameters["engine_decoupled"] == "true"
        self.bfloat16 = {one["name"] for one in config["input"] if one["data_type"] == "TYPE_BF16"}
        self.maps = {key: json.loads(value) for key, value in parameters.items() if "_from_" in key}
        self.preprocessing = parameters["preprocessing_model_name"]
        self.engine_model = parameters["tensorrt_llm_model_name"]
        self.engine, self.forwarder = Engine(), Forwarder()
        self.running, self.counting = set(), threading.Lock()
        self.shown = os.open(f"{REQUESTS}/{os.getpid()}", os.O_CREAT | os.O_WRONLY) if REQUESTS else None
        threads, waiting = int(parameters["threads"]), int(parameters["max_queue_size"])
        self.most = threads + waiting if waiting else sys.maxsize
        self.queue_seconds = float(parameters["queue_timeout_seconds"]) or sys.maxsize
        self.stall_seconds = float(parameters["stall_timeout_seconds"]) or sys.maxsize
        self.pool = ThreadPoolExecutor(threads)
        self.closing = threading.Event()
        self.watcher = threading.Thread(target=self.watch)
        self.watcher.start()
        release_memory()

    def read(self, path, skip_special_tokens):
        """Keeps what is needed of the tokenizer."""
        tokenizer = Tokenizer.from_file(str(path))
        self.context = context_ids(tokenizer)
        self.vocabulary = Vocabulary(tokenizer, skip_special_tokens)
        self.incomplete_ids = incomplete_ids(tokenizer, skip_special_tokens)

    def execute(self, requests):
        for request in requests:
            answer = Answer(request, request.get_response_sender())
            with self.counting:
                accepted = len(self.running) < self.most
                if accepted:
                    self.running.add(answer)
                    self.show_running()
            if accepted:
                self.pool.submit(self.answer, answer)
            else:
                answer.fail(pb_utils.TritonError("Exceeds maximum queue size", pb_utils.TritonError.UNAVAILABLE))

    def show_running(self):
        if self.shown is not None:
            os.pwrite(self.shown, b"%6d" % len(self.running), 0)

    def finalize(self):
        self.pool.shutdown()
        self.closing.set()
        self.watcher.join()
        self.forwarder.close()
        self.engine.close()

    def watch(self):
        """Stops the engine for the requests whose clients are gone, and ends requests that are stuck. Waits for none of
        them: the others have their own time limits."""
        while not self.closing.wait(CANCELLATION_SECONDS):
            with self.counting:
                running = list(self.running)
            for answer in running:
                try:  # a problem with one request must not end the watch over the others
                    self.check_on(answer)
                except Exception:
                    traceback.print_exc()

    def check_on(self, answer):
        """Ends a request that is stuck, or stops the engine if the client is gone."""
        cancelled, generation = answer.is_cancelled(), answer.generation
        if not generation or not generation.reading:
            return
        if generation.is_stalled():
            self.stop(generation)
            generation.put(None)
        elif cancelled and self.engine_streams:
            self.stop(generation)

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
                self.show_running()

    def serve(self, answer):
        """Answers one request, streamed or not. Rejected for an invalid one."""
        request = answer.request
        inputs = {
            tensor.name(): bits(tensor) if tensor.name() in self.bfloat16 else tensor.as_numpy()
            for tensor in request.inputs()
        }
        streaming = flag(inputs, "stream")
        self.check(inputs, streaming)
        engine_inputs = self.preprocess(inputs)
        extra = [name for name in request.requested_output_names() if name != "text_output"]
        # A new id: the engine stops requests by id, and clients may reuse ids or send none.
        message = engine_request(self.engine_model, uuid.uuid4().hex, engine_inputs, [*OWN_OUTPUTS, *extra])
        answer.check_cancelled()  # while it waited, or while preprocessing ran
        if streaming:
            self.stream(answer, message)
        else:
            answer.generation = Generation(message)
            answer.generation.start(self.engine, answer.generation.received.put)
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
            model_name=self.preprocessing, inputs=tensors, requested_output_names=list(from_preprocessing.values())
        )
        response = request.exec()
        if response.has_error():
            # Preprocessing rejects invalid requests only. Triton 24.10 (no fix is known) drops the code.
            invalid(response.error().message())
        made = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        engine = {name: made[source] for name, source in from_preprocessing.items()}
        from_request = self.maps["tensorrt_llm_from_request"]
        return engine | {name: inputs[source] for name, source in from_request.items() if source in inputs}

    def answer_once(self, answer, context):
        """Sends the whole answer as one response."""
        answers = list(answer.generation.responses())
        answer.check_cancelled()
        if len(answers) != 1:
            invalid(f"the engine returned {len(answers)} answers to one request")
        beams, extra = read(answers[0])
        texts = [self.vocabulary.text_after(context, ids) for ids in beams]
        answer.finish(text_response(texts, extra))

    def stream(self, answer, message):
        """Sends new text as the engine generates it."""
        limits = (self.queue_seconds + self.stall_seconds, self.stall_seconds)
        answer.generation = Generation(message, limits)
        text = Detokenizer(self.vocabulary, self.incomplete_ids, self.context)
        stream = Stream(answer, text)
        answer.generation.start(self.engine, lambda response: self.forwarder.put(stream, response))
        sent = stream.ended.result()
        answer.check_cancelled()
        rest = text.rest()
        # A client must get at least one response, even if the model ends immediately.
        answer.finish(text_response([rest], []) if rest or not sent else None)

    def stop(self, generation):
        """Tells the engine to end a generation, if it was not told yet."""
        if not generation.stopped:
            generation.stopped = True
            one = np.ones((1, 1), np.int32)
            inputs = {"input_ids": one, "input_lengths": one, "request_output_len": one, "stop": np.array([[True]])}
            message = engine_request(self.engine_model, generation.message.id, inputs, OWN_OUTPUTS)
            self.engine.stop(message, generation.reading)


class Engine:
    """The connection to the engine model. One thread reads all streams: with a thread each, it takes more CPU time."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        asyncio.run_coroutine_threadsafe(self.connect(), self.loop).result()

    async def connect(self):
        self.channel = grpc.aio.insecure_channel(ADDRESS, options=CHANNEL)
        self.infer = service_pb2_grpc.GRPCInferenceServiceStub(self.channel).ModelStreamInfer

    def send(self, message, put):
        """Sends a request. `put` gets each response, and at the end None or the error. Returns the end as a future."""
        return asyncio.run_coroutine_threadsafe(self.read(message, put), self.loop)

    def stop(self, message, reading):
        """Sends a request to stop the one whose end is `reading`. Does not wait for it."""
        asyncio.run_coroutine_threadsafe(self.end(message, reading), self.loop)

    async def end(self, message, reading):
        """Repeats a request to stop another one, which the engine may not have seen yet, until that one has ended.

        Cancelling its stream at once instead can crash Triton 24.10 while responses arrive (no fix is known; see
        builder/gateway/engine.py).
        """
        deadline = time.monotonic() + STOP_SECONDS
        while not reading.done() and (left := deadline - time.monotonic()) > 0:
            await self.read(message, lambda response: None, left)
            await asyncio.wait([asyncio.wrap_future(reading)], timeout=CANCELLATION_SECONDS)
        reading.cancel()

    async def read(self, message, put, timeout=None):
        end = None
        try:
            async for response in self.infer(iter([message]), timeout=timeout):
                put(response)
        except Exception as error:
            end = error
        finally:
            put(end)

    async def disconnect(self):
        others = asyncio.all_tasks() - {asyncio.current_task()}  # that stop requests
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.channel.close()

    def close(self):
        asyncio.run_coroutine_threadsafe(self.disconnect(), self.loop).result()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


class Forwarder:
    """Sends the text of all streams, in one thread: with a thread each, most of a token's CPU time is for switching
    between them. Tokens that arrive for a stream while others are sent are sent together."""

    def __init__(self):
        self.waiting = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def put(self, stream, response):
        """Adds a response of the engine to what is to be sent. None or an exception is the last."""
        stream.received.append(response)
        if not stream.waiting:
            stream.waiting = True
            self.waiting.put(stream)

    def run(self):
        while (stream := self.waiting.get()) is not None:
            stream.waiting = False  # first: what arrives while it is forwarded must not be missed
            stream.forward()

    def close(self):
        self.waiting.put(None)
        self.thread.join()


class Stream:
    """A streamed answer. `ended`: whether something was sent, or the error that ended it."""

    def __init__(self, answer, text):
        self.answer, self.text, self.new = answer, text, ""
        self.received, self.waiting, self.ended, self.sent = deque(), False, Future(), False

    def forward(self):
        """Sends the text of all responses that were received. Does nothing after an error."""
        if self.ended.done():
            return
        try:
            try:
                is_complete = self.add_received()
            finally:
                self.send([])  # also what came before an error
        except Exception as error:  # for the request's own thread
            self.ended.set_exception(error)
        else:
            if is_complete:
                self.ended.set_result(self.sent)

    def add_received(self):
        """Whether the last response was among those received. Their text is in `new`, or sent."""
        while self.received:
            response = self.received.popleft()
            if outputs := self.answer.generation.outputs(response):
                beams, extra = read(outputs)
                self.new += self.text.add(beams[0])
                if extra:  # it belongs to this response
                    self.send(extra)
            if response is None:
                return True
        return False

    def send(self, extra):
        """Sends the new text, unless the client is gone: then the engine stops soon."""
        if (self.new or extra) and not self.answer.cancelled:
            self.answer.send(text_response([self.new], extra))
            self.sent = True
        self.new = ""


class Generation:
    """A request to the engine model.

    `limits`: how many seconds the engine may send nothing, before its first response and after it. None for a whole
    answer, which may take long and comes as one response.
    """

    def __init__(self, message, limits=()):
        self.message, self.limits = message, limits
        self.started, self.last_response, self.stalled = time.monotonic(), None, ""
        self.received, self.put, self.reading, self.stopped = queue.SimpleQueue(), None, None, False

    def start(self, engine, put):
        """Sends the request. `put` gets each response, and at the end None or the error."""
        self.put, self.reading = put, engine.send(self.message, put)

    def responses(self):
        """Yields the outputs of each response that has some, {name: array}, as they arrive. Rejected if it fails."""
        while (response := self.received.get()) is not None:
            if outputs := self.outputs(response):
                yield outputs
        self.outputs(None)

    def outputs(self, response):
        """The outputs of what was received, {name: array}. Rejected if it is an error, or if it came too late."""
        self.last_response = time.monotonic()
        if self.stalled:
            raise Rejected(pb_utils.TritonError(self.stalled, pb_utils.TritonError.UNAVAILABLE))
        if isinstance(response, grpc.RpcError):
            raise rejected(response)
        if isinstance(response, Exception):
            raise response
        if response is None:
            return {}
        if response.error_message:
            raise failed(response.error_message)
        return arrays(response.infer_response)

    def is_stalled(self):
        """Whether the engine has sent nothing for too long. Stays true."""
        if self.limits:
            limit = self.limits[self.last_response is not None]
            if time.monotonic() - (self.last_response or self.started) > limit:
                self.stalled = f"the engine sent nothing for {limit:g} seconds"
        return self.stalled


class Answer:
    """A request that is being answered. `generation` is what the engine was sent for it, if it was."""

    def __init__(self, request, sender):
        self.request, self.sender, self.generation = request, sender, None
        self.arrived, self.cancelled, self.finished = time.monotonic(), False, False
        self.lock = threading.Lock()

    def is_cancelled(self):
        """Whether the client is gone. False after the final response: asking Triton 24.10 then crashes this process
        (no fix is known)."""
        with self.lock:
            if not self.finished and not self.cancelled:
                self.cancelled = self.sender.is_cancelled()
            return self.cancelled and not self.finished

    def check_cancelled(self):
        """Rejected if the client is known to be gone."""
        if self.cancelled:
            raise Rejected(pb_utils.TritonError("the client cancelled the request", pb_utils.TritonError.CANCELLED))

    def send(self, response, flags=0):
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

    def __init__(self, vocabulary, incomplete_ids, context):
        self.vocabulary, self.incomplete_ids, self.context = vocabulary, incomplete_ids, context
        # The last ids that gave text, how many they are, their text; then those after them. The ids before a text can
        # change it.
        self.recent, self.known, self.before = list(context), len(context), vocabulary.text(context)
        self.ids, self.pending, self.returned = [], [], 0

    def add(self, ids):
        """The new text after these ids; "" if it is not complete yet."""
        self.ids += ids
        texts = []
        for id in ids:
            self.pending.append(id)
            if id not in self.incomplete_ids:
                texts.append(self.step())
        new = "".join(texts)
        self.returned += len(new)
        return new

    def step(self):
        """The text of the pending ids; "" if it ends within a character or does not continue the text before."""
        self.recent += self.pending
        self.pending = []
        text = self.vocabulary.text(self.recent)
        if text.endswith("\ufffd") or text == self.before or not text.startswith(self.before):
            return ""
        new = text[len(self.before) :]
        del self.recent[: self.known]
        self.known, self.before = len(self.recent), self.vocabulary.text(self.recent)
        return new

    def rest(self):
        """The remaining text at the end: what decoding all ids yields for a character that was never completed."""
        return self.vocabulary.text_after(self.context, self.ids)[self.returned :]


class Vocabulary:
    """What decoding needs of a tokenizer: its tokens, in 16 to 20 bytes each, and its decoder.

    The tokenizers library keeps each token in two maps (0.22 and 0.23), which takes more than 10 times as much.
    """

    def __init__(self, tokenizer, skip_special_tokens):
        added = tokenizer.get_added_tokens_decoder().values()
        self.skipped = {token.content for token in added if token.special} if skip_special_tokens else set()
        self.ids = array("I", sorted(set(tokenizer.get_vocab().values())))
        self.content, self.ends = bytearray(), array("I", [0])
        for id in self.ids:
            self.content += tokenizer.id_to_token(id).encode("utf-8")
            self.ends.append(len(self.content))
        self.decoder = tokenizer.decoder
        self.token = lru_cache(8192)(self.token)

    def token(self, id):
        """The token with this id; None if there is none or it is left out of texts."""
        index = bisect_left(self.ids, id)
        if index == len(self.ids) or self.ids[index] != id:
            return None
        token = self.content[self.ends[index] : self.ends[index + 1]].decode("utf-8")
        return None if token in self.skipped else token

    def text(self, ids):
        """The same text as the tokenizer's decode."""
        tokens = [token for token in map(self.token, ids) if token is not None]
        return self.decoder.decode(tokens) if self.decoder else " ".join(tokens)

    def text_after(self, context, ids):
        """The text of the ids as the continuation of a text, here of the context."""
        before, whole = self.text(context), self.text([*context, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.text(ids)


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


class Rejected(Exception):
    """A request that failed. `error` is the TritonError for the client."""

    def __init__(self, error):
        super().__init__(error.message())
        self.error = error


def invalid(message):
    """Rejects the request as the client's mistake."""
    raise Rejected(pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))


def bits(tensor):
    """A bfloat16 tensor of Triton as an array of uint16."""
    import torch  # clients that send adapters here with each request are rare; the gateway sends them to the engine

    return torch.from_dlpack(tensor.to_dlpack()).view(torch.int16).numpy().view(np.uint16)


def engine_request(model, request_id, inputs, outputs):
    """The protobuf message of a request to the engine. inputs: {name: array}."""
    message = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for name, value in inputs.items():
        message.inputs.add(name=name, datatype=TRITON_KINDS.get(value.dtype.name, "BYTES"), shape=value.shape)
        strings = value.dtype.hasobject
        message.raw_input_contents.append(bytes(pb_utils.serialize_byte_tensor(value)) if strings else value.tobytes())
    for name in outputs:
        message.outputs.add(name=name)
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    return message


def arrays(response):
    """The outputs of an engine's response, {name: array}."""
    made = {}
    for output, content in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.datatype == "BF16":  # logits, and numpy has no such type; engines that return them come with torch
            import torch

            made[output.name] = torch.frombuffer(bytearray(content), dtype=torch.bfloat16).reshape(*output.shape)
        else:
            made[output.name] = np.frombuffer(content, KINDS[output.datatype]).reshape(output.shape)
    return made


def rejected(error):
    """What the client gets if the engine's stream ends with this error of gRPC."""
    details = error.details() or ""
    if error.code() is grpc.StatusCode.UNAVAILABLE and "connect" in details:
        print(f"{details}; BUILDER_TRITON_GRPC is not Triton's gRPC address", file=sys.stderr, flush=True)
        message = "the engine can't be reached; see the server's log"
        return Rejected(pb_utils.TritonError(message, pb_utils.TritonError.UNAVAILABLE))
    return failed(details)


def failed(message):
    """What the client gets for this error of the engine."""
    busy = any(one in message for one in BUSY)
    code = pb_utils.TritonError.UNAVAILABLE if busy else pb_utils.TritonError.INTERNAL
    return Rejected(pb_utils.TritonError(public_message(message), code))


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


def read(outputs):
    """The token ids of each beam, and the other outputs as tensors, which the client gets unchanged."""
    ids, lengths = outputs["output_ids"], outputs["sequence_length"].reshape(-1)
    beams = [row[:length].tolist() for row, length in zip(ids.reshape(len(lengths), -1), lengths, strict=True)]
    return beams, [tensor(name, value) for name, value in outputs.items() if name not in OWN_OUTPUTS]


def tensor(name, value):
    """The Triton tensor of a numpy array or a torch tensor."""
    return pb_utils.Tensor(name, value) if isinstance(value, np.ndarray) else pb_utils.Tensor.from_dlpack(name, value)


def text_response(texts, extra):
    """A response with the text of each beam, [1, beams], and the other output tensors."""
    output = np.array([[text.encode("utf-8") for text in texts]], dtype=object)
    return pb_utils.InferenceResponse([pb_utils.Tensor("text_output", output), *extra])


def release_memory():
    """Returns memory to the system: reading a tokenizer's file takes more than twice what the tokenizer keeps."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)  # a function of glibc
