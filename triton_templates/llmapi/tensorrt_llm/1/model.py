"""Triton model: text in, text out by TensorRT-LLM's LLM class. Streamed pieces are what is new, not all so far.

The class gets what model.yaml holds. One asyncio loop in a thread of its own carries all requests; responses leave by
another thread, so that a slow client keeps no other waiting. Runs in Triton's container with TensorRT-LLM.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
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
PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}  # and what has no effect
EXTRAS = {"finish_reason": np.object_, "stop_reason": np.object_, "cumulative_logprob": np.float32}
# Whoever starts the server says whether clients may have a prompt's logits; `builder eval` does, of its own server.
# In a batch that holds such a request TensorRT-LLM's forward pass returns logits of every token of every prompt, and
# counts one row for a prompt that did not ask (_torch/pyexecutor/py_executor.py of late 2025,
# num_context_logits_prefix_sum): others would get wrong tokens.
LOGITS = "context_logits"
LOGITS_SWITCH = "BUILDER_CONTEXT_LOGITS"
# A directory of packages that this model's processes take before the installed ones: `builder serve` sets it.
OVERLAY = "BUILDER_LLMAPI_OVERLAY"
# What tells a process that it is a rank of some MPI job: with it the LLM class starts no ranks of its own
# (triton_backend/all_models/llmapi/tensorrt_llm/1/model.py@044a90d2). MPI's own settings stay: OMPI_MCA_*, PMIX_MCA_*.
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
        self.vocab_size = int(parameters["vocab_size"])
        self.end_ids = json.loads(parameters["end_ids"])
        self.gives_logits = os.environ.get(LOGITS_SWITCH) == "1"
        directory = Path(args["model_repository"]) / args["model_version"]
        arguments = yaml.safe_load((directory / "model.yaml").read_text(encoding="utf-8"))
        check_period = arguments.pop("triton_config").get("cancellation_check_period_ms", 100) / 1000
        self.max_input_len, self.max_seq_len = arguments["max_input_len"], arguments["max_seq_len"]
        self.lora = arguments.get("lora_config", {})
        prepare_environment()
        # Here and not above: importing it starts CUDA and MPI.
        from tensorrt_llm import LLM, SamplingParams

        self.sampling_params = SamplingParams
        self.llm = LLM(**built(arguments))
        self.front = added_in_front(self.llm.tokenizer.encode)
        self.running = {}  # task -> (the client's request id, its response sender)
        self.sender = ThreadPoolExecutor(1)
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.watching = asyncio.run_coroutine_threadsafe(self.watch(check_period), self.loop)

    def execute(self, requests):
        for request in requests:
            asyncio.run_coroutine_threadsafe(self.answer(request, request.get_response_sender()), self.loop)

    def finalize(self):
        """Answers that are under way are finished first; Triton waits for them before it calls this."""
        self.watching.cancel()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.sender.shutdown()
        self.llm.shutdown()

    async def watch(self, period):
        """Ends the requests whose clients are gone."""
        while True:
            await asyncio.sleep(period)
            for task, (_, sender) in list(self.running.items()):
                try:
                    if sender.is_cancelled():
                        task.cancel()
                except Exception:  # of one request; the others' clients are watched all the same
                    traceback.print_exc()

    async def answer(self, request, sender):
        """Sends something in every case: a request without a final response would wait for ever."""
        task = asyncio.current_task()
        self.running[task] = (request.request_id(), sender)
        try:
            await self.serve(request, sender)
        except asyncio.CancelledError:
            self.refuse(sender, "the client cancelled the request", pb_utils.TritonError.CANCELLED)
        except ValueError as error:
            self.refuse(sender, str(error), pb_utils.TritonError.INVALID_ARG)
        except Exception as error:
            if type(error).__name__ == "RequestError":  # TensorRT-LLM's for one wrong request
                self.refuse(sender, str(error), pb_utils.TritonError.INVALID_ARG)
                return
            traceback.print_exc()
            self.refuse(sender, f"{self.name} failed: {type(error).__name__}; the server's log says more")
        finally:
            self.running.pop(task, None)

    async def serve(self, request, sender):
        inputs = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        if flag(inputs, "stop"):
            self.stop(request.request_id())
            raise asyncio.CancelledError
        streaming = flag(inputs, "streaming")
        if streaming and not self.decoupled:
            raise ValueError("this repository answers once; pieces come from one with decoupled: true")
        prompt, ids = await asyncio.to_thread(self.prompt, inputs)
        wanted = [name for name in (*EXTRAS, LOGITS) if flag(inputs, f"return_{name}")]
        if LOGITS in wanted and not self.gives_logits:
            raise ValueError(f"this server gives no logits of a prompt: it was started without {LOGITS_SWITCH}=1")
        parameters = self.sampling_params(**self.sampling(inputs, len(ids), wanted))
        exclude = flag(inputs, "sampling_param_exclude_input_from_output", self.exclude_input)
        # A prefix that is in the KV cache already is not computed again and has no logits
        # (_torch/pyexecutor/handle_logits.py@02ed233d). Under a salt of its own a request shares no block with another
        # (upstream's own test of it: tests/unittest/_torch/sampler/test_return_logits.py@f59aed07).
        more = {"cache_salt": uuid.uuid4().hex} if LOGITS in wanted else {}
        more |= self.adapter(words(inputs, "lora_name"))
        result = self.llm.generate_async(ids, sampling_params=parameters, streaming=streaming, **more)
        try:
            await self.send(result, sender, "" if exclude else prompt, wanted)
        except asyncio.CancelledError:
            result.abort()
            raise

    def prompt(self, inputs):
        """The text ("" for a prompt of token ids) and its token ids."""
        prompts = words(inputs, "text_input")
        if "input_ids" in inputs:
            prompts, ids = [""], self.given(inputs, prompts)
        elif prompts is None:
            raise ValueError("text_input is missing")
        elif len(prompts) != 1 or not prompts[0]:
            raise ValueError("text_input is empty" if len(prompts) == 1 else "text_input takes one prompt a request")
        else:
            ids = without_repeat(list(self.llm.tokenizer.encode(prompts[0])), self.front)
            if max(ids, default=0) >= self.vocab_size:
                raise ValueError(f"text_input makes token {max(ids)}; this model knows 0 to {self.vocab_size - 1}")
        if len(ids) > self.max_input_len:
            raise ValueError(f"the prompt has {len(ids)} tokens; this model takes {self.max_input_len} (max_input_len)")
        return prompts[0], ids

    def given(self, inputs, prompts):
        """A prompt of token ids. One that the model has no embedding for would end its process, not its request."""
        ids = inputs["input_ids"].reshape(-1).tolist()
        if prompts is not None:
            raise ValueError("text_input and input_ids are both given: one is the prompt")
        if not ids:
            raise ValueError("input_ids is empty")
        if not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise ValueError(f"input_ids holds {min(ids)} to {max(ids)}; this model knows 0 to {self.vocab_size - 1}")
        return ids

    def adapter(self, names):
        """The LoRA adapter of this name, which is its directory's; none for no name."""
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

    def sampling(self, inputs, prompt, wanted):
        """What SamplingParams takes: the client's sampling_param_* inputs, and what the answer's outputs need."""
        found = {name: scalar(inputs, f"sampling_param_{name}") for name in SAMPLING}
        found["stop"] = words(inputs, "sampling_param_stop") or None
        found = {name: value for name, value in found.items() if value is not None}
        for name, neutral in PENALTIES.items():
            if not self.penalties and found.pop(name, neutral) != neutral:
                raise ValueError(f"{name} would be ignored: this version's sampler has no penalties")
        room = self.max_seq_len - prompt
        if found.get("max_tokens", 1) < 1:
            raise ValueError(f"max_tokens is {found['max_tokens']}; it must be 1 or more")
        if found.get("max_tokens", 1) > room:
            raise ValueError(
                f"the prompt has {prompt} tokens and max_tokens is {found['max_tokens']}, together "
                f"{prompt + found['max_tokens']}; this model takes {self.max_seq_len} (max_seq_len): "
                f"max_tokens can be {room}"
            )
        if self.end_ids:
            # By itself TensorRT-LLM ends at the tokenizer's eos_token alone (SamplingParams._setup,
            # sampling_params.py@000a01de): a model with several ends would run past the others.
            found |= {"end_id": self.end_ids[0], "stop_token_ids": self.end_ids[1:] or None}
        if "cumulative_logprob" in wanted:
            found["logprobs"] = 1
        if LOGITS in wanted:
            found["return_context_logits"] = True
        return found

    async def send(self, result, sender, prefix, wanted):
        """One response, or the new text of each step; of several where responses leave more slowly than text comes.

        A character that is not whole yet waits for the next step.
        """
        given, leaving = "", None
        async for output in result:
            text = prefix + output.outputs[0].text
            if not output.finished:
                text = text.rstrip(REPLACEMENT)
                if len(text) > len(given) and (leaving is None or leaving.done()):
                    leaving = self.sender.submit(sender.send, response(text[len(given) :], output, ()))
                    given = text
                continue
            last = response(text[len(given) :], output, wanted)
            if LOGITS in wanted:  # large: shared memory may have no room for it, which its client has to hear
                del self.running[asyncio.current_task()]  # Triton dies of is_cancelled after a last response (24.10)
                await asyncio.wrap_future(self.finish(sender, last))
                return
            self.finish(sender, last)
            return
        raise RuntimeError("the LLM ended a request without its last part")

    def stop(self, request_id):
        """Ends the requests that came under this id."""
        if not request_id:
            raise ValueError("stop needs the id of the request that it shall end")
        for task, (id, _) in list(self.running.items()):
            if id == request_id and task is not asyncio.current_task():
                task.cancel()

    def refuse(self, sender, message, *code):
        self.finish(sender, pb_utils.InferenceResponse(error=pb_utils.TritonError(message, *code)))

    def finish(self, sender, last):
        return self.sender.submit(sender.send, last, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def added_in_front(encode):
    """The ids, as that of <s>, that `encode` puts in front of every text."""
    common = []
    for ids in zip(encode(""), encode("a"), encode("b"), strict=False):
        if len(set(ids)) > 1:
            break
        common.append(ids[0])
    return common


def without_repeat(ids, front):
    """A chat template has often written <s> already: it is not added a second time. Calibration does the same."""
    length = len(front)
    return ids[length:] if length and ids[length : 2 * length] == front else ids


def prepare_environment():
    """Before TensorRT-LLM is imported: this process is no rank of a job, and finds the overlay's packages first."""
    for name in list(os.environ):
        if name in {prefix + rest for prefix, ends in JOB.items() for rest in ends} or name.startswith(JOB_PREFIXES):
            del os.environ[name]
    overlay = os.environ.get(OVERLAY)
    if overlay and os.path.isdir(overlay):
        sys.path.insert(0, overlay)
        path = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != overlay]
        os.environ["PYTHONPATH"] = os.pathsep.join([overlay, *path])  # for the ranks that the class starts


