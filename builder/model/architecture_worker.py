"""The worker that compares a model's headers with what transformers builds from its config.json:
python -m builder.model.architecture_worker JOB.json

For architectures without a table of tensors in configs/architectures, before any weight is downloaded: it writes a
sparse file with the model's header and no weights, and lets transformers load that on the meta device.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.core import temporary
from builder.core.safetensors_io import byte_size
from builder.core.worker import worker_main
from builder.model import loading as model_loading
from builder.model.files import CONFIG, WEIGHTS


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """The job holds the model's `name`, `config` and `tensors`, {name: [dtype, shape]}. Raises what
    loading.check_architecture raises."""
    with temporary.directory() as directory:
        (directory / CONFIG).write_text(json.dumps(job["config"]), encoding="utf-8")
        write_sparse(directory / WEIGHTS, job["tensors"])
        model_loading.check_architecture(directory, job["name"], trust_remote_code=False)
    return {}


def write_sparse(path: Path, tensors: Mapping[str, Any]) -> None:
    """Writes a safetensors file with these tensors, {name: [dtype, shape]}, all zeros, as a sparse file: it takes no
    space on the disk."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        end = position + byte_size(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)


if __name__ == "__main__":
    sys.exit(worker_main(sys.argv, run))
