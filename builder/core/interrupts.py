"""Moments at which an interrupt must wait: between two steps that only make sense together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deferred() -> Iterator[None]:
    """Until the block ends, SIGINT, SIGTERM and SIGHUP are only noted; then their handlers run.

    A signal mask would not do: another thread takes the signal, and the main thread runs its handler all the same
    (docs.python.org/3/library/signal.html, "Signals and threads").
    """
    came: list[int] = []
    ours = {}
    if threading.current_thread() is threading.main_thread():  # handlers run, and are set, nowhere else
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if callable(signal.getsignal(number)):
                ours[number] = signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
    for caught in came:
        signal.raise_signal(caught)
