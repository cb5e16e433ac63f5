"""Recorded requests: how long their prompts and answers were, and when they came.

A trace is a file of JSON objects, one per line, with `input_length`, `output_length` and, if arrival times are
replayed, `timestamp` in milliseconds. That is the format of Mooncake's traces (arXiv 2407.00079), which AIPerf reads.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.core.errors import UsageError

LATEST = 1e15  # milliseconds; clocks since 1970 count to 2e12
EXAMPLE = '{"timestamp": 0, "input_length": 512, "output_length": 128}'


@dataclass(frozen=True)
class Recorded:
    """One request: lengths in tokens, and milliseconds since the trace began, if it was recorded."""

    input_tokens: int
    output_tokens: int
    timestamp: float | None = None


@dataclass(frozen=True)
class Trace:
    """The requests of a file, and the file's sha256."""

    requests: tuple[Recorded, ...]
    digest: str

    @property
    def timed(self) -> bool:
        """Whether every request has a time."""
        return all(one.timestamp is not None for one in self.requests)

    def write(self, path: Path, count: int, *, timed: bool) -> None:
        """Writes the first `count` requests for AIPerf. No answer may end before its recorded length."""
        with path.open("w", encoding="utf-8") as file:
            for one in self.requests[:count]:
                line: dict[str, Any] = {"input_length": one.input_tokens, "output_length": one.output_tokens}
                line |= {"timestamp": one.timestamp} if timed else {}
                file.write(json.dumps({**line, "extra": {"min_tokens": one.output_tokens}}) + "\n")


def read(path: Path) -> Trace:
    """Reads a trace. UsageError names the line that is not a request."""
    try:
        data = path.read_bytes()
        lines = data.decode("utf-8-sig").split("\n")  # splitlines would also split at U+2028, which JSON may hold
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Can't read the trace {path}.", why=str(error), hint="--trace FILE.jsonl") from None
    requests = tuple(_request(path, number, line) for number, line in enumerate(lines, 1) if line.strip())
    if not requests:
        raise UsageError(f"{path} has no request.", hint=f"Write one per line: {EXAMPLE}")
    return Trace(requests, hashlib.sha256(data).hexdigest())


def _request(path: Path, number: int, line: str) -> Recorded:
    try:
        found = json.loads(line)
        if not isinstance(found, dict):
            raise ValueError("It is not an object.")
        return Recorded(_length(found, "input_length"), _length(found, "output_length"), _timestamp(found))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}:{number} is not a request.", why=str(error), hint=f"As in: {EXAMPLE}") from None


def _length(found: dict[str, Any], name: str) -> int:
    value = found.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1 (got {json.dumps(value)}).")
    return value


def _timestamp(found: dict[str, Any]) -> float | None:
    value = found.get("timestamp")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < LATEST:
        raise ValueError(f"timestamp must be milliseconds from 0, below {LATEST:.0e} (got {json.dumps(value)}).")
    return float(value)
