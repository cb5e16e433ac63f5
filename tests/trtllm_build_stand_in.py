"""A stand-in for trtllm-build, which needs a GPU. It takes exactly the flags of TensorRT-LLM 1.2 (as configs/trtllm
lists them from upstream's sources), refuses every other, and leaves what the real one does: config.json, rank0.engine.

STAND_IN=crash makes it die half-way, STAND_IN=empty makes it end well and leave nothing, STAND_IN=other-version
writes another version into config.json, STAND_IN=slow makes it wait to be interrupted, STAND_IN=one-rank makes it
forget all ranks but the first.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

SPEC = json.loads((Path(__file__).parent.parent / "configs" / "trtllm" / "1.2.1" / "flags.json").read_text())


def main() -> int | str:
    parser = argparse.ArgumentParser(prog="trtllm-build", allow_abbrev=False)
    for flag in SPEC["flags"]:
        if flag["kind"] == "store_true":
            parser.add_argument(flag["name"], action="store_true")
            continue
        choices = ["enable", "disable"] if flag["kind"] == "bool_str" else flag["choices"]
        kind = int if flag["kind"] == "int" else str
        parser.add_argument(flag["name"], type=kind, choices=choices if isinstance(choices, list) else None)
    arguments = parser.parse_args()
    behaviour = os.environ.get("STAND_IN", "")
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    print("[TensorRT-LLM] stand-in", flush=True)
    if behaviour == "slow":
        (output / "rank0.engine").write_bytes(b"half")
        time.sleep(60)
    if behaviour == "crash":
        (output / "rank0.engine").write_bytes(b"half")
        print("RuntimeError: FMHA kernel not found", file=sys.stderr)
        return 1
    if behaviour == "empty":
        return 0
    pretrained = json.loads((Path(arguments.checkpoint_dir) / "config.json").read_text())
    version = "1.1.0" if behaviour == "other-version" else "1.2.1"
    config = {
        "version": version,
        "pretrained_config": pretrained,
        "build_config": {"max_batch_size": arguments.max_batch_size},
    }
    (output / "config.json").write_text(json.dumps(config))
    for rank in range(pretrained["mapping"]["world_size"]):
        if not (Path(arguments.checkpoint_dir) / f"rank{rank}.safetensors").is_file():
            return f"rank{rank}.safetensors is missing"
        if behaviour != "one-rank" or rank == 0:
            (output / f"rank{rank}.engine").write_bytes(b"engine")
    Path(arguments.output_timing_cache).write_bytes(b"timing")
    return 0


if __name__ == "__main__":
    sys.exit(main())
