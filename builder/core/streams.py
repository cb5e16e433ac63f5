"""Survives standard streams that are closed, full, or have no reader: the work goes on, the exit code reports it.

stderr carries progress and messages, so losing it does not change the exit code. stdout carries the result: if it
could not be written, the command exits with 1, or with its own non-zero code.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any


class Stream:
    """Wraps a text stream so that writes never raise. After the first error, kept in `error`, output is discarded."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Writes `text`, or discards it once the stream is broken. Returns its length in characters, as io does."""
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream; an error is kept, not raised."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def writelines(self, lines: Any) -> None:
        """Writes each string of `lines`, as io.TextIOBase.writelines does."""
        for line in lines:
            self.write(line)

    def _lose(self, error: OSError | ValueError) -> None:
        """Keeps the first error and redirects the descriptor to /dev/null.

        Otherwise buffered text would fail again when the interpreter exits, and the exit code would be 120.
        """
        self.error = self.error or (error if isinstance(error, OSError) else OSError(errno.EBADF, str(error)))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare() -> None:
    """Opens closed standard descriptors on /dev/null and wraps stdout and stderr. Call it before opening any file.

    Otherwise the first file opened would get the number of a closed stderr, and error messages would end up in it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # open() returns the lowest free number, which is this one
            os.set_inheritable(descriptor, True)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(descriptor, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (open until the end)
            setattr(sys, f"__{name}__", stream)
        if stream is getattr(sys, f"__{name}__"):  # a test's stream, or the caller's, stays as it is
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, Stream(stream))


def finish(code: int) -> int:
    """Flushes both streams. Returns the exit code: `code`, or 1 if that is 0 and stdout lost output."""
    sys.stderr.flush()
    sys.stdout.flush()
    error = getattr(sys.stdout, "error", None)
    if error is None:
        return code
    if error.errno != errno.EPIPE:  # a reader that closes early, such as `| head`, needs no message
        print(f"error: Can't write the result to stdout: {error.strerror}.", file=sys.stderr)
    return code or 1
