"""Where a Triton server is on this machine: the container's, or the one inside the nvidia-pytriton wheel."""

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
    """A Triton server on this machine: its binary, where its backends are, the files of its Python backend."""

    binary: Path
    backends: Path
    python_backend: tuple[Path, ...]
    environment: Mapping[str, str]


def find_server() -> Installation:
    """The server on the PATH or in NVIDIA's container; else the one in the nvidia-pytriton wheel."""
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
            why=f"No tritonserver on the PATH, none in {CONTAINER}, and nvidia-pytriton is not installed.",
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
        # The stub runs the first python3 of the PATH: it must be the one whose packages the models need.
        "PATH": f"{programs}:/usr/local/bin:/usr/bin:/bin",
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "LANG": "C.UTF-8",
        "OMP_WAIT_POLICY": "PASSIVE",  # torch's threads must not spin while a tokenizer wants the core
        "PYTHONUNBUFFERED": "1",
    }
    backend = home / "backends" / "python"
    files = (backend / "libtriton_python.so", backend / "triton_python_backend_utils.py", stub)
    return Installation(home / "bin" / "tritonserver", home / "backends", files, environment)


def check_paths() -> None:
    """Before any work: that the wheel's server can be started from where it is. No error where there is none."""
    if shutil.which("tritonserver") is None and not (CONTAINER / "bin" / "tritonserver").is_file():
        with suppress(metadata.PackageNotFoundError):
            _check_paths(*_paths(metadata.distribution("nvidia-pytriton")))


def _paths(package: metadata.Distribution) -> tuple[list[Path], Path]:
    """Where the wheel's server finds libraries, and Python."""
    libraries = Path(str(package.locate_file("nvidia_pytriton.libs")))
    return [libraries, Path(str(sysconfig.get_config_var("LIBDIR")))], Path(sys.executable).parent


def _check_paths(libraries: Sequence[Path], programs: Path) -> None:
    """LD_LIBRARY_PATH can't name a directory with its separators (ld.so(8)), and Triton's Python reads ASCII alone."""
    for directory in (*libraries, programs, Path(__file__)):
        if re.search("[:;]", str(directory)) or not str(directory).isascii():
            raise ServingError(
                f"Triton can't be started from {directory}.",
                why="Its path must have neither `:` nor `;`, and no letters but those of ASCII.",
                hint="Install this project, and its virtual environment, in another directory.",
            )
