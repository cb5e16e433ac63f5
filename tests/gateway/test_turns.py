"""Work for one request at a time: small requests overtake large ones, and large ones are refused first."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.gateway import turns
from builder.gateway.errors import ApiError
from builder.gateway.turns import Turns
from tests.gateway.conftest import MODEL, Serve
from tests.gateway.test_limits import connect, eventually, head, in_progress, metric

SLOW = "slow" + "x" * 1000
# Takes some tenths of a second for such a message, and no time for others.
TEMPLATE = (
    "{% for m in messages %}{% if m.content.startswith('slow') %}{% for i in range(99999) %}{% for j in range(6) %}"
    "{% endfor %}{% endfor %}{% endif %}{{ m.content }}{% endfor %}"
)


async def run(sizes: list[int], cancelled: list[int]) -> list[tuple[int, int]]:
    """Which of the requests of these sizes had a turn, in order, as (size, number). All wait behind one with a turn."""
    shared, had, open_turns = Turns("tests"), [], 0

    async def one(number: int) -> None:
        nonlocal open_turns
        async with shared.turn(sizes[number]):
            open_turns += 1
            assert open_turns == 1
            await asyncio.sleep(0)
            had.append((sizes[number], number))
            open_turns -= 1

    async with shared.turn(0):
        tasks = [asyncio.ensure_future(one(number)) for number in range(len(sizes))]
        await asyncio.sleep(0)
        for number in cancelled:
            tasks[number % len(tasks)].cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert result is None or isinstance(result, asyncio.CancelledError | ApiError)
    async with asyncio.timeout(1), shared.turn(0):  # nobody holds it
        pass
    return had


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.lists(st.integers(0, 19), max_size=4))
def test_the_smallest_comes_next_and_the_turn_is_never_lost(sizes: list[int], cancelled: list[int]) -> None:
    gone = {number % len(sizes) for number in cancelled}
    waiting = [(size, number) for number, size in enumerate(sizes) if number not in gone]
    had = asyncio.run(run(sizes, cancelled))
    assert len(had) == len(waiting)
    for turn, one in enumerate(had, 1):
        assert one == (min(waiting) if turn % turns.OLDEST else min(waiting, key=lambda one: one[1]))
        waiting.remove(one)


def test_small_requests_do_not_starve_a_large_one() -> None:
    """As many small ones as end keep coming."""
    shared, before = Turns("tests"), 0

    async def small() -> None:
        nonlocal before
        while not large.done():
            async with shared.turn(1):
                await asyncio.sleep(0)
                before += 1

    async def once() -> None:
        async with shared.turn(10**6):
            pass

    async def main() -> None:
        nonlocal large
        async with shared.turn(0):
            large = asyncio.ensure_future(once())
            others = [asyncio.ensure_future(small()) for _ in range(4)]
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            await asyncio.gather(large, *others)

    large: asyncio.Future[None]
    asyncio.run(main())
    assert before <= turns.OLDEST + 4


def test_work_in_a_thread_keeps_its_turn_if_its_client_leaves() -> None:
    async def main() -> None:
        shared, working, go_on = Turns("tests"), threading.Event(), threading.Event()

        def work() -> None:
            working.set()
            assert go_on.wait(10)

        async def one() -> None:
            async with shared.turn(1):
                await turns.completed(asyncio.to_thread(work))

        async def another() -> bool:
            async with shared.turn(1):
                return go_on.is_set()

        task, following = asyncio.ensure_future(one()), asyncio.ensure_future(another())
        await asyncio.to_thread(working.wait, 10)
        task.cancel()
        await asyncio.sleep(0.05)
        assert not task.done()
        go_on.set()
        assert await following, "its turn came after the work"
        assert isinstance((await asyncio.gather(task, return_exceptions=True))[0], asyncio.CancelledError)

    asyncio.run(main())


def test_if_too_many_wait_the_largest_are_refused() -> None:
    sizes = [*range(turns.MOST_WAITING), 5, 3]
    assert sorted(size for size, _ in asyncio.run(run(sizes, []))) == sorted([*range(turns.MOST_WAITING - 2), 5, 3])


def test_nobody_waits_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "SECONDS", 0.05)

    async def wait() -> None:
        shared = Turns("tests")
        async with shared.turn(0):
            with pytest.raises(ApiError, match="Too many requests wait for tests") as raised:
                async with shared.turn(0):
                    pass
        assert raised.value.status == 429
        async with shared.turn(0):
            pass

    asyncio.run(wait())


def test_a_turn_that_comes_when_the_wait_ends_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "SECONDS", 0.05)

    async def main() -> None:
        shared, over = Turns("tests"), asyncio.Event()

        async def hold() -> None:
            async with shared.turn(0):
                await over.wait()

        async def wait() -> None:
            async with shared.turn(0):
                pass

        tasks = [asyncio.ensure_future(hold()), asyncio.ensure_future(wait())]
        await asyncio.sleep(0)
        time.sleep(0.1)  # so that the loop finds the end of the turn and of the wait together
        over.set()
        await asyncio.gather(*tasks)
        async with asyncio.timeout(1), shared.turn(0):
            pass

    asyncio.run(main())


def test_small_conversations_are_answered_while_many_large_ones_wait(serve_with: Serve) -> None:
    """The large ones have all the answers that the gateway gives at once, but are worked on one at a time."""
    gateway = serve_with(TEMPLATE)

    def ask(client: openai.OpenAI, text: str) -> int:
        talk: Any = [{"role": "user", "content": text}]
        try:
            client.chat.completions.create(model=MODEL, messages=talk, max_tokens=1)
        except openai.APIStatusError as error:
            return error.status_code
        return 200

    with gateway.client(timeout=120) as client, ThreadPoolExecutor(120) as pool:
        assert ask(client, "x") == 200
        large = [pool.submit(ask, client, SLOW) for _ in range(120)]
        refused = time.monotonic() + 10
        while not any(one.done() and one.result() == 429 for one in large):
            assert time.monotonic() < refused, "those that are too many are refused at once"
            time.sleep(0.05)
        small, start = [], time.monotonic()
        while len(small) < 5 and not all(one.done() for one in large):
            small.append(ask(client, "x"))
        took = time.monotonic() - start
        assert set(small) == {200}
        assert took < 10, "each waits for one large conversation at most"
        assert {one.result() for one in large} <= {200, 400, 429}, "400: the template took too long"


def test_those_that_leave_while_they_wait_are_forgotten_at_once(serve_with: Serve) -> None:
    """Whether their conversation is in its text or in a variable of the template."""
    gateway = serve_with(TEMPLATE)
    talk = [{"role": "user", "content": SLOW}]
    body = json.dumps({"model": MODEL, "messages": talk, "max_tokens": 1}).encode()
    connections = [connect(gateway) for _ in range(60)]
    for connection in connections:
        connection.sendall(head(len(body), path="/v1/chat/completions") + body)
    assert eventually(lambda: in_progress(gateway) > 40)
    for connection in connections:
        connection.close()
    left = time.monotonic()
    assert eventually(lambda: in_progress(gateway) == 0)
    assert time.monotonic() - left < 5, "not after the 10 s that each waits for its turn"
    assert metric(gateway, "gateway_cancelled_total") > 40
