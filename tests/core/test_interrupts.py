"""An interrupt ends a command with 130 and one line, whatever is running at that moment makes of it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from builder.cli import machine, main
from builder.core import interrupts
from builder.core.errors import ServingError, StageError
from builder.core.store import Store

INTERRUPTED = "interrupted; finished stages are kept, partial ones are removed\n"


def stop() -> None:
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(0.01)


def plain() -> None:
    stop()


def in_a_descriptor() -> None:
    """As pydantic's descriptors: Python 3.11 makes a RuntimeError of it."""

    class Descriptor:
        def __set_name__(self, owner: type, name: str) -> None:
            stop()

    class Model:
        field = Descriptor()

    raise AssertionError(Model)


def translated() -> None:
    try:
        stop()
    except BaseException as error:
        raise ServingError("The server did not answer.") from error


def in_a_group() -> None:
    try:
        stop()
    except BaseException as error:
        raise BaseExceptionGroup("two tasks failed", [error, ValueError("x")]) from None


def in_an_exit() -> None:
    try:
        stop()
    except BaseException:
        sys.exit(3)


def swallowed() -> None:
    with suppress(BaseException):
        stop()


def swallowed_then_failed() -> None:
    swallowed()
    raise StageError("The result is missing.")


def in_a_finalizer() -> None:
    """Python can only print it, and would go on."""

    class Resource:
        def __del__(self) -> None:
            stop()

    Resource()
    time.sleep(20)
    raise AssertionError("it went on")


def before_a_stage(store: Store) -> None:
    swallowed()
    store.stage("engine", {}, lambda _: pytest.fail("it was made"))


WAYS = [plain, in_a_descriptor, translated, in_a_group, in_an_exit, swallowed, swallowed_then_failed, in_a_finalizer]


@pytest.mark.parametrize("way", WAYS)
def test_whatever_becomes_of_an_interrupt_the_command_was_interrupted(
    way: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object) -> int:
        way()
        return 0

    monkeypatch.setattr(machine, "run_gpus", run)
    start = time.monotonic()
    assert main.main(["gpus"]) == 130
    assert capsys.readouterr().err == INTERRUPTED
    assert time.monotonic() - start < 10


def test_the_next_command_of_the_same_process_is_not_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "run_gpus", lambda *_: swallowed())
    assert main.main(["gpus"]) == 130
    monkeypatch.setattr(machine, "run_gpus", lambda *_: 0)
    assert main.main(["gpus"]) == 0


def test_another_error_is_still_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(arguments: argparse.Namespace, out: object) -> int:
        raise RuntimeError("a bug")

    monkeypatch.setattr(machine, "run_gpus", run)
    with pytest.raises(RuntimeError, match="a bug"):
        main.main(["gpus"])


def test_no_stage_begins_after_an_interrupt_that_was_swallowed(store: Store) -> None:
    interrupts.handle()
    with pytest.raises(KeyboardInterrupt):
        before_a_stage(store)


def test_an_answered_interrupt_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """`builder serve` ends with 0."""

    def run(*_: object) -> int:
        swallowed()
        interrupts.answered()
        return 0

    monkeypatch.setattr(machine, "run_gpus", run)
    assert main.main(["gpus"]) == 0


def test_a_deferred_interrupt_comes_although_the_block_failed() -> None:
    interrupts.handle()

    def fail() -> None:
        stop()
        raise StageError("The disk is full.")

    with pytest.raises(KeyboardInterrupt) as caught, interrupts.deferred():
        fail()
    assert isinstance(caught.value.__context__, StageError)
    assert signal.getsignal(signal.SIGHUP) is interrupts.interrupt


def test_other_exceptions_of_finalizers_are_printed_as_ever(capsys: pytest.CaptureFixture[str]) -> None:
    interrupts.handle()

    class Broken:
        def __del__(self) -> None:
            raise ValueError("in a finalizer")

    Broken()
    assert "ValueError: in a finalizer" in capsys.readouterr().err


def test_work_is_done_within_a_time_or_ends_as_by_an_interrupt() -> None:
    done: list[str] = []

    def whole() -> None:
        with interrupts.deferred():
            time.sleep(0.2)
            done.append("what must not be torn")
        time.sleep(60)
        done.append("never")

    assert interrupts.within(0.05, whole) is False
    assert done == ["what must not be torn"]
    assert interrupts.within(60, lambda: done.append("quick")) is True
    assert interrupts.within(0.01, in_a_descriptor_for_long) is False
    assert interrupts.within(None, lambda: done.append("unlimited")) is True
    assert interrupts.within(float("inf"), lambda: time.sleep(0.1)) is True, "as for --max-minutes inf"
    assert done[1:] == ["quick", "unlimited"]
    assert not interrupts.received()


def in_a_descriptor_for_long() -> None:
    """Python 3.11 makes a RuntimeError of the interrupt."""

    class Descriptor:
        def __set_name__(self, owner: type, name: str) -> None:
            time.sleep(5)

    class Model:
        field = Descriptor()


def test_a_user_s_interrupt_and_an_error_within_a_time_are_what_they_were() -> None:
    previous = signal.signal(signal.SIGHUP, interrupts.interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupts.within(60, stop)
        assert interrupts.received()
    finally:
        interrupts.answered()
        signal.signal(signal.SIGHUP, previous)
    with pytest.raises(ZeroDivisionError):
        interrupts.within(60, lambda: 1 / 0)
    assert signal.getsignal(interrupts.TIME_OVER) == signal.SIG_DFL
