"""The runner `served`: the rendered repository, served by Triton, asked for the logits of its prompts over gRPC.

The engine must gather them (`gather_context_logits`): one that does not is not measurable, whatever else it answers.
Everything that is served is in the figures: engine, kernels, KV cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from builder.client import Ask, Client, Refused, Stalled
from builder.errors import NotMeasurable, ServingError
from builder.evaluation_data import Ids
from builder.output import Output
from builder.serve import Server, serve

AT_ONCE = 4  # requests under way: the engine batches them
MAX_MESSAGE = (1 << 31) - (1 << 20)  # of gRPC, whose lengths are int32; and a margin for what surrounds the tensor
GATHER = "--set engine.flags.gather_context_logits=enable"


class Served:
    """A server that is up. Each text is a prompt, answered by its logits and one token."""

    def __init__(self, server: Server, facts: Mapping[str, Any], job: Mapping[str, Any]) -> None:
        self._server = server
        names, batched = facts.get("names", {}), facts.get("batched", True)
        self._client = Client(server.http_url, server.grpc_url, facts["models"], job["timeout"], names, batched)
        self.vocab_size, self.batch_tokens = int(facts["vocab_size"]), job["batch_tokens"]

    def logits(self, batch: Sequence[Ids]) -> Iterator[Tensor]:
        for start in range(0, len(batch), AT_ONCE):
            with ThreadPoolExecutor(AT_ONCE) as pool:
                yield from pool.map(self._ask, batch[start : start + AT_ONCE])

    def generate(self, prompt: str, max_tokens: int, options: Mapping[str, Any]) -> str:
        """The answer's text; greedy where `options` don't say otherwise."""
        with self._answering():
            return self._client.http_generate(Ask(prompt, max_tokens, options)).text

    def _ask(self, ids: Ids) -> Tensor:
        with self._answering():
            return torch.from_numpy(self._client.context_logits(ids.tolist()))

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except (Refused, Stalled) as error:
            code = self._server.child.poll()
            raise ServingError(
                "The server ended while it was measured." if code is not None else "The server did not answer.",
                why=str(error),
                cure="Run the same command again: data sets and tasks that were finished are kept. "
                f"The server's log: {self._server.log}",
            ) from None


@contextmanager
def served(job: Mapping[str, Any]) -> Iterator[Served]:
    """Serves the repository while it is measured. NotMeasurable if `logits` are wanted and its engine gives none."""
    facts = job["facts"]
    if job["logits"]:
        check(facts, job["gathers"], job["lengths"]["max_tokens"])
    with serve(Path(job["models"]), out=Output("quiet"), log=Path(job["server_log"])) as server:
        yield Served(server, facts, job)


def check(facts: Mapping[str, Any], gathers: bool, max_tokens: int) -> None:
    """What makes a served model unmeasurable, known before it is started."""
    if not gathers:
        raise NotMeasurable(
            "The served engine returns no logits of a prompt, so the likelihood of a text can't be had from it.",
            why="It was built without gather_context_logits, trtllm-build's default. No figure is made up for it.",
            cure=f"Build an engine to measure with {GATHER}; it needs more memory, and KV cache reuse is off.",
        )
    size = 4 * int(facts["vocab_size"])
    if max_tokens * size > MAX_MESSAGE:
        raise NotMeasurable(
            f"The logits of {max_tokens} tokens do not fit into one answer of gRPC.",
            why=f"{max_tokens} x {facts['vocab_size']} float32 numbers are more than 2^31 bytes.",
            cure=f"Cut the texts: --set evaluation.max_tokens={MAX_MESSAGE // size}",
        )
