"""Checks before a server starts that engine, repository and machine are compatible. IntegrityError if they are not.

Each check says what Triton's C++ backend would do without it: fail late, or continue silently.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from builder.core import manifest
from builder.core.errors import IntegrityError
from builder.lora import cache
from builder.machine.gpus import Seen, visible
from builder.recipe.target_facts import ENGINE, REFERENCE, TARGETS, target_facts
from builder.trtllm import references
from builder.trtllm.mismatch import STREAMING, Mismatch
from builder.trtllm.parameter_rules import ON, contradictions

ENGINE_MODEL, BLS_MODEL = "tensorrt_llm", "tensorrt_llm_bls"
BUILT_WITH = "built_with.json"  # in the engine's directory, so that a copied engine can still be validated
LOGITS_TYPES = {"float16": "TYPE_FP16", "float32": "TYPE_FP32", "bfloat16": "TYPE_BF16"}
LOGITS = ("context_logits", "generation_logits", "draft_logits")
# Parameters of the C++ backend that need an engine with paged context FMHA, and what it does with them without one
# (cpp/tensorrt_llm/batch_manager/trtGptModelInflightBatching.cpp@00825c4e: fixExecutorConfig, the constructor).
NEED_PAGED_FMHA = {
    "enable_kv_cache_reuse": "The C++ backend would turn it off and only log that.",
    "enable_chunked_context": "The C++ backend would not load the engine.",
}
# Where Triton's images keep TensorRT-LLM's Python package: a venv of their own since 26.06, the system's before.
SITES = ("/opt/venv-*/lib/python3*/site-packages", "/usr/local/lib/python3*/dist-packages")
# What is read of an engine's config.json and of built_with.json, with its type; the rest is upstream's.
CONFIG_TYPES: Mapping[str, Any] = {
    "version": str,
    "pretrained_config": {"dtype": str, "logits_dtype": str, "mapping": {"world_size": int}},
    "build_config": {"max_batch_size": int, "max_beam_width": int, "plugin_config": {}, "lora_config": {}},
}
MOST_RANKS = 4096  # of an engine; a damaged number would be a list of as many file names
BUILT_WITH_TYPES: Mapping[str, Any] = {"target": str, "tensorrt": str, "sm": int, "gpu": str}
LLM_ARGUMENTS = "Names, meanings and defaults of the LLM class's arguments differ between versions."
RENDER = "Or render the repository again: the same `builder build`, with --from render."


@dataclass(frozen=True)
class Served:
    """What a repository's config.pbtxt files say about its engine. logits: tensor name -> data type. lora_weights: the
    data type of that input, "" without one."""

    file: Path
    engine: Path
    max_batch_size: int
    max_beam_width: int
    on: frozenset[str]
    logits: Mapping[str, str]
    lora_weights: str
    decoupled: bool
    bls_decoupled: bool | None
    parameters: Mapping[str, str]


@dataclass(frozen=True)
class EngineFacts:
    """An engine's config.json, written by trtllm-build, and our built_with.json ({} if there is none)."""

    path: Path
    config: Mapping[str, Any]
    built_with: Mapping[str, Any]

    @property
    def target(self) -> str:
        """engine or reference."""
        known = self.built_with.get("target")
        return str(known or (ENGINE if any(self.path.glob("*.engine")) else REFERENCE).name)

    @property
    def is_tensorrt(self) -> bool:
        """Whether trtllm-build built it."""
        return self.target in TARGETS and target_facts(self.target).builds_tensorrt

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        pretrained = self.config.get("pretrained_config") or {}
        return int((pretrained.get("mapping") or {}).get("world_size") or 1)

    @property
    def build(self) -> Mapping[str, Any]:
        """build_config of config.json."""
        found: Mapping[str, Any] = self.config.get("build_config") or {}
        return found


@dataclass(frozen=True)
class Runtime:
    """What would run the engine: GPUs and installed library versions; None where unknown.

    chosen: CUDA_VISIBLE_DEVICES is set, so GPU numbers here are not those of the machine.
    """

    gpus: Sequence[Seen] | None = None
    tensorrt_llm: str | None = None
    tensorrt: str | None = None
    chosen: bool = False


