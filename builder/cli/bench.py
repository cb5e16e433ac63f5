"""The commands that measure a served repository: AIPerf through the gateway, and a small check of Triton alone."""

from __future__ import annotations

import argparse
import time
from typing import Any

from builder.cli import serve
from builder.cli.options import add_command, path
from builder.core.errors import UsageError
from builder.core.output import Output

TITLE = serve.TITLE  # one group of `builder --help`


def add(commands: Any) -> None:
    """Adds bench and load."""
    command = add_command(
        commands, "bench", "measure the gateway under load with AIPerf", run_bench,
        examples=[
            "builder bench artifacts/models/tiny-qwen3-cpu-nvfp4",
            "builder bench REPOSITORY --concurrency 1 --concurrency 8 --objective 'ttft<=500ms,itl<=50ms'",
            "builder bench REPOSITORY --rate 0.5 --rate 2 --input-tokens 512 --output-tokens 128",
            "builder bench REPOSITORY --trace recorded.jsonl --url http://127.0.0.1:9000/v1",
        ],
    )  # fmt: skip
    serve.add_served(command)
    add_workload(command)
    command.add_argument("--url", metavar="URL", help="measure the OpenAI API that runs there instead of starting one")
    command.add_argument("--model-name", metavar="NAME", help="the model's name there (default: the first one listed)")
    for old in ("http", "grpc"):
        command.add_argument(f"--{old}", help=argparse.SUPPRESS)
    examples = [
        "builder load artifacts/models/tiny-qwen3-cpu-nvfp4",
        "builder load artifacts/models/tiny-qwen3-cpu-nvfp4 --concurrency 1 --concurrency 8 --requests 64",
    ]
    command = add_command(commands, "load", "a small check of latency and throughput", run_load, examples=examples)
    serve.add_served(command)
    serve.add_running(command)
    _add_sizes(command)


def add_workload(command: argparse.ArgumentParser) -> None:
    """Adds what AIPerf sends and what a good request keeps to."""
    _add_sizes(command)
    command.add_argument("--rate", type=float, metavar="R", action="append", default=[],
                         help="requests sent per second, however many are in flight; repeatable")  # fmt: skip
    command.add_argument("--arrival", choices=["poisson", "constant"], default="poisson",
                         help="times between requests with --rate (default: poisson)")  # fmt: skip
    command.add_argument("--trace", type=path, metavar="FILE",
                         help="recorded requests (JSON lines: input_length, output_length, timestamp)")  # fmt: skip
    command.add_argument("--objective", metavar="LIMITS",
                         help="what a good request keeps to, as in ttft<=500ms,itl<=50ms,latency<=10s")  # fmt: skip
    command.add_argument("--api", choices=["chat", "completions"],
                         help="route (default: chat if the model has a chat template)")  # fmt: skip
    command.add_argument("--seed", type=int, metavar="N", help="of prompts and arrival times (default: a new one)")


def _add_sizes(command: argparse.ArgumentParser) -> None:
    command.add_argument("--concurrency", type=int, metavar="N", action="append", default=[],
                         help="requests in flight at any time; repeatable (default: 1, 4 and 16)")  # fmt: skip
    command.add_argument("--clients", type=int, action="append", default=[], help=argparse.SUPPRESS)
    for name, text in (
        ("requests", "requests at each load (default: 32, or twice the concurrency)"),
        ("input-tokens", "tokens of each prompt (default: 128)"),
        ("output-tokens", "tokens of each answer (default: 32)"),
    ):
        command.add_argument(f"--{name}", type=int, metavar="N", help=text)


def run_bench(arguments: argparse.Namespace, out: Output) -> int:
    """Measures the gateway with AIPerf at every load. The result is kept beside the repository for the report."""
    from builder.aiperf import keep, measure, target, workload
    from builder.aiperf.environment import environment
    from builder.core.locks import serving_lock

    _refuse_old_options(arguments)
    if arguments.model_name and not arguments.url:
        raise UsageError("--model-name has no effect without --url.", hint="Omit --model-name.")
    _warn_of_old_names(arguments, out)
    asked = workload_of(arguments)
    repository = serve.open_named(arguments)
    repository.check_single(arguments.command)
    asked = with_route(asked, arguments.api, repository)
    workload.check(asked, repository.facts)
    if arguments.url:
        served = target.running(arguments.url, repository, arguments.model_name)
        measurement = measure.measure(environment(out), served, asked, out=out)
    else:
        starting = serve.started(arguments, repository, out)  # refuses a rejected build before anything is installed
        place = environment(out)
        with (
            serving_lock(repository.path),
            starting as server,
            target.in_front(server, repository, asked) as served,
        ):
            measurement = measure.measure(place, served, asked, out=out)
    kept = keep.save(repository, measurement, out)
    keep.show(measurement, out)
    out.result({**measurement.as_dict(), "path": str(kept) if kept else None})
    if kept:
        out.text(f"next       builder report {arguments.repository or repository.path}")
    return 0


