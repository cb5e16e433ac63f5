"""The environment that AIPerf runs in: made once for each user, with pinned versions, and kept.

AIPerf's dependencies conflict with ours and with those of NVIDIA's images, so it can't be installed beside them.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from builder.core import interrupts, paths, process
from builder.core.atomic import disk_error, make_directory
from builder.core.errors import BuilderError, StageError, UsageError
from builder.core.locks import flock, lock_file
from builder.core.output import Output

NAMED = "BUILDER_AIPERF"  # an environment with AIPerf that the user made
# Measured with Python 3.11 on two busy cores and a registry nearby: 1.2 GB, 3 minutes.
COST = "about 1.2 GB on disk, and some minutes"


@dataclass(frozen=True)
class Environment:
    """A Python environment with AIPerf."""

    root: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.root / "bin" / "python"


def requirements() -> Path:
    """The file that pins AIPerf and all that it needs."""
    return paths.data("configs", "aiperf", "requirements.txt")


def version() -> str:
    """The version of AIPerf that is pinned."""
    return next(pin.removeprefix("aiperf==") for pin in _pins() if pin.startswith("aiperf=="))


def cache() -> Path:
    """The directory that it is kept in."""
    return paths.user_cache() / "trtllm-builder"


def place() -> Path:
    """Its directory. Other versions, and other Pythons that share the cache, have others."""
    made_from = [requirements().read_text(encoding="utf-8"), sys.base_prefix, sys.version, platform.machine()]
    digest = hashlib.sha256("\0".join(made_from).encode()).hexdigest()
    return cache() / f"aiperf-{version()}-{digest[:12]}"


def environment(out: Output, source: Mapping[str, str] | None = None) -> Environment:
    """The environment that BUILDER_AIPERF names, or ours, which is made if it is not there.

    UsageError if the named one has no AIPerf, StageError if ours can't be made.
    """
    named = (os.environ if source is None else source).get(NAMED)
    if named:
        return _named(Path(named))
    found = Environment(place())
    if found.python.exists():  # false for a link to a Python that was removed
        with suppress(OSError):  # a cache that only its owner can write to
            os.utime(found.root)  # `builder clean` removes those of other versions that were not used for long
        return found
    with lock_file(cache() / "aiperf.lock") as lock:
        flock(lock, fcntl.LOCK_EX)
        if not found.python.exists():  # else another command has just made it
            _make(found, out)
    return found


def _named(root: Path) -> Environment:
    found = Environment(root.absolute())
    if not found.python.exists() or not list(root.glob("lib/python*/site-packages/aiperf")):
        raise UsageError(
            f"{NAMED} is {root}, which is not an environment with AIPerf.",
            why="There is no bin/python in it, or no AIPerf among its packages (lib/python*/site-packages).",
            hint=f"python3 -m venv DIR && DIR/bin/pip install aiperf=={version()}, then {NAMED}=DIR; or unset it",
        )
    return found


def _make(wanted: Environment, out: Output) -> None:
    """Makes it under another name and renames it, so that it is there whole or not at all. Called under a lock."""
    parent = wanted.root.parent
    make_directory(parent)
    for stale in (*parent.glob(".aiperf-*.tmp"), wanted.root):  # of a killed command; with a Python that was removed
        shutil.rmtree(stale, ignore_errors=True)
    out.info(f"making AIPerf's environment, once: {COST}, in {wanted.root}")
    tmp = None
    try:
        with interrupts.deferred():
            tmp = Path(tempfile.mkdtemp(prefix=".aiperf-", suffix=".tmp", dir=parent))
        _install(tmp, out)
        tmp.rename(wanted.root)
    except OSError as error:
        raise disk_error(error, parent) from error
    finally:
        if tmp is not None:
            with interrupts.deferred():
                shutil.rmtree(tmp, ignore_errors=True)


def _install(root: Path, out: Output) -> None:
    """pip of this Python installs into the environment, which needs none then: Debian packages ensurepip apart."""
    log = root / "install.log"
    us = process.python()
    # pip's own settings may hold the address of a registry. kind "public": proxies, but no token of the Hub.
    settings = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    install = [us, "-m", "pip", "--python", str(root / "bin" / "python"), "install", "--no-input"]
    install += ["--disable-pip-version-check", "--progress-bar", "off", "--no-compile", "-r", str(requirements())]
    try:
        process.run(process.Command([us, "-m", "venv", "--without-pip", str(root)]), log=log)
        with out.progress("installing AIPerf", unit="packages", total=_count()) as bar:
            seen: set[str] = set()

            def collected(line: str) -> None:
                if line.startswith("Collecting "):
                    seen.add(line)
                    bar.update(len(seen))
                elif line.startswith("Installing "):
                    bar.update(len(seen), label="unpacking AIPerf")

            process.run(process.Command(install, env=settings, kind="public"), log=log, on_line=collected)
    except process.Failed as error:
        raise _not_installed(process.tail(log, 6)) from error


def _not_installed(why: str) -> BuilderError:
    return StageError(
        "AIPerf's environment could not be made.",
        why=why,
        hint="It needs the package registry once, through pip and its settings. Without a network, make it elsewhere "
        f"(python3 -m venv DIR && DIR/bin/pip install -r {requirements()}) and name it: {NAMED}=DIR. "
        "builder load needs no AIPerf.",
    )


def _count() -> int:
    return len(_pins())


def _pins() -> list[str]:
    """NAME==VERSION of each package. Their hashes are on the lines below, so pip accepts no other file."""
    lines = requirements().read_text(encoding="utf-8").splitlines()
    return [line.split()[0] for line in lines if line[:1].isalnum()]
