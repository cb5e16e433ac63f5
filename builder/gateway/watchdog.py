"""What the watchdog of `builder serve` has seen: a file that it writes. The gateway exports it, and is not ready while
the server is down."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from builder.core.store import replace_file
from builder.core.untrusted_text import parse_json, read_regular

COUNTERS = {
    "probes": "Requests for one token that the watchdog has sent",
    "failures": "Those that failed",
    "replaced": "Processes of models that ended or hung, and were replaced",
    "restarts": "Starts of the whole server after the first",
}


@dataclass
class Watched:
    """fault: why the server is down now; "" while it is up. probed_at: of time.monotonic; 0.0 before the first one."""

    fault: str = ""
    probes: int = 0
    failures: int = 0
    replaced: int = 0
    restarts: int = 0
    probed_at: float = 0.0

    def write(self, file: Path) -> None:
        """Replaces the file. BuilderError if the disk refuses."""
        replace_file(file, json.dumps(vars(self)))

    @classmethod
    def read(cls, file: Path | None) -> Watched | None:
        """What was written last; None without a file."""
        if file is None:
            return None
        try:
            return cls(**parse_json(read_regular(file)))
        except FileNotFoundError:
            return None


class WatchdogCollector(Collector):
    """The metrics of the watchdog; none without a file."""

    def __init__(self, file: Path | None) -> None:
        self._file = file

    def collect(self) -> Iterator[Metric]:
        """Reads the file."""
        seen = Watched.read(self._file)
        if seen is None:
            return
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"watchdog_{name}", text, getattr(seen, name))
        yield GaugeMetricFamily("watchdog_server_up", "Whether the server is up: 1, or 0", float(not seen.fault))
        if seen.probed_at:
            age = time.monotonic() - seen.probed_at  # the same clock in all processes of a machine
            yield GaugeMetricFamily("watchdog_probe_age_seconds", "Since the last probe has ended", age)
