"""An error as OpenAI's API reports it: an HTTP status, and a JSON object with message, type, param and code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that failed. `message` is for the client, `detail` for the log only."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, detail: str = ""
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.detail = status, message, param, code, detail

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object of the response."""
        kind = TYPES.get(self.status) or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> Mapping[str, str]:
        """Additional headers of the response. Clients such as openai's wait as long as Retry-After says."""
        return {"Retry-After": "1"} if self.status in (429, 503) else {}


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """The client's mistake: status 400."""
    return ApiError(400, message, param=param, code=code)