def workload_of(arguments: argparse.Namespace) -> Any:
    """The workload that the options of `add_workload` describe, but for its route. UsageError for a bad one."""
    from builder.aiperf import objective, trace
    from builder.aiperf.workload import Load, Workload, default_requests

    recorded = trace.read(arguments.trace) if arguments.trace else None
    for name in ("input_tokens", "output_tokens"):
        if recorded and getattr(arguments, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} has no effect with --trace, which has the lengths.", hint=f"Omit {option}.")
    loads = tuple(Load(concurrency=number) for number in (*arguments.concurrency, *arguments.clients))
    loads += tuple(Load(rate=rate) for rate in arguments.rate)
    loads = loads or ((Load(),) if recorded and recorded.timed else tuple(Load(concurrency=n) for n in (1, 4, 16)))
    return Workload(
        loads,
        trace=recorded,
        objective=objective.parse(arguments.objective) if arguments.objective is not None else None,
        arrival=arguments.arrival,
        seed=time.time_ns() % 1_000_000_000 if arguments.seed is None else _seed(arguments.seed),
        **{"requests": default_requests(loads, recorded), **_sizes(arguments)},
    )


def _sizes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of the options of `_add_sizes` that were given."""
    given = {name: getattr(arguments, name) for name in ("requests", "input_tokens", "output_tokens")}
    return {name: value for name, value in given.items() if value is not None}


def with_route(asked: Any, api: str | None, repository: Any) -> Any:
    """The workload with its route: the one that was named, or chat for a model with a template."""
    from dataclasses import replace

    from builder.aiperf.target import has_template

    templated = has_template(repository)
    if api == "chat" and not templated:
        raise UsageError("The model has no chat template.", hint="--api completions")
    return replace(asked, api=api or ("chat" if templated else "completions"))


def _seed(number: int) -> int:
    if not 0 <= number < 1 << 31:
        raise UsageError(f"--seed must be from 0 to {(1 << 31) - 1} (got {number}).", hint="--seed 7")
    return number


def run_load(arguments: argparse.Namespace, out: Output) -> int:
    """Serves a repository, sends concurrent requests and stops it. The result is kept beside it for the report."""
    from builder.core.locks import serving_lock
    from builder.serving import benchmark

    _warn_of_old_names(arguments, out)
    serve.check_both_ports(arguments)
    concurrency = (*arguments.concurrency, *arguments.clients) or benchmark.Workload.concurrency
    sizes = {"requests": benchmark.default_requests(concurrency), **_sizes(arguments)}
    workload = benchmark.Workload(concurrency, **sizes)
    repository = serve.open_named(arguments)
    repository.check_single(arguments.command)
    benchmark.check(workload, repository.facts)
    if arguments.http:
        report = benchmark.run(arguments.http, arguments.grpc, repository, workload, out=out)
    else:
        with serving_lock(repository.path), serve.started(arguments, repository, out) as server:
            report = benchmark.run(server.http_url, server.grpc_url, repository, workload, out=out)
    kept = benchmark.save(repository, report, out)
    benchmark.show(report, out)
    out.result({**report.as_dict(), "path": str(kept) if kept else None})
    if kept:
        out.text(f"next       builder report {arguments.repository or repository.path}")
    return 0


def _refuse_old_options(arguments: argparse.Namespace) -> None:
    """UsageError for the options that `builder bench` had while it talked to Triton itself."""
    if arguments.http or arguments.grpc:
        raise UsageError(
            "`builder bench` measures the gateway and not Triton's own ports.",
            hint="The check of these ports is `builder load` with the same options; for a gateway: --url URL",
        )


def _warn_of_old_names(arguments: argparse.Namespace, out: Output) -> None:
    if arguments.clients:
        out.warn("--clients is now --concurrency; the next version removes the old name")
