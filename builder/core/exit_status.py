"""How a process ended, in words: its exit code, or the signal that killed it."""

from __future__ import annotations

import signal


def describe(code: int) -> str:
    """What to write after "it": -8 "was killed by SIGFPE", 136 "ended with exit code 136 (killed by SIGFPE)", 1 "ended
    with exit code 1".

    Minus the signal's number is Python's way (subprocess.Popen.returncode). Shells, mpirun and container engines add it
    to 128 (the Bash manual, "Exit Status").
    """
    if code < 0:
        return f"was killed by {_name(-code)}"
    by = f" (killed by {_name(code - 128)})" if code > 128 and _known(code - 128) else ""
    return f"ended with exit code {code}{by}"


def _known(number: int) -> bool:
    return number in {one.value for one in signal.Signals} and number < signal.SIGRTMIN


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal between SIGRTMIN and SIGRTMAX
        return f"signal {number}"
