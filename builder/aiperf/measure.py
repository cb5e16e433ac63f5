"""Runs AIPerf against a gateway, once for each load, and reads what it measured."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from builder.aiperf import environment, measured
from builder.aiperf.environment import Environment
from builder.aiperf.measured import Measurement, Point
from builder.aiperf.workload import Load, Workload
from builder.core import process, temporary
from builder.core.errors import ServingError, StageError
from builder.core.output import Output

# AIPerf loads a tokenizer directory over the network code path unless it is online; with a directory it asks nobody.
ENVIRONMENT = {"HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "", "NO_COLOR": "1", "TERM": "dumb"}
REQUEST_SECONDS = 600  # for one answer, as the gateway gives it
FAILED_SHARE = 0.5  # of failed requests, above which a load is not measured to its end
WORKERS = 8  # AIPerf's processes that send requests; one sends thousands a second
WATCH_SECONDS = 0.5
SOCKETS = "sockets"  # of AIPerf's processes, in its working directory


@dataclass(frozen=True)
class Target:
    """A gateway: its address with scheme and without /v1, the model's name, and the model's tokenizer.

    `alive` returns why it no longer serves, or "" while it does.
    """

    url: str
    model: str
    tokenizer: Path
    alive: Callable[[], str] = lambda: ""


def measure(place: Environment, target: Target, workload: Workload, *, out: Output) -> Measurement:
    """Measures every load of the workload.

    ServingError if the server ends or at one load every request fails, StageError if AIPerf fails otherwise.
    """
    points: list[Point] = []
    with out.progress("aiperf", total=len(workload.loads), unit="loads") as bar:
        for number, load in enumerate(workload.loads):
            bar.update(number, label=load.label)
            # Other prompts at each load: the server's KV cache may hold those of the last one.
            part = replace(workload, loads=(load,), seed=workload.seed + number)
            points.append(_point(place, target, part))
            bar.update(number + 1)
    return Measurement(workload.as_dict(), tuple(points), environment.version())


def _point(place: Environment, target: Target, workload: Workload) -> Point:
    [load] = workload.loads
    with temporary.directory() as directory:
        log, results = directory / "aiperf.log", directory / "results"
        argv = arguments(place, target, workload, results, directory / "trace.jsonl")
        (directory / SOCKETS).mkdir()
        command = process.Command(argv, env=ENVIRONMENT, cwd=directory)
        died = ""
        try:
            with process.started(command, log=log) as running, _watched(running, target.alive) as seen:
                running.wait()
            died = seen[0] if seen else ""
            running.finished()
        except process.Failed as error:
            died = died or target.alive()
            if not died:
                raise _failure(load, results, log) from error
        if died:
            raise ServingError(f"The server ended while AIPerf measured {load.label}.", why=died)
        return measured.point(load, _export(results, log))


def arguments(place: Environment, target: Target, workload: Workload, results: Path, trace: Path) -> list[str]:
    """AIPerf's command line for the one load of this workload. Writes the workload's trace, if it has one."""
    [load] = workload.loads
    argv = [str(place.python), "-m", "aiperf", "profile", "--model", target.model, "--url", target.url]
    argv += ["--tokenizer", str(target.tokenizer), "--endpoint-type", workload.api, "--streaming"]
    # The server's counts: encoding an answer again can give fewer tokens. Older servers know no other max_tokens.
    argv += ["--use-server-token-count", "--use-legacy-max-tokens"]
    # cache-bust: no KV block of a warm-up request is used again; AIPerf can't do that on the other route.
    chat = ["--apply-chat-template", "--cache-bust", "warmup-isolation-first-turn"]
    argv += chat if workload.api == "chat" else []
    argv += ["--request-count", str(workload.requests), "--warmup-request-count", str(load.concurrency or 2)]
    argv += _when(load, workload)
    argv += _lengths(load, workload, trace)
    argv += ["--goodput", workload.objective.goodput] if workload.objective else []
    argv += ["--request-timeout-seconds", str(REQUEST_SECONDS), "--failed-request-threshold", str(FAILED_SHARE)]
    argv += ["--random-seed", str(workload.seed), "--workers-max", str(WORKERS), "--output-artifact-dir", str(results)]
    # Relative, because the path of a socket has at most 107 bytes (unix(7)) and TMPDIR can be long.
    argv += ["--zmq-ipc-path", SOCKETS]
    return [*argv, "--ui", "none", "--no-gpu-telemetry", "--no-server-metrics"]


def _when(load: Load, workload: Workload) -> list[str]:
    if load.concurrency is not None:
        return ["--concurrency", str(load.concurrency)]
    if load.rate is not None:
        return ["--request-rate", f"{load.rate:g}", "--arrival-pattern", workload.arrival]
    return ["--fixed-schedule", "--fixed-schedule-auto-offset"]


def _lengths(load: Load, workload: Workload, trace: Path) -> list[str]:
    if workload.trace is None:
        words = ["--isl", str(workload.input_tokens), "--osl", str(workload.output_tokens)]
        words += ["--num-dataset-entries", str(workload.requests)]  # so that no prompt is sent twice
        return [*words, "--extra-inputs", json.dumps({"min_tokens": workload.output_tokens})]
    replayed = load == Load()
    workload.trace.write(trace, workload.requests, timed=replayed)
    words = ["--input-file", str(trace), "--custom-dataset-type", "mooncake-trace"]
    return words if replayed else [*words, "--no-fixed-schedule"]


@contextmanager
def _watched(running: process.Running, alive: Callable[[], str]) -> Iterator[list[str]]:
    """Ends AIPerf when the server no longer serves, and then holds why: it would go on to send every request."""
    seen: list[str] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(WATCH_SECONDS):
            if why := alive():
                seen.append(why)
                running.kill()
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def _export(results: Path, log: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads((results / "profile_export_aiperf.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageError("AIPerf left no results.", why=process.tail(log)) from error
    return found


def _failure(load: Load, results: Path, log: Path) -> ServingError | StageError:
    """Every request failed, or most did; otherwise AIPerf itself did."""
    if error := _first_error(results / "profile_export.jsonl"):
        return ServingError(
            f"More than half of the requests failed at {load.label}.", why=error, hint="builder smoke REPOSITORY"
        )
    return StageError(f"AIPerf failed at {load.label}.", why=process.tail(log))


def _first_error(records: Path) -> str:
    with suppress(OSError, ValueError), records.open(encoding="utf-8") as lines:
        for line in lines:
            if error := json.loads(line).get("error"):
                return " ".join(str(error.get("message") or error).split())[:400]
    return ""
