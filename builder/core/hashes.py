"""Hashes the finished files of a stage, and flushes them to the disk, in threads, while the stage makes others."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from types import MappingProxyType, TracebackType
from typing import Self

from builder.core import atomic
from builder.core.manifest import chunks, sha256


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
        self._known, self._flushed = dict(known), dict[str, Future[None]]()

    def add(self, directory: Path) -> None:
        """Begins with all files below a directory, the root or one in it, except those that were added before."""
        for path in sorted(directory.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            if not path.is_file() or name in self._flushed:
                continue
            self._flushed[name] = self._flushing.submit(atomic.fsync, path)
            if name in self._hashes:  # by `following`
                continue
            known = self._known.get(name)
            self._hashes[name] = self._hashing.submit(sha256, path, self._stop) if known is None else _done(known)

    @contextmanager
    def following(self, path: Path) -> Iterator[Callable[[int], None]]:
        """Hashes a file while the block writes it from its beginning to its end, if it writes it at all. It is flushed
        once it is added.

        Yields a function to call with the number of bytes that are written so far.
        """
        written: SimpleQueue[int | None] = SimpleQueue()
        future = self._hashing.submit(_followed, path, written, self._stop)
        try:
            yield written.put
        finally:
            written.put(None)
        if path.is_file():
            self._hashes[path.relative_to(self.root).as_posix()] = future

    def finish(self) -> dict[str, str]:
        """Waits for all files that were added. Returns {name: sha256}. OSError if the disk refuses."""
        found = {name: future.result() for name, future in sorted(self._hashes.items())}
        for one in self._flushed.values():
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


def _followed(path: Path, written: SimpleQueue[int | None], stop: threading.Event) -> str:
    """The sha256 of a file of which more and more is written; "" if there is no such file in the end."""
    end = written.get()
    if end is None and not path.is_file():
        return ""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while not stop.is_set():
            for chunk in chunks(file, None if end is None else end - file.tell()):
                digest.update(chunk)
            if end is None:
                break
            end = written.get()
    return digest.hexdigest()


def _done(known: str) -> Future[str]:
    future: Future[str] = Future()
    future.set_result(known)
    return future
