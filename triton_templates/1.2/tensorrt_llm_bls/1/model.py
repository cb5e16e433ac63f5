"""Triton model: text in, text out in pieces. It asks preprocessing, then the engine, and detokenizes with state.

As ensemble_infer it answers once, in many threads. As tensorrt_llm_bls it streams, one request at a time.
Needs numpy and tokenizers. Runs as it is in Triton's container and with the reference executor.
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
# The stub of Triton 24.10 forgets a finished stream in a thread of its own, without Python's lock. If it is the last to
# hold it, it frees Python objects there and crashes: at once on Python 3.12, now and then on 3.11 (python_backend
# r24.10, Stub::SendCleanupId). So each is held here for longer than the stub needs: milliseconds, more under load.
HELD_SECONDS = 2.0
# Source files, stack frames and the log's own prefix in TensorRT-LLM's C++ errors. They are the server's business.
INSIDES = re.compile(
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
        self.waiting_ids = waiting_ids(self.tokenizer, self.skip_special_tokens)
        self.context = context_ids(self.tokenizer)
        self.exclude_input = parameters["exclude_input_in_output"] == "true"
        self.can_stream = config.get("model_transaction_policy", {}).get("decoupled", False)
        self.engine_streams = parameters["engine_decoupled"] == "true"
        self.maps = {key: json.loads(value) for key, value in parameters.items() if "_from_" in key}
        self.held, self.letting_go = deque(), threading.Lock()
        threads = int(parameters["threads"])
        self.pool = ThreadPoolExecutor(threads) if threads > 1 else None

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            if self.pool:
                self.pool.submit(self.answer, request, sender)
            else:
                self.answer(request, sender)

    def finalize(self):
        if self.pool:
            self.pool.shutdown()

    def answer(self, request, sender):
        """Sends something in every case: a request without a final response would wait for ever."""
        try:
            self.serve(request, sender)
        except Refused as refused:
            refuse(sender, refused.error)
        except pb_utils.TritonModelException as error:
            refuse(sender, pb_utils.TritonError(plain(str(error))))
        except Exception as error:
            traceback.print_exc()
            message = f"{self.name} failed: {type(error).__name__}; the server's log says more"
            refuse(sender, pb_utils.TritonError(message))

    def serve(self, request, sender):
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        streaming = flag(inputs, "stream")
        self.check(inputs, streaming)
        engine_inputs = self.preprocess(inputs)
        wanted = [name for name in request.requested_output_names() if name != "text_output"]
        engine_request = pb_utils.InferenceRequest(
            model_name="tensorrt_llm",
            # Of our own: the engine stops a request by its id, and clients may use one id twice or none.
            request_id=uuid.uuid4().hex,
            inputs=[pb_utils.Tensor(name, value) for name, value in engine_inputs.items()],
            requested_output_names=[*OWN_OUTPUTS, *wanted],
        )
        if streaming:
            self.stream(engine_request, request, sender)
        else:
            exclude = inputs.get("exclude_input_in_output")
            has_prompt = not (self.exclude_input if exclude is None else exclude.any())
            self.answer_once(engine_request, sender, [] if has_prompt else self.context)

    def check(self, inputs, streaming):
        for name in ("text_input", "max_tokens"):
            if name not in inputs:
                invalid(f"{name} is missing")
        if streaming and not self.can_stream:
            invalid(f"{self.name} answers once; pieces come from tensorrt_llm_bls of a repository with decoupled: true")
        for name in ("beam_width", "num_return_sequences"):
            if streaming and name in inputs and inputs[name].max() > 1:
                invalid(f"{name} is {inputs[name].max()}; one answer at a time can be streamed")

    def preprocess(self, inputs):
        """The engine's inputs by name: what preprocessing makes of the text, and the rest of the client's."""
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
            # What preprocessing refuses is the client's to mend; Triton 24.10 loses the code on its way here.
            invalid(response.error().message())
        made = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        engine = {name: made[source] for name, source in from_preprocessing.items()}
        from_request = self.maps["tensorrt_llm_from_request"]
        return engine | {name: inputs[source] for name, source in from_request.items() if source in inputs}

    def ask(self, request):
        """The responses that hold something, as they come."""
        responses = request.exec(decoupled=True) if self.engine_streams else [request.exec()]
        try:
            for response in responses:
                if checked(response).output_tensors():
                    yield response
        finally:
            self.hold(responses)

    def hold(self, responses):
        now = time.monotonic()
        self.held.append((now, responses))
        with self.letting_go:
            while self.held[0][0] < now - HELD_SECONDS:
                self.held.popleft()

    def answer_once(self, engine_request, sender, context):
        answers = list(self.ask(engine_request))
        if len(answers) != 1:
            invalid(f"the engine gave {len(answers)} answers to one request")
        beams, others = read(answers[0])
        texts = [decode_after(self.tokenizer, context, ids, self.skip_special_tokens) for ids in beams]
        sender.send(piece(texts, others), flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def stream(self, engine_request, request, sender):
        text = Detokenizer(self.tokenizer, self.skip_special_tokens, self.waiting_ids, self.context)
        sent = stopped = False
        for response in self.ask(engine_request):
            if stopped or request.is_cancelled():
                stopped = stopped or self.stop(engine_request)
                continue
            beams, others = read(response)
            new = text.add(beams[0])
            if new or others:
                sender.send(piece([new], others))
                sent = True
        if stopped:
            refuse(sender, pb_utils.TritonError("the client cancelled the request", pb_utils.TritonError.CANCELLED))
            return
        rest = text.rest()
        # A client must see one response at least, also where the model ends at once.
        last = piece([rest], []) if rest or not sent else None
        sender.send(last, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def stop(self, engine_request):
        """Tells the engine to end the request of the same id; what it still sends is read and dropped."""
        one = np.ones((1, 1), np.int32)
        inputs = {"input_ids": one, "input_lengths": one, "request_output_len": one, "stop": np.array([[True]])}
        request = pb_utils.InferenceRequest(
            model_name="tensorrt_llm",
            request_id=engine_request.request_id(),
            inputs=[pb_utils.Tensor(name, value) for name, value in inputs.items()],
            requested_output_names=list(OWN_OUTPUTS),
        )
        for _ in self.ask(request):
            pass
        return True


class Detokenizer:
    """Token ids in, text out: nothing is given out before later ids can no longer change it."""

    def __init__(self, tokenizer, skip_special_tokens, waiting_ids, context):
        self.tokenizer, self.skip_special_tokens, self.waiting_ids = tokenizer, skip_special_tokens, waiting_ids
        self.decoder, self.context = DecodeStream(skip_special_tokens=skip_special_tokens), context
        for id in context:
            self.decoder.step(tokenizer, id)
        self.ids, self.pending, self.given = [], [], 0

    def add(self, ids):
        self.ids += ids
        pieces = []
        for id in ids:
            self.pending.append(id)
            if id not in self.waiting_ids:
                pieces.append(self.decoder.step(self.tokenizer, self.pending) or "")
                self.pending = []
        new = "".join(pieces)
        self.given += len(new)
        return new

    def rest(self):
        """What a decoding of the whole has beyond what was given out: of a character that never became complete."""
        return decode_after(self.tokenizer, self.context, self.ids, self.skip_special_tokens)[self.given :]


def waiting_ids(tokenizer, skip_special_tokens):
    """Ids whose text hangs on the ids after them: single bytes of a byte-fallback vocabulary, where a run of bytes is
    decoded as one, and special tokens, which don't end such a run when they are skipped."""
    ids = {id for token, id in tokenizer.get_vocab().items() if len(token) == 6 and token.startswith("<0x")}
    if skip_special_tokens:
        ids |= {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return ids


def context_ids(tokenizer):
    """An ordinary token, after which answers are decoded; empty where there is none.

    At the start of a text, tokenizers of the Llama 2 kind drop the space that the first token begins with, and the
    prompt and its answer would run together.
    """
    byte_ids = {id for token, id in tokenizer.get_vocab().items() if len(token) == 6 and token.startswith("<0x")}
    for text in ("a", "b", "1", "."):
        ids = tokenizer.encode(text, add_special_tokens=False).ids[-1:]
        if ids and ids[0] not in byte_ids and tokenizer.decode(ids):
            return ids
    return []


def decode_after(tokenizer, context, ids, skip_special_tokens):
    """The text of the ids as it continues a text."""
    front = tokenizer.decode(context, skip_special_tokens=skip_special_tokens)
    whole = tokenizer.decode([*context, *ids], skip_special_tokens=skip_special_tokens)
    if not whole.startswith(front):
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    return whole[len(front) :]


class Refused(Exception):
    def __init__(self, error):
        super().__init__(error.message())
        self.error = error


def invalid(message):
    raise Refused(pb_utils.TritonError(message, pb_utils.TritonError.INVALID_ARG))


def checked(response):
    if response.has_error():
        error = response.error()
        raise Refused(pb_utils.TritonError(plain(error.message()), error.code()))
    return response


def plain(message):
    """An engine's error without the insides of the server, which go to its log."""
    first = message.strip().partition("\n")[0]
    said = INSIDES.sub("", first).strip()
    if said == message.strip():
        return said
    print(f"The engine's error: {message}", file=sys.stderr, flush=True)
    return f"{said or 'the engine failed on this request'}; the server's log says more"


def refuse(sender, error):
    final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
    sender.send(pb_utils.InferenceResponse(error=error), flags=final)


def flag(inputs, name):
    return name in inputs and bool(inputs[name].any())


def read(response):
    """The token ids of each beam, and the tensors that the client gets as they are."""
    tensors = {tensor.name(): tensor for tensor in response.output_tensors()}
    ids = tensors["output_ids"].as_numpy()
    lengths = tensors["sequence_length"].as_numpy().reshape(-1)
    beams = [row[:length].tolist() for row, length in zip(ids.reshape(len(lengths), -1), lengths, strict=True)]
    return beams, [tensor for name, tensor in tensors.items() if name not in OWN_OUTPUTS]


def piece(texts, others):
    output = np.array([[text.encode("utf-8") for text in texts]], dtype=object)
    return pb_utils.InferenceResponse([pb_utils.Tensor("text_output", output), *others])
