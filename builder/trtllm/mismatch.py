"""One incompatibility between an engine, the repository that serves it and the machine."""

from __future__ import annotations

from dataclasses import dataclass

STREAMING = "streaming"  # whether the models on the path of a response are decoupled


@dataclass(frozen=True)
class Mismatch:
    """One incompatibility: what, why it matters, and what to do. about: its subject, for checks that have it too."""

    what: str
    why: str
    hint: str
    about: str = ""
