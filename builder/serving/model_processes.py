"""The processes of a server's models: which have ended, and how a model is loaded again.

Triton does not restart the process of a Python model, keeps reporting the model as ready, and answers its requests with
errors (seen in 24.10; not known to be fixed). Loading the model again replaces the process within seconds.
Triton loads models again whose files change (--model-control-mode=poll). The files are in the server's private
directory, so nobody else can make it load a model.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

from builder.core import supervisor

_STUB = "triton_python"  # begins the name of each process of the Python backend


class ModelProcesses:
    """The processes below a server's supervisor. `models` is the private repository that the server loads."""

    def __init__(self, supervisor_pid: int, models: Path) -> None:
        self._supervisor, self._models = supervisor_pid, models
        self._names: dict[int, str] = {}  # the model of each process that was seen alive
        self._stopped: set[int] = set()
        self._replaced: set[int] = set()
        self._before: set[int] = set()

    def ended(self) -> dict[int, str]:
        """The processes that have ended and were not replaced: {pid: its model}; "" for one that was not seen before.

        A process that is stopped (SIGSTOP) at two calls in a row is killed: when it continues, Triton 24.10 aborts
        (no fix is known).
        """
        ours, found = set(supervisor.descendants(self._supervisor)), list(supervisor.processes())
        servers = {pid for pid, name, _, _ in found if name == "tritonserver" and pid in ours}
        children = [(pid, name, state) for pid, name, state, parent in found if parent in servers]
        self._names |= {
            pid: _model(pid) for pid, name, _ in children if name.startswith(_STUB) and pid not in self._names
        }
        stopped = {pid for pid, _, state in children if state == "T"}
        for pid in stopped & self._stopped:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        self._stopped = stopped
        return {
            pid: self._names.get(pid, "") for pid, _, state in children if state == "Z" and pid not in self._replaced
        }

    def has_stopped(self) -> bool:
        """Whether a process was stopped at the last call of `ended`."""
        return bool(self._stopped)

    def load_again(self, pid: int) -> bool:
        """Has Triton load the model of a process that has ended. False if that is not possible.

        TensorRT-LLM's own processes may still hold the GPU's memory (the llmapi target), so its model is not loaded.
        """
        directory = self._models / (self._names.get(pid) or "unknown")
        if not (directory / "1").is_dir() or (directory / "1" / "model.yaml").exists():
            return False
        self._replaced.add(pid)
        self._before = set(self._names)
        for place in (directory, directory / "1"):
            (place / ".loaded").unlink(missing_ok=True)
            (place / ".loaded").touch()
        return True

    def is_loaded(self, model: str) -> bool:
        """Whether the model has a process that was started after `load_again`."""
        self.ended()
        return any(name == model and pid not in self._before for pid, name in self._names.items())


def _model(pid: int) -> str:
    """The model whose process this is: its command line contains MODELS/NAME/VERSION/model.py."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
        return next((Path(word).parents[1].name for word in words if word.endswith("/model.py")), "")
    return ""
