"""What every request passes first: its id, the API key, and the response to errors. Then its log line and metrics."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import traceback
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from builder.gateway.errors import ApiError
from builder.gateway.record import Metrics, Record, log, log_request
from builder.gateway.streams import ClientGone
from builder.gateway.telemetry import Traces

OPEN_PATHS = ("/health/", "/metrics")  # without an API key
ROUTES = re.compile(r"/v1/(?:chat/completions|completions|responses|models)|/health/(?:live|ready)|/metrics")
# Statuses and a code after which the body may not have been read, so the connection is closed.
UNREAD = (401, 404, 405, 408, 413, 415, "too_many_bytes")
CLIENT_ID = re.compile(rb"[\w.:-]{1,64}")


class Front:
    """Wraps the application. `keys`: the API keys that are accepted; none are needed if it is empty."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], metrics: Metrics, traces: Traces | None = None) -> None:
        self._app, self.metrics, self._traces = app, metrics, traces
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request; errors become responses."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope["app"] = self  # makes Starlette's router raise an HTTPException for an unknown path or method
        headers = dict(scope["headers"])
        record = scope["state"]["record"] = Record(_request_id(headers), scope["method"], scope["path"])
        id_header = (b"x-request-id", record.id.encode())

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", []), id_header]
            await send(message)

        try:
            self._check_key(scope["path"], headers)
            await self._app(scope, receive, with_id)
        except ClientGone:
            record.status = 499
        except asyncio.CancelledError:  # by uvicorn, when the time is over that a gateway has to finish
            message = "The gateway was stopped before the answer was complete."
            await _respond(with_id, record, ApiError(503, message, code="shutting_down"))
        except HTTPException as error:
            await _respond(with_id, record, _from_http(error, scope))
        except ApiError as error:
            await _respond(with_id, record, error)
        except Exception as error:
            detail = "".join(traceback.format_exception(error))
            await _respond(with_id, record, ApiError(500, "The gateway failed on this request.", detail=detail))
        finally:
            for release in record.releases:
                release()
            self._finish(record, scope)

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if not self._keys or path.startswith(OPEN_PATHS):
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(key.strip() if scheme.lower() == b"bearer" else b"").digest()
        # Each key is compared in constant time, and all are, so the time tells nothing about them.
        if not any([hmac.compare_digest(digest, one) for one in self._keys]):
            raise ApiError(401, "The API key is missing or wrong (Authorization: Bearer KEY).", code="invalid_api_key")

    def _finish(self, record: Record, scope: Scope) -> None:
        if record.stalled:
            record.status, record.code = 499, "client_stalled"
        found = ROUTES.match(record.path)
        route = found.group() if found else "other"
        self.metrics.add(record, route)
        if not record.path.startswith(OPEN_PATHS) or record.status >= 500:
            log_request(record)
            if self._traces is not None:
                self._traces.add(record, route, scope)


def _request_id(headers: dict[bytes, bytes]) -> str:
    """The client's X-Request-Id, if it is harmless, or a new one."""
    sent = headers.get(b"x-request-id", b"")
    return sent.decode() if CLIENT_ID.fullmatch(sent) else uuid.uuid4().hex


def _from_http(error: HTTPException, scope: Scope) -> ApiError:
    messages = {404: f"There is no {scope['path'][:200]}.", 405: f"{scope['method']} is not allowed here."}
    return ApiError(error.status_code, messages.get(error.status_code, str(error.detail)))


async def _respond(send: Any, record: Record, error: ApiError) -> None:
    """Sends an error, unless the response has begun."""
    record.code, record.detail = error.code or "", error.detail
    if record.status:
        return
    body = json.dumps(error.body).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **error.headers}
    if error.status in UNREAD or error.code in UNREAD:
        headers["Connection"] = "close"
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    try:
        await send({"type": "http.response.start", "status": error.status, "headers": raw})
        await send({"type": "http.response.body", "body": body})
    except OSError as failed:
        log("warning", "response failed", request_id=record.id, detail=str(failed))
