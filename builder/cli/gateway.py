"""The command that serves OpenAI's API in front of a running Triton server."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from builder.cli.options import add_command, add_output, path, port
from builder.core.errors import UsageError
from builder.core.output import Output


def add(commands: Any) -> None:
    """Adds gateway."""
    command = add_command(
        commands, "gateway", "serve OpenAI's API in front of a running server", run_gateway,
        examples=[
            "builder gateway artifacts/models/tiny-qwen3-cpu-nvfp4 --grpc localhost:8001",
            "builder gateway artifacts/models/tiny-qwen3-cpu-nvfp4 --port 9000 --api-keys keys.txt",
        ],
    )  # fmt: skip
    command.add_argument(
        "repository", type=path, nargs="?",
        help="the repository that is served; default: the only one in OUTPUT/models",
    )  # fmt: skip
    add_output(command)
    command.add_argument("--grpc", metavar="HOST:PORT", default="localhost:8001",
                         help="the server's gRPC port (default: localhost:8001)")  # fmt: skip
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    command.add_argument("--port", type=port, metavar="PORT", help="default: a free port")
    add_options(command)
    command.add_argument("--drain", type=int, metavar="SECONDS", default=30,
                         help="for requests in progress at the end (default: 30)")  # fmt: skip


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds the options that `serve` has, too."""
    command.add_argument("--model-name", metavar="NAME",
                         help="the model's name for clients (default: the repository's)")  # fmt: skip
    command.add_argument("--api-keys", type=path, metavar="FILE", help="a file with one accepted key per line")
    for name, default, text in (
        ("max-requests", 256, "answers in progress, above which clients get 429"),
        ("max-body", 8 << 20, "bytes of a request's body"),
        ("request-timeout", 600, "seconds for one answer"),
    ):
        metavar = {"max-requests": "N", "max-body": "BYTES"}.get(name, "SECONDS")
        help = f"{text} (default: {default})"
        command.add_argument(f"--{name}", type=int, metavar=metavar, default=default, help=help)


def options(arguments: argparse.Namespace) -> list[str]:
    """These options, but for the name, as arguments for another `builder gateway`."""
    keys = ["--api-keys", str(arguments.api_keys.absolute())] if arguments.api_keys else []
    numbers = ("max_requests", "max_body", "request_timeout")
    return keys + [
        word for name in numbers for word in (f"--{name.replace('_', '-')}", str(_positive(arguments, name)))
    ]


def run_gateway(arguments: argparse.Namespace, out: Output) -> int:
    """Serves until SIGTERM or Ctrl-C (exit code 0)."""
    from builder.gateway import server
    from builder.gateway.listener import listen
    from builder.gateway.settings import Limits, Model, Settings
    from builder.triton import repository

    limits = Limits(
        requests=_positive(arguments, "max_requests"),
        body=_positive(arguments, "max_body"),
        seconds=_positive(arguments, "request_timeout"),
    )
    place = arguments.repository or repository.find(arguments.output)
    opened = repository.open_repository(place)
    name = arguments.model_name or place.absolute().name
    settings = Settings(arguments.grpc, name, limits, read_keys(arguments.api_keys))
    model = Model.read(opened.models, opened.facts)
    listener = listen(arguments.host, arguments.port)
    host, number = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{number}/v1"

    def ready() -> None:
        out.result({"url": url, "model": name})
        out.text(f"openai     {url}")
        out.text(f"model      {name}")
        out.finish()
        sys.stdout.flush()

    server.run(settings, model, listener, drain=_positive(arguments, "drain"), ready=ready)
    return 0


def read_keys(file: Any) -> tuple[str, ...]:
    """The API keys in a file, one per line; none without a file. UsageError if it has none: it would open the door."""
    if file is None:
        return ()
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Can't read the API keys in {file}.", why=str(error), hint="--api-keys FILE") from None
    keys = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not keys:
        raise UsageError(f"{file} has no API key.", hint="Write one key per line.")
    return keys


def _positive(arguments: argparse.Namespace, name: str) -> int:
    value: int = getattr(arguments, name)
    if value < 1:
        raise UsageError(f"--{name.replace('_', '-')} must be at least 1 (got {value}).")
    return value
