"""Runs `builder` as its console script does, counts its file operations, and can send itself a signal at one of them.

    python launch.py FD OPERATION SIGNAL process|group -- ARGUMENTS OF builder

Python announces each change of the file system to audit hooks (docs.python.org/3/library/audit_events.html) just
before it happens, so "before operation 17" is the same moment in every run. With OPERATION 0 no signal is sent.
FD receives `start`, and `end` with the names of the operations, so the harness knows when `main` was running.
"""

from __future__ import annotations

import os
import sys

_CHANGES = (
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate", "os.chmod",
    "shutil.rmtree", "shutil.move", "subprocess.Popen", "tempfile.mkdtemp", "tempfile.mkstemp",
)  # fmt: skip
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def main() -> int:
    """The exit code of `builder`."""
    fd, operation, number, to = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    sys.argv = ["builder", *sys.argv[6:]]
    sys.path.pop(0)  # the directory of this file, which no console script has there
    import builder.cli.main  # noqa: F401 - before `start`, so that moments count from the command itself
    from builder.__main__ import main as console_script
    from builder.core import interrupts

    names: list[str] = []

    def count(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not isinstance(flags, int) or not flags & _WRITES:
                return  # read, or open already
        elif event not in _CHANGES:
            return
        if arguments and "__pycache__" in str(arguments[0]):
            return  # the first run after a change compiles modules, the next one does not
        names.append(event)
        if len(names) == operation:
            os.kill(0 if to == "group" else os.getpid(), number)  # pid 0: our process group

    handle = interrupts.handle

    def begin() -> None:
        handle()
        os.write(fd, b"start\n")

    interrupts.handle = begin  # the first thing that `main` does: until then only Python itself answers a signal
    sys.addaudithook(count)
    try:
        return console_script()
    finally:
        os.write(fd, b"end " + " ".join(names).encode() + b"\n")


if __name__ == "__main__":
    sys.exit(main())
