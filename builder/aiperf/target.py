"""What AIPerf measures: a gateway in front of a server that we started, or one that runs already."""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from builder.aiperf.measure import Target
from builder.aiperf.workload import Workload
from builder.core import exit_status
from builder.core.errors import ServingError, UsageError
from builder.gateway.limits import Limits
from builder.gateway.settings import tokenizer_directory
from builder.serving.gateway import Gateway, gateway
from builder.triton.repository import Repository

if TYPE_CHECKING:
    from builder.serving.container import ContainerServer
    from builder.serving.server import Server

LOCAL = "127.0.0.1"
LARGEST = 1 << 20  # bytes of a list of models


@contextmanager
def in_front(server: Server | ContainerServer, repository: Repository, workload: Workload) -> Iterator[Target]:
    """A gateway in front of this server while the block runs, which takes as many requests as the workload sends."""
    most = max(Limits.requests, *(2 * (load.concurrency or 0) for load in workload.loads))
    name = repository.path.name
    log = server.log.with_name("gateway.log")
    options = ["--model-name", name, "--max-requests", str(most)]
    with gateway(repository.path, server.grpc_url, (LOCAL, None), log=log, options=options) as front:
        url = front.url.removesuffix("/v1")
        yield Target(url, name, tokenizer(repository), lambda: _ended(server, front))


def running(url: str, repository: Repository, model: str | None) -> Target:
    """A server with OpenAI's API that runs already. `model`: its name there; default: the first that it lists.

    UsageError for an address that is none, ServingError if nothing answers there.
    """
    if not _is_address(url):
        raise UsageError(f"{url!r} is not the address of an OpenAI API.", hint="--url http://127.0.0.1:9000/v1")
    base = url.rstrip("/").removesuffix("/v1")
    return Target(base, model or _listed(base), tokenizer(repository))


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018 - it is parsed here
    except ValueError:  # half of an IPv6 address, or a port that is none
        return False
    extra = parts.query or parts.fragment or parts.username
    return parts.scheme in ("http", "https") and bool(parts.hostname) and not extra


def tokenizer(repository: Repository) -> Path:
    """The directory of the model's tokenizer, without links, which AIPerf's processes would look up by name."""
    return tokenizer_directory(repository.models, repository.facts).resolve()


def has_template(repository: Repository) -> bool:
    """Whether its model has a chat template."""
    from builder.tokenizer import files

    return files.read(tokenizer(repository)).template is not None


def _listed(base: str) -> str:
    import http.client
    import json
    import urllib.request

    # An address of this machine or of a cluster: a proxy in the environment would not find it.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{base}/v1/models", timeout=30) as answer:
            return str(json.loads(answer.read(LARGEST))["data"][0]["id"])
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ServingError(
            f"{base}/v1/models lists no model.", why=str(error), hint="Start it: builder serve REPOSITORY --port 9000"
        ) from None


def _ended(server: Server | ContainerServer, front: Gateway) -> str:
    """Why they no longer serve, or ""."""
    try:
        code = front.watched(server.wait)(0)
    except ServingError as error:
        return str(error)
    return "" if code is None else f"Triton {exit_status.describe(code)}. Its log: {server.log}"
