"""Fixtures that several files share."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import exports
import pytest
from hub_server import Hub
from hypothesis import HealthCheck, settings

from builder.checkpoint import layouts
from builder.core import interrupts
from builder.core.output import Output
from builder.core.store import Store
from builder.hub import client

# Set before torch is imported: OpenMP threads that spin while they wait fight over the cores of a small machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# What our stand-ins for trtllm-build read (children get a list of variables only).
os.environ.setdefault("BUILDER_CHILD_ENV", "STAND_IN,STAND_IN_SAYS,CALLS,CARD")
# A shell's background job ignores SIGINT, and so would every process that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# A busy machine is no failure. What else hypothesis sets (derandomize where CI is true) stays.
settings.register_profile("patient", parent=settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# The files that take longest, in this order. Whichever process takes one of them last works alone.
LONGEST = [
    f"tests/{name}.py"
    for name in (
        "pipeline/test_pipeline", "evaluate/test_evaluate", "quality/test_quality", "quantize/test_keep_fp8",
        "docs/test_examples", "llmapi/test_serving", "evaluate/test_tasks", "evaluate/test_sensitivity",
        "core/test_keys", "cli/test_cli", "serving/test_smoke", "calibration/test_before_calibrating",
        "quantize/test_keep_bf16", "serving/test_smoke_sound", "hub/test_snapshot", "calibration/test_rows",
        "quantize/test_modelopt",
    )
]  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; all others in their own order."""
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """A command that runs in the process of a test leaves no signal handler, and no signal, to the next test."""
    handlers, hook = {number: signal.getsignal(number) for number in interrupts.SIGNALS}, sys.unraisablehook
    yield
    for number, handler in handlers.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)
    sys.unraisablehook = hook
    interrupts.answered()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub of our own, with every variable that huggingface_hub reads pointing to it and to tmp_path."""
    with Hub() as server:
        for name in [n for n in os.environ if n.startswith(("HF_", "HUGGING"))]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("NO_PROXY", "*")
        monkeypatch.setattr(client, "RETRY_DELAYS", (0.05, 0.05))
        yield server


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", Output("human"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """For each model a checkpoint with both layouts."""
    made = {}
    for name, source in exports.MODELS.items():
        made[name] = tmp_path_factory.mktemp(name)
        exports.export(exports.quantized(source), made[name] / "unified")
        config = layouts.read_json(source / "config.json")
        layouts.write_tensorrt_llm(made[name] / "unified", config, made[name] / "tensorrt_llm")
    return made
