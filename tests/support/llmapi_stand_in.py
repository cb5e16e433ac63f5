"""Stands in for TensorRT-LLM's LLM class on machines without a GPU: same calls, the reference executor's answers.

What it takes and how it behaves follows NVIDIA/TensorRT-LLM: LLM's arguments configs/trtllm/llmapi.yaml, SamplingParams
tests/unittest/api_stability/references_committed/sampling_params.yaml@020a7393, generate_async llm.yaml@029c15cb beside
it; outputs hold all text so far, and stop words are left out (tensorrt_llm/executor/result.py). Greedy only.
context_logits are float32 [tokens, vocab] (_torch/modules/logits_processor.py, _torch/pyexecutor/llm_request.py),
without those of a prefix that an earlier request of the same cache_salt left in the KV cache (handle_logits.py@02ed233d
beside it, NVIDIA/Model-Optimizer #1577), the last token excepted, which is always computed.
To a prompt that begins with SAY it answers the rest of the prompt, token by token.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer

from builder.llmapi import versions as llmapi_versions
from builder.reference.model import ReferenceModel

SAY = "Say: "
MODULE = """# Stands in for TensorRT-LLM: tests/support/llmapi_stand_in.py
import sys
sys.path[:0] = {paths!r}
import llmapi_stand_in
from llmapi_stand_in import {llm} as LLM, SamplingParams
sys.modules |= {{name: llmapi_stand_in for name in llmapi_stand_in.MODULES}}
"""
SHOWN = ("OMPI_", "PMIX_", "PMI_", "TRTLLM_", "BUILDER_", "PYTHONPATH")  # variables in the log
# Where model.py takes more names from.
MODULES = ("tensorrt_llm.executor.request", "tensorrt_llm.llmapi.llm_utils", "tensorrt_llm.llmapi")


def put_stand_in(models: Path, llm: str = "LLM") -> None:
    """Puts the stand-in beside model.py, where the stub looks first. `llm`: the class of this file to use."""
    here = Path(__file__).parent
    code = MODULE.format(paths=[str(here), str(here.parents[1])], llm=llm)
    (models / "tensorrt_llm" / "1" / "tensorrt_llm.py").write_text(code)


def render_with_stand_in(patch) -> None:
    """Puts the stand-in beside each model that is rendered while this pytest.MonkeyPatch lasts."""
    from builder.llmapi import repository  # here, because Triton's stub loads this file

    rendering = repository.write

    def with_stand_in(models: Path, *rest):
        facts = rendering(models, *rest)
        put_stand_in(models)
        return facts

    patch.setattr(repository, "write", with_stand_in)


class Built(dict):
    """An object of one of the configuration classes."""


def update_llm_args_with_extra_dict(llm_args, llm_args_dict, extra_llm_api_options=None):
    """tensorrt_llm/llmapi/llm_args.py: makes objects of mappings that the class of 2025 does not take."""
    made = {name: Built(llm_args_dict[name]) for name in ("speculative_config", "lora_config") if name in llm_args_dict}
    return {**llm_args, **llm_args_dict, **made}


@dataclass
class LoRARequest:
    """tensorrt_llm.executor.request.LoRARequest."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    lora_ckpt_source: str = "hf"

    def __post_init__(self):
        if not Path(self.lora_path).exists():
            raise ValueError(f"lora_path ({self.lora_path}) does not exist.")


class RequestError(RuntimeError):
    """tensorrt_llm.executor.RequestError: one request is wrong."""


@dataclass(kw_only=True)
class GuidedDecodingParams:
    """tensorrt_llm/sampling_params.py@000a01de."""

    json: str | None = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False


@dataclass(kw_only=True)
class SamplingParams:
    best_of: int | None = None
    max_tokens: int = 32
    min_tokens: int | None = None
    seed: int | None = None
    end_id: int | None = None
    stop_token_ids: list[int] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: list[str] | None = None
    logprobs: int | None = None
    return_context_logits: bool = False
    guided_decoding: GuidedDecodingParams | None = None

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
    """The result of generate_async: yields itself, with more tokens each time."""

    def __init__(self, loop):
        self.outputs, self.finished, self.aborted = [CompletionOutput()], False, threading.Event()
        self.context_logits = None
        self.loop, self.queue = loop, asyncio.Queue()

    def put(self, output, finished=False, context_logits=None):
        self.loop.call_soon_threadsafe(self.queue.put_nowait, (output, finished, context_logits))

    def abort(self):
        self.aborted.set()

    def __aiter__(self):
        return self

    async def __anext__(self):
        if self.finished:
            raise StopAsyncIteration
        output, self.finished, self.context_logits = await self.queue.get()
        if isinstance(output, Exception):
            raise output
        self.outputs = [output]
        return self


