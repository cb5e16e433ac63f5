"""Validates responses before huggingface_hub uses them: a hijacked HF_ENDPOINT, a captive portal or a broken mirror
may answer instead of the Hub.

huggingface_hub turns ETags and commits into paths in its cache, waits as long as Retry-After says, and follows listings
without end. Imported only in processes that talk to the Hub; works with huggingface_hub 0.36 (requests) and 1.x
(httpx).
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants, file_download
from huggingface_hub.utils._http import hf_raise_for_status

from builder.core.errors import BuilderError, IntegrityError, StageError
from builder.core.safe_text import printable_line
from builder.core.worker import emit_error

HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # sha1 of a git blob, or sha256 of an LFS file
COMMIT = re.compile(r"[0-9a-f]{40}")
XET_HASH = re.compile(r"[0-9a-f]{64}")
MOST_REQUESTS = 500  # to one URL of the API; each page of a listing has 1,000 files
MOST_BYTES = 256_000_000  # of all API responses together; a page of a listing has about 300 kB
HINT = "Check HF_ENDPOINT and the proxy: this server can't be trusted. Its response was not used."


class Deadline:
    """Ends this process with an error if more than the given seconds pass between `begin` and `end`.

    Read timeouts are not enough, since a server that sends one byte per second never triggers them. Threads can't be
    interrupted, so the whole process is ended.
    """

    def __init__(self) -> None:
        self._ends: float | None = None
        self._seconds = 0.0
        self._stop: Callable[[int], object] = os._exit
        self._thread: threading.Thread | None = None

    def begin(self, seconds: float, stop: Callable[[int], object] | None = None) -> None:
        """Starts the deadline, or restarts it. `stop`: called with the exit code in place of os._exit."""
        self._stop = stop or self._stop
        self._seconds, self._ends = seconds, time.monotonic() + seconds
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def extend(self, seconds: float) -> None:
        """Postpones the deadline, for waits that the Hub asks for."""
        if self._ends is not None:
            self._ends += seconds

    def end(self) -> None:
        """Cancels the deadline."""
        self._ends = None

    def _watch(self) -> None:
        while True:
            time.sleep(0.1)
            if self._ends is not None and time.monotonic() > self._ends:
                error = StageError(
                    f"The Hub at {endpoint()} took more than {self._seconds:.0f} s to answer.",
                    why="It sends slowly or without end. Listings and small files normally take seconds.",
                    hint="Try again later, or check HF_ENDPOINT and the proxy.",
                )
                emit_error(error)
                self._stop(error.exit_code)


DEADLINE = Deadline()
_requests: Counter[str] = Counter()
_received = 0


def endpoint() -> str:
    """The URL of the Hub, without the user name and password that a mirror's URL may contain."""
    return re.sub(r"//[^/]*@", "//", constants.ENDPOINT)


def install() -> None:
    """Installs the checks between huggingface_hub and the network. StageError for an unknown huggingface_hub."""
    _check_metadata()
    if hasattr(huggingface_hub, "set_client_factory"):
        _guard_httpx()
    else:
        _guard_requests()


def check_hash(etag: object, what: str) -> None:
    """IntegrityError unless `etag` is the hash of a git blob or an LFS file. `what` names it in the message."""
    if not isinstance(etag, str) or not HASH.fullmatch(etag):
        raise _untrusted(f"{what} {_quoted(etag)}, which is not a hash", "It would become a file name in the cache.")


def check_commit(commit: object, requested: str | None = None) -> None:
    """IntegrityError unless `commit` is a commit hash, and equal to `requested` if that is one, too."""
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise _untrusted(
            f"commit {_quoted(commit)}, which is not a commit", "It would become a directory in the cache."
        )
    if requested and COMMIT.fullmatch(requested) and commit != requested:
        raise _untrusted(f"commit {commit}, but {requested} was requested", "Files of two commits must not be mixed.")


def _untrusted(what: str, why: str) -> IntegrityError:
    return IntegrityError(f"The Hub at {endpoint()} responded with {what}.", why=why, hint=HINT)


def _quoted(value: object) -> str:
    return printable_line(repr(value)[:120])


def _check_metadata() -> None:
    """Wraps the function that returns a file's metadata, from which both versions derive the path in the cache.

    The metadata comes from a HEAD request, or for Xet files (1.33) from a listing.
    """
    upstream = getattr(file_download, "_get_metadata_or_catch_error", None)
    if upstream is None:
        raise StageError(
            f"huggingface_hub {huggingface_hub.__version__} is not supported: its downloads can't be checked.",
            hint="Install a supported version: pip install 'huggingface_hub>=0.36,<1.34'",
        )

    def checked(**arguments: Any) -> Any:
        found = upstream(**arguments)
        _, etag, commit, size, xet, error = found
        if error is None:
            check_hash(etag, "the ETag")
            check_commit(commit, arguments.get("revision"))
            if size is not None and not 0 <= size < 1 << 60:
                raise _untrusted(f"a file size of {size} bytes", "No real file has that size.")
            if xet is not None and not XET_HASH.fullmatch(str(xet.file_hash)):
                raise _untrusted(f"the Xet hash {_quoted(xet.file_hash)}", "It would become a file name in the cache.")
        elif isinstance(error, BuilderError):
            raise error
        return found

    file_download._get_metadata_or_catch_error = checked