def built(arguments):
    """What the LLM class takes: the class of 2025 takes no mapping for these two."""
    if not arguments.keys() & {"speculative_config", "lora_config"}:
        return arguments
    from tensorrt_llm.llmapi.llm_utils import update_llm_args_with_extra_dict

    return update_llm_args_with_extra_dict({}, arguments)


def scalar(inputs, name):
    if name not in inputs:
        return None
    if inputs[name].size != 1:
        raise ValueError(f"{name} takes one value")
    return inputs[name].item()


def flag(inputs, name, default=False):
    value = scalar(inputs, name)
    return default if value is None else bool(value)


def words(inputs, name):
    """Texts; "", which clients send for none, is left out of lists of words. Triton does not look into strings."""
    if name not in inputs:
        return None
    try:
        texts = [v if isinstance(v, str) else v.decode("utf-8") for v in inputs[name].reshape(-1)]
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not valid UTF-8 at byte {error.start}") from None
    return texts if name == "text_input" else [text for text in texts if text]


def response(text, output, wanted):
    tensors = [pb_utils.Tensor("text_output", np.array([text.encode("utf-8")], dtype=np.object_))]
    for name in wanted:
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
    """Of each token of the prompt [tokens, vocab], those of its successor. None where TensorRT-LLM gave none: whoever
    asked must tell an answer without them from a bad one."""
    found = output.context_logits
    return [] if found is None else [pb_utils.Tensor(LOGITS, found.float().cpu().numpy())]
