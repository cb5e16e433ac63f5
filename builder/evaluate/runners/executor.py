"""The runner `reference`: the TensorRT-LLM layout through the reference executor. Weights, activations and KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from builder.evaluate.datasets import Ids
from builder.reference.model import ReferenceModel


class Executor:
    """One text at a time: the executor keeps a KV cache for each."""

    def __init__(self, model: ReferenceModel, batch_tokens: int) -> None:
        self._model, self.batch_tokens = model, batch_tokens
        self.vocab_size = len(model.embedding)

    def logits(self, batch: Sequence[Ids]) -> Iterator[Tensor]:
        for ids in batch:
            yield self._model.forward(torch.from_numpy(ids).long(), self._model.new_cache())


@contextmanager
def reference(job: Mapping[str, Any]) -> Iterator[Executor]:
    """From the checkpoint, whose length is the model's own. The arithmetic is the recipe's, float32 by default."""
    dtype = torch.float32 if job["dtype"] == "auto" else getattr(torch, job["dtype"])
    yield Executor(ReferenceModel.load(Path(job["tensorrt_llm"]), dtype), job["batch_tokens"])
