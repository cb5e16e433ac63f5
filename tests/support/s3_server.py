"""A real S3 server for tests: moto's, as a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

BUCKET = "models"
ADDRESS = f"s3://{BUCKET}/team/builds"


@contextmanager
def running(directory: Path) -> Iterator[dict[str, str]]:
    """Yields the variables by which clients reach it. It has one bucket."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with open(directory / "s3.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=log,
            stderr=log,
            env={"PATH": "/usr/bin:/bin"},
        )
    try:
        _wait(port)
        variables = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "AKIAIOSFODNN7EXAMPLE",
            "AWS_SECRET_ACCESS_KEY": "only-in-the-environment",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        _make_bucket(variables)
        yield variables
    finally:
        server.kill()
        server.wait()


@contextmanager
def strict(variables: Mapping[str, str]) -> Iterator[None]:
    """While the block runs, it asks for permissions, which nobody has."""
    _ask_permissions(variables, "0")
    try:
        yield
    finally:
        _ask_permissions(variables, "inf")


def _ask_permissions(variables: Mapping[str, str], after: str) -> None:
    """after: so many requests."""
    address = f"{variables['AWS_ENDPOINT_URL']}/moto-api/reset-auth"
    request = urllib.request.Request(address, after.encode(), {"Content-Type": "text/plain"})
    urllib.request.urlopen(request, timeout=60).close()


def _make_bucket(variables: Mapping[str, str]) -> None:
    request = urllib.request.Request(f"{variables['AWS_ENDPOINT_URL']}/{BUCKET}", method="PUT")
    urllib.request.urlopen(request, timeout=10).close()


def _wait(port: int) -> None:
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise TimeoutError("moto's server did not start")
