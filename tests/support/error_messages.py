"""Every message that the builder can raise as an error, as a regular expression, read from its sources."""

from __future__ import annotations

import ast
import difflib
import functools
import re
from pathlib import Path

from builder.core import errors

PACKAGE = Path(errors.__file__).parents[1]
KINDS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, Exception)}


@functools.cache
def patterns() -> list[tuple[str, re.Pattern[str]]]:
    """(file:line, pattern of the first argument) of every error. What is computed matches any text."""
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in KINDS and node.args:
                place = f"{file.relative_to(PACKAGE)}:{node.lineno}"
                found.append((place, re.compile(_pattern(node.args[0]), re.S)))
    return found


def _pattern(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return re.escape(str(node.value))
    if isinstance(node, ast.JoinedStr):
        return "".join(_pattern(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _pattern(node.left) + _pattern(node.right)
    return ".*"


def literal_length(pattern: re.Pattern[str]) -> int:
    """Characters of a pattern that are not computed."""
    return len(pattern.pattern.replace(".*", ""))


def raised_as(message: str) -> list[str]:
    """Where the code raises this message; patterns that are hardly more than a placeholder do not count."""
    return [place for place, pattern in patterns() if literal_length(pattern) > 12 and pattern.fullmatch(message)]


def nearest(message: str) -> str:
    """The message of the code that is most like this one, with ... for what is computed."""
    known = [re.sub(r"\\(.)", r"\1", pattern.pattern.replace(".*", "...")) for _, pattern in patterns()]
    return max(known, key=lambda text: difflib.SequenceMatcher(None, text, message).ratio())
