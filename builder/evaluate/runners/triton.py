"""The runner `served`: serves the rendered repository with Triton and requests the logits of prompts over gRPC.

The figures include everything that is served: engine, kernels, KV cache. An engine must be built with
`gather_context_logits`; without it the model can't be measured. TensorRT-LLM's LLM class returns the logits to each
request that asks (`SamplingParams.return_context_logits`). Its `prompt_logprobs` are not used although they are fewer
bytes: they are computed from the same logits (sampling_params.py@a98a9061, _get_output_config), so the GPU needs no
less memory; KL can't be computed from them; and around 1.2.1 (late 2025) they cover the k likeliest tokens, but not
the text's own (executor/base_worker.py, _compute_pytorch_prompt_logprobs).
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from builder.core.errors import NotMeasurable, ServingError, out_of_memory
from builder.core.output import Output
from builder.evaluate.datasets import Ids
from builder.recipe.target_facts import target_facts
from builder.serving.client import Client, MissingOutput, Request, ResponseTimeout, ServerError
from builder.serving.server import Server, ServerOptions, serve
from builder.serving.shared_memory import SHM

CONCURRENCY = 4  # requests at the same time: the engine batches them
# One, because the PyTorch backend keeps a prompt's logits on the GPU beside those of the forward pass, in the memory
# that the KV cache leaves (_torch/pyexecutor/llm_request.py, LogitsStorage), and Triton's Python backend copies them
# through shared memory.
CONCURRENCY_LLMAPI = 1
ENVIRONMENT = {"BUILDER_CONTEXT_LOGITS": "1"}  # read by the llmapi target's model.py
MAX_MESSAGE = (1 << 31) - (1 << 20)  # bytes: gRPC lengths are int32; 1 MiB for what surrounds the tensor
ROOM = (
    "Leave memory for the logits: --set repository.kv_cache_free_gpu_mem_fraction=0.5, or cut the texts: "
    "--set evaluation.max_tokens=512"
)
GATHER = "--set engine.flags.gather_context_logits=enable"


class Served:
    """A running server. Each text is sent as a prompt and answered with its logits and one token."""

    def __init__(self, server: Server, facts: Mapping[str, Any], job: Mapping[str, Any]) -> None:
        self._server = server
        self._client = Client.for_repository(server.http_url, server.grpc_url, facts, job["timeout"])
        self._concurrency = CONCURRENCY_LLMAPI if target_facts(facts["target"]).python_model else CONCURRENCY
        self.vocab_size, self.batch_tokens = int(facts["vocab_size"]), job["batch_tokens"]

    def logits(self, batch: Sequence[Ids]) -> Iterator[Tensor]:
        for start in range(0, len(batch), self._concurrency):
            with ThreadPoolExecutor(self._concurrency) as pool:
                yield from pool.map(self._ask, batch[start : start + self._concurrency])

    def generate(self, prompt: str, max_tokens: int, options: Mapping[str, Any]) -> str:
        """The answer to a prompt; greedy unless `options` set a sampling parameter."""
        with self._answering():
            return self._client.http_generate(Request(prompt, max_tokens, options)).text

    def _ask(self, ids: Ids) -> Tensor:
        with self._answering():
            logits = self._client.context_logits(ids.tolist())
        if len(logits) != len(ids):
            raise ServingError(
                f"The server returned {len(logits)} rows of logits for a prompt of {len(ids)} tokens.",
                why="It is unknown which tokens they belong to. TensorRT-LLM omits the logits of a prefix that is in "
                "the KV cache.",
                hint="Serve without reuse: --set repository.enable_kv_cache_reuse=false",
            )
        return torch.from_numpy(logits[:, : self.vocab_size])  # an engine of several ranks pads the vocabulary

    def _ended(self) -> int | None:
        """The server's exit code, None while it runs; waits up to a second for one that is exiting."""
        with suppress(subprocess.TimeoutExpired):
            return self._server.child.wait(1)
        return None

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except MissingOutput as error:
            raise NotMeasurable(
                "The served model returns no prompt logits, so the likelihood of a text can't be measured.",
                why=str(error),
                hint="Measure the checkpoint that it loads: --runner checkpoint",
            ) from None
        except (ServerError, ResponseTimeout) as error:
            code = self._ended()
            room = f"{ROOM}\n" if out_of_memory(error) else ""
            raise ServingError(
                "The server exited during the measurement." if code is not None else "The server did not answer.",
                why=str(error),
                hint=f"{room}Run the same command again: finished data sets and tasks are kept. "
                f"The server's log: {self._server.log}",
            ) from None


@contextmanager
def served(job: Mapping[str, Any]) -> Iterator[Served]:
    """Serves the repository during the measurement. NotMeasurable if the job needs logits and can't get them."""
    facts = job["facts"]
    if job["logits"]:
        check(facts, job["gathers"], job["lengths"]["max_tokens"], free=shutil.disk_usage(SHM).free)
    log, options = Path(job["server_log"]), ServerOptions(environment=ENVIRONMENT if job["logits"] else {})
    with serve(Path(job["models"]), out=Output("quiet"), log=log, options=options) as server:
        yield Served(server, facts, job)


def check(facts: Mapping[str, Any], gathers: bool, max_tokens: int, *, free: int) -> None:
    """NotMeasurable if a served model can't return the logits, before it is started.

    gathers: whether the engine returns prompt logits. max_tokens: of the longest text. free: bytes of shared memory.
    """
    if not gathers:
        raise NotMeasurable(
            "The served engine returns no prompt logits, so the likelihood of a text can't be measured.",
            why="It was built without gather_context_logits, which is off by default in trtllm-build.",
            hint=f"Build an engine to measure: {GATHER}. It needs more memory, and KV cache reuse is off.",
        )
    size = 4 * int(facts["vocab_size"])
    if max_tokens * size > MAX_MESSAGE:
        raise NotMeasurable(
            f"The logits of {max_tokens} tokens do not fit into one gRPC message.",
            why=f"{max_tokens} x {facts['vocab_size']} float32 numbers are more than 2^31 bytes.",
            hint=f"Cut the texts: --set evaluation.max_tokens={MAX_MESSAGE // size}",
        )
    through_shm = target_facts(facts["target"]).python_model
    if through_shm and max_tokens * size > free // 2:  # half: what was sent may not be freed yet
        raise NotMeasurable(
            f"The logits of {max_tokens} tokens do not fit into this machine's shared memory.",
            why=f"Triton's Python backend passes {max_tokens} x {facts['vocab_size']} float32 numbers through {SHM}, "
            f"which has {free >> 20} MiB free; half of that is usable.",
            hint="Increase it: SHM_SIZE=8gb with compose, shm-size of docker run. Or cut the texts: "
            f"--set evaluation.max_tokens={max(2, free // 2 // size)}",
        )
