"""Locates data files that ship with the project: beside the package in a checkout, inside it in an installed wheel."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def data(*parts: str) -> Path:
    """The path of a shipped file or directory: `data("configs", "gpus")` -> .../configs/gpus."""
    inside = _PACKAGE / "data"
    return (inside if inside.is_dir() else _PACKAGE.parent).joinpath(*parts)