class TransformersTokenizer:
    def __init__(self, directory):
        self.tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))

    def encode(self, text, add_special_tokens=True, split_special_tokens=False):
        self.tokenizer.encode_special_tokens = split_special_tokens  # as transformers' fast tokenizers do
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


class LLM:
    def __init__(self, model, tokenizer=None, **kwargs):
        facts = llmapi_versions.load("1.2.1")
        known = {name.split(".")[0] for name in facts.arguments} | {"backend"}
        for key in kwargs:
            if key not in known:
                raise ValueError(f"LLM got invalid argument: {key}")
            if key in ("speculative_config", "lora_config") and not isinstance(kwargs[key], Built):
                raise ValueError(f"{key} is a mapping")
        directory = Path(model)
        if not (directory / "hf_quant_config.json").is_file():
            raise ValueError(f"{model} is no checkpoint of ModelOpt's")
        lora = kwargs.get("lora_config") or {}
        if len(lora.get("lora_dir") or [1]) > 1 and not lora.get("lora_target_modules"):
            raise AssertionError("Expecting at least one lora target module")  # as _torch/pyexecutor of 1.2
        self.args = kwargs
        self.tokenizer = TransformersTokenizer(directory)
        self._model = ReferenceModel.load(directory.parent / "tensorrt_llm")
        generation = json.loads((directory / "generation_config.json").read_text())
        ends = generation["eos_token_id"]
        self._ends = ends if isinstance(ends, list) else [ends]
        self._pool = ThreadPoolExecutor(8)
        self._reuses = kwargs.get("kv_cache_config", {}).get("enable_block_reuse", True)
        self._vocab_size = json.loads((directory / "config.json").read_text())["vocab_size"]
        self._compiler = self._made_compiler() if kwargs.get("guided_decoding_backend") == "xgrammar" else None
        self._cached = []  # (salt, token ids) of what was answered
        print(f"stand-in for TensorRT-LLM: {json.dumps(kwargs)}", file=sys.stderr, flush=True)
        environment = {name: value for name, value in os.environ.items() if name.startswith(SHOWN)}
        print(f"stand-in: environment {json.dumps(environment)}", file=sys.stderr, flush=True)

    def generate_async(
        self,
        inputs,
        sampling_params=None,
        lora_request=None,
        prompt_adapter_request=None,
        streaming=False,
        cache_salt=None,
    ):
        assert prompt_adapter_request is None
        if lora_request:
            print(f"stand-in: adapter {json.dumps(vars(lora_request))}", file=sys.stderr, flush=True)
        result = RequestOutput(asyncio.get_running_loop())
        if sampling_params.top_p not in (None, 0) and sampling_params.top_k != 1:
            raise RequestError("the stand-in is greedy")
        reused = self._reused(list(inputs), cache_salt)
        self._pool.submit(self._generate, list(inputs), sampling_params, streaming, result, reused)
        return result

    def shutdown(self):
        self._pool.shutdown()

    def _made_compiler(self):
        """As TensorRT-LLM makes it (_xgrammar_tokenizer_info; _torch/pyexecutor/grammar_matcher.py@0fccc5b9)."""
        import xgrammar

        tokenizer = self.tokenizer.tokenizer
        found = xgrammar.TokenizerInfo._detect_metadata_from_hf(tokenizer.to_str())
        listed = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
        info = xgrammar.TokenizerInfo(
            [token for token, _ in listed], vocab_type=found["vocab_type"], vocab_size=self._vocab_size,
            stop_token_ids=self._ends[:1], add_prefix_space=found["add_prefix_space"],
        )  # fmt: skip
        return xgrammar.GrammarCompiler(info)

    def _match(self, guide):
        import xgrammar

        if guide is None:
            return None
        if guide.json_object:
            compiled = self._compiler.compile_builtin_json_grammar()
        elif guide.json:
            compiled = self._compiler.compile_json_schema(guide.json)
        elif guide.regex:
            compiled = self._compiler.compile_regex(guide.regex)
        else:
            compiled = self._compiler.compile_grammar(guide.grammar)
        return xgrammar.GrammarMatcher(compiled)

    def _masked(self, match, logits):
        """The logits [vocab] without tokens that can't follow. Not after the end, as in guided_decoder.py."""
        import xgrammar

        if match is None or match.is_terminated():
            return logits
        mask = xgrammar.allocate_token_bitmask(1, len(logits))
        match.fill_next_token_bitmask(mask)
        xgrammar.apply_token_bitmask_inplace(logits[None], mask)
        return logits

    def _reused(self, ids, salt):
        """Tokens of the prompt that lie in the cache. Whole blocks or not: enable_partial_reuse is on by default."""
        found = 0
        for cached in [cached for other, cached in self._cached if other == salt and self._reuses]:
            same = [ours == theirs for ours, theirs in zip(ids, cached, strict=False)]
            found = max(found, [*same, False].index(False))
        self._cached.append((salt, ids))
        return min(found, len(ids) - 1)

    def _generate(self, ids, wanted, streaming, result, reused):
        try:
            self._steps(ids, wanted, streaming, result, reused)
        except Exception as error:
            result.put(error, finished=True)

    def _steps(self, ids, wanted, streaming, result, reused):
        stops = {
            word: self.tokenizer.tokenizer.encode(word, add_special_tokens=False).ids for word in wanted.stop or ()
        }
        cache, step, said, logprob, context = self._model.new_cache(), ids, [], 0.0, None
        reason, stopped_by = "length", None
        ends = self._ends if wanted.end_id is None else [wanted.end_id, *(wanted.stop_token_ids or ())]
        prompt = self.tokenizer.tokenizer.decode(ids)
        forced = self.tokenizer.encode(prompt.removeprefix(SAY)) if prompt.startswith(SAY) else []
        match = self._match(wanted.guided_decoding)
        for n in range(wanted.max_tokens):
            if result.aborted.is_set():
                print(f"stand-in: aborted after {n} of {wanted.max_tokens} tokens", file=sys.stderr, flush=True)
                reason = "cancelled"
                break
            every = self._model.forward(torch.tensor(step), cache)
            if n == 0 and wanted.return_context_logits:
                context = every[reused:].clone()
            logits = every[-1]
            if n < (wanted.min_tokens or 0):
                logits[ends] = -torch.inf
            logits = self._masked(match, logits)
            token = forced[n] if n < len(forced) else int(logits.argmax())
            if match and not match.is_terminated() and not match.accept_token(token):
                raise ValueError(f"failed to accept last new token: {token}")
            if token in ends:
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
        result.put(self._output(said, logprob, reason, stopped_by), finished=True, context_logits=context)

    def _output(self, said, logprob, reason, stopped_by):
        text = self.tokenizer.tokenizer.decode(said)
        return CompletionOutput(text, said, logprob, reason, stopped_by)


