"""Stands in for TensorRT-LLM's LLM class on machines without a GPU: same calls, the reference executor's answers.

What it takes and how it behaves follows NVIDIA/TensorRT-LLM: LLM's arguments configs/trtllm/llmapi.yaml, SamplingParams
tests/unittest/api_stability/references_committed/sampling_params.yaml@020a7393, generate_async llm.yaml@029c15cb beside
it; outputs hold all text so far, and stop words are left out (tensorrt_llm/executor/result.py). Greedy only.
To a prompt that begins with SAY it answers the rest of the prompt, token by token.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer

from builder import llmapi_facts
from builder.reference.model import ReferenceModel

SAY = "Say: "


class RequestError(RuntimeError):
    """tensorrt_llm.executor.RequestError: one request is wrong."""


@dataclass(kw_only=True)
class SamplingParams:
    best_of: int | None = None
    max_tokens: int = 32
    min_tokens: int | None = None
    seed: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: list[str] | None = None
    logprobs: int | None = None

    def __post_init__(self):
        if self.temperature is not None and self.temperature < 0:
            raise ValueError(f"require temperature >= 0, got temperature={self.temperature}")


@dataclass
class CompletionOutput:
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class RequestOutput:
    """What generate_async returns: it yields itself, more complete each time."""

    def __init__(self, loop):
        self.outputs, self.finished, self.aborted = [CompletionOutput()], False, threading.Event()
        self.loop, self.queue = loop, asyncio.Queue()

    def put(self, output, finished=False):
        self.loop.call_soon_threadsafe(self.queue.put_nowait, (output, finished))

    def abort(self):
        self.aborted.set()

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self.finished:
            raise StopAsyncIteration
        output, self.finished = await self.queue.get()
        if isinstance(output, Exception):
            raise output
        self.outputs = [output]
        return self


class TransformersTokenizer:
    def __init__(self, directory):
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))

    def encode(self, text):
        return self.tokenizer.encode(text).ids


class LLM:
    def __init__(self, model, tokenizer=None, **kwargs):
        facts = llmapi_facts.load("1.2.1")
        known = {name.split(".")[0] for name in facts.arguments} | {"backend"}
        for key in kwargs:
            if key not in known:
                raise ValueError(f"LLM got invalid argument: {key}")
        directory = Path(model)
        if not (directory / "hf_quant_config.json").is_file():
            raise ValueError(f"{model} is no checkpoint of ModelOpt's")
        self.args = kwargs
        self.tokenizer = TransformersTokenizer(directory)
        self._model = ReferenceModel.load(directory.parent / "tensorrt_llm")
        generation = json.loads((directory / "generation_config.json").read_text())
        ends = generation["eos_token_id"]
        self._ends = ends if isinstance(ends, list) else [ends]
        self._pool = ThreadPoolExecutor(8)
        print(f"stand-in for TensorRT-LLM: {json.dumps(kwargs)}", file=sys.stderr, flush=True)

    def generate_async(
        self, inputs, sampling_params=None, lora_request=None, prompt_adapter_request=None, streaming=False
    ):
        assert lora_request is None
        assert prompt_adapter_request is None
        result = RequestOutput(asyncio.get_running_loop())
        if sampling_params.top_p not in (None, 0) and sampling_params.top_k != 1:
            raise RequestError("the stand-in is greedy")
        self._pool.submit(self._generate, list(inputs), sampling_params, streaming, result)
        return result

    def shutdown(self):
        self._pool.shutdown()

    def _generate(self, ids, wanted, streaming, result):
        try:
            self._steps(ids, wanted, streaming, result)
        except Exception as error:
            result.put(error, finished=True)

    def _steps(self, ids, wanted, streaming, result):
        stops = {
            word: self.tokenizer.tokenizer.encode(word, add_special_tokens=False).ids for word in wanted.stop or ()
        }
        cache, step, said, logprob = self._model.new_cache(), ids, [], 0.0
        reason, stopped_by = "length", None
        prompt = self.tokenizer.tokenizer.decode(ids)
        forced = self.tokenizer.encode(prompt.removeprefix(SAY)) if prompt.startswith(SAY) else []
        for n in range(wanted.max_tokens):
            if result.aborted.is_set():
                print(f"stand-in: aborted after {n} of {wanted.max_tokens} tokens", file=sys.stderr, flush=True)
                reason = "cancelled"
                break
            logits = self._model.forward(torch.tensor(step), cache)[-1]
            if n < (wanted.min_tokens or 0):
                logits[self._ends] = -torch.inf
            token = forced[n] if n < len(forced) else int(logits.argmax())
            if token in self._ends:
                reason = "stop"
                break
            logprob += float(logits.log_softmax(-1)[token])
            said, step = [*said, token], [token]
            stopped_by = next((word for word, tokens in stops.items() if said[-len(tokens) :] == tokens), None)
            if stopped_by is not None:
                reason, said = "stop", said[: -len(stops[stopped_by])]
                break
            if streaming:
                result.put(self._output(said, logprob, None, None))
        result.put(self._output(said, logprob, reason, stopped_by), finished=True)

    def _output(self, said, logprob, reason, stopped_by):
        text = self.tokenizer.tokenizer.decode(said)
        return CompletionOutput(text, said, logprob, reason, stopped_by)
