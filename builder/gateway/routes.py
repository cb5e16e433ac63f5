"""A file that says which models a gateway serves and where. `builder serve` writes it, to put a new version in place.

The gateway reads the file again when it changes, and serves what it names from then on. Requests that have begun stay
with the version that they began with. A second file, .state, tells `serve` which file was read and which servers may
still get requests, so that it stops none too early.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path

from builder.core.errors import BuilderError
from builder.core.store import replace_file
from builder.core.untrusted_text import parse_json, read_regular
from builder.gateway.models import Models
from builder.gateway.record import log
from builder.gateway.settings import Place, read_models

LOOK_SECONDS = 0.2  # between two looks at the file


@dataclass(frozen=True)
class Routes:
    """The models to serve. number: counts the files that were written, to tell which one a gateway has read."""

    number: int
    places: tuple[Place, ...]

    def write(self, file: Path) -> None:
        """Replaces the file."""
        places = [{**vars(place), "repository": str(place.repository)} for place in self.places]
        replace_file(file, json.dumps({"number": self.number, "places": places}))


@dataclass(frozen=True)
class State:
    """What a gateway last read, why it does not serve that ("" if it does), and the gRPC addresses that it may use."""

    number: int
    fault: str
    in_use: frozenset[str]

    def write(self, file: Path) -> None:
        """Replaces the state beside the file of the routes."""
        replace_file(_state(file), json.dumps({**vars(self), "in_use": sorted(self.in_use)}))

    @classmethod
    def read(cls, file: Path) -> State | None:
        """The state beside the file of the routes; None before a gateway wrote one."""
        try:
            found = parse_json(read_regular(_state(file)))
        except FileNotFoundError:
            return None
        return cls(found["number"], found["fault"], frozenset(found["in_use"]))


def read(file: Path) -> Routes:
    """The routes in a file that `Routes.write` wrote."""
    found = parse_json(read_regular(file))
    places = (Place(**{**place, "repository": Path(place["repository"])}) for place in found["places"])
    return Routes(found["number"], tuple(places))


async def follow(file: Path | None, models: Models) -> None:
    """Serves what the file names, whenever it changes, and keeps the state up to date. Returns if there is no file."""
    if file is None:
        return
    number, fault, written, logged = read(file).number, "", None, ""
    while True:
        try:
            routes = read(file)
            if routes.number != number:
                number, fault = routes.number, await _switch(routes, models)
            await models.close_retired()
            state = State(number, fault, frozenset(models.in_use()))
            if state != written:
                state.write(file)
                written = state
            logged = ""
        except (BuilderError, OSError, ValueError) as error:  # such as a full disk: tried again at the next look
            if str(error) != logged:
                log("error", "routes failed", detail=str(error))
            logged = str(error)
        await asyncio.sleep(LOOK_SECONDS)


async def _switch(routes: Routes, models: Models) -> str:
    """Serves these models. Returns why they can't be served; the former ones stay then."""
    try:
        # A large tokenizer takes seconds to load: in a thread, and requests go on.
        await models.replace(await asyncio.to_thread(read_models, routes.places))
    except Exception as error:  # of any kind: nobody else would hear of it
        fault = str(error) if isinstance(error, BuilderError) else repr(error)
        log("error", "switch failed", detail=fault)
        return fault
    log("info", "switched", models=[place.name for place in routes.places], number=routes.number)
    return ""


def _state(file: Path) -> Path:
    return file.with_name(f"{file.name}.state")
