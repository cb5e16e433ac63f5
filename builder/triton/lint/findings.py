"""What the lint reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Finding:
    """A fault with its place. file: relative to the repository. line: from 1 on; 0 for a file as a whole.

    error: Triton would not load the model, or would answer wrongly. warning: it works, and was hardly meant.
    """

    rule: str
    file: str
    line: int
    what: str
    fix: str
    severity: Severity = "error"

    @property
    def place(self) -> str:
        """file:line."""
        return f"{self.file}:{self.line}" if self.line else self.file
