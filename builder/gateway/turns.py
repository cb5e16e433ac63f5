"""Turns for work that is done for one request at a time: chat templates, grammars.

The smallest waiting request comes next, and if too many wait, the largest is refused, so that large requests hold up
neither small ones nor the answers in progress. Every eighth turn is that of the request that has waited longest, so
that small ones can't keep a large one waiting until it is refused.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

from builder.gateway.errors import ApiError

MOST_WAITING = 64
SECONDS = 10.0  # that a request waits for its turn
OLDEST = 8  # of so many turns in a row one is that of the oldest request

Result = TypeVar("Result")

_Waiting = tuple[int, int, "asyncio.Future[None]"]  # size, order of arrival, done when it is its turn


class Turns:
    """Must be used in one event loop. `what`: the work, for messages."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._busy = False
        self._waiting: list[_Waiting] = []
        self._numbers = itertools.count()
        self._passed = 0  # turns of those that waited

    @asynccontextmanager
    async def turn(self, size: int) -> AsyncIterator[None]:
        """Waits for the turn of a request of this size, which ends with the block. ApiError (429) if too many wait."""
        if self._busy:
            await self._wait(size)
        self._busy = True
        try:
            yield
        finally:
            self._next()

    async def _wait(self, size: int) -> None:
        mine = (size, next(self._numbers), asyncio.get_running_loop().create_future())
        self._waiting.append(mine)
        if len(self._waiting) > MOST_WAITING:
            largest = max(self._waiting)
            self._remove(largest)
            largest[2].set_exception(self._refused())
        try:
            await asyncio.wait({mine[2]}, timeout=SECONDS)  # asyncio.timeout would lose a turn that comes at its end
        except asyncio.CancelledError:
            if mine[2].done() and mine[2].exception() is None:
                self._next()  # the turn came with the cancellation
            raise
        finally:
            self._remove(mine)
        if not mine[2].done():
            raise self._refused()
        mine[2].result()
        self._passed += 1

    def _next(self) -> None:
        """Passes the turn on."""
        if not self._waiting:
            self._busy = False
            return
        oldest = self._passed % OLDEST == OLDEST - 1
        following = min(self._waiting, key=(lambda one: one[1]) if oldest else None)
        self._remove(following)
        following[2].set_result(None)

    def _remove(self, one: _Waiting) -> None:
        if one in self._waiting:
            self._waiting.remove(one)

    def _refused(self) -> ApiError:
        return ApiError(429, f"Too many requests wait for {self._what}. Try again later.", code="too_many_requests")


async def completed(work: Awaitable[Result]) -> Result:
    """The result of work in a thread. If this task is cancelled, it ends after the work, which nothing can stop: the
    turn is over only then."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with suppress(Exception):
            await task
        raise
