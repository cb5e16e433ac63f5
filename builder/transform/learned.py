"""Rotations learned from a model and calibration rows, by a worker process. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.calibration.rows import Calibration
from builder.core import process, workers
from builder.core.output import Output
from builder.core.partial_results import PartialResults
from builder.core.safetensors_io import Tensors
from builder.core.store import library_versions, sources_digest
from builder.formats.assignment import Layers
from builder.hub.snapshot import Snapshot
from builder.quantize import modelopt
from builder.recipe.transform import Transform

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

LIBRARIES = ("torch", "transformers", "tokenizers")
SOURCES = (
    "builder/transform/learned.py",
    "builder/transform/learning.py",
    "builder/transform/learning_cost.py",
    "builder/transform/learning_state.py",
    "builder/transform/learning_worker.py",
    "builder/transform/cayley.py",
    "builder/transform/rounded_inputs.py",
    "builder/transform/rotation.py",
    "builder/transform/hadamard.py",
    "builder/transform/goethals_seidel.py",
    "builder/transform/paley.py",
    *modelopt.SOURCES,
)
OF_PART = ("rotations", "seed", "learning")  # the recipe's values that a job has


@dataclass(frozen=True)
class Rows:
    """What rotations are learned from: rows, cut at seq_len tokens, and the formats that round the layers' inputs."""

    calibration: Calibration
    seq_len: int
    number_format: str
    layers: Layers
    trust_remote_code: bool = False

    def ingredients(self) -> dict[str, Any]:
        """What the result depends on beside the model and the recipe's values."""
        return {
            "calibration": self.calibration.digest,
            "seq_len": self.seq_len,
            "format": self.number_format,
            "layers": {name: list(modules) for name, modules in sorted(self.layers.items()) if modules},
            "libraries": library_versions(*LIBRARIES),
            "sources": sources_digest(*SOURCES),
            "gpus": modelopt.calibrating(),
            "environment": modelopt.numerics(),
            "trust_remote_code": self.trust_remote_code,
        }


def learn(
    snapshot: Snapshot, part: Transform, rows: Rows, partial: PartialResults
) -> tuple[dict[str, Array], dict[str, Any]]:
    """({"r1": [hidden, hidden], "r2.N": [head, head] of layer N}, in float64, facts for the manifest)."""
    store, state = partial.store, partial.path.with_suffix(".safetensors")
    result = state.with_name(f"{partial.path.name}-result.safetensors")
    made = rows.ingredients()
    job = {
        **snapshot.source.as_job(),
        **{name: made[name] for name in ("seq_len", "format", "layers", "gpus", "trust_remote_code")},
        **{name: value for name, value in part.model_dump(mode="json").items() if name in OF_PART},
        "rows": str(rows.calibration.path.absolute()),
        "batch_size": 1,
        "kv_cache_dtype": "auto",  # the cache is not rounded
        "state": str(state.absolute()),
        "result": str(result.absolute()),
    }
    events, finished = process.run_job(
        workers.LEARN_ROTATIONS,
        job,
        log=store.log("transform"),
        bar=process.Bar(store.out, "starting"),
        env=modelopt.ENVIRONMENT,
    )
    facts = {**events["summary"], "max_rss": finished.max_rss}
    _tell(facts, store.out)
    return _read(result), facts


def _tell(facts: Mapping[str, Any], out: Output) -> None:
    before, after = facts["loss"]["before"], facts["loss"]["after"]
    if facts["fell"]:
        out.info(f"learned rotations: the loss with rounded inputs fell from {before:.4f} to {after:.4f}")
    else:
        out.warn(
            f"learning did not lower the loss with rounded inputs ({before:.4f}, then {after:.4f}): the rotations are "
            "the random ones it began with. More steps or another rate may help: --set transform.learning.rate=20"
        )


def _read(path: Path) -> dict[str, Array]:
    import numpy as np

    stored = Tensors(path.parent, [path])
    return {name: np.frombuffer(stored.read(name), "<f8").reshape(info.shape) for name, info in stored.items()}
