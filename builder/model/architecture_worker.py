"""The child process that compares a model's headers with what transformers builds from its config.json:
python -m builder.model.architecture_worker JOB.json

For architectures without a table in tensor_names.py, before a weight is downloaded: it makes a file with the model's
header and a hole for its weights, and has transformers load that on the meta device.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.core.process import worker_main
from builder.core.safetensors_io import byte_size
from builder.model import loading as model_loading
from builder.model.files import CONFIG, WEIGHTS
from builder.model.hashed_files import private_directory


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Raises as model_loading.check_architecture does. The job holds the model's name, config and tensors."""
    with private_directory() as directory:
        (directory / CONFIG).write_text(json.dumps(job["config"]), encoding="utf-8")
        write_hole(directory / WEIGHTS, job["tensors"])
        model_loading.check_architecture(directory, job["name"], trust_remote_code=False)
    return {}


def write_hole(path: Path, tensors: Mapping[str, Any]) -> None:
    """A safetensors file with these tensors, {name: [dtype, shape]}, that takes no room: all of their bytes are 0."""
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
