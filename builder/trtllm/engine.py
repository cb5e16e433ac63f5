"""Checkpoint -> Engine: runs trtllm-build or, for the reference target, writes the same directory without kernels."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.checkpoint.layouts import QUANT_CFG, Checkpoint
from builder.core import paths, process
from builder.core.errors import IntegrityError, StageError, UnsupportedError, UsageError
from builder.core.output import seconds
from builder.core.store import Artifact, Store, library_versions, read, sources_digest
from builder.core.untrusted_text import parse_json, read_regular
from builder.machine.gpus import Seen, cuda_order, visible
from builder.recipe.schema import Resolved
from builder.recipe.target_facts import target_facts
from builder.trtllm import build_log
from builder.trtllm import flags as trtllm_flags
from builder.trtllm.compatibility import BUILT_WITH, installed


@dataclass(frozen=True)
class Engine:
    """A directory with config.json {version, pretrained_config, build_config} and rank*.engine.

    The reference target has rank*.safetensors. built_with.json adds target, SM, GPU, driver and TensorRT version.
    """

    path: Path
    digest: str
    artifact: Artifact

    @property
    def config(self) -> Mapping[str, Any]:
        """The engine's config.json."""
        loaded: Mapping[str, Any] = parse_json(read_regular(self.path / "config.json"))
        return loaded


@dataclass(frozen=True)
class EngineJob:
    """What an engine is made of, by which version of TensorRT-LLM, and the directory to write it to."""

    checkpoint: Checkpoint
    flags: Sequence[trtllm_flags.Flag]
    version: str
    directory: Path


def check_machine(resolved: Resolved, *, serving: bool = True) -> None:
    """UnsupportedError if this machine cannot build the target or, with `serving`, serve it. Called before any work."""
    if not target_facts(resolved.recipe.target).builds_tensorrt:
        return
    if os.environ.get("BUILDER_FORCE_NUM_PROFILES"):
        raise UsageError(
            "BUILDER_FORCE_NUM_PROFILES is set: trtllm-build would build a different engine than the recipe describes.",
            why="It is a debug override of TensorRT-LLM (rule R48) and not part of any stage's key.",
            hint="unset BUILDER_FORCE_NUM_PROFILES",
        )
    if shutil.which("trtllm-build") is None:
        raise UnsupportedError(
            "trtllm-build is not on this machine's PATH, so no TensorRT engine can be built here.",
            why=f"The {resolved.gpu.name} profile's target is `engine`; trtllm-build comes in NVIDIA's "
            f"Triton images with TensorRT-LLM {resolved.recipe.engine.tensorrt_llm}.",
            hint="Run inside that image, or build for the reference executor: --gpu cpu. "
            "`builder plan` works everywhere.",
        )
    if (seen := visible()) is not None:
        _check_gpus(resolved, seen, serving=serving)


def _check_gpus(resolved: Resolved, seen: Sequence[Seen], *, serving: bool) -> None:
    """trtllm-build times kernels on GPU 0 and builds for it. Without a GPU it crashes (rule R08); on a GPU of another
    architecture it would build for that one."""
    sm, world_size = resolved.gpu.sm, resolved.recipe.engine.world_size
    if not seen:
        raise UnsupportedError(
            "trtllm-build is installed, but no GPU is visible, so no TensorRT engine can be built.",
            why="It times kernels on the GPU that will run them (rule R08).",
            hint="Give the container its GPUs; CUDA_VISIBLE_DEVICES may hide them. Or build for the reference "
            "executor: --gpu cpu. `builder plan` works everywhere.",
        )
    wrong = [gpu for gpu in seen[:world_size] if gpu.sm != sm]
    if wrong:
        raise UnsupportedError(
            f"The {resolved.gpu.name} profile was asked for, and this machine's {wrong[0].name} is sm{wrong[0].sm}.",
            why="trtllm-build builds for the GPU that it runs on, and the engine would run on no other architecture.",
            hint="Build on the card that will serve it, or for this one: --gpu auto",
        )
    if serving and len(seen) < world_size:
        raise UnsupportedError(
            f"The engine needs {world_size} GPUs to be served and tested, and this machine has {len(seen)}.",
            why="--tp times --pp is the number of its ranks, and each rank needs its own GPU.",
            hint="Build it here without serving: --no-smoke. Or reduce --tp and --pp.",
        )


