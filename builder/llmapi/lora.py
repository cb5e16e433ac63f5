"""LoRA adapters that the llmapi target serves with the model: checks of their directories."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.core.errors import UsageError
from builder.core.untrusted_text import parse_json, read_regular
from builder.llmapi.adapter_files import Adapter, open_adapter, target_modules
from builder.recipe.lora import Lora

DIRECTORIES = "lora_config.lora_dir"
MODULES = "lora_config.lora_target_modules"
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
DEFAULT_RANK = 64  # lora_helper.py@585c7567, LoraConfig.max_lora_rank


def with_adapters(arguments: dict[str, Any], part: Lora) -> dict[str, Any]:
    """The arguments with the adapters of the recipe's `lora`. UsageError for one that this target can't name."""
    if not part.adapters:
        return arguments
    if arguments.get(DIRECTORIES):
        raise UsageError(
            f"LoRA adapters are named twice: by lora.adapters and by llmapi.args.{DIRECTORIES}.",
            hint="Name all of them with --lora NAME=DIRECTORY.",
        )
    found = []
    for name, place in part.adapters.items():
        directory = Path(place).expanduser().absolute()
        if not directory.is_dir() or directory.name != name:
            raise UsageError(
                f"--target llmapi serves an adapter from a directory of its name, and {name} is {place}.",
                why="TensorRT-LLM loads it from there, and requests name it by the last part of that path.",
                hint=f"Copy or download it: hf download OWNER/NAME --local-dir adapters/{name}; then "
                f"--lora {name}=adapters/{name}",
            )
        found.append(str(directory))
    most = {"lora_config.max_lora_rank": part.max_rank} if part.max_rank else {}
    return {**arguments, DIRECTORIES: found, **most, **_modules(arguments, part)}


def opened(part: Lora) -> list[Adapter]:
    """The adapters of the recipe's `lora`. Errors as for `adapter_files.open_adapter`."""
    places = {name: Path(place).expanduser() for name, place in part.adapters.items()}
    return [open_adapter(name, place.absolute()) for name, place in places.items() if place.is_dir()]


def _modules(arguments: Mapping[str, Any], part: Lora) -> dict[str, Any]:
    """The layers of several adapters: the LLM class finds those of a single one itself, and without them ends in an
    assertion (_torch/pyexecutor/_util.py, 1.2)."""
    if len(part.adapters) < 2 or arguments.get(MODULES):
        return {}
    return {MODULES: target_modules({kind for one in opened(part) for kind in one.modules})}


def directories(arguments: Mapping[str, Any]) -> list[Path]:
    """The directories of the adapters in these arguments (by dotted name), in order."""
    return [Path(path) for path in arguments.get(DIRECTORIES) or ()]


def check(arguments: Mapping[str, Any]) -> None:
    """UsageError for an adapter that does not exist, that the LLM class cannot load, or whose name is used twice."""
    names: dict[str, Path] = {}
    for directory in directories(arguments):
        if not directory.is_absolute():
            raise UsageError(
                f"The LoRA adapter {directory} must be named by its whole path: the server has another directory.",
                hint=f"--set llmapi.args.{DIRECTORIES}=[{directory.absolute()}]",
            )
        if directory.name in names:
            raise UsageError(
                f"Two LoRA adapters are called {directory.name}: {names[directory.name]} and {directory}.",
                why="Requests name an adapter by the last part of its path.",
                hint="Rename one of the two directories.",
            )
        names[directory.name] = directory
        if arguments.get("lora_config.lora_ckpt_source", "hf") == "hf":
            _check_adapter(directory, arguments.get("lora_config.max_lora_rank", DEFAULT_RANK))
    if len(directories(arguments)) > 1 and not arguments.get(MODULES):
        raise UsageError(
            f"Several LoRA adapters need llmapi.args.{MODULES}, the kinds of layers that they change.",
            why="TensorRT-LLM's LLM class finds them itself for a single adapter only.",
            hint=f"--lora NAME=DIRECTORY for each finds them, or --set llmapi.args.{MODULES}=[attn_q,attn_k,attn_v]",
        )


def _check_adapter(directory: Path, most: int) -> None:
    missing = [CONFIG] if not (directory / CONFIG).is_file() else []
    if not any((directory / name).is_file() for name in WEIGHTS):
        missing.append(WEIGHTS[0])
    if missing:
        raise UsageError(
            f"{directory} is no LoRA adapter: it has no {' and no '.join(missing)}.",
            hint="Name the directory that PEFT's save_pretrained wrote.",
        )
    try:
        rank = parse_json(read_regular(directory / CONFIG)).get("r")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{directory / CONFIG} can't be read.", why=str(error), hint="Save the adapter again."
        ) from error
    if isinstance(rank, int) and rank > most:
        raise UsageError(
            f"The LoRA adapter {directory} has rank {rank}, and max_lora_rank is {most}.",
            hint=f"--set llmapi.args.lora_config.max_lora_rank={rank}",
        )


def digests(arguments: Mapping[str, Any]) -> dict[str, str]:
    """The sha256 of each adapter's files, for the repository's key."""
    found = {}
    for directory in directories(arguments):
        digest = hashlib.sha256()
        for file in sorted(path for path in directory.glob("adapter_*") if path.is_file()):
            digest.update(file.name.encode())
            with open(file, "rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
        found[directory.name] = digest.hexdigest()
    return found
