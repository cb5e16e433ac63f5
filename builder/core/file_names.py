"""File names made from a user's words: safe characters, bounded length, distinct for distinct words. Pure."""

from __future__ import annotations

import hashlib
import re

# File systems allow 255 bytes in a name; room is left for `.json`, `.html` and a temporary name's process id.
LONGEST = 180


def sanitized(text: str) -> str:
    """Letters, digits, '.', '_' and '-' only; what nothing is left of becomes `model`."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.") or "model"


def truncated(name: str, longest: int = LONGEST) -> str:
    """The name, or where it has more than `longest` bytes its beginning and a digest of the whole."""
    encoded = name.encode(errors="surrogateescape")
    if len(encoded) <= longest:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return f"{encoded[: longest - 9].decode(errors='ignore').rstrip('-.')}-{digest}"
