"""Calibration layer by layer against ModelOpt's own flow on a model in Qwen3-8B's shape with random weights.

    python benchmarks/streamed_on_gpu.py [--layers 36] [--rows 128] [--tokens 512] [--device cuda] [--small]

Makes the model (16 GB, in --directory), runs both in processes of their own, and prints as JSON: seconds of each part,
the most memory of the device and of the process, and how many ranges and stored tensors are equal. Needs no network.
ModelOpt's flow is from_pretrained, mtq.quantize with max calibration, export_hf_checkpoint. Both get the same ids.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import random_model

from builder.core.safetensors_io import Tensors
from builder.formats import kv_cache
from builder.formats.assignment import ModelFormats
from builder.formats.registry import NVFP4
from builder.quantize.ranges import Ranges

SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2,
         "head_dim": 64, "vocab_size": 4096, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
FORMATS = ModelFormats(NVFP4, {}, kv_cache.FP8)


def batches(config: Mapping[str, Any], asked: argparse.Namespace) -> list[Any]:
    """Random token ids, one row each."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shape = (1, asked.tokens)
    return [torch.randint(0, config["vocab_size"], shape, generator=generator) for _ in range(asked.rows)]


class Clock:
    """Seconds of each part; waits for the device."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = {}
        self._device, self._last = device, time.monotonic()

    def lap(self, name: str) -> None:
        """Ends a part."""
        import torch

        if self._device == "cuda":
            torch.cuda.synchronize()
        now = time.monotonic()
        self.seconds[name], self._last = round(now - self._last, 2), now


def streamed(directory: Path, asked: argparse.Namespace, clock: Clock) -> Ranges:
    """Calibrates layer by layer, and writes the unified layout into `streamed`."""
    import torch

    from builder.model import streamed as models
    from builder.quantize import streamed_calibration, writer
    from builder.quantize.source_weights import SourceModel

    clock.lap("import")
    job = {"model": str(directory), "trust_remote_code": False}
    model = models.open_decoder(job, torch.device(asked.device), asked.tokens)
    clock.lap("open")
    ids = batches(model.config.to_dict(), asked)
    with tempfile.TemporaryDirectory(dir=directory.parent) as partial:
        names = list(Tensors(directory))
        found, _ = streamed_calibration.calibrate(model, ids, names, Path(partial) / "checkpoint-0")
    clock.lap("calibrate")
    writer.write(SourceModel.open(directory), FORMATS, found, directory.parent / "streamed")
    clock.lap("write")
    return found


def modelopt(directory: Path, asked: argparse.Namespace, clock: Clock) -> Ranges:
    """ModelOpt's own flow; its checkpoint is in `modelopt`."""
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM

    from builder.quantize import calibrated, quantizers

    clock.lap("import")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, device_map=asked.device)
    clock.lap("open")
    ids = batches(model.config.to_dict(), asked)

    def forward(model: Any) -> None:
        for row in ids:
            model.base_model(row.to(model.device), use_cache=False)

    with torch.inference_mode():
        mtq.quantize(model, quantizers.config(mtq, FORMATS), forward)
        found = calibrated.ranges(model, list(Tensors(directory)))
        clock.lap("calibrate")
        export_hf_checkpoint(model, export_dir=directory.parent / "modelopt")
    clock.lap("write")
    return found


WAYS: Mapping[str, Callable[[Path, argparse.Namespace, Clock], Ranges]] = {"streamed": streamed, "modelopt": modelopt}


def measure(way: str, directory: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Runs one way in this process. Saves its ranges beside the model."""
    clock = Clock(asked.device)
    WAYS[way](directory, asked, clock).save(directory.parent / f"{way}.json")
    import torch

    on_device = torch.cuda.max_memory_reserved() if asked.device == "cuda" else 0
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": clock.seconds, "device_bytes": on_device, "resident_bytes": resident}


def compared(directory: Path) -> dict[str, Any]:
    """How far the ranges and the stored tensors of both agree."""
    one, other = (Ranges.load(directory / f"{way}.json") for way in WAYS)
    pairs = [(amax, other.inputs[name]) for name, amax in one.inputs.items()]
    pairs += [pair for name, both in one.cache.items() for pair in zip(both, other.cache[name], strict=True)]
    stored = [Tensors(directory / way) for way in WAYS]
    same = sum(stored[0].read(name) == stored[1].read(name) for name in stored[0] if name in stored[1])
    return {
        "ranges": len(pairs),
        "equal_ranges": sum(a == b for a, b in pairs),
        "largest_difference": max(abs(a - b) / b for a, b in pairs),
        "tensors": len(stored[0]),
        "equal_tensors": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="a few megabytes, to try the script")
    parser.add_argument("--directory", type=Path, help="a directory with 50 GB free; a temporary one by default")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.way:
        print("\n" + json.dumps(measure(asked.way, asked.directory / "model", asked)))
        return
    config = random_model.shape("qwen3-8b", asked.layers) | (SMALL if asked.small else {})
    with tempfile.TemporaryDirectory(dir=asked.directory) as made:
        random_model.make(Path(made) / "model", config, shards=1 if asked.small else 4)
        found: dict[str, Any] = {}
        for way in WAYS:
            start = time.monotonic()
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            ran = subprocess.run([*command, "--directory", made], check=True, stdout=subprocess.PIPE, text=True)
            found[way] = {"whole": round(time.monotonic() - start, 2), **json.loads(ran.stdout.splitlines()[-1])}
        print(json.dumps({**found, **compared(Path(made))}, indent=1))


if __name__ == "__main__":
    main()