def check(models: Path, runtime: Runtime | None = None) -> None:
    """Raises IntegrityError with all incompatibilities, the most important first.

    runtime: this machine by default. For a repository of the llmapi target only the TensorRT-LLM version is compared,
    if it is installed.
    """
    found = [one for prefix in prefixes(models) or [""] for one in _of_model(models, prefix, runtime)]
    if found:
        raise _refusal(found)


def prefixes(models: Path) -> list[str]:
    """What the names of Triton's models begin with, for each model of the repository; "" if it has only one."""
    names = (path.name for path in models.glob(f"*{ENGINE_MODEL}") if path.is_dir())
    found = sorted(name.removesuffix(ENGINE_MODEL) for name in names)
    return [prefix for prefix in found if not prefix or prefix.endswith("_")]


def _of_model(models: Path, prefix: str, runtime: Runtime | None) -> list[Mismatch]:
    served = read_served(models, prefix)
    if served is None:
        return list(_llmapi(models, prefix, runtime))
    if found := missing(served):
        return found
    engine = read_engine(served.engine)
    if runtime is None and engine.is_tensorrt:
        runtime = here()
    return mismatches(served, engine, runtime or Runtime())


def read_served(models: Path, prefix: str = "") -> Served | None:
    """What config.pbtxt says about the engine, parsed as Triton parses it; None for a repository without an engine.

    prefix: of the names of Triton's models, in a repository of several.
    """
    config = parse(models / f"{prefix}{ENGINE_MODEL}" / "config.pbtxt")
    parameters = {name: value.string_value for name, value in config.parameters.items()} if config else {}
    if not parameters.get("gpt_model_path"):
        return None
    bls = parse(models / f"{prefix}{BLS_MODEL}" / "config.pbtxt")
    tensors = [tensor for tensor in (*config.input, *config.output) if tensor.name in LOGITS]
    return Served(
        file=models / f"{prefix}{ENGINE_MODEL}" / "config.pbtxt",
        engine=references.resolved(parameters["gpt_model_path"], models / f"{prefix}{ENGINE_MODEL}"),
        max_batch_size=config.max_batch_size,
        max_beam_width=_number(parameters.get("max_beam_width"), 1),
        on=frozenset(n for n in NEED_PAGED_FMHA if parameters.get(n) in ON),
        logits={tensor.name: _type(tensor) for tensor in tensors},
        lora_weights=next((_type(tensor) for tensor in config.input if tensor.name == "lora_weights"), ""),
        decoupled=config.model_transaction_policy.decoupled,
        bls_decoupled=bls.model_transaction_policy.decoupled if bls else None,
        parameters={name: value for name, value in parameters.items() if value and not value.startswith("${")},
    )


def _type(tensor: Any) -> str:
    from tritonclient.grpc import model_config_pb2

    return str(model_config_pb2.DataType.Name(tensor.data_type))


def read_engine(directory: Path) -> EngineFacts:
    """An engine's facts from its directory. A missing file counts as empty."""
    config = _json(directory / "config.json", CONFIG_TYPES)
    return EngineFacts(directory, config, _json(directory / BUILT_WITH, BUILT_WITH_TYPES))


def here() -> Runtime:
    """This machine: GPUs from NVML, and versions of the libraries in this Python or in Triton's image."""
    chosen = "CUDA_VISIBLE_DEVICES" in os.environ
    return Runtime(visible(), installed("tensorrt_llm"), installed("tensorrt"), chosen)


def lacking_paged_fmha(build_config: Mapping[str, Any], asked: Sequence[str]) -> list[str]:
    """Those of `asked` (names in NEED_PAGED_FMHA) that an engine with this build_config does not support."""
    return [] if has_paged_fmha(build_config) else [name for name in NEED_PAGED_FMHA if name in asked]


def has_paged_fmha(build_config: Mapping[str, Any]) -> bool:
    """Whether the engine was built with paged context FMHA."""
    return (build_config.get("plugin_config") or {}).get("use_paged_context_fmha") in (True, "enable", "true")


