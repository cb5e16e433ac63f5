"""Answers of a Hub that can't be trusted (a hijacked HF_ENDPOINT, a captive portal, a broken mirror), checked before
huggingface_hub uses them.

huggingface_hub makes paths in its cache of a file's ETag and of a commit, waits as long as Retry-After says, and
follows listings without end. Only ever imported in a child process that talks to the Hub; for huggingface_hub 0.36
(requests) and 1.x (httpx).
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
from builder.core.process import emit_error
from builder.core.safe_text import printable_line

HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # of a git blob, or of an LFS file
COMMIT = re.compile(r"[0-9a-f]{40}")
XET_HASH = re.compile(r"[0-9a-f]{64}")
MOST_REQUESTS = 500  # for one address of the API: the pages of a listing have 1,000 files each
MOST_BYTES = 256_000_000  # of all answers of the API together; a page of a listing has some 300 kB
HINT = "Check HF_ENDPOINT and the proxy: what answers there is no Hub to trust. Nothing of it was used."


class Deadline:
    """Ends this process with an error when `seconds` pass between `begin` and `end`.

    Only the process as a whole can be ended: a read that gets a byte a second never times out by itself.
    """

    def __init__(self) -> None:
        self._ends: float | None = None
        self._seconds = 0.0
        self._stop: Callable[[int], object] = os._exit
        self._thread: threading.Thread | None = None

    def begin(self, seconds: float, stop: Callable[[int], object] | None = None) -> None:
        """`stop` ends the process in place of os._exit."""
        self._stop = stop or self._stop
        self._seconds, self._ends = seconds, time.monotonic() + seconds
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def extend(self, seconds: float) -> None:
        """For waits that the Hub asked for."""
        if self._ends is not None:
            self._ends += seconds

    def end(self) -> None:
        self._ends = None

    def _watch(self) -> None:
        while True:
            time.sleep(0.1)
            if self._ends is not None and time.monotonic() > self._ends:
                error = StageError(
                    f"The Hub at {endpoint()} took more than {self._seconds:.0f} s to answer.",
                    why="It sends slowly or without end; listings and small files take seconds.",
                    hint="Try again later, or check HF_ENDPOINT and the proxy.",
                )
                emit_error(error)
                self._stop(error.exit_code)


DEADLINE = Deadline()
_requests: Counter[str] = Counter()
_received = 0


def endpoint() -> str:
    """The Hub's address without the user and password that a mirror's address may hold."""
    return re.sub(r"//[^/]*@", "//", constants.ENDPOINT)


def install() -> None:
    """Puts the checks below between huggingface_hub and the network."""
    _check_metadata()
    if hasattr(huggingface_hub, "set_client_factory"):
        _guard_httpx()
    else:
        _guard_requests()


def check_hash(etag: object, what: str) -> None:
    """IntegrityError unless it is the hash of a git blob or of an LFS file."""
    if not isinstance(etag, str) or not HASH.fullmatch(etag):
        raise _untrusted(f"{what} {_shown(etag)}, which is no hash", "It would become the name of a file in the cache.")


def check_commit(commit: object, asked: str | None = None) -> None:
    """IntegrityError unless it is a commit, and the one that was asked for by its hash."""
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise _untrusted(f"commit {_shown(commit)}, which is none", "It would become a directory of the cache.")
    if asked and COMMIT.fullmatch(asked) and commit != asked:
        raise _untrusted(f"commit {commit} where {asked} was asked for", "Files of two commits must not be mixed.")


def _untrusted(what: str, why: str) -> IntegrityError:
    return IntegrityError(f"The Hub at {endpoint()} answers with {what}.", why=why, hint=HINT)


def _shown(value: object) -> str:
    return printable_line(repr(value)[:120])


def _check_metadata() -> None:
    """Wraps the one function from which both versions take what they make a file's path of: what a HEAD request
    answered, or for Xet files (1.33) a listing."""
    upstream = getattr(file_download, "_get_metadata_or_catch_error", None)
    if upstream is None:
        raise StageError(
            f"huggingface_hub {huggingface_hub.__version__} is not known here: its downloads can't be checked.",
            hint="Install a version that is: pip install 'huggingface_hub>=0.36,<1.34'",
        )

    def checked(**asked: Any) -> Any:
        found = upstream(**asked)
        _, etag, commit, size, xet, error = found
        if error is None:
            check_hash(etag, "the ETag")
            check_commit(commit, asked.get("revision"))
            if size is not None and not 0 <= size < 1 << 60:
                raise _untrusted(f"a file of {size} bytes", "There are no such files.")
            if xet is not None and not XET_HASH.fullmatch(str(xet.file_hash)):
                raise _untrusted(f"the Xet hash {_shown(xet.file_hash)}", "It names a file in the cache as well.")
        elif isinstance(error, BuilderError):
            raise error
        return found

    file_download._get_metadata_or_catch_error = checked


def _check_answer(method: str, url: str, status: int, headers: Mapping[str, str]) -> None:
    """What can be judged by an answer's first lines."""
    path = urlsplit(url).path
    commit = headers.get("X-Repo-Commit")
    if commit is not None:
        check_commit(commit)  # of an error too: 404 makes files in <cache>/.no_exist/<commit>
    if method != "HEAD" and 200 <= status < 300 and "text/html" in headers.get("Content-Type", "").lower():
        raise StageError(
            f"What answers at {urlsplit(url).hostname} is a web page, not the Hub.",
            why="That is how the log-in page of a network (a captive portal), a proxy or a wrong HF_ENDPOINT looks.",
            hint="Open a browser and log in to the network, or check HF_ENDPOINT and the proxy.",
        )
    if "/api/" not in path:
        return
    _requests[f"{method} {path}"] += 1
    if _requests[f"{method} {path}"] > MOST_REQUESTS:
        raise _untrusted("a listing without end", f"{MOST_REQUESTS} pages were read, and there is another one.")
    encoding = headers.get("Content-Encoding", "identity").lower()
    if encoding != "identity":
        raise _untrusted(f"the encoding {_shown(encoding)}", "None was asked for: a few bytes could become billions.")


def _count(url: str, received: int) -> None:
    """The bytes of the API's answers: a listing's single page could be endless, too."""
    global _received
    if "/api/" in urlsplit(url).path:
        _received += received
        if _received > MOST_BYTES:
            raise _untrusted(f"more than {MOST_BYTES} bytes of listings", "Those of real models have a few.")


def _limits_rate(status: int, headers: Mapping[str, str]) -> bool:
    """Whether huggingface_hub would sleep as long as this answer says. `patiently` waits instead, and not for ever."""
    return status == 429 or (status == 503 and "Retry-After" in headers)


def _guard_httpx() -> None:
    """Also makes a connection that is reset look like a body that ends too early: huggingface_hub 1.x resumes only the
    latter (httpx.RemoteProtocolError, not httpx.ReadError; `http_get` in file_download.py of 1.33)."""
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

    def ask_plain(request: httpx.Request) -> None:
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
        made.event_hooks["request"].append(ask_plain)
        made.event_hooks["response"].append(check)
        return made

    huggingface_hub.set_client_factory(client)


def _guard_requests() -> None:
    """The same for huggingface_hub 0.36."""
    from huggingface_hub.utils import _http

    class Raw:
        """A body that is counted while requests reads it."""

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
