"""Checkpoint -> Engine: runs trtllm-build where it exists; for the reference target writes what stands in its place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder import paths, process, trtllm
from builder.checkpoint import Checkpoint
from builder.errors import IntegrityError, StageError, UnsupportedError, UsageError
from builder.quantize.modelopt import gpus
from builder.recipe import Resolved
from builder.store import Artefact, Store, library_versions, read, sources_digest


@dataclass(frozen=True)
class Engine:
    """config.json {version, pretrained_config, build_config} beside rank*.engine, or rank*.safetensors (reference)."""

    path: Path
    digest: str
    artefact: Artefact

    @property
    def config(self) -> Mapping[str, Any]:
        """The engine's config.json."""
        loaded: Mapping[str, Any] = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
        return loaded


def check_machine(resolved: Resolved, *, serving: bool = True) -> None:
    """Before the first expensive byte: can this machine build the target, and serve it? UnsupportedError if not."""
    if resolved.recipe.target == "engine" and os.environ.get("BUILDER_FORCE_NUM_PROFILES"):
        raise UsageError(
            "BUILDER_FORCE_NUM_PROFILES is set: trtllm-build would make another engine than the recipe says.",
            why="A debug override of TensorRT-LLM (rule R48); no stage's key would know of it.",
            cure="unset BUILDER_FORCE_NUM_PROFILES",
        )
    if resolved.recipe.target == "engine" and shutil.which("trtllm-build") is None:
        raise UnsupportedError(
            "trtllm-build is not on this machine's PATH, so no TensorRT engine can be built here.",
            why=f"The {resolved.gpu.name} profile's target is `engine`; trtllm-build comes in NVIDIA's "
            f"Triton images with TensorRT-LLM {resolved.recipe.engine.tensorrt_llm}.",
            cure="Run inside that image, or build for the reference executor: --gpu cpu. "
            "`builder plan` works everywhere.",
        )
    world_size, have = resolved.recipe.engine.world_size, len(gpus())
    if resolved.recipe.target == "engine" and serving and 0 < have < world_size:
        raise UnsupportedError(
            f"The engine needs {world_size} GPUs to be served and tested, and this machine has {have}.",
            why="--tp times --pp is the number of its ranks, and each takes a GPU of its own.",
            cure="Only build it here, rank by rank: --no-smoke. Or split it less.",
        )


def build(checkpoint: Checkpoint, flags: Sequence[trtllm.Flag], resolved: Resolved, *, store: Store) -> Engine:
    """The engine for these flags: by trtllm-build, or for the reference target the checkpoint and the same config."""
    recipe = resolved.recipe
    ingredients = {
        "checkpoint": checkpoint.digest,
        "target": recipe.target,
        "sm": resolved.gpu.sm,
        "flags": [[flag.name, flag.value] for flag in flags],
        "tensorrt_llm": recipe.engine.tensorrt_llm,
        "libraries": library_versions("tensorrt_llm", "tensorrt") if recipe.target == "engine" else {},
        "sources": sources_digest(
            "builder/engine.py",
            "builder/trtllm.py",
            "builder/trtllm_answers.py",
            "builder/trtllm_facts.py",
            "builder/trtllm_rules.py",
            # The reference engine's build_config is made of the version's defaults.
            paths.data("configs", "trtllm", recipe.engine.tensorrt_llm),
        ),
    }
    work = _run_trtllm_build if recipe.target == "engine" else _write_reference
    version = recipe.engine.tensorrt_llm
    artefact = store.stage("engine", ingredients, lambda directory: work(checkpoint, flags, version, directory, store))
    return Engine(artefact.path, artefact.digest, artefact)


def _write_reference(
    checkpoint: Checkpoint, flags: Sequence[trtllm.Flag], version: str, directory: Path, store: Store
) -> Mapping[str, Any]:
    pretrained = json.loads((checkpoint.tensorrt_llm / "config.json").read_text(encoding="utf-8"))
    config = {
        "version": version,
        "pretrained_config": pretrained,
        "build_config": trtllm.build_config(trtllm.load(version), flags, pretrained),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    hashed = {}
    made = read(checkpoint.path)
    for rank in sorted(checkpoint.tensorrt_llm.glob("rank*.safetensors")):
        _link(rank, directory / rank.name)
        if made:
            hashed[rank.name] = made.manifest["files"][f"tensorrt_llm/{rank.name}"]["sha256"]
    return {"hashed": hashed, "command": None, "version": version, "world_size": pretrained["mapping"]["world_size"]}


def _link(source: Path, target: Path) -> None:
    """A second name for the same bytes; a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _run_trtllm_build(
    checkpoint: Checkpoint, flags: Sequence[trtllm.Flag], version: str, directory: Path, store: Store
) -> Mapping[str, Any]:
    timing_cache = store.root / "timing" / "model.cache"
    timing_cache.parent.mkdir(parents=True, exist_ok=True)
    argv = trtllm.command(flags, checkpoint=checkpoint.tensorrt_llm, output=directory, timing_cache=timing_cache)
    log = store.log("trtllm-build")
    store.out.info(f"trtllm-build works; what it says: {log}")
    finished = process.run(argv, log=log, cwd=timing_cache.parent)
    pretrained = json.loads((checkpoint.tensorrt_llm / "config.json").read_text(encoding="utf-8"))
    world_size = pretrained["mapping"]["world_size"]
    built = check_built(directory, version, world_size)
    paste = trtllm.command(flags, checkpoint=checkpoint.tensorrt_llm, output=Path("ENGINE"), timing_cache=timing_cache)
    return {
        "command": paste,
        "log": str(log),
        "version": built["version"],
        "world_size": world_size,
        "seconds": round(finished.seconds, 1),
        "max_rss": finished.max_rss,
    }


def check_built(directory: Path, version: str, world_size: int) -> Mapping[str, Any]:
    """trtllm-build can end with 0 and half an engine; and the engine must be of the version that will serve it."""
    ranks = [directory / f"rank{rank}.engine" for rank in range(world_size)]
    if not all(file.is_file() for file in (directory / "config.json", *ranks)):
        wanted = "rank0.engine" if world_size == 1 else f"rank0.engine to rank{world_size - 1}.engine"
        raise StageError(f"trtllm-build ended well but left no config.json with {wanted}.")
    built: Mapping[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if built.get("version") != version:
        raise IntegrityError(
            f"The engine was built by TensorRT-LLM {built.get('version')}, and {version} was asked for.",
            why="An engine runs only on the version that built it.",
            cure=f"Build in an image with {version}, or ask for this one: "
            f"--set engine.tensorrt_llm={built.get('version')}",
        )
    return built