def missing(served: Served) -> list[Mismatch]:
    """A missing engine directory, or missing files in it.

    For a missing directory the backend reports that both model paths are empty: it takes it for an unset parameter
    (model_instance_state.cc@c8c6df08, the constructor).
    """
    if not served.engine.is_dir():
        what = f"There is no engine at {served.engine}, where {served.file} looks for it."
        why = "It was moved or removed, or has another path in this container."
    else:
        engine = read_engine(served.engine)
        suffix = "engine" if engine.is_tensorrt else "safetensors"
        files = ["config.json", *(f"rank{rank}.{suffix}" for rank in range(engine.world_size))]
        absent = [name for name in files if not (served.engine / name).is_file()]
        if not absent:
            return []
        what, why = (
            f"The engine at {served.engine} lacks {', '.join(absent)}.",
            "The copy or the build is incomplete.",
        )
    hint = (
        "Restore it there, or run the same `builder build` again, which rebuilds what is missing. To move a repository "
    )
    hint += "with its engine: builder export REPOSITORY DIRECTORY"
    return [Mismatch(what=what, why=why, hint=hint)]


def mismatches(served: Served, engine: EngineFacts, runtime: Runtime) -> list[Mismatch]:
    """All incompatibilities, the most important first. The reference executor needs no GPU and no TensorRT-LLM."""
    found: list[Mismatch] = []
    if engine.is_tensorrt:
        found += [*_versions(engine, runtime), *_cards(engine, runtime)]
    found += [*_paged(served, engine), *_sizes(served, engine), *_logits(served, engine), *_adapters(served, engine)]
    found += _streaming(served)
    if not engine.build:
        return found
    contradicted = contradictions(served.parameters, engine.build, engine.world_size)
    return [*found, *(replace(one, hint=f"{one.hint} {RENDER}") for one in contradicted)]


def _versions(engine: EngineFacts, runtime: Runtime) -> Iterator[Mismatch]:
    """The backend logs the engine's version and compares nothing (gptJsonConfig.cpp, parseJson): TensorRT's own check
    fails when the engine is loaded (triton-inference-server/tensorrtllm_backend #531), or nothing does."""
    built, have = engine.config.get("version"), runtime.tensorrt_llm
    if built and have and built != have:
        yield Mismatch(
            what=f"The engine was built by TensorRT-LLM {built}, and this machine has {have}.",
            why="An engine runs only on the version that built it.",
            hint=f"Serve it in an image with TensorRT-LLM {built}, or build here: --set engine.tensorrt_llm={have}",
        )
    # docs.nvidia.com/deeplearning/tensorrt, Version Compatibility; trtllm-build sets no VERSION_COMPATIBLE.
    built, have = engine.built_with.get("tensorrt"), runtime.tensorrt
    if built and have and built != have:
        yield Mismatch(
            what=f"The engine was built by TensorRT {built}, and this machine has {have}.",
            why="A TensorRT engine runs only on the version that built it; Triton would exit with a version tag "
            "mismatch.",
            hint="Serve it in the image that built it, or build it again here: the same `builder build`.",
        )


def _llmapi(models: Path, prefix: str, runtime: Runtime | None) -> Iterator[Mismatch]:
    """The LLM class of another version accepts arguments of the same name, but may treat them differently."""
    config = parse(models / f"{prefix}{ENGINE_MODEL}" / "config.pbtxt")
    parameters = {name: value.string_value for name, value in config.parameters.items()} if config else {}
    rendered = parameters.get("tensorrt_llm")
    have = runtime.tensorrt_llm if runtime else installed("tensorrt_llm")
    if rendered and have and rendered != have:
        yield Mismatch(
            what=f"The repository was rendered for TensorRT-LLM {rendered}, and this machine has {have}.",
            why=LLM_ARGUMENTS,
            hint=f"Serve it in an image with TensorRT-LLM {rendered}, or render it for this one: the same `builder "
            f"build`, with --set engine.tensorrt_llm={have}",
        )


