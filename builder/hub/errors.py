"""What the Hugging Face Hub can answer, as errors for people, and the patience for what passes by itself.

For huggingface_hub 0.36 (requests) and 1.x (httpx) alike: both wrap the cause, so the chain of causes is read.
Only ever imported in a child process that talks to the Hub.
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
from builder.core.process import emit
from builder.core.safe_text import SHORTEST_SECRET, redact
from builder.hub.guard import DEADLINE, endpoint

T = TypeVar("T")
PASSING = (408, 429, 500, 502, 503, 504)
# Seconds in all that a rate limit may make us wait; the Hub's windows are five minutes long.
RATE_LIMIT_PATIENCE = 900.0
RATE_LIMIT_TRIES = 20  # in a row, however short the waits are that it asks for
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_TRANSPORTS = ("httpx", "httpcore", "requests", "urllib3")


def with_retries(call: Callable[[], T], waits: Sequence[float], progress: Callable[[], int] = lambda: 0) -> T:
    """Repeats `call` when the Hub limits the rate (as long as it asks), is down, or the connection breaks.

    `waits`: seconds before each repetition in a row; bytes that `progress` counts begin a new row.
    """
    left, limited, tries, before = list(waits), 0.0, 0, progress()
    while True:
        try:
            return call()
        except Exception as error:
            if (now := progress()) > before:
                left, tries, before = list(waits), 0, now
            status = status_of(error)
            if status == 429 and (asked := _retry_after(error)) is not None:
                pause = asked
                limited, tries = limited + pause, tries + 1
                if limited > RATE_LIMIT_PATIENCE or tries > RATE_LIMIT_TRIES:
                    raise
                why = "The Hub limits the rate"
            elif left and _passes(error, status):
                pause = left.pop(0)
                why = f"The Hub answered {status}" if status else f"The connection broke ({_last(error)})"
            else:
                raise
        emit(info=redact_token(f"{why}; trying again in {pause:g} s."))
        DEADLINE.extend(pause)
        time.sleep(pause)


def translate(error: BaseException, kind: str, repo: str, revision: str | None) -> BuilderError:
    """What happened, why and what to type next. `kind`: "model" or "dataset"."""
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
            return UsageError(f"{repo!r} is no id of a {kind}.", why=str(cause), hint="Qwen/Qwen3-8B is one.")
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return _offline(kind, repo, revision)
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return StageError(
                f"The disk that holds the Hub's cache is full ({constants.HF_HUB_CACHE}).",
                why="What was downloaded whole stays there and is not downloaded again.",
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
        asked = _retry_after(error)
        return StageError(
            "The Hub limits the rate" + (f" and asks to wait {asked:.0f} s more." if asked else "."),
            why="Requests without a token have the smallest allowance." if not _token() else "",
            hint="Try again later" + ("." if _token() else ", or export HF_TOKEN=... of any account."),
        )
    if status == 416 or "Consistency check failed" in str(error):
        return IntegrityError(
            f"The Hub sends a file of {repo} with another size than it lists.",
            why=_last(error),
            hint="Run the same command again; if it stays, the repository or a mirror in between is damaged.",
        )
    if status is not None:
        return StageError(f"The Hub answered {status} for {kind} {repo}.", why=_last(error), hint="Try again later.")
    if _passes(error, None):
        return StageError(
            f"Can't reach the Hub at {endpoint()}.",
            why=_last(error),
            hint="Check the network and HF_ENDPOINT; with the files cached already, export HF_HUB_OFFLINE=1",
        )
    if isinstance(error, (ValueError, TypeError, LookupError, AttributeError, AssertionError, RecursionError)):
        return StageError(
            f"The answer of the Hub at {endpoint()} for {kind} {repo} can't be understood.",
            why=f"{_last(error)} (huggingface_hub reading it)",
            hint="Check HF_ENDPOINT and the proxy; if it is the Hub itself, try again later.",
        )
    return StageError(
        f"Reading {kind} {repo} from the Hub failed.", why=redact_token(f"{type(error).__name__}: {error}")
    )


def status_of(error: BaseException) -> int | None:
    """The HTTP status at the bottom of it, if there was an answer at all."""
    response = _response(error)
    return None if response is None else int(response.status_code)


def _token() -> str | None:
    try:
        return get_token()
    except OSError:  # HF_HOME/token can't be read
        return None


def redact_token(text: str) -> str:
    """`text` without the token and other secrets, whatever it quotes."""
    token = _token()  # which may come from a file
    text = text.replace(token, "***") if token and len(token) >= SHORTEST_SECRET else text
    return redact(text)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _response(error: BaseException) -> Any:
    # A requests.Response with a status of 400 or more is false: compare with None.
    return next((r for e in _chain(error) if (r := getattr(e, "response", None)) is not None), None)


def _passes(error: BaseException, status: int | None) -> bool:
    if status is not None:
        return status in PASSING
    # What came is no JSON; requests' error for that is one of its connection errors.
    if any(isinstance(e, (errors.OfflineModeIsEnabled, json.JSONDecodeError, BuilderError)) for e in _chain(error)):
        return False
    broken = (isinstance(e, ConnectionError) or type(e).__module__.split(".")[0] in _TRANSPORTS for e in _chain(error))
    return any(broken) or "Consistency check failed" in str(error)


def _retry_after(error: BaseException) -> float | None:
    """Seconds that a 429 asks for: Retry-After as seconds or a date (RFC 9110), or the Hub's `ratelimit: ...;t=55`.
    None where it asks for nothing that can be understood."""
    headers = _response(error).headers
    asked = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"[0-9]+", asked):
        return _bounded(float(asked))
    with suppress(ValueError, TypeError, OverflowError):
        return _bounded(email.utils.parsedate_to_datetime(asked).timestamp() - time.time())
    window = re.search(r"\bt=([0-9]+)", headers.get("ratelimit", ""))
    return _bounded(float(window[1])) if window else None


def _bounded(seconds: float) -> float:
    return min(max(1.0, seconds), 1e7)


def _last(error: BaseException) -> str:
    """The innermost cause in one line: the outer ones only repeat that something failed."""
    *_, last = _chain(error)
    return redact_token(f"{type(last).__name__}: {str(last).splitlines()[0] if str(last) else ''}"[:300])


def _page(kind: str, repo: str) -> str:
    return f"{endpoint()}/{'datasets/' if kind == 'dataset' else ''}{repo}"


def gated_error(kind: str, repo: str) -> BuilderError:
    if _token():
        return UsageError(
            f"The {kind} {repo} is gated, and the account of this HF_TOKEN has no access to it.",
            why="Its owner gives access to those who accept the licence; fine-grained tokens need the right to read "
            "gated repositories as well.",
            hint=f"Accept the licence at {_page(kind, repo)} with that account, then run the same command.",
        )
    return UsageError(
        f"The {kind} {repo} is gated.",
        why="Its owner gives access to accounts that accept the licence, and no token was given.",
        hint=f"Accept the licence at {_page(kind, repo)}, then export HF_TOKEN=... of that account.",
    )


def _refused(kind: str, repo: str, status: int) -> BuilderError:
    if _token():
        return UsageError(
            f"The Hub refused the token ({status}) for {kind} {repo}.",
            why="It is wrong, expired, or lacks the right to read this repository.",
            hint="Make a new token in the settings of your account, then export HF_TOKEN=...",
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
    """Up to three ids that the Hub's search finds. A hint only: what goes wrong here stays unsaid."""
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
    except Exception:  # a hint only, as the names of _similar are: what is wrong is told all the same
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
            f"Which commit {revision or 'main'} of the dataset {repo} is can't be asked: HF_HUB_OFFLINE is set.",
            hint="Name the commit of an earlier build (--set calibration.revision=COMMIT, or `revision` of a data set "
            "to evaluate on), or give a .jsonl file.",
        )
    return UsageError(
        f"The {kind} {repo} at {revision or 'main'} is not in the cache, and HF_HUB_OFFLINE forbids to download it.",
        why=f"The cache is {constants.HF_HUB_CACHE}.",
        hint="unset HF_HUB_OFFLINE once with a network, or give a local directory.",
    )
