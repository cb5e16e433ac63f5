"""The models that a gateway serves, by the names that clients use. They can be replaced while requests are answered."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from builder.gateway.engine import Engine
from builder.gateway.errors import ApiError
from builder.gateway.guided import Guides
from builder.gateway.job import Admission, Jobs
from builder.gateway.limits import Limits
from builder.gateway.prompts import Prompts
from builder.gateway.readiness import Readiness
from builder.gateway.record import log
from builder.gateway.settings import Model, Place


@dataclass(eq=False)
class Served:
    """A model behind one connection to its server. A request keeps the one that it began with until it ends.

    created: seconds since 1970, for OpenAI's clients. users: requests that have not ended.
    """

    place: Place
    model: Model
    engine: Engine
    prompts: Prompts
    jobs: Jobs
    readiness: Readiness
    guides: Guides
    created: int
    users: int = 0

    @property
    def name(self) -> str:
        """The name that clients use."""
        return self.place.name

    def begin(self) -> None:
        """A request has begun."""
        self.users += 1

    def end(self) -> None:
        """It has ended, in whatever way."""
        self.users -= 1

    async def close(self) -> None:
        """Closes the connection and ends the worker processes of chat template and grammars."""
        await self.engine.close()
        await asyncio.to_thread(self.guides.close)
        await asyncio.to_thread(self.prompts.close)


class Models:
    """All models of a gateway. Must be used in its event loop."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.admission = Admission(limits)
        self._served: Mapping[str, Served] = {}
        self._retired: set[Served] = set()

    def __iter__(self) -> Iterator[Served]:
        return iter(self._served.values())

    def named(self, name: str) -> Served:
        """The model that clients call so. ApiError (404) if there is none."""
        found = self._served.get(name)
        if found is None:
            known = ", ".join(repr(one) for one in self._served)
            raise ApiError(
                404, f"The model {name[:200]!r} does not exist; this server has {known}.",
                param="model", code="model_not_found",
            )  # fmt: skip
        return found

    async def replace(self, models: Sequence[tuple[Place, Model]]) -> None:
        """Serves these from now on, and no others. One at the same place as before keeps its connection."""
        before = {one.place: one for one in self}
        now: dict[str, Served] = {}
        try:
            for place, model in models:
                now[place.name] = before.get(place) or await self._start(place, model)
        except BaseException:
            await _close(one for one in now.values() if one.place not in before)
            raise
        self._retired |= {one for one in before.values() if one not in now.values()}
        self._served = now

    async def close_retired(self) -> None:
        """Closes the models that were replaced and have no requests any more."""
        for one in [one for one in self._retired if not one.users]:
            await _close([one])
            self._retired.discard(one)

    def in_use(self) -> set[str]:
        """The gRPC addresses of the servers that may still get requests."""
        return {one.place.grpc for one in (*self, *self._retired)}

    async def close(self) -> None:
        """Closes all."""
        await _close((*self, *self._retired))

    async def _start(self, place: Place, model: Model) -> Served:
        prompts = await asyncio.to_thread(Prompts, model)  # looks at the whole vocabulary
        log("info", "model", name=place.name, **model.explained())
        engine = Engine(place.grpc, model, self._limits.silent_seconds)
        jobs = Jobs(engine, model, self._limits)
        return Served(place, model, engine, prompts, jobs, Readiness(engine, model), Guides(model), int(time.time()))


async def _close(models: Iterable[Served]) -> None:
    """Closes all of them, even if one fails, which is logged."""
    for one in models:
        try:
            await one.close()
        except Exception as error:
            log("error", "close failed", name=one.name, detail=str(error))
