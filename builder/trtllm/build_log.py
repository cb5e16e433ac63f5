"""Reads trtllm-build's log: the current phase, the memory used, and why it failed.

The lines are those of tensorrt_llm/commands/build.py@65f1d153, tensorrt_llm/builder.py and _common.py (1.2), and of
TensorRT's builder; the known failures are data, in configs/trtllm/known_errors.yaml.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.core import paths
from builder.core.errors import StageError
from builder.core.output import seconds, size
from builder.core.untrusted_text import parse_yaml

START, NETWORK, FINISH = "starting", "reading the checkpoint and constructing the network", "finishing"
# A line, and the phase that begins with it. None: another rank's network, or the end.
PHASES = (
    (re.compile(r"\[TensorRT-LLM\] TensorRT[- ]LLM version"), NETWORK),
    (re.compile(r"Total time of constructing network"), "initializing the weights"),
    (re.compile(r"Build TensorRT engine "), "building the TensorRT engine"),
    (re.compile(r"Total time of building (?!all engines)"), "saving the timing cache"),
    (re.compile(r"Serializing engine to "), "serializing the engine"),
    (re.compile(r"Engine serialized"), None),
)
GPU_PEAK = re.compile(r"Peak memory usage of TRT CPU/GPU memory allocators: CPU \d+ MiB, GPU (\d+) MiB")
READ_BYTES = 32 << 20  # of a failed build's log; a missing FMHA kernel lists every kernel that there is


@dataclass(frozen=True)
class Known:
    """A known failure: its pattern, its cause, what to do, and the source."""

    name: str
    pattern: re.Pattern[str]
    why: str
    hint: str
    source: str


class BuildLog:
    """Reads a log line by line.

    phases: seconds by phase, summed over ranks. peak_gpu_memory: bytes of the largest rank. show: called with each
    phase that begins and the seconds until then. With --workers the lines of ranks mix, and the phase is the one that
    any rank began last.
    """

    def __init__(
        self, world_size: int, show: Callable[[str, float], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.phases: dict[str, float] = {}
        self.peak_gpu_memory: int | None = None
        self._show, self._clock, self._left = show, clock, world_size
        self._phase, self._start = START, clock()
        self._since = self._start

    def read_line(self, line: str) -> None:
        """Updates the phase and the peak of GPU memory from one line."""
        if peak := GPU_PEAK.search(line):
            self.peak_gpu_memory = max(self.peak_gpu_memory or 0, int(peak[1]) << 20)
        for pattern, phase in PHASES:
            if pattern.search(line):
                if phase is None:
                    self._left -= 1
                    phase = NETWORK if self._left > 0 else FINISH
                self._begin(phase)
                return

    def end(self) -> None:
        """Ends the last phase."""
        self._add()

    def rounded(self) -> dict[str, float]:
        """The phases to a tenth of a second."""
        return {phase: round(took, 1) for phase, took in self.phases.items()}

    def summary(self) -> str:
        """A sentence: the phases that took a second or more, and the memory."""
        parts = [f"{phase} {seconds(took)}" for phase, took in self.phases.items() if took >= 1]
        parts += [f"{size(self.peak_gpu_memory)} of GPU memory at most"] if self.peak_gpu_memory else []
        return ", ".join(parts)

    def _begin(self, phase: str) -> None:
        if phase != self._phase:
            self._add()
            self._phase = phase
            self._show(phase, self._since - self._start)

    def _add(self) -> None:
        now = self._clock()
        self.phases[self._phase] = self.phases.get(self._phase, 0.0) + now - self._since
        self._since = now


@functools.cache
def known_errors(of: str = "errors") -> tuple[Known, ...]:
    """The known failures of trtllm-build (`errors`) or a server (`serving`). The first match counts."""
    file = paths.data("configs", "trtllm", "known_errors.yaml")
    raw: list[dict[str, Any]] = parse_yaml(file.read_text(encoding="utf-8"))[of]
    return tuple(Known(pattern=re.compile("|".join(entry.pop("patterns"))), **entry) for entry in raw)


def diagnose(text: str, of: str = "errors") -> Known | None:
    """The first known failure that this text matches, or None."""
    return next((known for known in known_errors(of) if known.pattern.search(text)), None)


def explained(error: StageError, log: Path) -> StageError:
    """The error of a failed trtllm-build, with the cause if it is known, the last lines of the log, and a hint."""
    with open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - READ_BYTES))
        text = file.read().decode("utf-8", "replace")
    known = diagnose(f"{text}\n{error.what}")
    if known is None:
        return error
    why = f"{known.why} ({known.source})\nIts last lines:\n{error.why}"
    return StageError(error.what, why=why, hint=f"{known.hint}\n{error.hint}")
