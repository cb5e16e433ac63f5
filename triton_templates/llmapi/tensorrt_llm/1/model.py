"""Triton model: text to text with TensorRT-LLM's LLM class. Each streamed chunk contains only the new text.

The LLM class gets the arguments in model.yaml. All requests share one asyncio loop in its own thread. Another thread
sends the responses, so that a slow client does not delay the others. Runs in Triton's container with TensorRT-LLM.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
import traceback
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
import yaml

REPLACEMENT = "\ufffd"
SAMPLING = (
    "best_of", "temperature", "top_k", "top_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
    "max_tokens", "min_tokens", "seed",
)  # fmt: skip
PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}  # name -> neutral value
EXTRAS = {"finish_reason": np.object_, "stop_reason": np.object_, "cumulative_logprob": np.float32}
# The engine model's names of guides -> those of GuidedDecodingParams (tensorrt_llm/sampling_params.py@000a01de)
GUIDES = {"json": "json_object", "json_schema": "json", "regex": "regex", "ebnf_grammar": "grammar"}
# Clients may request a prompt's logits only if the server was started with this variable, as `builder eval` starts its
# own. If a batch contains such a request, TensorRT-LLM's forward pass returns logits for every token of every prompt,
# but counts one row for prompts that did not request them (_torch/pyexecutor/py_executor.py of late 2025,
# num_context_logits_prefix_sum). Other clients would get wrong tokens.
LOGITS = "context_logits"
LOGITS_SWITCH = "BUILDER_CONTEXT_LOGITS"
# A directory of packages that take precedence over the installed ones in this model's processes. `builder serve`
# sets it.
OVERLAY = "BUILDER_LLMAPI_OVERLAY"
# Variables that mark a process as a rank of an MPI job. With them, the LLM class would not start ranks of its own
# (triton_backend/all_models/llmapi/tensorrt_llm/1/model.py@044a90d2). MPI's settings are kept: OMPI_MCA_*, PMIX_MCA_*.
JOB = {
    "OMPI_": ("UNIVERSE_SIZE", "FIRST_RANKS", "APP_CTX_NUM_PROCS", "COMM_WORLD_SIZE", "COMM_WORLD_RANK",
              "COMM_WORLD_LOCAL_SIZE", "COMM_WORLD_LOCAL_RANK", "COMM_WORLD_NODE_RANK"),
    "PMIX_": ("RANK", "NAMESPACE", "SERVER_URI", "SERVER_URI2", "SERVER_URI21", "SERVER_URI3", "SERVER_TMPDIR",
              "SYSTEM_TMPDIR", "SECURITY_MODE", "GDS_MODULE", "BFROPS_MODULE", "PTL_MODULE", "VERSION", "HOSTNAME"),
    "PMI_": ("RANK", "SIZE", "FD", "SPAWNED", "APPNUM", "ID"),
}  # fmt: skip
JOB_PREFIXES = ("OMPI_MCA_orte_", "ORTE_")


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        parameters = {key: v["string_value"] for key, v in config["parameters"].items()}
        self.name = args["model_name"]
        self.decoupled = config.get("model_transaction_policy", {}).get("decoupled", False)
        self.exclude_input = parameters["exclude_input_in_output"] == "true"
        self.penalties = parameters["penalties"] == "true"
        self.defaults = json.loads(parameters["sampling_defaults"])
        self.skip_special_tokens = parameters["skip_special_tokens"] == "true"
        self.encoding = {"add_special_tokens": False} if parameters["add_special_tokens"] != "true" else {}
        if parameters["parse_special_tokens"] != "true":
            self.encoding["split_special_tokens"] = True  # reads them as text
        self.vocab_size = int(parameters["vocab_size"])
        self.end_ids = json.loads(parameters["end_ids"])
        self.gives_logits = os.environ.get(LOGITS_SWITCH) == "1"
        directory = Path(args["model_repository"]) / args["model_version"]
        arguments = yaml.safe_load((directory / "model.yaml").read_text(encoding="utf-8"))
        checkpoint = Path(args["model_repository"]) / arguments["model"]  # relative to this model's directory
        if checkpoint.exists():
            arguments["model"] = str(checkpoint)
        check_period = arguments.pop("triton_config").get("cancellation_check_period_ms", 100) / 1000
        self.max_input_len, self.max_seq_len = arguments["max_input_len"], arguments["max_seq_len"]
        self.lora = arguments.get("lora_config", {})
        self.guided = "guided_decoding_backend" in arguments
        prepare_environment()
        # Not at the top of the file: the import initializes CUDA and MPI, for which the environment must be prepared.
        from tensorrt_llm import LLM, SamplingParams

        self.sampling_params = SamplingParams
        self.llm = LLM(**llm_arguments(arguments))
        self.prefix = prefix_ids(self.encode)
        waiting = int(parameters["max_queue_size"])
        self.most = arguments["max_batch_size"] + waiting if waiting else sys.maxsize
        stall = float(parameters["stall_timeout_seconds"]) or sys.maxsize
        queued = float(parameters["queue_timeout_seconds"]) or sys.maxsize
        self.limits = (queued + stall, stall)  # seconds without a chunk of a stream: before the first, after it
        self.running = {}  # task -> Running
        self.sender = ThreadPoolExecutor(1)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.watching = asyncio.run_coroutine_threadsafe(self.watch(check_period), self.loop)

    def execute(self, requests):
        for request in requests:
            asyncio.run_coroutine_threadsafe(self.answer(request, request.get_response_sender()), self.loop)

    def finalize(self):
        """Stops the loop. Triton calls this when all requests have been answered."""
        self.watching.cancel()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.sender.shutdown()
        self.llm.shutdown()

    async def watch(self, period):
        """Cancels the requests whose clients are gone, every `period` seconds."""
        while True:
            await asyncio.sleep(period)
            for task, running in list(self.running.items()):
                try:
                    if running.is_stalled() or running.sender.is_cancelled():
                        task.cancel()
                except Exception:  # a problem with one request must not end the watch over the others
                    traceback.print_exc()

    async def answer(self, request, sender):
        """Handles a request. Always sends a final response, because the client would otherwise wait forever."""
        task = asyncio.current_task()
        if len(self.running) >= self.most:
            self.send_error(sender, "Exceeds maximum queue size", pb_utils.TritonError.UNAVAILABLE)
            return
        running = self.running[task] = Running(request.request_id(), sender)
        try:
            await self.serve(request, sender)
        except asyncio.CancelledError:
            if running.stalled:
                self.send_error(sender, running.stalled, pb_utils.TritonError.UNAVAILABLE)
                return
            self.send_error(sender, "the client cancelled the request", pb_utils.TritonError.CANCELLED)
        except ValueError as error:
            self.send_error(sender, str(error), pb_utils.TritonError.INVALID_ARG)
        except Exception as error:
            if type(error).__name__ == "RequestError":  # TensorRT-LLM's error for an invalid request
                self.send_error(sender, str(error), pb_utils.TritonError.INVALID_ARG)
                return
            traceback.print_exc()
            self.send_error(sender, f"{self.name} failed: {type(error).__name__}; see the server's log")
        finally:
            self.running.pop(task, None)

    async def serve(self, request, sender):
        """Answers one request, streamed or not. ValueError for an invalid one."""
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        if flag(inputs, "stop"):
            self.stop(request.request_id())
            raise asyncio.CancelledError
        streaming = flag(inputs, "streaming")
        if streaming and not self.decoupled:
            raise ValueError("this repository does not stream; one with decoupled: true does")
        prompt, ids = await asyncio.to_thread(self.prompt, inputs)
        extra = [name for name in (*EXTRAS, LOGITS) if flag(inputs, f"return_{name}")]
        if LOGITS in extra and not self.gives_logits:
            raise ValueError(f"this server returns no prompt logits: it was started without {LOGITS_SWITCH}=1")
        parameters = self.sampling_params(**self.sampling(inputs, len(ids), extra))
        exclude = flag(inputs, "sampling_param_exclude_input_from_output", self.exclude_input)
        # A prefix that is in the KV cache is not computed again and has no logits
        # (_torch/pyexecutor/handle_logits.py@02ed233d). With a unique salt, a request shares no block with others
        # (upstream tests this: tests/unittest/_torch/sampler/test_return_logits.py@f59aed07).
        options = {"cache_salt": uuid.uuid4().hex} if LOGITS in extra else {}
        options |= self.adapter(words(inputs, "lora_name"))
        if streaming:
            self.running[asyncio.current_task()].limits = self.limits
        result = self.llm.generate_async(ids, sampling_params=parameters, streaming=streaming, **options)
        try:
            await self.send(result, sender, "" if exclude else prompt, extra)
        except asyncio.CancelledError:
            result.abort()
            raise

    def prompt(self, inputs):
        """The prompt's text ("" if it was given as token ids) and its token ids. ValueError for an invalid prompt."""
        prompts = words(inputs, "text_input")
        if "input_ids" in inputs:
            prompts, ids = [""], self.input_ids(inputs, prompts)
        elif prompts is None:
            raise ValueError("text_input is missing")
        elif len(prompts) != 1 or not prompts[0]:
            raise ValueError("text_input is empty" if len(prompts) == 1 else "text_input takes one prompt per request")
        else:
            ids = without_repeated_prefix(self.encode(prompts[0]), self.prefix)
            if max(ids, default=0) >= self.vocab_size:
                raise ValueError(f"text_input has token {max(ids)}; this model knows 0 to {self.vocab_size - 1}")
        if len(ids) > self.max_input_len:
            raise ValueError(f"the prompt has {len(ids)} tokens; this model takes {self.max_input_len} (max_input_len)")
        return prompts[0], ids

    def encode(self, text):
        return list(self.llm.tokenizer.encode(text, **self.encoding))

    def input_ids(self, inputs, prompts):
        """A prompt given as token ids. ValueError for ids without an embedding, which would crash this process."""
        ids = inputs["input_ids"].reshape(-1).tolist()
        if prompts is not None:
            raise ValueError("text_input and input_ids are both given; send only one")
        if not ids:
            raise ValueError("input_ids is empty")
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"input_ids has {min(ids)} to {max(ids)}; this model knows 0 to {self.vocab_size - 1}")
        return ids

    def adapter(self, names):
        """The option for the LoRA adapter with this name, which is the name of its directory; empty without a name."""
        if not names:
            return {}
        paths = self.lora.get("lora_dir", [])
        known = [Path(path).name for path in paths]
        if len(names) != 1 or names[0] not in known:
            raise ValueError(f"lora_name is {', '.join(names)}; this model has {', '.join(known) or 'no adapters'}")
        from tensorrt_llm.executor.request import LoRARequest

        index = known.index(names[0])
        kind = [self.lora["lora_ckpt_source"]] if "lora_ckpt_source" in self.lora else []
        return {"lora_request": LoRARequest(names[0], index + 1, paths[index], *kind)}

    def sampling(self, inputs, prompt, extra):
        """The arguments of SamplingParams: the client's sampling_param_* inputs, and what extra outputs need.

        `prompt` is the prompt's length in tokens. ValueError for values that would be ignored or exceed a limit.
        """
        found = {name: scalar(inputs, f"sampling_param_{name}") for name in SAMPLING}
        found["stop"] = words(inputs, "sampling_param_stop") or None
        found = self.defaults | {name: value for name, value in found.items() if value is not None}
        if found.get("temperature") == 0 and scalar(inputs, "sampling_param_top_k") is None and self.defaults:
            found["top_k"] = 1  # greedy, whatever the defaults are
        if not self.skip_special_tokens:
            found["skip_special_tokens"] = False
        for name, neutral in PENALTIES.items():
            if not self.penalties and found.pop(name, neutral) != neutral:
                raise ValueError(f"{name} would be ignored: this version's sampler has no penalties")
        longest = self.max_seq_len - prompt
        if found.get("max_tokens", 1) < 1:
            raise ValueError(f"max_tokens is {found['max_tokens']}; it must be 1 or more")
        if found.get("max_tokens", 1) > longest:
            raise ValueError(
                f"the prompt has {prompt} tokens and max_tokens is {found['max_tokens']}, together "
                f"{prompt + found['max_tokens']}; this model takes {self.max_seq_len} (max_seq_len): "
                f"max_tokens can be {longest}"
            )
        if self.end_ids:
            # By default TensorRT-LLM stops only at the tokenizer's eos_token (SamplingParams._setup,
            # sampling_params.py@000a01de). A model with several end tokens would not stop at the others.
            found |= {"end_id": self.end_ids[0], "stop_token_ids": self.end_ids[1:] or None}
        if "cumulative_logprob" in extra:
            found["logprobs"] = 1
        if LOGITS in extra:
            found["return_context_logits"] = True
        guide = self.guide(words(inputs, "guided_decoding_guide_type"), words(inputs, "guided_decoding_guide"))
        if guide and found.get("min_tokens"):
            raise ValueError("min_tokens can't be used with a guide: a complete answer has nothing else to follow")
        return found | guide

    def guide(self, kinds, texts):
        """The argument of SamplingParams for the grammar of the answer; empty without one. ValueError for a wrong one.

        An answer's grammar is compiled where all requests are served, and one that is invalid may end that: clients
        other than the gateway, which compiles it before, must send valid ones.
        """
        if not kinds and not texts:
            return {}
        if not self.guided:
            raise ValueError("this model has no guided decoding (repository.guided_decoding)")
        if not kinds or len(kinds) != 1 or kinds[0] not in GUIDES:
            raise ValueError(f"guided_decoding_guide_type must be one of {', '.join(GUIDES)}")
        if kinds[0] != "json" and (not texts or len(texts) != 1):
            raise ValueError(f"guided_decoding_guide is missing; the type {kinds[0]} needs one")
        from tensorrt_llm.llmapi import GuidedDecodingParams

        value = True if kinds[0] == "json" else texts[0]
        return {"guided_decoding": GuidedDecodingParams(**{GUIDES[kinds[0]]: value})}

    async def send(self, result, sender, prefix, extra):
        """Sends one response, or a chunk with the new text of each step.

        If the client is slow, a chunk has the text of several steps. An incomplete character is sent with the next one.
        """
        sent, sending = "", None
        running = self.running[asyncio.current_task()]
        async for output in result:
            running.last_response = time.monotonic()
            text = prefix + output.outputs[0].text
            if not output.finished:
                text = text.rstrip(REPLACEMENT)
                if len(text) > len(sent) and (sending is None or sending.done()):
                    sending = self.sender.submit(sender.send, response(text[len(sent) :], output, ()))
                    sent = text
                continue
            last = response(text[len(sent) :], output, extra)
            if LOGITS in extra:  # large, and may not fit into shared memory: wait, so that the client gets the error
                # is_cancelled after a final response crashes Triton 24.10 (no fix is known)
                del self.running[asyncio.current_task()]
                await asyncio.wrap_future(self.finish(sender, last))
                return
            self.finish(sender, last)
            return
        raise RuntimeError("the LLM ended a request without a final output")

    def stop(self, request_id):
        """Cancels the running requests with this id."""
        if not request_id:
            raise ValueError("stop needs the id of the request to cancel")
        for task, running in list(self.running.items()):
            if running.request_id == request_id and task is not asyncio.current_task():
                task.cancel()

    def send_error(self, sender, message, *code):
        """Sends an error as the final response."""
        self.finish(sender, pb_utils.InferenceResponse(error=pb_utils.TritonError(message, *code)))

    def finish(self, sender, last):
        """Sends the final response from the sending thread; returns its future."""
        return self.sender.submit(sender.send, last, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


class Running:
    """A request in progress. limits: as for TritonPythonModel; None for a whole answer, which may take long."""

    def __init__(self, request_id, sender):
        self.request_id, self.sender, self.limits, self.stalled = request_id, sender, None, ""
        self.started, self.last_response = time.monotonic(), None

    def is_stalled(self):
        """Whether the LLM has sent nothing for too long. Stays true."""
        if self.limits:
            limit = self.limits[self.last_response is not None]
            if time.monotonic() - (self.last_response or self.started) > limit:
                self.stalled = f"the engine sent nothing for {limit:g} seconds"
        return self.stalled


def prefix_ids(encode):
    """The ids, such as that of <s>, that `encode` puts in front of every text."""
    common = []
    for ids in zip(encode(""), encode("a"), encode("b"), strict=False):
        if len(set(ids)) > 1:
            break
        common.append(ids[0])
    return common


def without_repeated_prefix(ids, prefix):
    """`ids` without a second prefix: chat templates often write <s> themselves. Calibration follows the same rule."""
    length = len(prefix)
    return ids[length:] if length and ids[length : 2 * length] == prefix else ids


def prepare_environment():
    """Prepares the environment for TensorRT-LLM's import.

    Removes the variables that mark this process as a rank, and puts the overlay's packages first.
    """
    for name in list(os.environ):
        if name in {prefix + rest for prefix, ends in JOB.items() for rest in ends} or name.startswith(JOB_PREFIXES):
            del os.environ[name]
    overlay = os.environ.get(OVERLAY)
    if overlay and os.path.isdir(overlay):
        sys.path.insert(0, overlay)
        path = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != overlay]
        os.environ["PYTHONPATH"] = os.pathsep.join([overlay, *path])  # for the ranks that the LLM class starts


