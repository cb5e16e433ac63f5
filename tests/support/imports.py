"""Which modules of ours a file imports, read from its source: nothing is imported."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def modules() -> dict[str, Path]:
    """Every module of ours and its file, by dotted name: builder.core.store."""
    files = sorted((ROOT / "builder").rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in files}


def imported(path: Path, *, inner: bool = True) -> set[str]:
    """The modules of ours that a file imports; without `inner` only where it is loaded, not inside functions."""
    known, tree = modules(), ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if inner else tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "builder":
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else str(node.module) for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
    return found
