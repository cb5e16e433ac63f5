"""The commands that serve a repository: in the foreground, and for a smoke test."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.cli import combine, gateway, updating
from builder.cli.options import add_command, add_output, path, port
from builder.core.errors import UsageError
from builder.core.output import Output, seconds

if TYPE_CHECKING:
    from builder.serving.container import ContainerServer
    from builder.serving.gateway import Gateway
    from builder.serving.launch import Ports
    from builder.serving.server import Server
    from builder.triton.repository import Repository

TITLE = "serve"


def add(commands: Any) -> None:
    """Adds serve, gateway and smoke."""
    command = add_command(
        commands, "serve", "serve a repository until Ctrl-C", run_serve,
        examples=[
            "builder serve artifacts/models/tiny-qwen3-cpu-nvfp4",
            "builder serve artifacts/models/tiny-qwen3-cpu-nvfp4 --port 9000 --http-port 8000",
            "builder serve artifacts/models/qwen3-8b-sm120-nvfp4 --container --host 0.0.0.0",
        ],
    )  # fmt: skip
    add_served(command)
    command.add_argument("--port", type=port, metavar="PORT", help="of the OpenAI API (default: a free port)")
    command.add_argument("--no-gateway", action="store_true",
                         help="no OpenAI API; --host is Triton's address then")  # fmt: skip
    command.add_argument("--triton-host", metavar="HOST",
                         help="address of Triton's own ports (default: this machine only)")  # fmt: skip
    gateway.add_options(command)
    command.add_argument("--auto-update", action="store_true",
                         help="when the link names a new version, switch to it without losing a request")  # fmt: skip
    command.add_argument("--follow-log", action="store_true", help="copy the server's log to stderr")
    # Of another `builder serve`, which shows the events that this one prints, also with --quiet.
    command.add_argument("--watchdog", type=path, help=argparse.SUPPRESS)
    command.add_argument("--until-eof", action="store_true", help="stop when stdin is closed")
    gateway.add(commands)
    combine.add(commands)
    command = add_command(
        commands, "smoke", "start a server, test every endpoint, stop it", run_smoke,
        examples=[
            "builder smoke artifacts/models/tiny-qwen3-cpu-nvfp4 --junit smoke.xml",
            "builder smoke artifacts/models/tiny-qwen3-cpu-nvfp4 --http localhost:8000 --grpc localhost:8001",
        ],
    )  # fmt: skip
    add_served(command)
    add_running(command)
    command.add_argument("--junit", type=path, metavar="FILE", help="write the results as JUnit XML")


def add_running(command: argparse.ArgumentParser) -> None:
    """Adds --http and --grpc, of a server that runs already."""
    command.add_argument("--http", metavar="HOST:PORT", help="use the server that runs there instead of starting one")
    command.add_argument("--grpc", metavar="HOST:PORT", help="its gRPC port (with --http)")


def add_served(command: argparse.ArgumentParser) -> None:
    """Adds which repository is served and how."""
    command.add_argument(
        "repository", type=path, nargs="?",
        help="a repository, as in artifacts/models/; default: MODEL_REPOSITORY, or the only one in OUTPUT/models",
    )  # fmt: skip
    add_output(command)
    command.add_argument("--ungated", action="store_true", default=os.environ.get("UNGATED", "") not in ("", "0"),
                         help="serve it even if it failed a gate (UNGATED)")  # fmt: skip
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    for name in ("http", "grpc", "metrics"):
        command.add_argument(f"--{name}-port", type=port, metavar="PORT", help="default: a free port")
    add_container(command)


def add_container(command: argparse.ArgumentParser) -> None:
    """Adds --container and --image."""
    command.add_argument("--container", action="store_true", help="run Triton in a Docker container of its own")
    command.add_argument("--image", default=os.environ.get("BUILDER_IMAGE", "trtllm-builder"),
                         help="image for --container (BUILDER_IMAGE, default trtllm-builder)")  # fmt: skip


def run_serve(arguments: argparse.Namespace, out: Output) -> int:
    """Serves in the foreground until interrupted (exit code 0) or the server fails for good (ServingError)."""
    from builder.core.locks import serving_lock
    from builder.serving.foreground import Foreground
    from builder.serving.private_directory import serving_directory
    from builder.serving.server import stop_at_eof
    from builder.serving.watchdog import Watchdog

    repository = open_named(arguments)
    gateway.check(arguments, repository)
    if arguments.until_eof:
        stop_at_eof()
    if arguments.auto_update:
        with serving_directory(executable=False) as place:
            return updating.run(arguments, place.path, out)
    watchdog = Watchdog(arguments.watchdog, Output().warn) if arguments.watchdog else None
    with serving_lock(repository.path), serving_directory(executable=False) as place:
        return Foreground(
            partial(started, arguments, repository, out),
            partial(_gateway, arguments, repository),
            partial(_show_addresses, repository, out),
            place.path,
            out,
            watchdog,
        ).run()


def _gateway(
    arguments: argparse.Namespace, repository: Repository, server: Server | ContainerServer, log: Path, watchdog: Path
) -> AbstractContextManager[Gateway | None]:
    """The gateway in front of the server; None with --no-gateway."""
    from builder.serving.gateway import gateway as start

    if arguments.no_gateway:
        return nullcontext()
    names = gateway.served_names(repository, arguments.model_name, arguments.repository.absolute().name)
    options = ["--model-name", names[""]] if "" in names else []
    options += [*gateway.options(arguments), "--watchdog", str(watchdog)]
    address = (arguments.host, arguments.port)
    return start(repository.path, server.grpc_url, address, log=log, options=options, follow_log=arguments.follow_log)


def _show_addresses(
    repository: Repository, out: Output, server: Server | ContainerServer, front: Gateway | None
) -> None:
    openai = {"openai": front.url} if front else {}
    out.result(
        {**openai, "http": server.http_url, "grpc": server.grpc_url, "metrics": server.metrics_url, "pid": server.pid}
    )
    if front:
        out.text(f"openai     {front.url}")
    out.text(f"http       {server.http_url}")
    out.text(f"grpc       {server.grpc_url}")
    out.text(f"metrics    {server.metrics_url}")
    for facts in repository.members.values():
        out.text(f"try        {_curl(server.http_url, facts)}")
    out.finish()  # now, not at the end: whoever reads it wants to talk to the server
    sys.stdout.flush()


def _curl(url: str, facts: Mapping[str, Any]) -> str:
    tokens = facts.get("names", {}).get("max_tokens", "max_tokens")
    body = f'{{"text_input": "Return the number of", "{tokens}": 32}}'
    return f"curl -s http://{url}/v2/models/{facts['models']['generate']}/generate -d '{body}'"


def open_named(arguments: argparse.Namespace) -> Repository:
    """The repository that was named, or else the only one that was published, which the arguments then name."""
    from builder.triton import repository

    arguments.repository = gateway.named(arguments)
    found = repository.open_repository(arguments.repository)
    repository.check_served(found)
    return found


def started(
    arguments: argparse.Namespace, repository: Repository, out: Output, ports: Ports | None = None
) -> AbstractContextManager[Server | ContainerServer]:
    """A server for it, on this machine or in a container. EvaluationError if it failed its gate, without --ungated.

    `ports`: of the server that it replaces, if it replaces one.
    """
    from builder.publish import verdict

    if not arguments.ungated:
        verdict.check(arguments.repository)
    ports = ports or _chosen_ports(arguments)
    if arguments.container:
        from builder.serving.container import serve_container

        follow = arguments.command == "serve" and not arguments.quiet
        return serve_container(repository, out=out, image=arguments.image, ports=ports, follow_log=follow)
    from builder.serving.server import ServerOptions, serve

    options = ServerOptions(follow_log=getattr(arguments, "follow_log", False))
    return serve(repository.models, out=out, ports=ports, options=options)


def _chosen_ports(arguments: argparse.Namespace) -> Ports:
    from builder.serving.launch import Ports

    behind = arguments.command == "serve" and not arguments.no_gateway
    host = (arguments.triton_host or Ports.host) if behind else arguments.host
    return Ports(arguments.http_port, arguments.grpc_port, arguments.metrics_port, host)


def run_smoke(arguments: argparse.Namespace, out: Output) -> int:
    """Serves a repository, tests it and stops the server. ServingError if a check failed."""
    from builder.core.locks import serving_lock
    from builder.serving.smoke import smoke_models, write_junit

    check_both_ports(arguments)
    repository = open_named(arguments)
    if arguments.http:
        report = smoke_models(arguments.http, arguments.grpc, repository, out=out)
    else:
        with serving_lock(repository.path), started(arguments, repository, out) as server:
            report = smoke_models(server.http_url, server.grpc_url, repository, out=out)
    if arguments.junit:
        write_junit(report, arguments.junit)
    outcomes = {True: "ok", False: "FAILED", None: "not checked"}
    rows = [(outcomes[c.passed], c.name, seconds(c.seconds), c.detail) for c in report.checks]
    out.table("smoke test", ["result", "check", "time", "detail"], rows)
    out.result(report.as_dict())
    report.check()
    return 0


def check_both_ports(arguments: argparse.Namespace) -> None:
    """UsageError if only one port of a running server was given."""
    if bool(arguments.http) != bool(arguments.grpc):
        raise UsageError(
            "--http and --grpc must be given together: both ports of a running server are used.",
            hint="--http HOST:PORT --grpc HOST:PORT",
        )
