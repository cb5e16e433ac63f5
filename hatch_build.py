"""Compiles the C extension of builder/formats/kernels when the project is installed or built.

hatchling calls it; setuptools knows the compiler and its flags. Without a compiler or Python's headers the project
installs all the same and computes with torch. BUILDER_REQUIRE_KERNELS=1 makes that an error.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from setuptools import Distribution, Extension

KERNELS = "builder/formats/kernels"
SOURCES = ("native.c", "loops.h", "search.h")
# No fused multiply-add and no reordering: both change bytes. Comparisons need not trap, or GCC vectorizes none of them.
FLAGS = ["-std=gnu11", "-O3", "-g0", "-fno-fast-math", "-ffp-contract=off", "-fno-trapping-math"]


class Kernels(BuildHookInterface):  # type: ignore[type-arg]
    """Adds the extension to a wheel; for an editable installation it lies beside its source."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before the wheel is written. version: "standard" or "editable"."""
        root = Path(self.root)
        self.scratch = tempfile.TemporaryDirectory()
        built = compiled(root, Path(self.scratch.name))
        if built is None:
            if os.environ.get("BUILDER_REQUIRE_KERNELS"):
                raise SystemExit("BUILDER_REQUIRE_KERNELS is set, and the C extension did not compile (see above)")
            self.app.display_warning("The C extension did not compile: packing will use torch, which is slower.")
        elif version == "editable":
            install(built, root / KERNELS / built.name)
        else:
            build_data["force_include"][str(built)] = f"{KERNELS}/{built.name}"
            build_data["pure_python"] = False
            build_data["tag"] = f"cp311-abi3-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Called when the wheel is written."""
        self.scratch.cleanup()


def install(built: Path, place: Path) -> None:
    """Puts the extension at `place`, also from another file system: /tmp is one of its own on many machines. A process
    that runs the old one keeps it."""
    copy = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.copy2(built, copy)
    copy.replace(place)


def compiled(root: Path, target: Path) -> Path | None:
    """Compiles the extension below `target`; None if that failed, which setuptools then has printed."""
    sources = [root / KERNELS / name for name in SOURCES]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    extension = Extension(
        f"{KERNELS.replace('/', '.')}._native",
        [str(sources[0])],
        define_macros=[("SOURCE", f'"{digest}"')],
        extra_compile_args=FLAGS,
        py_limited_api=True,
        optional=True,
    )
    command: Any = Distribution({"ext_modules": [extension]}).get_command_obj("build_ext")
    command.build_lib, command.build_temp = str(target / "lib"), str(target / "temp")
    command.ensure_finalized()
    command.run()
    return next((target / "lib").rglob("_native*"), None)