class WithoutLogits(LLM):
    """A version that never returns logits of a prompt."""

    def generate_async(self, inputs, sampling_params=None, **more):
        return super().generate_async(inputs, replace(sampling_params, return_context_logits=False), **more)


class WithoutSalt(LLM):
    """A version that reuses blocks of the KV cache whatever the salt."""

    def generate_async(self, inputs, sampling_params=None, cache_salt=None, **more):
        return super().generate_async(inputs, sampling_params, **more)


class OutOfMemory(LLM):
    """On a card whose memory the KV cache has: PyExecutor hands the error of a forward pass on to its requests."""

    def _steps(self, ids, wanted, streaming, result, reused):
        raise RequestError("CUDA out of memory. Tried to allocate 1.24 GiB.")


class Shifted(LLM):
    """Returns each token's logits one row too late, which the number of rows does not reveal."""

    def _steps(self, ids, wanted, streaming, result, reused):
        put = result.put
        result.put = lambda output, finished=False, context_logits=None: put(
            output, finished, None if context_logits is None else context_logits.roll(1, 0)
        )
        super()._steps(ids, wanted, streaming, result, reused)


class Stuck(LLM):
    """Sends one token of a stream and then nothing, until the request is aborted."""

    def _steps(self, ids, wanted, streaming, result, reused):
        result.put(self._output(ids[:1], 0.0, None, None))
        result.aborted.wait()
