"""Whether a Triton server that was started is ready, and why one that failed did not start."""

from __future__ import annotations

import http.client
import re
from pathlib import Path
from urllib.parse import quote

from builder.core import process
from builder.core.errors import ServingError
from builder.trtllm import build_log


def ready_paths(models: Path) -> list[str]:
    """The HTTP paths that answer 200 once the server and each of its models are ready."""
    names = [path.name for path in sorted(models.iterdir()) if path.is_dir()]
    return ["/v2/health/ready", *(f"/v2/models/{quote(name)}/ready" for name in names)]


def answers_ok(url: str, path: str) -> bool:
    """Whether a GET of this path is answered with status 200 within 5 seconds. `url` is HOST:PORT."""
    connection = http.client.HTTPConnection(url, timeout=5)
    try:
        connection.request("GET", path, headers={"Connection": "close"})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def start_failure(what: str, log: Path) -> ServingError:
    """The error for a server that did not start: the log's errors, and the fix if the error is a known one."""
    text = log.read_text(encoding="utf-8", errors="replace")
    why = "\n".join(reasons(text)) or process.tail(log)
    if known := build_log.diagnose(text, "serving"):
        hint = f"{known.hint}\nThe full log: {log}"
        return ServingError(what, why=f"{known.why} ({known.source})\n{why}", hint=hint)
    return ServingError(what, why=why, hint=f"The full log: {log}")


def reasons(log: str) -> list[str]:
    """The errors in a server's log that explain why it did not start, without duplicates and stack traces."""
    failed = re.findall(r'"failed to load \'([^\']+)\' version \d+: (.+)', log)
    found = [f"{model}: {reason}" for model, reason in failed]
    found += re.findall(r'^E\d{4} .*?\] "((?:failed to start|Poll failed).*)', log, re.MULTILINE)
    found += re.findall(r"^Bad option: .*\n(.*)", log, re.MULTILINE)
    return list(dict.fromkeys(line.split(r"\n\nAt:")[0].strip(' "') for line in found))
