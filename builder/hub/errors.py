"""Translates errors of the Hugging Face Hub into messages, and retries those that are transient.

Works with huggingface_hub 0.36 (requests) and 1.x (httpx). Both wrap the original exception, so the whole chain of
causes is searched. Imported only in processes that talk to the Hub.
"""

from __future__ import annotations

import difflib
import email.utils
import errno
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from huggingface_hub import HfApi, constants, errors, get_token

from builder.core.errors import BuilderError, IntegrityError, StageError, UsageError
from builder.core.safe_text import SHORTEST_SECRET, redact
from builder.core.worker import emit
from builder.hub.guard import DEADLINE, endpoint

T = TypeVar("T")
TRANSIENT = (408, 429, 500, 502, 503, 504)  # HTTP statuses that are retried
# Seconds to wait in total because of rate limits: three of the Hub's windows of five minutes.
RATE_LIMIT_PATIENCE = 900.0
RATE_LIMIT_TRIES = 20  # rate-limited responses in a row, however short the waits are
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_TRANSPORTS = ("httpx", "httpcore", "requests", "urllib3")


def with_retries(call: Callable[[], T], waits: Sequence[float], progress: Callable[[], int] = lambda: 0) -> T:
    """Calls `call` again after transient errors: a rate limit, a server error, or a broken connection.

    `waits`: seconds before each retry; after the last one, the error is raised. Retries start over whenever `progress`
    (bytes received so far) has increased. For a rate limit, the wait is what the Hub asks for, up to
    RATE_LIMIT_PATIENCE seconds in total.
    """
    left, limited, tries, before = list(waits), 0.0, 0, progress()
    while True:
        try:
            return call()
        except Exception as error:
            if (now := progress()) > before:
                left, tries, before = list(waits), 0, now
            status = status_of(error)
            if status == 429 and (retry_after := _retry_after(error)) is not None:
                pause = retry_after
                limited, tries = limited + pause, tries + 1
                if limited > RATE_LIMIT_PATIENCE or tries > RATE_LIMIT_TRIES:
                    raise
                why = "The Hub limits the rate"
            elif left and _is_transient(error, status):
                pause = left.pop(0)
                why = f"The Hub answered {status}" if status else f"The connection broke ({_last(error)})"
            else:
                raise
        emit(info=redact_token(f"{why}; retrying in {pause:g} s."))
        DEADLINE.extend(pause)
        time.sleep(pause)


def translate(error: BaseException, kind: str, repo: str, revision: str | None) -> BuilderError:
    """The BuilderError for an exception of huggingface_hub. `kind`: "model" or "dataset". May ask the Hub for hints."""
    for cause in _chain(error):
        if isinstance(cause, BuilderError):
            return cause
        if isinstance(cause, errors.GatedRepoError):
            return gated_error(kind, repo)
        if isinstance(cause, errors.RevisionNotFoundError):
            return _no_revision(kind, repo, revision)
        if isinstance(cause, errors.RepositoryNotFoundError):
            return _no_repository(kind, repo)
        if isinstance(cause, errors.HFValidationError):
            return UsageError(f"{repo!r} is not a {kind} id.", why=str(cause), hint="Ids look like Qwen/Qwen3-8B.")
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return _offline(kind, repo, revision)
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return StageError(
                f"The disk that holds the Hub's cache is full ({constants.HF_HUB_CACHE}).",
                why="Complete files are kept and are not downloaded again.",
                hint="Free some space, or export HF_HOME=/a/larger/disk",
            )
        if isinstance(cause, OSError) and cause.errno in UNWRITABLE:
            return UsageError(
                f"Can't write to the Hub's cache {constants.HF_HUB_CACHE}.",
                why=str(cause),
                hint="export HF_HOME=/a/writable/directory",
            )
    return _by_status(error, kind, repo)


def _by_status(error: BaseException, kind: str, repo: str) -> BuilderError:
    status = status_of(error)
    if status in (401, 403):
        return _refused(kind, repo, status)
    if status == 429:
        retry_after = _retry_after(error)
        return StageError(
            "The Hub limits the rate" + (f" and asks to wait another {retry_after:.0f} s." if retry_after else "."),
            why="Requests without a token have the lowest limit." if not _token() else "",
            hint="Try again later" + ("." if _token() else ", or export HF_TOKEN=... of any account."),
        )
    if status == 416 or "Consistency check failed" in str(error):
        return IntegrityError(
            f"The size of a file of {repo} is not the one that the Hub lists.",
            why=_last(error),
            hint="Run the same command again. If it fails again, the repository or a mirror is damaged.",
        )
    if status is not None:
        return StageError(f"The Hub answered {status} for {kind} {repo}.", why=_last(error), hint="Try again later.")
    if _is_transient(error, None):
        return StageError(
            f"Can't reach the Hub at {endpoint()}.",
            why=_last(error),
            hint="Check the network and HF_ENDPOINT. If the files are cached: export HF_HUB_OFFLINE=1",
        )
    if isinstance(error, (ValueError, TypeError, LookupError, AttributeError, AssertionError, RecursionError)):
        return StageError(
            f"huggingface_hub can't parse the response of {endpoint()} for {kind} {repo}.",
            why=_last(error),
            hint="Check HF_ENDPOINT and the proxy. If this is the Hub itself, try again later.",
        )
    return StageError(
        f"Reading {kind} {repo} from the Hub failed.", why=redact_token(f"{type(error).__name__}: {error}")
    )


def status_of(error: BaseException) -> int | None:
    """The HTTP status of the response that caused the error; None if there was no response."""
    response = _response(error)
    return None if response is None else int(response.status_code)


def _token() -> str | None:
    try:
        return get_token()
    except OSError:  # HF_HOME/token can't be read
        return None


