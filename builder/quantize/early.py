"""What begins to quantize a model before its files are all there and hashed.

Nothing depends on it: where it can't begin or does not fit what is wanted in the end, the stage begins anew.
"""

from __future__ import annotations

from dataclasses import dataclass

from builder.core.early_worker import EarlyWorker
from builder.quantize.ahead import Ahead


@dataclass(frozen=True)
class Early:
    """The data-free writer, the worker that calibrates, or neither. way: for which way the worker is."""

    ahead: Ahead | None = None
    worker: EarlyWorker | None = None
    way: str = ""

    def begin(self) -> None:
        """Begins."""
        for one in (self.ahead, self.worker):
            if one is not None:
                one.begin()

    def close(self) -> None:
        """Ends what is not done, and removes what it made."""
        for one in (self.ahead, self.worker):
            if one is not None:
                one.close()
