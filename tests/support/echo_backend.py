"""A stand-in for the engine in tests of serving: Triton's `tensorrtllm` backend in Python, without a model.

It repeats the prompt's token ids up to `request_output_len` tokens, and streams one token per response. Like
TensorRT-LLM, it stops at the end id and at stop words, and includes the stop word in the answer. For a prompt that
begins with "!" (token id 0 of the fixture), it waits `WAIT_SECONDS` before each token. It logs what was stopped.
For a prompt that begins with '"' (token id 1), it sends one token and then nothing. For one that begins with "#"
(token id 2), it is stuck as well: for `STUCK_SECONDS` it does not answer a request to stop it.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import triton_python_backend_utils as pb_utils

WAIT, WAIT_SECONDS, STALL, STUCK, STUCK_SECONDS = 0, 0.05, 1, 2, 6.0


class TritonPythonModel:
    def initialize(self, args):
        self.stopped, self.stuck = set(), set()

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            if "stop" in inputs and inputs["stop"].any():
                seconds = STUCK_SECONDS if request.request_id() in self.stuck else 0
                threading.Timer(seconds, self.stop, (request.request_id(), sender)).start()
            else:
                threading.Thread(target=self.answer, args=(request.request_id(), inputs, sender)).start()

    def stop(self, request_id, sender):
        self.stopped.add(request_id)
        sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def answer(self, request_id, inputs, sender):
        streaming = bool(inputs.get("streaming", np.array(False)).any())
        generated = []
        log_probs = [] if "return_log_probs" in inputs else None
        for token in self.tokens(request_id, inputs):
            generated.append(token)
            if log_probs is not None:  # TensorRT-LLM returns those of the whole answer each time
                log_probs.append(-len(generated) / 8)
            if streaming:
                sender.send(response([token], log_probs))
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        sender.send(flags=final) if streaming else sender.send(response(generated, log_probs), flags=final)

    def tokens(self, request_id, inputs):
        prompt = inputs["input_ids"][0, : inputs["input_lengths"].flat[0]].tolist()
        stop_words = words(inputs["stop_words_list"][0]) if "stop_words_list" in inputs else []
        generated = []
        for i in range(inputs["request_output_len"].flat[0]):
            token = prompt[i % len(prompt)]
            if token == inputs["end_id"].flat[0]:
                return
            if request_id in self.stopped:
                print(f"stopped after {i} tokens", flush=True)
                return
            if prompt[0] == WAIT:
                time.sleep(WAIT_SECONDS)
            if prompt[0] == STUCK:
                self.stuck.add(request_id)
            while prompt[0] in (STALL, STUCK) and i and request_id not in self.stopped:
                time.sleep(WAIT_SECONDS)
            generated.append(token)
            yield token
            if any(generated[-len(word) :] == word for word in stop_words):
                return


def words(packed):
    ends = [end for end in packed[1].tolist() if end > 0]
    return [packed[0, start:end].tolist() for start, end in zip([0, *ends], ends, strict=False)]


def response(ids, log_probs=None):
    tensors = [
        pb_utils.Tensor("output_ids", np.array([[ids]], np.int32)),
        pb_utils.Tensor("sequence_length", np.array([[len(ids)]], np.int32)),
    ]
    if log_probs is not None:
        tensors.append(pb_utils.Tensor("output_log_probs", np.array([[log_probs]], np.float32)))
    return pb_utils.InferenceResponse(tensors)