def _cards(engine: EngineFacts, runtime: Runtime) -> Iterator[Mismatch]:
    """Each rank needs a GPU of the engine's architecture. Rank n uses GPU n (worldConfig.cpp)."""
    sm, ranks, gpus = engine.built_with.get("sm"), engine.world_size, runtime.gpus
    if gpus is None:
        return
    card = f"sm{sm} ({engine.built_with.get('gpu')})" if sm else "its architecture"
    if len(gpus) < ranks:
        yield Mismatch(
            what=f"The engine has {ranks} rank{'s' * (ranks > 1)}, and "
            f"{len(gpus) or 'no'} GPU{' is' if len(gpus) < 2 else 's are'} visible here.",
            why="Each rank needs its own GPU; with fewer, TensorRT-LLM only warns and puts several on one.",
            hint=f"Serve it on a machine with {ranks} of {card}; a container needs access to its GPUs, and "
            "CUDA_VISIBLE_DEVICES may hide some. Without a GPU: build for the reference executor, --gpu cpu.",
        )
        return
    wrong = [(index, gpu) for index, gpu in enumerate(gpus[:ranks]) if sm and gpu.sm != sm]
    fitting = [str(number) for number, gpu in enumerate(gpus) if gpu.sm == sm]
    hint = f"Serve it on {card}, or build for this machine: the same `builder build` with --gpu auto."
    if len(fitting) >= ranks and not runtime.chosen:
        hint = f"Choose the GPUs that it was built for: CUDA_VISIBLE_DEVICES={','.join(fitting[:ranks])}"
    # docs.nvidia.com/deeplearning/tensorrt, Engine Compatibility: trtllm-build does not use the hardware compatibility
    # mode; TensorRT-LLM #3031 is what it looks like.
    for index, gpu in wrong[:1]:
        yield Mismatch(
            what=f"The engine was built for {card}, and GPU {index} here, {gpu.name}, is sm{gpu.sm}.",
            why="A TensorRT engine runs only on the architecture that it was built for; Triton would exit with an "
            "incompatible device error.",
            hint=hint,
        )


def _paged(served: Served, engine: EngineFacts) -> Iterator[Mismatch]:
    for name in lacking_paged_fmha(engine.build, tuple(served.on)):
        yield Mismatch(
            what=f"{name} is true in {served.file}, and the engine has no paged context FMHA.",
            why=NEED_PAGED_FMHA[name],
            hint=f"Set {name} to false there, or build with --set engine.flags.use_paged_context_fmha=enable on a "
            f"profile with context FMHA. {RENDER}",
        )


def _sizes(served: Served, engine: EngineFacts) -> Iterator[Mismatch]:
    batch, asked = engine.build.get("max_batch_size"), served.max_batch_size
    if batch and asked > batch:
        yield Mismatch(
            what=f"max_batch_size is {asked} in {served.file}, and the engine was built for {batch}.",
            # ExecutorConfig{... maxBatchSize = std::nullopt ...}: model_instance_state.cc@c8c6df08.
            why="The C++ backend ignores it: the engine keeps its own limit, and further requests wait.",
            hint=f"Set it to {batch} at most, or build with --max-batch-size {asked}. {RENDER}",
        )
    beams, asked = engine.build.get("max_beam_width") or 1, served.max_beam_width
    if asked > beams:
        yield Mismatch(
            what=f"max_beam_width is {asked} in {served.file}, and the engine was built for {beams}.",
            # trtGptModel.h@2e2327b9: "Runtime configured max beam width (%d) must not exceed ..."
            why="The C++ backend would not load the engine.",
            hint=f"Set it to {beams}, or build with --set engine.flags.max_beam_width={asked}. {RENDER}",
        )


def _logits(served: Served, engine: EngineFacts) -> Iterator[Mismatch]:
    """TLLM_CHECK(contextLogitsType == model_state_->getLogitsDataType()), when it sends a response
    (model_instance_state.cc@c8c6df08)."""
    dtype = (engine.config.get("pretrained_config") or {}).get("logits_dtype")
    wanted = LOGITS_TYPES.get(dtype or "")
    wrong = [f"{name} {kind}" for name, kind in served.logits.items() if wanted and kind != wanted]
    if wrong:
        yield Mismatch(
            what=f"{served.file} declares {', '.join(wrong)}, and the engine's logits are {dtype}: {wanted}.",
            why="The C++ backend would load the engine and fail each request for logits.",
            hint=f"Set the type there to {wanted}. {RENDER}",
        )


