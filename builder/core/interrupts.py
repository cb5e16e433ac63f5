"""Defers interrupts across a critical section, such as two renames that belong together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deferred() -> Iterator[None]:
    """Delivers SIGINT, SIGTERM and SIGHUP only after the block has ended.

    Blocking the signals with a mask is not enough: another thread would receive the signal, and Python would still run
    the handler in the main thread (docs.python.org/3/library/signal.html, "Signals and threads").
    """
    received: list[int] = []
    previous = {}
    if threading.current_thread() is threading.main_thread():  # only the main thread can set and run handlers
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if callable(signal.getsignal(number)):
                previous[number] = signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for caught in received:
        signal.raise_signal(caught)
