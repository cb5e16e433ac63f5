"""A stand-in for trtllm-build, which needs a GPU. It takes exactly the flags of TensorRT-LLM 1.2 (as configs/trtllm
lists them from upstream's sources), refuses every other, says what the real one says in the same order
(commands/build.py@65f1d153, builder.py, _common.py), and leaves what the real one does: config.json, rank0.engine.

STAND_IN=crash makes it die half-way, STAND_IN=empty makes it end well and leave nothing, STAND_IN=hollow with an engine
of no bytes, STAND_IN=other-version writes another version into config.json, STAND_IN=slow makes it wait to be
interrupted, STAND_IN=one-rank makes it forget all ranks but the first. STAND_IN=says makes it say STAND_IN_SAYS while
it writes the engine, and end with 1; STAND_IN=killed lets SIGKILL end it, as the kernel does when memory runs out.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

STAMP = "[11/21/2026-10:00:00]"
SPEC = json.loads((Path(__file__).parents[2] / "configs" / "trtllm" / "1.2.1" / "flags.json").read_text())


def say(text: str, who: str = "TRT-LLM") -> None:
    print(f"{STAMP} [{who}] [I] {text}", flush=True)


def build(rank: int, output: Path, timing_cache: str) -> None:
    """Prints and writes what one rank does."""
    say("Total time of constructing network from module object 0.3 seconds")
    say("Total optimization profiles added: 1")
    say("Total time to initialize the weights in network Unnamed Network 0: 00:00:00")
    say("Build TensorRT engine Unnamed Network 0")
    say("Global timing cache in use. Profiling results in this builder pass will be stored.", "TRT")
    say("Engine generation completed in 0.2 seconds.", "TRT")
    say(f"[MemUsageStats] Peak memory usage of TRT CPU/GPU memory allocators: CPU 8 MiB, GPU {385 + rank} MiB", "TRT")
    say("Total time of building Unnamed Network 0: 00:00:00")
    if rank == 0:
        Path(timing_cache).write_bytes(b"timing")
        say(f"Timing cache serialized to {timing_cache}")
    say("Build phase peak memory: 6978.95 MB, children: 12049.21 MB")
    say(f"Serializing engine to {output / f'rank{rank}.engine'}...")
    (output / f"rank{rank}.engine").write_bytes(b"" if os.environ.get("STAND_IN") == "hollow" else b"engine")
    say("Engine serialized. Total time: 00:00:00")


def build_config(arguments: argparse.Namespace) -> dict[str, object]:
    """The given flags merged into the defaults (BuildConfig, PluginConfig)."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    config, plugins = dict(SPEC["build_config_defaults"]), {}
    for flag in SPEC["flags"]:
        name = flag["name"].removeprefix("--")
        value = given.get(name, flag["default"])
        if flag["group"] == "plugin":
            plugins[name] = value == "enable" if flag["kind"] == "bool_str" else value
        elif name in given and flag.get("build_config_field"):
            config[flag["build_config_field"]] = value
    return {**config, "plugin_config": plugins}


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
    print("[TensorRT-LLM] TensorRT LLM version: 1.2.1", flush=True)
    if behaviour == "slow":
        (output / "rank0.engine").write_bytes(b"half")
        time.sleep(60)
    if behaviour in ("crash", "says", "killed"):
        (output / "rank0.engine").write_bytes(b"half")
        says = "RuntimeError: FMHA kernel not found" if behaviour == "crash" else os.environ.get("STAND_IN_SAYS", "")
        print(says, file=sys.stderr, flush=True)
        if behaviour == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return 1
    if behaviour == "empty":
        return 0
    pretrained = json.loads((Path(arguments.checkpoint_dir) / "config.json").read_text())
    version = "1.1.0" if behaviour == "other-version" else "1.2.1"
    config = {
        "version": version,
        "pretrained_config": pretrained,
        "build_config": build_config(arguments),
    }
    (output / "config.json").write_text(json.dumps(config))
    for rank in range(pretrained["mapping"]["world_size"]):
        if not (Path(arguments.checkpoint_dir) / f"rank{rank}.safetensors").is_file():
            return f"rank{rank}.safetensors is missing"
        if behaviour != "one-rank" or rank == 0:
            build(rank, output, arguments.output_timing_cache)
    say("Total time of building all engines: 00:00:01")
    return 0


if __name__ == "__main__":
    sys.exit(main())
