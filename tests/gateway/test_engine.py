"""The gateway's connection to the engine, with a real Triton: what ends an answer, and what stays behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import grpc.aio
import pytest
from tritonclient.grpc import service_pb2

from builder.gateway.engine import Engine
from builder.gateway.settings import Model
from builder.gateway.streams import ClientGone
from builder.gateway.tensors import Sampling, Step, TokenRequest
from builder.serving.server import Server
from builder.triton import repository
from tests.gateway import test_http2
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


def test_a_batcher_that_sleeps_is_woken_by_another_request(echo_repository: repository.Repository) -> None:
    """As Triton's can, this server leaves requests to stop in its queue until another one comes, which wakes it for
    all."""
    model = Model.read(echo_repository.models, echo_repository.facts)
    request = TokenRequest([5], 400, Sampling(temperature=0), (), streaming=True)
    final = service_pb2.ModelStreamInferResponse()
    final.infer_response.parameters["triton_final_response"].bool_param = True
    stopped: dict[str, asyncio.Event] = {}
    stops, count = [], 20

    async def handle(message: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        found = service_pb2.ModelInferRequest.FromString(message)
        if "stop" in [one.name for one in found.inputs]:
            stops.append(found.id)
            while len(stops) <= count:
                await asyncio.sleep(0.01)
            stopped[found.id].set()
        else:
            stopped[found.id] = asyncio.Event()
            yield service_pb2.ModelStreamInferResponse().SerializeToString()
            await stopped[found.id].wait()
        yield final.SerializeToString()

    async def leave() -> None:
        async with test_http2.server(handle) as (port, _):
            engine = Engine(f"127.0.0.1:{port}", model)
            answers = [
                asyncio.create_task(engine.generate(request, str(number), lambda step: True)) for number in range(count)
            ]
            while len(stopped) < count:
                await asyncio.sleep(0.01)
            for answer in answers:
                answer.cancel()
            await asyncio.gather(*answers, return_exceptions=True)
            await engine.close()

    start = time.monotonic()
    asyncio.run(asyncio.wait_for(leave(), 20))
    assert sorted(set(stops)) == sorted(map(str, range(count)))
    assert count < len(stops) <= count + 3, "one for all that wait"
    assert time.monotonic() - start < 4, "closing waits for five seconds for what does not end"
