"""Container images and the versions in them, from configs/containers.yaml. No side effects."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from builder.core import paths
from builder.core.errors import UnsupportedError
from builder.core.untrusted_text import parse_yaml


@dataclass(frozen=True)
class Container:
    """A container image. A version is None if no source names it.

    `engine`: whether the image has trtllm-build and Triton's C++ backend. `gb`: its size in units of 10^9 bytes.
    """

    image: str
    triton: str | None
    tensorrt_llm: str
    tensorrt: str | None
    cuda: str | None
    driver: str | None
    modelopt: str | None
    engine: bool
    gb: float | None


@dataclass(frozen=True)
class Needs:
    """What a GPU container needs from its machine, in bytes: shared memory, stack and disk."""

    shm_bytes: int
    stack_bytes: int
    disk_bytes: int


def rows() -> list[Container]:
    """Every known image, newest first."""
    raw = _raw()
    found = []
    for row in raw["rows"]:
        kind = "triton" if row["triton"] else "release"
        values = {key: value for key, value in row.items() if key != "tag"}
        found.append(Container(image=raw["images"][kind].format(tag=row["triton"] or row["tag"]), **values))
    return found


def newest(tensorrt_llm: str) -> Container:
    """The newest Triton image with this version of TensorRT-LLM. UnsupportedError if there is none."""
    for row in rows():
        if row.tensorrt_llm == tensorrt_llm and row.triton:
            return row
    known = dict.fromkeys(row.tensorrt_llm for row in rows() if row.triton)
    raise UnsupportedError(
        f"No Triton image with TensorRT-LLM {tensorrt_llm} is known.",
        why=f"configs/containers.yaml lists {', '.join(known)}.",
        hint=f"Choose one of those: --set engine.tensorrt_llm={next(iter(known))}",
    )


def needs() -> Needs:
    """What every GPU container needs from its machine."""
    return Needs(**_raw()["needs"])


def driver_floor(cuda: str) -> str | None:
    """The oldest driver that runs this CUDA major version at all (NVIDIA's minor version compatibility), or None."""
    floor: str | None = _raw()["driver_floor"].get(cuda.split(".")[0])
    return floor


def numbers(version: str) -> tuple[int, ...]:
    """A version as comparable numbers: 590.44.01 -> (590, 44, 1)."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


@functools.cache
def _raw() -> Mapping[str, Any]:
    loaded: Mapping[str, Any] = parse_yaml(paths.data("configs", "containers.yaml").read_text(encoding="utf-8"))
    return loaded