def build(checkpoint: Checkpoint, flags: Sequence[trtllm_flags.Flag], resolved: Resolved, *, store: Store) -> Engine:
    """Builds the engine with these flags, or finds it in the store.

    For the reference target it is the checkpoint with the same config.json.
    """
    recipe = resolved.recipe
    by_tensorrt = target_facts(recipe.target).builds_tensorrt
    ingredients = {
        "checkpoint": checkpoint.digest,
        "target": recipe.target,
        "sm": resolved.gpu.sm,
        "flags": [[flag.name, flag.value] for flag in flags],
        "tensorrt_llm": recipe.engine.tensorrt_llm,
        "libraries": library_versions("tensorrt_llm", "tensorrt") if by_tensorrt else {},
        "sources": sources_digest(
            "builder/trtllm/engine.py",
            "builder/trtllm/flags.py",
            "builder/trtllm/probe_results.py",
            "builder/trtllm/versions.py",
            "builder/trtllm/rules.py",
            "builder/lora/modules.py",
            # The reference engine's build_config is made of the version's defaults.
            paths.data("configs", "trtllm", recipe.engine.tensorrt_llm),
        ),
    }
    work = _run_trtllm_build if by_tensorrt else _write_reference
    version = recipe.engine.tensorrt_llm

    def make(directory: Path) -> Mapping[str, Any]:
        facts = work(EngineJob(checkpoint, flags, version, directory), store)
        _write_built_with(directory, recipe.target, flags, facts)
        return facts

    artifact = store.stage("engine", ingredients, make)
    return Engine(artifact.path, artifact.digest, artifact)


def _write_built_with(
    directory: Path, target: str, flags: Sequence[trtllm_flags.Flag], facts: Mapping[str, Any]
) -> None:
    """Records what the engine was built with in its directory, so that a copied engine can still be validated."""
    by_tensorrt = target_facts(target).builds_tensorrt
    gpu = next(iter(visible() or []), None) if by_tensorrt else None
    record = {
        "target": target,
        "tensorrt_llm": facts["version"],
        "tensorrt": installed("tensorrt") if by_tensorrt else None,
        "sm": gpu.sm if gpu else None,
        "gpu": gpu.name if gpu else None,
        "driver": gpu.driver if gpu else None,
        "world_size": facts["world_size"],
        "flags": {flag.name: flag.value for flag in flags},
    }
    (directory / BUILT_WITH).write_text(json.dumps(record, indent=2), encoding="utf-8")


