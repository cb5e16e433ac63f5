"""Worker process that learns rotations: python -m builder.transform.learning_worker JOB.json

Writes the matrices into the job's `result`. A killed run's state is in its `state`, from which the next one continues.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.architectures import catalog
from builder.architectures.attention import head_size
from builder.core.errors import BuilderError, UnsupportedError, UsageError, out_of_memory
from builder.core.worker import emit, worker_main
from builder.formats.assignment import of_job
from builder.model import loading
from builder.quantize import worker
from builder.quantize.device import check_device
from builder.transform import rotation


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Learns the rotations that the job names. Returns facts for the manifest."""
    import torch

    from builder.transform.learning import Learner
    from builder.transform.learning_state import State, write_matrices
    from builder.transform.rounded_inputs import RoundedInputs

    clock = worker.Clock()
    device = check_device(job["gpus"])
    torch.use_deterministic_algorithms(True, warn_only=True)
    rows = [row for row in worker.read_batches(job) if row.shape[1] > 1]
    if not rows:
        raise UsageError(
            "No calibration row has two tokens, and rotations are learned by the loss of the next token.",
            hint="Choose another --calib-data, or --set transform.kind=hadamard",
        )
    emit(progress={"label": "loading the model", "done": 0, "total": None})
    model = loading.load(job, dtype=torch.float32)
    if torch.cuda.is_available():
        model = model.to("cuda")
    clock.lap("load")
    config = model.config.to_dict()
    family = catalog.of(config).rotation
    assert family is not None  # spinquant.plan has checked that
    layers, learning = int(config["num_hidden_layers"]), job["learning"]
    inputs = RoundedInputs(model, family, of_job(job), layers)
    learner = Learner(model, inputs, rows, per_step=learning["rows"])
    learner.recompute([model.get_submodule(f"{family.layers}.{layer}") for layer in range(layers)])
    start = {name: rotation.random(size, "hadamard", job["seed"], name).matrix() for name, size in _sizes(job, config)}

    def progress(done: int) -> None:
        emit(progress={"label": "learning rotations", "done": done, "total": learning["steps"]})

    found = learner.learn(
        start, steps=learning["steps"], rate=learning["rate"], state=State(Path(job["state"])), progress=progress
    )
    write_matrices(Path(job["result"]), found.matrices)
    clock.lap("learn")
    return {
        "device": device,
        "loss": {"before": found.before, "after": found.after},
        "losses": found.losses,
        "fell": found.fell,
        "tokens": sum(row.numel() for row in rows),
        "seconds": clock.laps,
    }


def _sizes(job: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """(name, order) of the matrices to learn."""
    found = [("r1", int(config["hidden_size"]))] if "r1" in job["rotations"] else []
    if "r2" in job["rotations"]:
        found += [(f"r2.{layer}", head_size(config)) for layer in range(int(config["num_hidden_layers"]))]
    return found


def known(error: BaseException, job: Mapping[str, Any]) -> BuilderError | None:
    """The error to show if memory ran out; None for any other."""
    if not out_of_memory(error):
        return None
    return UnsupportedError(
        "Learning rotations does not fit into memory.",
        why=(str(error).splitlines() or [""])[0],
        hint="Use shorter rows (--calib-seq-len 512), or random rotations: --set transform.kind=hadamard",
    )


if __name__ == "__main__":
    sys.exit(worker_main(sys.argv, run, known))
