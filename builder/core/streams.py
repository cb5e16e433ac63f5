"""Standard streams that are closed, full, or whose reader is gone: the work goes on, and the exit code says it.

What goes to stderr is talk, and losing it changes nothing. What goes to stdout is the result: where it could not be
written, the command ends with 1 at least.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any


class Stream:
    """A text stream whose writes never raise: after the first error the rest goes to /dev/null, and `error` is kept."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """All of `text`, or nothing once the stream is broken."""
        try:
            self._stream.write(text)
        except (OSError, ValueError) as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def _lose(self, error: OSError | ValueError) -> None:
        """What is buffered would fail again when the interpreter ends, which then exits with 120."""
        self.error = self.error or (error if isinstance(error, OSError) else OSError(errno.EBADF, str(error)))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def prepare() -> None:
    """Before anything is opened: closed descriptors become /dev/null, and both output streams a `Stream`.

    Without that, the first file that we open would get the number of a closed stderr, and whatever is written there
    would end up in that file.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
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
    """Writes what is buffered. Returns the exit code: that of the command, or 1 where its result was lost."""
    sys.stderr.flush()
    sys.stdout.flush()
    error = getattr(sys.stdout, "error", None)
    if error is None:
        return code
    if error.errno != errno.EPIPE:  # a reader that has enough, as `| head` has, needs no message
        print(f"error: Can't write the result to stdout: {error.strerror}.", file=sys.stderr)
    return code or 1