def _adapters(served: Served, engine: EngineFacts) -> Iterator[Mismatch]:
    """loraValidateRequestTensors (tensorrt_llm/runtime/loraUtils.cpp@2a9abd95): the data type is that of the model."""
    dtype = (engine.config.get("pretrained_config") or {}).get("dtype")
    wanted = LOGITS_TYPES.get(dtype or "")
    if cache.has_adapters(engine.build) and wanted and served.lora_weights not in ("", wanted):
        yield Mismatch(
            what=f"{served.file} declares lora_weights {served.lora_weights}, and the engine computes in {dtype}: "
            f"{wanted}.",
            why="The C++ backend would load the engine and fail each request that brings an adapter.",
            hint=f"Set the type there to {wanted}. {RENDER}",
        )


def _streaming(served: Served) -> Iterator[Mismatch]:
    """Streaming needs every model on the path of a response to be decoupled."""
    engine, bls = served.decoupled, served.bls_decoupled
    if bls is not None and bls != engine:
        yield Mismatch(
            what=f"decoupled is {str(engine).lower()} for {ENGINE_MODEL} and {str(bls).lower()} for {BLS_MODEL}.",
            why="Streaming needs both to be decoupled; otherwise streaming requests fail.",
            hint=f"Set model_transaction_policy of both config.pbtxt files to the same. {RENDER}",
            about=STREAMING,
        )


def _refusal(found: Sequence[Mismatch]) -> IntegrityError:
    first = found[0]
    if len(found) == 1:
        return IntegrityError(first.what, why=first.why, hint=first.hint)
    why = [f"{number}. {one.what} {one.why}" for number, one in enumerate(found, 1)]
    return IntegrityError(
        f"Engine, repository and machine are incompatible in {len(found)} ways; no server was started.",
        why="\n".join(why),
        hint="\n".join(f"{number}. {one.hint}" for number, one in enumerate(found, 1)),
    )


def parse(file: Path) -> Any:
    """A config.pbtxt as a ModelConfig; None if the file does not exist."""
    if not file.is_file():
        return None
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    try:
        return text_format.Parse(file.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    except (text_format.ParseError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{file} does not parse.", why=str(error), hint=f"Fix it. {RENDER}") from error


def _number(text: str | None, default: int) -> int:
    """Reads a number as the backend does: anything else counts as unset (std::stoi throws, and the default is kept)."""
    return int(text) if text and text.strip().isdecimal() else default


def _json(file: Path, types: Mapping[str, Any]) -> Mapping[str, Any]:
    """A JSON object whose values have these types, if present; an empty object if the file does not exist."""
    if not file.is_file():
        return {}
    try:
        loaded = manifest.read_object(file)
        _check_types(loaded, types)
    except manifest.Damaged as error:
        raise IntegrityError(
            f"{file} can't be read.", why=str(error), hint="Build the engine again: --from engine"
        ) from error
    return loaded


def _check_types(value: Mapping[str, Any], types: Mapping[str, Any]) -> None:
    for name, kind in types.items():
        found = value.get(name)
        if found is None:
            continue
        if isinstance(kind, Mapping):
            if not isinstance(found, Mapping):
                raise manifest.Damaged(f"{name} is {ascii(found)[:80]}")
            _check_types(found, kind)
        elif type(found) is not kind or (kind is int and not 0 < found < 1 << 31):
            raise manifest.Damaged(f"{name} is {ascii(found)[:80]}")
    if types.get("world_size") and (value.get("world_size") or 1) > MOST_RANKS:
        raise manifest.Damaged(f"world_size is {value['world_size']}")


def installed(name: str) -> str | None:
    """The version of a distribution in this Python or in Triton's image; None if it is not installed."""
    sites = [str(site) for pattern in SITES for site in Path("/").glob(pattern.lstrip("/"))]
    found = next(iter(metadata.distributions(name=name, path=[*sys.path, *sites])), None)
    return found.version if found else None
