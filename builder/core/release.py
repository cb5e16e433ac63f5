"""Order of TensorRT-LLM releases, so that facts can say since which one they hold."""

from __future__ import annotations

import re

from builder.core.errors import UsageError

FINAL = 1 << 30  # stands for "no release candidate": a release comes after all of its candidates


def order(version: str) -> tuple[int, ...]:
    """A version as numbers that compare: 1.3.0rc21 < 1.3.0 < 1.4.0rc0. UsageError if it is not a version."""
    parsed = re.fullmatch(r"(\d+)\.(\d+)(?:\.(\d+))?(?:rc(\d+))?(?:\.?post\d+|\.\d+)?", version)
    if parsed is None:
        raise UsageError(f"{version!r} is not a TensorRT-LLM version.", hint="Versions look like 1.2.1 or 1.3.0rc22.")
    major, minor, patch, candidate = parsed.groups()
    return (int(major), int(minor), int(patch or 0), FINAL if candidate is None else int(candidate))


def reaches(version: str | None, since: str | None) -> bool:
    """Whether a version is `since` or a later one; true if either is None: any version, or a fact that always held."""
    return version is None or since is None or order(version) >= order(since)
