"""Whether a server still answers: one token from each model that takes text. python -m builder.serving.health HOST:PORT

Triton's own health says too little. After a model has lost its process, Triton 24.10 still reports it as ready, does
not start it again, and answers every request with an error. A container's health check runs this file too, so it
imports the standard library only.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Callable

from builder.core.errors import ServingError

PERIOD = 10.0  # seconds between two checks of `watch`
PATIENCE = 30.0  # for one check: behind full queues a token takes its time
FAILURES = 3  # in a row, before the server is given up
# What our repositories name the models that may take text; each of them is asked by processes of its own.
MODELS = ("ensemble", "ensemble_infer", "tensorrt_llm_bls", "tensorrt_llm")
MAX_TOKENS = ("max_tokens", "sampling_param_max_tokens")
BUSY = "maximum queue size"  # Triton's refusal of a request that finds the queue full


def fault(url: str, patience: float = PATIENCE) -> str:
    """What is wrong with the server; "" if every model answers, or is too busy to answer in time."""
    deadline = time.monotonic() + patience
    try:
        asked = [(model, body) for model in MODELS if (body := _request_body(url, model))]
        if not asked:
            return "it has no model that takes text"
        for model, body in asked:
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


def watch(url: str, wait: Callable[[float], int | None], lost: Callable[[], bool] = lambda: False) -> int:
    """Until the server ends by itself: its exit code. ServingError once it runs and no longer answers.

    `wait` waits for its end for so many seconds; `lost` says whether a process of one of its models has ended.
    """
    failures = 0
    while True:
        code = wait(PERIOD)
        if code is not None:
            return code
        if lost() and (code := wait(PERIOD / 2)) is None and lost():
            raise _given_up("The process of a model has ended.")
        if code is not None:
            return code
        found = fault(url)
        failures = failures + 1 if found else 0
        if failures == FAILURES and (code := wait(1.0)) is None:
            raise _given_up(f"Asked for one token, {failures} times in a row: {found}")


def _given_up(why: str) -> ServingError:
    return ServingError(
        "The server runs, and no longer answers.",
        why=f"{why}\nTriton does not start a model's process again.",
        hint="Start it again (with docker compose, restart: unless-stopped does that). The server's log says more.",
    )


def _request_body(url: str, model: str) -> bytes | None:
    """A request for one token; None where there is no such model or it takes no text."""
    status, answer = _call(url, "GET", f"/v2/models/{model}", 5.0)
    names = {one["name"] for one in json.loads(answer).get("inputs", [])} if status == 200 else set()
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
    """Exit code 0 if it answers, 1 with the reason on stderr."""
    found = fault(argv[1], patience=8.0)
    if found:
        print(found, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
