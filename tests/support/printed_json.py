"""The JSON object that a command prints with --json while it goes on running, as `builder serve` does."""

from __future__ import annotations

import json
import subprocess
from typing import Any


def first_object(child: subprocess.Popen[str]) -> Any:
    """Reads stdout up to the end of the object."""
    assert child.stdout is not None
    lines = []
    for line in child.stdout:
        lines.append(line)
        if line.startswith("}"):
            break
    return json.loads("".join(lines))
