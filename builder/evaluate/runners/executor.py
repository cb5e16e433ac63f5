"""The runner `reference`: the TensorRT-LLM layout in the reference executor, with quantized inputs and KV cache."""

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
    """Scores one text at a time, because the executor needs a KV cache for each."""

    def __init__(self, model: ReferenceModel, batch_tokens: int) -> None:
        self._model, self.batch_tokens = model, batch_tokens
        self.vocab_size = len(model.embedding)

    def logits(self, batch: Sequence[Ids]) -> Iterator[Tensor]:
        """Logits [tokens, vocab] float32 of each sequence."""
        for ids in batch:
            yield self._model.forward(torch.from_numpy(ids).long(), self._model.new_cache())


@contextmanager
def reference(job: Mapping[str, Any]) -> Iterator[Executor]:
    """Loads the checkpoint, not the engine, so the length limit is the model's own. Computes in the recipe's
    evaluation.dtype, float32 by default."""
    dtype = torch.float32 if job["dtype"] == "auto" else getattr(torch, job["dtype"])
    yield Executor(ReferenceModel.load(Path(job["tensorrt_llm"]), dtype), job["batch_tokens"])