def _write_reference(job: EngineJob, store: Store) -> Mapping[str, Any]:
    checkpoint, directory = job.checkpoint, job.directory
    pretrained = json.loads((checkpoint.tensorrt_llm / "config.json").read_text(encoding="utf-8"))
    config = {
        "version": job.version,
        "pretrained_config": pretrained,
        "build_config": trtllm_flags.build_config(trtllm_flags.load(job.version), job.flags, pretrained),
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    hashed = {}
    layers = checkpoint.tensorrt_llm / QUANT_CFG
    if layers.is_file():  # trtllm-build writes one too (builder.py, 1.2, Engine.save)
        shutil.copyfile(layers, directory / QUANT_CFG)
    made = read(checkpoint.path)
    for rank in sorted(checkpoint.tensorrt_llm.glob("rank*.safetensors")):
        _link(rank, directory / rank.name)
        if made:
            hashed[rank.name] = made.manifest["files"][f"tensorrt_llm/{rank.name}"]["sha256"]
    return {
        "hashed": hashed,
        "command": None,
        "version": job.version,
        "world_size": pretrained["mapping"]["world_size"],
    }


def _link(source: Path, target: Path) -> None:
    """Hard-links a file, or copies it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _run_trtllm_build(job: EngineJob, store: Store) -> Mapping[str, Any]:
    kept = timing_cache(store.root, job.version)
    with _own_timing_cache(kept) as own:
        return _built(job, store, own, kept)


def timing_cache(root: Path, version: str) -> Path:
    """The timing cache that builds with the same TensorRT version and GPU share; TensorRT accepts no other."""
    tensorrt, gpu = library_versions("tensorrt")["tensorrt"], next(iter(visible() or []), None)
    words = [f"tensorrt_llm-{version}"]
    words += [f"tensorrt-{tensorrt}"] if tensorrt != "absent" else []
    words += [f"sm{gpu.sm}", re.sub(r"[^A-Za-z0-9]+", "-", gpu.name).strip("-")] if gpu else []
    return root / "timing" / ("-".join(words) + ".cache")


@contextmanager
def _own_timing_cache(kept: Path) -> Iterator[Path]:
    """A copy of the timing cache for one build, which replaces the shared one if the build succeeds.

    trtllm-build writes the file in place at its end, so an interrupted or concurrent build would damage it.
    """
    own = kept.parent / f".{kept.stem}.{os.getpid()}.tmp"
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        own.write_bytes(kept.read_bytes() if kept.exists() else b"")  # an empty file starts a new cache
        yield own
        own.replace(kept)
    finally:
        own.unlink(missing_ok=True)


def _built(job: EngineJob, store: Store, own: Path, kept: Path) -> Mapping[str, Any]:
    layout, directory = job.checkpoint.tensorrt_llm, job.directory
    argv = trtllm_flags.command(job.flags, checkpoint=layout, output=directory, timing_cache=own)
    log = store.log("trtllm-build")
    store.out.info(f"running trtllm-build; its log: {log}")
    pretrained = json.loads((layout / "config.json").read_text(encoding="utf-8"))
    world_size = pretrained["mapping"]["world_size"]
    finished, said = _watched(argv, log, kept.parent, world_size, store)
    built = check_built(directory, job.version, world_size)
    paste = trtllm_flags.command(job.flags, checkpoint=layout, output=Path("ENGINE"), timing_cache=kept)
    return {
        "command": paste,
        "log": str(log),
        "version": built["version"],
        "world_size": world_size,
        "seconds": round(finished.seconds, 1),
        "max_rss": finished.max_rss,
        "phases": said.rounded(),
        "peak_gpu_memory": said.peak_gpu_memory,
    }


def _watched(
    argv: Sequence[str], log: Path, cwd: Path, world_size: int, store: Store
) -> tuple[process.Finished, build_log.BuildLog]:
    """Runs trtllm-build and shows its phases from the log. A known failure is raised with its cause and hint."""
    with store.out.progress("trtllm-build: starting") as bar:

        def show(phase: str, after: float) -> None:
            if store.out.live:
                bar.update(0, label=f"trtllm-build: {phase}")
            else:
                store.out.info(f"trtllm-build: {phase}, after {seconds(after)}")

        said = build_log.BuildLog(world_size, show)
        try:
            finished = process.run(process.Command(argv, env=cuda_order(), cwd=cwd), log=log, on_line=said.read_line)
        except StageError as error:
            raise build_log.explained(error, log) from error
        said.end()
    store.out.info(f"trtllm-build took {seconds(finished.seconds)}: {said.summary()}")
    return finished, said


def check_built(directory: Path, version: str, world_size: int) -> Mapping[str, Any]:
    """Checks the result, as trtllm-build can exit with 0 and leave files out. Returns the engine's config.json.

    StageError if a file is missing, IntegrityError if another TensorRT-LLM version built it.
    """
    ranks = [directory / f"rank{rank}.engine" for rank in range(world_size)]
    if not all(file.is_file() and file.stat().st_size for file in (directory / "config.json", *ranks)):
        wanted = "rank0.engine" if world_size == 1 else f"rank0.engine to rank{world_size - 1}.engine"
        raise StageError(f"trtllm-build exited with 0 but did not write config.json and {wanted}.")
    built: Mapping[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if built.get("version") != version:
        raise IntegrityError(
            f"The engine was built by TensorRT-LLM {built.get('version')}, and {version} was asked for.",
            why="An engine runs only on the version that built it.",
            hint=f"Build in an image with {version}, or ask for this one: "
            f"--set engine.tensorrt_llm={built.get('version')}",
        )
    return built
