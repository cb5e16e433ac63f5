"""Sanitizes output: redacts secrets and escapes control characters.

Messages quote file names, configuration values, rows of data sets and answers of servers, any of which may be hostile.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from urllib.parse import unquote

# Access tokens of the Hub are one of two prefixes and 34 letters or digits (the "Hugging Face" detectors of trufflehog
# and of GitHub's secret scanning). Anything shorter may be part of a path, such as ./hf_checkpoints.
_TOKEN = re.compile(r"(?<![A-Za-z0-9_])(hf|api_org)_[A-Za-z0-9]{34}(?![A-Za-z0-9_])")
_USERINFO = re.compile(r"""(\b[A-Za-z][A-Za-z0-9+.-]*://)[^/?#\s"'<>]*@""")
_AUTHORIZATION = re.compile(r"""(authorization["']?\s*[:=]\s*["']?(?:bearer|basic)\s+)[^\s"',]+""", re.IGNORECASE)
_SECRET_NAME = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|API_KEY|ACCESS_KEY|SECRET_KEY)\Z", re.IGNORECASE)
_URL_NAME = re.compile(r"(ENDPOINT|PROXY|URL)\Z", re.IGNORECASE)
# Characters. A value shorter than the first ("1", "none") is never redacted, one shorter than the second only as a
# whole word: "checkpoint" as the value of some variable must not blank out half of a message.
SHORTEST_SECRET, SURE_SECRET = 8, 20
# Control characters except line feed and tab, line separators, and characters that reorder text (Unicode TR 36, 2.8).
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff\U000e0000-\U000e007f]"
)


def safe(text: str) -> str:
    """Text for a terminal: secrets redacted, control characters escaped."""
    return printable(redact(text))


def printable(text: str) -> str:
    r"""Escapes control characters, so that a terminal prints `\x1b[2J` instead of obeying it. Keeps \n and \t."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def printable_line(text: str) -> str:
    r"""Escapes control characters, \n and \t too: for table cells, and values that must not imitate a line of ours."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def quoted(value: object, longest: int = 80) -> str:
    """An untrusted value for a message: quoted, in ASCII with control characters escaped, cut to `longest`."""
    text = ascii(value)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def printable_bytes(data: bytes) -> bytes:
    """Escapes control characters and invalid UTF-8 in a piece of a server's log."""
    return printable(data.decode("utf-8", "backslashreplace").replace("\r\n", "\n")).encode()


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """Redacts Hub tokens, credentials in URLs, Authorization headers, and the values of secret environment variables.

    `environment`: where secret variables are looked up, by name (HF_TOKEN, *_PASSWORD, *_PROXY, ...).
    """
    for secret in sorted(set(_secrets(environment)), key=len, reverse=True):
        if len(secret) >= SURE_SECRET:
            text = text.replace(secret, "***")
        elif secret in text:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])", "***", text)
    text = _USERINFO.sub(r"\1", text)
    text = _AUTHORIZATION.sub(r"\1***", text)
    return _TOKEN.sub(r"\1_***", text)


def _secrets(environment: Mapping[str, str]) -> Iterator[str]:
    """Values of secret variables, and user names and passwords of addresses, as written and URL-decoded."""
    for name, value in environment.items():
        found = []
        if _SECRET_NAME.search(name):
            found = [value.strip()]
        elif _URL_NAME.search(name) and "@" in value:
            user = value.partition("://")[2].rpartition("@")[0]
            password = user.partition(":")[2]
            found = [user, password, unquote(user), unquote(password)]
        yield from (secret for secret in found if len(secret) >= SHORTEST_SECRET)
