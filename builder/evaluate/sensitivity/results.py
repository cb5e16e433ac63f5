"""A file of measurements that survives an interrupted run: one JSON line per result."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Results:
    """The results file: one JSON line per result. Incomplete lines of an interrupted run are ignored."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: dict[str, dict[str, float]] = {}
        self.output_errors: dict[str, float] = {}
        self.tokens = 0
        for line in path.read_bytes().split(b"\n") if path.exists() else ():
            try:
                self._take(json.loads(line))
            except (ValueError, KeyError, TypeError):
                continue

    def _take(self, line: Mapping[str, Any]) -> None:
        if "output_errors" in line:
            self.output_errors, self.tokens = dict(line["output_errors"]), line["tokens"]
        else:
            self._found[line["name"]] = {"kl": line["kl"], **{name: line[name] for name in line if name != "name"}}

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def __getitem__(self, name: str) -> dict[str, float]:
        return self._found[name]

    def add(self, **line: Any) -> None:
        """Appends one result; it is on the disk when this returns."""
        self._take(line)
        with open(self._path, "ab") as file:
            # The first newline ends an incomplete line of an interrupted run.
            file.write(f"\n{json.dumps(line)}\n".encode())
            file.flush()
            os.fsync(file.fileno())
