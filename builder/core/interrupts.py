"""Interrupts: SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, and the command ends with 130 whatever becomes of it.

The exception may be raised in the middle of any line, also inside a library that turns it into an error of its own
(Python 3.11 does so in `__set_name__`), swallows it, or can't propagate it (`__del__`). So it is remembered as well.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TIME_OVER = signal.SIGUSR1  # sent to the process itself by `within`
REPEAT_SECONDS = 0.05
_received: list[int] = []


def handle() -> None:
    """From now on the signals raise KeyboardInterrupt in the main thread, and `received` remembers them.

    A signal that is ignored stays so: under nohup, a closed terminal stops nothing.
    """
    _received.clear()
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)
    sys.unraisablehook = _unraisable


def interrupt(number: int, _: object = None) -> None:
    """The signal handler."""
    _received.append(number)
    raise KeyboardInterrupt


def received() -> bool:
    """Whether an interrupt has come that nobody has answered (`answered`)."""
    return bool(_received)


def answered() -> None:
    """Called where an interrupt is no failure, such as one that ends a server."""
    _received.clear()


def check() -> None:
    """Raises an interrupt that was swallowed: called before work that takes long."""
    if _received:
        raise KeyboardInterrupt


def _unraisable(about: Any) -> None:
    """Repeats an interrupt that came inside of `__del__` or another callback, where Python can only print it."""
    if not (_received and issubclass(about.exc_type, KeyboardInterrupt)):
        sys.__unraisablehook__(about)
        return
    main = threading.main_thread().ident or 0
    repeat = threading.Timer(REPEAT_SECONDS, signal.pthread_kill, (main, _received[-1]))
    repeat.daemon = True
    repeat.start()


@contextmanager
def deferred() -> Iterator[None]:
    """Delivers the signals only after the block has ended.

    Blocking the signals with a mask is not enough: another thread would receive the signal, and Python would still run
    the handler in the main thread (docs.python.org/3/library/signal.html, "Signals and threads").
    """
    held: list[int] = []
    previous = {}
    try:
        if threading.current_thread() is threading.main_thread():  # only the main thread can set and run handlers
            for number in (*SIGNALS, TIME_OVER):
                if callable(signal.getsignal(number)):
                    previous[number] = signal.signal(number, lambda number, frame: held.append(number))
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for caught in held:  # also if the block raised: a failure must not hide an interrupt
            signal.raise_signal(caught)


def within(seconds: float | None, work: Callable[[], object]) -> bool:
    """Does some work, and ends it after so many seconds as Ctrl-C would: children end, half-made files are removed.

    Whether the work was done in time; then nothing is raised, unless the user interrupts it too. None: no limit. Only
    the main thread can call it."""
    if seconds is None:
        work()
        return True
    main = threading.main_thread().ident or 0
    rang = threading.Event()

    def ring() -> None:
        rang.set()
        signal.pthread_kill(main, TIME_OVER)

    previous = signal.signal(TIME_OVER, interrupt)
    timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), ring)
    timer.daemon = True
    try:
        timer.start()
        try:
            work()
        finally:
            timer.cancel()
            timer.join()
    except BaseException:  # it may have been turned into another error
        if not rang.is_set() or any(number != TIME_OVER for number in _received):
            raise
        return False
    finally:
        signal.signal(TIME_OVER, previous)
        _received[:] = [number for number in _received if number != TIME_OVER]
    return True
