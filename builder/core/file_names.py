"""Turns arbitrary text into file names: safe characters and bounded length. Pure functions."""

from __future__ import annotations

import hashlib
import re

# Bytes. File systems allow 255; the rest is for an extension and for the process id in a temporary name.
LONGEST = 180


def sanitized(text: str) -> str:
    """Replaces each run of characters other than letters, digits, '.', '_' and '-' by one '-'. Never empty: `model`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "model"


def truncated(name: str, longest: int = LONGEST) -> str:
    """The name, cut to `longest` bytes if it is longer. A digest of the whole name keeps cut names distinct."""
    encoded = name.encode(errors="surrogateescape")
    if len(encoded) <= longest:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return f"{encoded[: longest - 9].decode(errors='ignore').rstrip('-.')}-{digest}"
