"""Whether the engine answers: a request for one token, repeated at most every few seconds."""

from __future__ import annotations

import asyncio
import time

from builder.gateway.engine import Engine
from builder.gateway.errors import ApiError
from builder.gateway.settings import Model
from builder.gateway.tensors import Sampling, TokenRequest

FRESH = 5.0  # seconds for which a good answer counts; a bad one counts for one second
PATIENCE = 10.0  # seconds for one token


class Readiness:
    """Infers one token to find out whether the engine answers. Clients that ask at once share one request."""

    def __init__(self, engine: Engine, model: Model) -> None:
        self._engine, self._model = engine, model
        self._lock = asyncio.Lock()
        self._fault, self._until = "", 0.0

    async def fault(self) -> str:
        """What is wrong; "" if nothing is. An engine that has answered anybody within FRESH seconds is not asked."""
        async with self._lock:
            if time.monotonic() - self._engine.last_response < FRESH:
                self._fault = ""
            elif time.monotonic() >= self._until:
                self._fault = await self._probe()
                self._until = time.monotonic() + (1.0 if self._fault else FRESH)
            return self._fault

    async def _probe(self) -> str:
        id = self._model.vocabulary.context[0] if self._model.vocabulary.context else 0
        request = TokenRequest((id,), 1, Sampling(temperature=0), self._model.end_ids, streaming=False)
        try:
            async with asyncio.timeout(PATIENCE):
                await self._engine.generate(request, f"readiness-{time.monotonic_ns()}", lambda step: True)
        except TimeoutError:
            return f"no token within {PATIENCE:.0f} s"
        except ApiError as error:
            return error.detail or error.message
        return ""
