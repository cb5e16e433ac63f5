"""Describes how a process ended: its exit code, or the signal that killed it."""

from __future__ import annotations

import signal


def describe(code: int) -> str:
    """The predicate of a sentence whose subject is the process.

    -8 -> "was killed by SIGFPE"; 136 -> "exited with code 136 (killed by SIGFPE)"; 1 -> "exited with code 1".

    Python reports a signal as its negative number (subprocess.Popen.returncode). Shells, mpirun and container engines
    report 128 plus the number (the Bash manual, "Exit Status").
    """
    if code < 0:
        return f"was killed by {_name(-code)}"
    by = f" (killed by {_name(code - 128)})" if code > 128 and _known(code - 128) else ""
    return f"exited with code {code}{by}"


def _known(number: int) -> bool:
    return number in {member.value for member in signal.Signals} and number < signal.SIGRTMIN


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals between SIGRTMIN and SIGRTMAX have no names
        return f"signal {number}"
