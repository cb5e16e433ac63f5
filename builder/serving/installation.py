"""Finds a Triton server on this machine: NVIDIA's, or the one in the nvidia-pytriton wheel."""

from __future__ import annotations

import re
import shutil
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from builder.core.environment import child_environment
from builder.core.errors import ServingError

CONTAINER = Path("/opt/tritonserver")


@dataclass(frozen=True)
class Installation:
    """A Triton server: its binary, its directory of backends, its Python backend's files, its environment variables."""

    binary: Path
    backends: Path
    python_backend: tuple[Path, ...]
    environment: Mapping[str, str]


def find_server() -> Installation:
    """The server on the PATH, else the one in NVIDIA's container, else the one in the nvidia-pytriton wheel.

    ServingError if there is none, or if the wheel's cannot run here.
    """
    on_path = shutil.which("tritonserver")
    binary = Path(on_path) if on_path else CONTAINER / "bin" / "tritonserver"
    if binary.is_file():
        backends = binary.resolve().parent.parent / "backends"
        return Installation(binary, backends, tuple(sorted((backends / "python").glob("*"))), child_environment())
    return _wheel()


def _wheel() -> Installation:
    try:
        package = metadata.distribution("nvidia-pytriton")
    except metadata.PackageNotFoundError:
        raise ServingError(
            "There is no Triton server on this machine.",
            why=f"There is no tritonserver on the PATH or in {CONTAINER}, and nvidia-pytriton is not installed.",
            hint="pip install --no-deps nvidia-pytriton==0.7.0, or run in NVIDIA's Triton image.",
        ) from None
    site = Path(str(package.locate_file("")))
    home = site / "pytriton" / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = home / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        raise ServingError(
            f"nvidia-pytriton {package.version} has no Python backend for Python {version}.",
            hint="Use Python 3.11 or 3.12.",
        )
    libraries, programs = _paths(package)
    _check_paths(libraries, programs)
    environment = child_environment() | {
        # The Python backend runs the first python3 on the PATH, so that must be the one with the models' packages.
        "PATH": f"{programs}:/usr/local/bin:/usr/bin:/bin",
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "LANG": "C.UTF-8",
        "OMP_WAIT_POLICY": "PASSIVE",  # torch's idle threads must not spin on a core that a tokenizer needs
        "PYTHONUNBUFFERED": "1",
    }
    backend = home / "backends" / "python"
    files = (backend / "libtriton_python.so", backend / "triton_python_backend_utils.py", stub)
    return Installation(home / "bin" / "tritonserver", home / "backends", files, environment)


def check_paths() -> None:
    """Checks, before any work, that the wheel's server can run from its directory. ServingError if not.

    Does nothing if another server is used or there is none.
    """
    if shutil.which("tritonserver") is None and not (CONTAINER / "bin" / "tritonserver").is_file():
        with suppress(metadata.PackageNotFoundError):
            _check_paths(*_paths(metadata.distribution("nvidia-pytriton")))


def _paths(package: metadata.Distribution) -> tuple[list[Path], Path]:
    """The wheel's library directories, and the directory of the Python interpreter."""
    libraries = Path(str(package.locate_file("nvidia_pytriton.libs")))
    return [libraries, Path(str(sysconfig.get_config_var("LIBDIR")))], Path(sys.executable).parent


def _check_paths(libraries: Sequence[Path], programs: Path) -> None:
    """ServingError for a path that the server cannot use.

    LD_LIBRARY_PATH cannot contain a directory with its separators (ld.so(8)), and Triton's Python decodes paths as
    ASCII.
    """
    for directory in (*libraries, programs, Path(__file__)):
        if re.search("[:;]", str(directory)) or not str(directory).isascii():
            raise ServingError(
                f"Triton can't be started from {directory}.",
                why="The path must not contain `:`, `;` or non-ASCII characters.",
                hint="Install this project and its virtual environment in another directory.",
            )
