"""Writes a checkpoint's unified layout while the model is still being downloaded or hashed, or its rows calibrate.

Nothing depends on it: whatever goes wrong here ends this attempt, and the stage itself then writes the layout, or says
what is wrong with the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from builder.core import atomic, interrupts, temporary
from builder.core.temporary import LockedDirectory
from builder.quantize.source_weights import SourceModel
from builder.quantize.writer import Work

Write = Callable[[SourceModel, Path, Work], dict[str, Any]]  # (source, directory to create, work) -> facts


class Ended(Exception):
    """Ends the writer: the download failed, or the command ends."""


class Ahead:
    """A thread that writes a model's unified layout, each part of it once the files that it is made of are complete.

    opened: gives the model, before its files are there if they are `downloaded`. write: writes it, in the formats
    `chosen`. place: the directory, on one disk with what is made, where a temporary directory is created.
    """

    def __init__(
        self,
        opened: Callable[[], SourceModel],
        write: Write,
        chosen: Mapping[str, Any],
        place: Path,
        *,
        downloaded: bool = True,
    ) -> None:
        self._opened, self._write, self._place = opened, write, place
        self.chosen, self._downloaded = chosen, downloaded
        self._ready: SimpleQueue[Path | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ahead", daemon=True)
        self._directory: LockedDirectory | None = None
        self._written: tuple[SourceModel, dict[str, Any]] | None = None
        self.done = 0  # bytes of the source that are finished

    def begin(self) -> None:
        """Starts the thread. A disk that refuses a directory is left for the stage to report."""
        try:
            with interrupts.deferred():
                atomic.make_directory(self._place)
                temporary.sweep(self._place)
                self._directory = temporary.create(self._place)
        except OSError:
            return
        self._thread.start()

    def arrived(self, path: Path) -> None:
        """Says that a file of the model is complete and verified. From any thread."""
        self._ready.put(path)

    def complete(self) -> None:
        """Says that all files are."""
        self._ready.put(None)

    def take(
        self, source: SourceModel, chosen: Mapping[str, Any], unified: Path, tell: Callable[[int], object]
    ) -> dict[str, Any] | None:
        """Waits for the layout, once all files are complete, and moves it to `unified`, with what `write` made beside
        it. Meanwhile `tell` gets the bytes of the source that are finished. Returns the writer's facts.

        None if there is no layout of exactly this source in these formats; what was written is then removed.
        """
        if chosen != self.chosen:
            self.close()
        if self._directory is None:
            return None
        self.complete()
        while self._thread.is_alive():
            tell(self.done)
            self._thread.join(0.1)
        if self._written is None or not _same(self._written[0], source):
            self.close()
            return None
        for made in self._directory.contents():
            made.rename(unified if made.name == "unified" else unified.parent / made.name)
        self.close()  # a kill from here on leaves nothing of it
        return self._written[1]

    def close(self) -> None:
        """Ends the thread and removes what it made and nobody took."""
        self._end.set()
        self._ready.put(None)
        with interrupts.deferred():
            if self._directory is not None:
                if self._thread.ident is not None:
                    self._thread.join()
                self._directory.remove()
                self._directory = None

    def _run(self) -> None:
        assert self._directory is not None
        try:
            source = self._opened()
            work = Work(done=self._count, ready=self._files() if self._downloaded else None)
            self._written = source, self._write(source, self._directory.path / "unified", work)
        except Exception:  # the stage meets the same and says it
            return

    def _files(self) -> Iterator[Path]:
        while (path := self._ready.get()) is not None:
            yield path
        self._check()

    def _count(self, nbytes: int) -> None:
        self._check()  # ends the writer from within
        with self._lock:
            self.done += nbytes

    def _check(self) -> None:
        if self._end.is_set():
            raise Ended


def _same(one: SourceModel, other: SourceModel) -> bool:
    """Whether both are the same tensors in the same places, with the same config."""
    if one != other:
        return False
    return all(one.tensors.place(name) == other.tensors.place(name) for name in one.tensors)
