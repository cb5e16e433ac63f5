"""Whether a server still answers: requests one token of each model that takes text.

Triton's own health endpoints are not enough. After the process of a model has ended, Triton 24.10 (no fix is
known) still reports the model as ready, does not restart it, and answers every request with an error (recovery.py loads
it again).
Containers run this file as their health check (python -m builder.serving.health --gateway HOST:PORT), so it imports the
standard library only.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Callable

from builder.core.errors import ServingError

PERIOD = 10.0  # seconds between two probes of `watch`
LOOK_SECONDS = 2.0  # between two looks at the models' processes, which cost about 20 ms each
PATIENCE = 30.0  # seconds for one probe: a token takes long if the queues are full
FAILURES = 3  # consecutive failed probes until the server counts as broken
# The names of the models in our repositories that may take text. Each runs in its own processes, so each is probed.
MODELS = ("ensemble", "ensemble_infer", "tensorrt_llm_bls", "tensorrt_llm")
MAX_TOKENS = ("max_tokens", "sampling_param_max_tokens")
Wait = Callable[[float], int | None]  # waits for so many seconds; the exit code of the server, None if it still runs
BUSY = "maximum queue size"  # in Triton's error for a request that exceeds max_queue_size


def fault(url: str, patience: float = PATIENCE) -> str:
    """Describes what is wrong with the server at `url` (HOST:PORT); "" if every model answers or is merely busy.

    A server that does not answer within `patience` seconds is busy if Triton reports it as ready.
    """
    deadline = time.monotonic() + patience
    try:
        requests = [(model, body) for model in text_models(url) if (body := _request_body(url, model))]
        if not requests:
            return "it has no model that takes text"
        for model, body in requests:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            status, answer = _call(url, "POST", f"/v2/models/{model}/generate", left, body)
            text = answer[:300].decode("utf-8", "replace")
            if (status != 200 or '{"error"' in text) and BUSY not in text:
                return f"{model}: {text or f'HTTP {status}'}"
    except TimeoutError:
        return "" if _is_ready(url) else "it does not answer, and is not ready"
    except (OSError, http.client.HTTPException, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def gateway_fault(url: str, patience: float) -> str:
    """Describes why the gateway at `url` (HOST:PORT) is not ready; "" if the engine behind it has generated a token."""
    try:
        status, answer = _call(url, "GET", "/health/ready", patience)
    except (OSError, http.client.HTTPException) as error:
        return f"{type(error).__name__}: {error}"
    return "" if status == 200 else answer[:300].decode("utf-8", "replace")


def no_recovery(wait: Wait) -> str:
    """Repairs nothing, and finds nothing to repair."""
    return ""


def watch(
    url: str,
    wait: Wait,
    recover: Callable[[Wait], str] = no_recovery,
    probed: Callable[[str], None] = lambda found: None,
) -> int:
    """Watches a server until it exits and returns its exit code. ServingError if it runs but no longer answers.

    `wait` waits for the exit for some seconds and returns the exit code or None. `recover` repairs what it can each
    LOOK_SECONDS and returns why it can't, or "". `probed` gets what each probe found.
    """
    failures, next_probe = 0, time.monotonic() + PERIOD
    while True:
        if (code := wait(min(LOOK_SECONDS, PERIOD))) is not None:
            return code
        if why := recover(wait):
            raise _broken(why)
        if time.monotonic() < next_probe:
            continue
        found = fault(url)
        probed(found)
        failures = failures + 1 if found else 0
        if failures == FAILURES:
            if (code := wait(1.0)) is not None:
                return code
            raise _broken(f"{failures} consecutive requests for one token failed. The last one: {found}")
        next_probe = time.monotonic() + PERIOD


def _broken(why: str) -> ServingError:
    return ServingError(
        "The server is running but no longer answers.",
        why=why,
        hint="Start the server again (docker compose does so with restart: unless-stopped). See the server's log.",
    )


def text_models(url: str) -> list[str]:
    """Those of the server's models that may take text: MODELS, or in a repository of several NAME_tensorrt_llm, ..."""
    status, answer = _call(url, "GET", "/v2/models/stats", 5.0)
    names = [entry["name"] for entry in json.loads(answer).get("model_stats", [])] if status == 200 else list(MODELS)
    return [name for name in names if name.endswith(tuple(f"_{model}" for model in MODELS)) or name in MODELS]


def _request_body(url: str, model: str) -> bytes | None:
    """The body of a request for one token; None if there is no such model or it takes no text."""
    status, answer = _call(url, "GET", f"/v2/models/{model}", 5.0)
    names = {entry["name"] for entry in json.loads(answer).get("inputs", [])} if status == 200 else set()
    limit = next((name for name in MAX_TOKENS if name in names), None)
    return json.dumps({"text_input": "a", limit: 1}).encode() if limit and "text_input" in names else None


def _is_ready(url: str) -> bool:
    try:
        return _call(url, "GET", "/v2/health/ready", 5.0)[0] == 200
    except (OSError, http.client.HTTPException):
        return False


def _call(url: str, verb: str, path: str, timeout: float, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(url, timeout=timeout)
    try:
        connection.request(verb, path, body, {"Connection": "close", "Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def main(argv: list[str]) -> int:
    """Probes Triton at HOST:PORT, or with --gateway the gateway. Exit code 0 if it answers; otherwise 1, with the
    reason on stderr."""
    found = gateway_fault(argv[2], patience=12.0) if argv[1] == "--gateway" else fault(argv[1], patience=8.0)
    if found:
        print(found, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
