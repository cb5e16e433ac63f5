"""Where the project's own data lies: beside the package in a checkout, inside it once installed as a wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def data(*parts: str) -> Path:
    """`data("configs", "gpus")` -> the directory that ships with this version of the code."""
    inside = _PACKAGE / "data"
    return (inside if inside.is_dir() else _PACKAGE.parent).joinpath(*parts)
