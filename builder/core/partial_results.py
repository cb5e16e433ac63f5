"""Results that an interrupted stage leaves for the next run with the same ingredients, in `partial/` of the store."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from builder.core import atomic
from builder.core.store import Store


@dataclass(frozen=True)
class PartialResults:
    """Those of the stage `name` with this key."""

    store: Store
    name: str
    key: str

    @property
    def path(self) -> Path:
        """Where they are, without suffix."""
        return self.store.root / "partial" / f"{self.name}-{self.key}"

    def begin(self) -> None:
        """Makes their directory, and removes those of a forced stage. For the stage's `make`, which holds its lock:
        before that, another build may be writing them."""
        atomic.make_directory(self.path.parent)
        if self.name in self.store.force:
            self._remove()

    def end(self) -> None:
        """Removes them once the stage is complete, unless another build has begun to make it again."""
        if not self.store.dry and self._files():
            with self.store.locked(self.name, self.key, wait=False) as ours:
                if ours:
                    self._remove()

    def _remove(self) -> None:
        for path in self._files():
            path.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        """Also those of single layers, and temporary ones."""
        patterns = [f"{hidden}{self.path.name}{more}*" for hidden in ("", ".") for more in (".", "-")]
        return [path for pattern in patterns for path in self.path.parent.glob(pattern)]
