"""Snapshot -> Checkpoint of --format bf16: the model's own weights in the layouts that the targets load.

Nothing is calibrated, and ModelOpt does not run. The Hugging Face layout has no hf_quant_config.json, because
TensorRT-LLM's LLM class rejects one without a quant_algo ("Pre-quantized checkpoint must have quant_algo",
tensorrt_llm/llmapi/llm_utils.py). Of a multimodal model the language model is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builder.architectures import catalog
from builder.checkpoint.finished import inspected, write_second_layout
from builder.checkpoint.layouts import Checkpoint
from builder.core.hashes import Hashes
from builder.core.store import Store, sources_digest
from builder.formats.assignment import ModelFormats
from builder.formats.registry import BF16
from builder.hub.snapshot import Snapshot
from builder.quantize import modelopt, unified_plan
from builder.quantize.ranges import Ranges

SOURCES = (*modelopt.SOURCES, *unified_plan.SOURCES, "builder/quantize/unquantized.py")


def write_checkpoint(snapshot: Snapshot, *, store: Store) -> Checkpoint:
    """Writes `unified/` and, where the architecture has one, `tensorrt_llm/`, in the dtype that the model is served in,
    but for tensors that the family keeps in float32.

    IntegrityError if the inspection finds an error. Such a checkpoint is not kept.
    """
    ingredients = {
        "snapshot": snapshot.digest,
        "architecture": catalog.ingredients(catalog.of(snapshot.config)),
        "format": "bf16",
        "sources": sources_digest(*SOURCES),
    }

    def make(tmp: Path) -> dict[str, Any]:
        from builder.quantize import writer  # numpy: only for those who write
        from builder.quantize.source_weights import NAMES, SourceModel

        with snapshot.source.explain_failures():
            source = SourceModel.open(snapshot.path)
            writer.write(source, ModelFormats(BF16), Ranges(), tmp / "unified")
        with Hashes(tmp) as hashes:
            lacking = write_second_layout(snapshot.config, hashes)
            snapshot.source.check_unchanged()
            if lacking is not None:
                store.out.warn(f"only the Hugging Face layout was written: {lacking}")
            facts = inspected(hashes)
        store.out.info(f"no layer is quantized; {len(source.tensors)} tensors in {NAMES[source.dtype]}")
        return {"layers": {}, "no_tensorrt_llm": lacking, "writer": "builder", **facts}

    artifact = store.stage("checkpoint", ingredients, make)
    return Checkpoint(path=artifact.path, digest=artifact.digest, facts=artifact.facts)
