"""What `builder serve` does when its server fails: says so, and starts it again, but not for ever."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from builder.core.errors import BuilderError, ServingError
from builder.gateway.watchdog import Watched

PAUSES = (1.0, 5.0, 15.0)  # seconds before each restart
PERIOD_SECONDS = 600.0  # in which there are no more restarts than these


@dataclass
class Watchdog:
    """Counts what happens to a server, writes it to a file for the gateway, and one line of each event to the log."""

    file: Path
    log: Callable[[str], None]
    seen: Watched = field(default_factory=Watched)
    _restarts: list[float] = field(default_factory=list)

    def probed(self, fault: str) -> None:
        """The server was asked for a token of each model. `fault`: why it failed; "" if it did not."""
        self.seen.probes += 1
        self.seen.failures += bool(fault)
        self.seen.probed_at = time.monotonic()
        if fault:
            self._say(f"A request for one token failed: {fault}")
        self._write()

    def replaced(self, model: str) -> None:
        """The process of a model has ended, and Triton starts another."""
        self.seen.replaced += 1
        self._say(f"The process of {model} has ended. Triton loads the model again.")
        self._write()

    def up(self) -> None:
        """The server is ready."""
        if self.seen.fault:
            self._say("The server answers again.")
        self.seen.fault = ""
        self._write()

    def restart(self, error: ServingError) -> float:
        """The server is down. Returns how many seconds to wait before it is started again.

        ServingError if it was started too often.
        """
        now = time.monotonic()
        self._restarts = [at for at in self._restarts if at > now - PERIOD_SECONDS]
        if len(self._restarts) == len(PAUSES):
            often = f"It was started again {len(PAUSES)} times within {PERIOD_SECONDS / 60:.0f} minutes."
            raise ServingError(error.what, why=f"{error.why}\n{often}".strip(), hint=error.hint) from error
        pause = PAUSES[len(self._restarts)]
        self._restarts.append(now)
        self.seen.restarts += 1
        self.seen.fault = error.what
        why = f" {error.why}" if error.why else ""
        self._say(f"{error.what}{why} It is started again in {pause:g} s.")
        self._write()
        return pause

    def _say(self, event: str) -> None:
        self.log(" ".join(event.split()))  # `--auto-update` reads events by line, and a reason may have several

    def _write(self) -> None:
        with suppress(BuilderError):  # a full disk must not end a server that works
            self.seen.write(self.file)
