"""The runner `served`: the rendered repository, served by Triton, asked for the logits of its prompts over gRPC.

An engine must gather them (`gather_context_logits`): one that does not is not measurable, whatever else it answers.
TensorRT-LLM's LLM class gives them to each request that asks (`SamplingParams.return_context_logits`). Its
`prompt_logprobs` would be fewer bytes, but are made of the same logits (sampling_params.py@a98a9061,
_get_output_config), so the GPU needs no less memory; there is no KL in them; and in late 2025, around 1.2.1, they are
those of the k likeliest tokens without the text's own (executor/base_worker.py, _compute_pytorch_prompt_logprobs).
Everything that is served is in the figures: engine, kernels, KV cache.
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

from builder.core.errors import NotMeasurable, ServingError
from builder.core.output import Output
from builder.evaluate.datasets import Ids
from builder.evaluate.runners import scoring
from builder.recipe.target_facts import target_facts
from builder.serving.client import Client, MissingOutput, Request, ResponseTimeout, ServerError
from builder.serving.server import SHM, Server, ServerOptions, serve

CONCURRENCY = 4  # requests under way: the engine batches them
# The PyTorch backend keeps a prompt's logits on the GPU beside those of the forward pass, in what the KV cache leaves
# (_torch/pyexecutor/llm_request.py, LogitsStorage), and Triton's Python backend copies them through shared memory.
CONCURRENCY_LLMAPI = 1
ENVIRONMENT = {"BUILDER_CONTEXT_LOGITS": "1"}  # what the llmapi target's model.py asks for
MAX_MESSAGE = (1 << 31) - (1 << 20)  # of gRPC, whose lengths are int32; and a margin for what surrounds the tensor
ROOM = (
    "Leave the logits room: --set repository.kv_cache_free_gpu_mem_fraction=0.5, or cut the texts: "
    "--set evaluation.max_tokens=512"
)
GATHER = "--set engine.flags.gather_context_logits=enable"


class Served:
    """A server that is up. Each text is a prompt, answered by its logits and one token."""

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
        """The answer's text; greedy where `options` don't say otherwise."""
        with self._answering():
            return self._client.http_generate(Request(prompt, max_tokens, options)).text

    def _ask(self, ids: Ids) -> Tensor:
        with self._answering():
            logits = self._client.context_logits(ids.tolist())
        if len(logits) != len(ids):
            raise ServingError(
                f"The server gave {len(logits)} rows of logits for a prompt of {len(ids)} tokens.",
                why="Which tokens they are of is not known, so no figure is made of them. TensorRT-LLM leaves out "
                "those of a prefix that it finds in the KV cache.",
                hint="Serve it without: --set repository.enable_kv_cache_reuse=false",
            )
        return torch.from_numpy(logits[:, : self.vocab_size])  # beyond it an engine of several ranks pads

    def _ended(self) -> int | None:
        """The exit code of a server that is gone; one that is just dying is given a second."""
        with suppress(subprocess.TimeoutExpired):
            return self._server.child.wait(1)
        return None

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except MissingOutput as error:
            raise NotMeasurable(
                "The served model returns no logits of a prompt, so the likelihood of a text can't be had from it.",
                why=f"It was asked for them: {error}. No figure is made up for it.",
                hint="Measure what it loads: --runner checkpoint",
            ) from None
        except (ServerError, ResponseTimeout) as error:
            code = self._ended()
            room = f"{ROOM}\n" if scoring.out_of_memory(error) else ""
            raise ServingError(
                "The server ended while it was measured." if code is not None else "The server did not answer.",
                why=str(error),
                hint=f"{room}Run the same command again: data sets and tasks that were finished are kept. "
                f"The server's log: {self._server.log}",
            ) from None


@contextmanager
def served(job: Mapping[str, Any]) -> Iterator[Served]:
    """Serves the repository while it is measured. NotMeasurable if `logits` are wanted and its engine gives none."""
    facts = job["facts"]
    if job["logits"]:
        check(facts, job["gathers"], job["lengths"]["max_tokens"], free=shutil.disk_usage(SHM).free)
    log, options = Path(job["server_log"]), ServerOptions(environment=ENVIRONMENT if job["logits"] else {})
    with serve(Path(job["models"]), out=Output("quiet"), log=log, options=options) as server:
        yield Served(server, facts, job)


def check(facts: Mapping[str, Any], gathers: bool, max_tokens: int, *, free: int) -> None:
    """What makes a served model unmeasurable, known before it is started. `free` bytes of shared memory are there."""
    if not gathers:
        raise NotMeasurable(
            "The served engine returns no logits of a prompt, so the likelihood of a text can't be had from it.",
            why="It was built without gather_context_logits, trtllm-build's default. No figure is made up for it.",
            hint=f"Build an engine to measure with {GATHER}; it needs more memory, and KV cache reuse is off.",
        )
    size = 4 * int(facts["vocab_size"])
    if max_tokens * size > MAX_MESSAGE:
        raise NotMeasurable(
            f"The logits of {max_tokens} tokens do not fit into one answer of gRPC.",
            why=f"{max_tokens} x {facts['vocab_size']} float32 numbers are more than 2^31 bytes.",
            hint=f"Cut the texts: --set evaluation.max_tokens={MAX_MESSAGE // size}",
        )
    through_shm = target_facts(facts["target"]).python_model
    if through_shm and max_tokens * size > free // 2:  # half: what was sent may not be freed yet
        raise NotMeasurable(
            f"The logits of {max_tokens} tokens do not fit into this machine's shared memory.",
            why=f"Triton's Python backend hands them on there: {max_tokens} x {facts['vocab_size']} float32 numbers, "
            f"and {SHM} has {free >> 20} MiB free, of which half is counted on.",
            hint="Give it more: SHM_SIZE=8gb with compose, shm-size of docker run. Or cut the texts: "
            f"--set evaluation.max_tokens={max(2, free // 2 // size)}",
        )
