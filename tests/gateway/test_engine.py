"""The gateway's connection to the engine, with a real Triton: what ends an answer, and what stays behind."""

from __future__ import annotations

import asyncio

import pytest

from builder.gateway.engine import Engine
from builder.gateway.settings import Model
from builder.gateway.streams import ClientGone
from builder.gateway.tensors import Sampling, Step, TokenRequest
from builder.serving.server import Server
from builder.triton import repository
from tests.gateway.test_limits import SLOW


def test_a_failure_while_a_response_is_used_stops_the_engine(
    echo_repository: repository.Repository, triton: Server
) -> None:
    """As when a client leaves too much of its stream unread."""
    model = Model.read(echo_repository.models, echo_repository.facts)
    request = TokenRequest(
        model.vocabulary.tokenizer.encode(SLOW).ids, 400, Sampling(temperature=0), (), streaming=True
    )  # fmt: skip

    async def fail_at_the_third() -> None:
        engine, steps = Engine(triton.grpc_url, model), iter(range(10))

        def use(step: Step) -> bool:
            if next(steps) == 2:
                raise ClientGone
            return True

        with pytest.raises(ClientGone):
            await engine.generate(request, "third", use)
        await engine.close()  # waits until the answer has ended

    before = triton.log.read_text().count("stopped after")
    asyncio.run(fail_at_the_third())
    assert triton.log.read_text().count("stopped after") == before + 1