def llm_arguments(arguments):
    """The arguments for the LLM class. The class of 2025 does not accept mappings for the two that are handled here."""
    if not arguments.keys() & {"speculative_config", "lora_config"}:
        return arguments
    from tensorrt_llm.llmapi.llm_utils import update_llm_args_with_extra_dict

    return update_llm_args_with_extra_dict({}, arguments)


def scalar(inputs, name):
    """An input's only value; None if it is missing. ValueError if it has several."""
    if name not in inputs:
        return None
    if inputs[name].size != 1:
        raise ValueError(f"{name} takes one value")
    return inputs[name].item()


def flag(inputs, name, default=False):
    """A boolean input, or the default if it is missing."""
    value = scalar(inputs, name)
    return default if value is None else bool(value)


def words(inputs, name):
    """An input's strings; None if it is missing. ValueError for invalid UTF-8, which Triton does not check.

    Clients send "" for no word, so it is left out, except in text_input.
    """
    if name not in inputs:
        return None
    try:
        texts = [v if isinstance(v, str) else v.decode("utf-8") for v in inputs[name].reshape(-1)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not valid UTF-8 at byte {error.start}") from None
    return texts if name == "text_input" else [text for text in texts if text]


def response(text, output, extra):
    """A response with text and the extra outputs."""
    tensors = [pb_utils.Tensor("text_output", np.array([text.encode("utf-8")], dtype=np.object_))]
    for name in extra:
        if name == LOGITS:
            tensors += logits(output)
            continue
        value = getattr(output.outputs[0], name)
        if EXTRAS[name] is np.object_:
            value = str(value).encode("utf-8")
        elif value is None:
            value = np.nan
        tensors.append(pb_utils.Tensor(name, np.array([value], dtype=EXTRAS[name])))
    return pb_utils.InferenceResponse(tensors)


def logits(output):
    """The prompt's logits as a list of one float32 tensor [tokens, vocab_size], each row for the token that follows.

    The list is empty if TensorRT-LLM returned none. The client must check for that.
    """
    found = output.context_logits
    return [] if found is None else [pb_utils.Tensor(LOGITS, found.float().cpu().numpy())]
