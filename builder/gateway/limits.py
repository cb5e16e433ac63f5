"""The gateway's limits. Imports nothing of the gateway, so that --help can show them."""

from __future__ import annotations

from dataclasses import dataclass

DRAIN_SECONDS = 30  # for requests in progress when the gateway is stopped, as for Triton's


@dataclass(frozen=True)
class Limits:
    """What one client may ask of the gateway, so that no request harms others.

    requests: answers in progress or waiting, above which a request gets 429. body, header: bytes.
    header_seconds: for a client to send a request's headers and body. idle_seconds: between two requests of a
    connection. seconds: for one answer.
    silent_seconds: of an engine within an answer, whether that is streamed or not.
    stalled_seconds: for a client to read something of its answers; stalled_bytes: of a stream that it may leave unread.
    choices: answers of one request (n times prompts).
    """

    requests: int = 256
    body: int = 8 << 20
    header: int = 32 << 10
    header_seconds: float = 20.0
    idle_seconds: float = 30.0
    seconds: float = 600.0
    silent_seconds: float = 120.0
    stalled_seconds: float = 30.0
    stalled_bytes: int = 4 << 20
    choices: int = 128

    @property
    def bodies(self) -> int:
        """The bytes of the bodies of all requests in progress: parsed, some take thirty times as much memory."""
        return 32 * self.body