def _check_answer(method: str, url: str, status: int, headers: Mapping[str, str]) -> None:
    """Checks status and headers of a response. Raises IntegrityError, or StageError for a web page."""
    path = urlsplit(url).path
    commit = headers.get("X-Repo-Commit")
    if commit is not None:
        check_commit(commit)  # for errors, too: a 404 creates files in <cache>/.no_exist/<commit>
    if method != "HEAD" and 200 <= status < 300 and "text/html" in headers.get("Content-Type", "").lower():
        raise StageError(
            f"{urlsplit(url).hostname} answered with a web page, so it is not the Hub.",
            why="The cause may be the login page of a network (a captive portal), a proxy or a wrong HF_ENDPOINT.",
            hint="Open a browser and log in to the network, or check HF_ENDPOINT and the proxy.",
        )
    if "/api/" not in path:
        return
    _requests[f"{method} {path}"] += 1
    if _requests[f"{method} {path}"] > MOST_REQUESTS:
        raise _untrusted("an endless listing", f"There are more than {MOST_REQUESTS} pages.")
    encoding = headers.get("Content-Encoding", "identity").lower()
    if encoding != "identity":
        raise _untrusted(
            f"the encoding {_quoted(encoding)}", "None was requested: a few bytes could expand to billions."
        )


def _count(url: str, received: int) -> None:
    """Counts the bytes of API responses, since a single page of a listing could be endless, too."""
    global _received
    if "/api/" in urlsplit(url).path:
        _received += received
        if _received > MOST_BYTES:
            raise _untrusted(f"more than {MOST_BYTES} bytes of listings", "Listings of real models are far smaller.")


def _limits_rate(status: int, headers: Mapping[str, str]) -> bool:
    """Whether huggingface_hub would sleep as long as this response says. `with_retries` waits instead, with a limit."""
    return status == 429 or (status == 503 and "Retry-After" in headers)


def _guard_httpx() -> None:
    """Installs the checks for huggingface_hub 1.x.

    Also reports a reset connection as a truncated body, because huggingface_hub 1.x resumes only the latter
    (httpx.RemoteProtocolError, not httpx.ReadError; `http_get` in file_download.py of 1.33).
    """
    import httpx
    from huggingface_hub.utils._http import default_client_factory

    class Body(httpx.SyncByteStream):
        def __init__(self, body: httpx.SyncByteStream, url: str) -> None:
            self._body, self._url = body, url

        def __iter__(self) -> Iterator[bytes]:
            try:
                for piece in self._body:
                    _count(self._url, len(piece))
                    yield piece
            except httpx.ReadError as error:
                raise httpx.RemoteProtocolError(str(error)) from error

        def close(self) -> None:
            self._body.close()

    def request_uncompressed(request: httpx.Request) -> None:
        if "/api/" in request.url.path:
            request.headers["Accept-Encoding"] = "identity"

    def check(response: httpx.Response) -> None:
        request = response.request
        _check_answer(request.method, str(request.url), response.status_code, response.headers)
        if isinstance(response.stream, httpx.SyncByteStream):
            response.stream = Body(response.stream, str(request.url))
        if _limits_rate(response.status_code, response.headers):
            response.read()
            hf_raise_for_status(response)

    def client() -> httpx.Client:
        made = default_client_factory()
        made.event_hooks["request"].append(request_uncompressed)
        made.event_hooks["response"].append(check)
        return made

    huggingface_hub.set_client_factory(client)


def _guard_requests() -> None:
    """Installs the checks for huggingface_hub 0.36."""
    from huggingface_hub.utils import _http

    class Raw:
        """A response body whose bytes are counted while requests reads them."""

        def __init__(self, raw: Any, url: str) -> None:
            self._raw, self._url = raw, url

        def stream(self, *arguments: Any, **options: Any) -> Iterator[bytes]:
            for piece in self._raw.stream(*arguments, **options):
                _count(self._url, len(piece))
                yield piece

        def __getattr__(self, name: str) -> Any:
            return getattr(self._raw, name)

    def check(response: Any, **_: Any) -> None:
        _check_answer(response.request.method, response.url, response.status_code, response.headers)
        if "/api/" in urlsplit(response.url).path:
            response.raw = Raw(response.raw, response.url)
        if _limits_rate(response.status_code, response.headers):
            hf_raise_for_status(response)

    def session() -> Any:
        made = _http._default_backend_factory()  # type: ignore[attr-defined]
        made.headers["Accept-Encoding"] = "identity"
        made.hooks["response"].append(check)
        return made

    huggingface_hub.configure_http_backend(session)