def redact_token(text: str) -> str:
    """Redacts all secrets, including a Hub token that is stored in a file."""
    token = _token()
    text = text.replace(token, "***") if token and len(token) >= SHORTEST_SECRET else text
    return redact(text)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception, its cause, the cause's cause, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _response(error: BaseException) -> Any:
    # Compared with None, since a requests.Response with a status of 400 or more is falsy.
    return next((r for e in _chain(error) if (r := getattr(e, "response", None)) is not None), None)


def _is_transient(error: BaseException, status: int | None) -> bool:
    """Whether a retry may help: for a status in TRANSIENT, or if there was no response, for a connection error."""
    if status is not None:
        return status in TRANSIENT
    # requests derives its JSON error from its connection errors; a response that is not JSON is not transient.
    if any(isinstance(e, (errors.OfflineModeIsEnabled, json.JSONDecodeError, BuilderError)) for e in _chain(error)):
        return False
    broken = (isinstance(e, ConnectionError) or type(e).__module__.split(".")[0] in _TRANSPORTS for e in _chain(error))
    return any(broken) or "Consistency check failed" in str(error)


def _retry_after(error: BaseException) -> float | None:
    """How many seconds a response with status 429 asks to wait; None if it does not say.

    Retry-After holds seconds or a date (RFC 9110, 10.2.3); the Hub may send `ratelimit: ...;t=55` instead.
    """
    headers = _response(error).headers
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]+", value):
        return _bounded(float(value))
    with suppress(ValueError, TypeError, OverflowError):
        return _bounded(email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    window = re.search(r"\bt=([0-9]+)", headers.get("ratelimit", ""))
    return _bounded(float(window[1])) if window else None


def _bounded(seconds: float) -> float:
    return min(max(1.0, seconds), 1e7)


def _last(error: BaseException) -> str:
    """The innermost cause on one line; the outer ones only repeat that something failed."""
    *_, last = _chain(error)
    return redact_token(f"{type(last).__name__}: {str(last).splitlines()[0] if str(last) else ''}"[:300])


def _page(kind: str, repo: str) -> str:
    return f"{endpoint()}/{'datasets/' if kind == 'dataset' else ''}{repo}"


def gated_error(kind: str, repo: str) -> BuilderError:
    """The error for a gated repository: how to get access, with or without a token. `kind`: "model" or "dataset"."""
    if _token():
        return UsageError(
            f"The {kind} {repo} is gated, and the account of this HF_TOKEN has no access to it.",
            why="Its owner grants access to accounts that accept the licence. A fine-grained token also needs the "
            "permission to read gated repositories.",
            hint=f"Accept the licence at {_page(kind, repo)} with that account, then run the same command.",
        )
    return UsageError(
        f"The {kind} {repo} is gated.",
        why="Its owner grants access to accounts that accept the licence, and there is no token.",
        hint=f"Accept the licence at {_page(kind, repo)}, then export HF_TOKEN=... of that account.",
    )


def _refused(kind: str, repo: str, status: int) -> BuilderError:
    if _token():
        return UsageError(
            f"The Hub refused the token ({status}) for {kind} {repo}.",
            why="It is wrong or expired, or has no permission to read this repository.",
            hint="Create a new token in the settings of your account, then export HF_TOKEN=...",
        )
    return UsageError(f"The Hub refused access to {kind} {repo} ({status}).", hint="export HF_TOKEN=...")


def _no_repository(kind: str, repo: str) -> BuilderError:
    near = _similar(kind, repo)
    private = "If it is private: export HF_TOKEN=..." if not _token() else ""
    hint = f"Did you mean {', '.join(near)}?" if near else "Check the spelling: ids look like Qwen/Qwen3-8B."
    return UsageError(
        f"The Hub has no {kind} {repo}, or it is private.",
        why="There is no directory of that name here either." if kind == "model" else "",
        hint=" ".join(part for part in (hint, private) if part),
    )


def _similar(kind: str, repo: str) -> list[str]:
    """Up to three similar ids from the Hub's search. Only for a hint, so errors are ignored."""
    owner, _, name = repo.rpartition("/")
    api = HfApi()
    search = api.list_models if kind == "model" else api.list_datasets
    try:
        found = [str(r.id) for r in search(search=name, limit=20)]
        if not found and owner:
            found = [str(r.id) for r in search(author=owner, limit=200)]
    except Exception:
        return []
    return difflib.get_close_matches(repo, [i for i in found if len(i) <= 96], n=3, cutoff=0.3)


def _no_revision(kind: str, repo: str, revision: str | None) -> BuilderError:
    try:
        refs = HfApi().list_repo_refs(repo, repo_type=kind)
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
    except Exception:  # only for a hint, so errors are ignored
        names = []
    near = difflib.get_close_matches(str(revision), names, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    known = f"It has {', '.join(names[:8])}." if names else ""
    return UsageError(
        f"The {kind} {repo} has no revision {revision}.", hint=f"{hint}{known}" or "Give a branch, a tag or a commit."
    )


def _offline(kind: str, repo: str, revision: str | None) -> BuilderError:
    if kind == "dataset":
        return UsageError(
            f"Can't look up the commit of the dataset {repo} at {revision or 'main'}: HF_HUB_OFFLINE is set.",
            hint="Name the commit of an earlier build (--set calibration.revision=COMMIT, or `revision` of a data set "
            "to evaluate on), or give a .jsonl file.",
        )
    return UsageError(
        f"The {kind} {repo} at {revision or 'main'} is not in the cache, and HF_HUB_OFFLINE is set.",
        why=f"The cache is {constants.HF_HUB_CACHE}.",
        hint="unset HF_HUB_OFFLINE to download it once, or give a local directory.",
    )
