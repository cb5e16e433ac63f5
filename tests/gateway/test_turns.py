"""Work for one request at a time: small requests overtake large ones, and large ones are refused first."""

from __future__ import annotations

import asyncio
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
    assert asyncio.run(run(sizes, cancelled)) == sorted(
        (size, number) for number, size in enumerate(sizes) if number not in gone
    )


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
