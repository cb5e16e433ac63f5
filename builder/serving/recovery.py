"""Loads a model again whose process has ended, and says so in the log of `builder serve`.

With Triton 24.10 on a busy machine, the killed process of any of our five models was noticed and replaced after 4 to 5
seconds. Up to 2 of them pass until the next look, and 1 until Triton looks at the files.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from builder.serving import health
from builder.serving.model_processes import ModelProcesses
from builder.serving.watchdog import Watchdog

CONFIRM_SECONDS = 3.0  # a process that is still dead after that was not part of a normal exit of the server
STOPPED_SECONDS = 1.0  # a process that is stopped for longer is replaced
LOADING_SECONDS = 60.0  # until a model that is loaded again must answer
MOST, PERIOD_SECONDS = 3, 600.0  # a model that needs more loads in this period has a lasting fault


@dataclass
class Recovery:
    """Recovers the models of one server, and tells the watchdog."""

    url: str
    processes: ModelProcesses
    watchdog: Watchdog
    _loads: dict[str, list[float]] = field(default_factory=dict)

    def __call__(self, wait: health.Wait) -> str:
        """Loads the models again whose processes have ended. Returns why that failed; "" if it did not, or on exit."""
        ended = self.processes.ended()
        if self.processes.has_stopped():  # a probe would wait for it: look again first
            wait(STOPPED_SECONDS)
            ended = self.processes.ended()
        if not ended or wait(0.0) is not None:
            return ""
        for pid, model in ended.items():
            too_often = not self._loads_left(model)
            if not too_often and self.processes.load_again(pid):
                self.watchdog.replaced(model)
            else:
                lasting = f" {MOST + 1} times in {PERIOD_SECONDS / 60:.0f} minutes" if too_often else ""
                gone = wait(CONFIRM_SECONDS) is not None
                return "" if gone else f"The process of {model or 'a model'} has ended{lasting}."
        return self._answers(sorted(set(ended.values())), wait)

    def _loads_left(self, model: str) -> bool:
        """Counts a load of the model. False if there were too many."""
        now = time.monotonic()
        recent = [at for at in self._loads.get(model, []) if at > now - PERIOD_SECONDS]
        self._loads[model] = [*recent, now]
        return len(recent) < MOST

    def _answers(self, models: list[str], wait: health.Wait) -> str:
        """Waits until the models are loaded and the server answers. Returns what is wrong after LOADING_SECONDS."""
        start = time.monotonic()
        found = "it is still loading"
        while time.monotonic() < start + LOADING_SECONDS:
            if wait(0.2) is not None:
                return ""
            if all(self.processes.is_loaded(model) for model in models) and not (found := health.fault(self.url)):
                self.watchdog.log(f"{', '.join(models)}: answers again after {time.monotonic() - start:.1f} s.")
                return ""
        return f"{', '.join(models)} was loaded again and does not answer: {found}"
