"""Locates data files that ship with the project, and the user's cache directory."""

from __future__ import annotations

import functools
import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def data(*parts: str) -> Path:
    """The path of a shipped file or directory: `data("configs", "gpus")` -> .../configs/gpus.

    Data files are beside the package in a checkout, and inside it in an installed wheel."""
    return _root().joinpath(*parts)


@functools.cache
def _root() -> Path:
    inside = _PACKAGE / "data"
    return inside if inside.is_dir() else _PACKAGE.parent


def user_cache() -> Path:
    """The user's cache directory, absolute: XDG_CACHE_HOME, which containers have on a volume, or ~/.cache."""
    named = os.environ.get("XDG_CACHE_HOME")
    return Path(named).absolute() if named else Path.home() / ".cache"
