"""Hashes the finished files of a stage, and flushes them to the disk, in threads, while the stage makes others."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

from builder.core import atomic
from builder.core.manifest import sha256


class Hashes:
    """The sha256 of files below a directory, `root`.

    Several files at once, because one core hashes slower than a disk writes. A file must not change after it was added.
    An error in the block, or the end of it, ends all threads.
    """

    def __init__(self, root: Path, known: Mapping[str, str] = MappingProxyType({})) -> None:
        """root: the directory that names are relative to. known: {name: sha256} of files that are only flushed."""
        self.root, self._stop = root, threading.Event()
        self._hashing, self._flushing = ThreadPoolExecutor(thread_name_prefix="hash"), ThreadPoolExecutor(1, "flush")
        self._hashes: dict[str, Future[str]] = {}
        self._known, self._flushed = dict(known), list[Future[None]]()

    def add(self, directory: Path) -> None:
        """Begins with all files below a directory, the root or one in it, except those that were added before."""
        for path in sorted(directory.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            if not path.is_file() or name in self._hashes:
                continue
            self._flushed.append(self._flushing.submit(atomic.fsync, path))
            known = self._known.get(name)
            self._hashes[name] = self._hashing.submit(sha256, path, self._stop) if known is None else _done(known)

    def finish(self) -> dict[str, str]:
        """Waits for all files that were added. Returns {name: sha256}. OSError if the disk refuses."""
        found = {name: future.result() for name, future in sorted(self._hashes.items())}
        for one in self._flushed:
            one.result()
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._hashing.shutdown(cancel_futures=True)
        self._flushing.shutdown(cancel_futures=True)


def _done(known: str) -> Future[str]:
    future: Future[str] = Future()
    future.set_result(known)
    return future
