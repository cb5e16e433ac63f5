"""The command that serves OpenAI's API in front of a running Triton server."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.cli.options import add_command, add_output, path, port
from builder.core.errors import UsageError
from builder.core.output import Output
from builder.gateway.limits import DRAIN_SECONDS, Limits

if TYPE_CHECKING:
    from builder.triton.repository import Repository

# Option -> (default, metavar, help)
NUMBERS = {
    "max-requests": (Limits.requests, "N", "answers in progress, above which clients get 429"),
    "max-body": (Limits.body, "BYTES", "bytes of a request's body"),
    "request-timeout": (int(Limits.seconds), "SECONDS", "seconds for one answer"),
    "stalled-timeout": (int(Limits.stalled_seconds), "SECONDS", "for a client to read something of its answer"),
}


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
        help="the repository that is served; default: MODEL_REPOSITORY, or the only one in OUTPUT/models",
    )  # fmt: skip
    add_output(command)
    command.add_argument("--grpc", metavar="HOST:PORT", default="localhost:8001",
                         help="the server's gRPC port (default: localhost:8001)")  # fmt: skip
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    command.add_argument("--port", type=port, metavar="PORT", help="default: a free port")
    add_options(command)
    command.add_argument("--routes", type=path, help=argparse.SUPPRESS)  # of `builder serve --auto-update`
    command.add_argument("--watchdog", type=path, help=argparse.SUPPRESS)  # of `builder serve`
    command.add_argument("--drain", type=int, metavar="SECONDS", default=DRAIN_SECONDS,
                         help=f"for requests in progress at the end (default: {DRAIN_SECONDS})")  # fmt: skip


def add_options(command: argparse.ArgumentParser) -> None:
    """Adds the options that `serve` has, too."""
    command.add_argument("--model-name", metavar="NAME",
                         help="the model's name for clients (default: the repository's)")  # fmt: skip
    command.add_argument("--api-keys", type=path, metavar="FILE", help="a file with one accepted key per line")
    for name, (default, metavar, text) in NUMBERS.items():
        help = f"{text} (default: {default})"
        command.add_argument(f"--{name}", type=int, metavar=metavar, default=default, help=help)


def options(arguments: argparse.Namespace) -> list[str]:
    """These options, but for the name, as arguments for another `builder gateway`."""
    keys = ["--api-keys", str(arguments.api_keys.absolute())] if arguments.api_keys else []
    return keys + [word for name in NUMBERS for word in (f"--{name}", str(_positive(arguments, name)))]


def check(arguments: argparse.Namespace, repository: Repository) -> None:
    """Checks what `serve` would pass to the gateway, before the server starts, which can take minutes.

    UsageError for wrong options or a file of keys that can't be used, UnsupportedError without a tokenizer,
    ServingError if the port is in use.
    """
    from builder.gateway.listener import listen

    if arguments.no_gateway:
        _check_unused(arguments)
        return
    for name in NUMBERS:
        _positive(arguments, name)
    read_keys(arguments.api_keys)
    check_model(arguments, repository)
    for name in ("http", "grpc", "metrics"):
        if arguments.port and getattr(arguments, f"{name}_port") == arguments.port:
            raise UsageError(f"--port and --{name}-port are both {arguments.port}.", hint="Choose two ports.")
    listen(arguments.host, arguments.port).close()


def check_model(arguments: argparse.Namespace, repository: Repository) -> None:
    """UsageError for a name that several models would have, UnsupportedError for a model without a tokenizer."""
    from builder.gateway.settings import tokenizer_directory

    served_names(repository, arguments.model_name, "")
    for facts in repository.members.values():
        tokenizer_directory(repository.models, facts)


def _check_unused(arguments: argparse.Namespace) -> None:
    """UsageError if an option of the gateway was given with --no-gateway: API keys would protect nothing."""
    unused: dict[str, Any] = {"port": None, "triton-host": None, "model-name": None, "api-keys": None}
    unused |= {name: default for name, (default, _, _) in NUMBERS.items()}
    for name, default in unused.items():
        if getattr(arguments, name.replace("-", "_")) != default:
            hint = {"port": "Triton's ports are --http-port, --grpc-port and --metrics-port.",
                    "triton-host": "Without a gateway, --host is Triton's address."}  # fmt: skip
            raise UsageError(
                f"--{name} has no effect with --no-gateway.", hint=hint.get(name, f"Omit one of them: --{name}.")
            )


def run_gateway(arguments: argparse.Namespace, out: Output) -> int:
    """Serves until SIGTERM or Ctrl-C (exit code 0)."""
    from builder.gateway import routes, server
    from builder.gateway.listener import authority, listen
    from builder.gateway.settings import Settings, places
    from builder.triton import repository

    limits = Limits(
        requests=_positive(arguments, "max-requests"),
        body=_positive(arguments, "max-body"),
        seconds=_positive(arguments, "request-timeout"),
        stalled_seconds=_positive(arguments, "stalled-timeout"),
    )
    if arguments.routes:
        found = routes.read(arguments.routes).places
    else:
        path = named(arguments)
        opened = repository.open_repository(path)
        names = served_names(opened, arguments.model_name, path.absolute().name)
        found = places(opened, names, arguments.grpc)
    settings = Settings(found, limits, read_keys(arguments.api_keys), arguments.routes, arguments.watchdog)
    listener = listen(arguments.host, arguments.port)
    host, number = listener.getsockname()[:2]
    url = f"http://{authority(host, number)}/v1"

    def ready() -> None:
        out.result({"url": url, "model": found[0].name, "models": [place.name for place in found]})
        out.text(f"openai     {url}")
        for place in found:
            out.text(f"model      {place.name}")
        out.finish()
        sys.stdout.flush()

    server.run(settings, listener, drain=_positive(arguments, "drain"), ready=ready)
    return 0


def named(arguments: argparse.Namespace) -> Path:
    """The repository that was named, or else the only one that was published; a link gives the model its name."""
    from builder.triton import repository

    path: Path | None = arguments.repository
    return path or repository.find(arguments.output, os.environ.get("MODEL_REPOSITORY"))


def served_names(repository: Repository, name: str | None, default: str) -> dict[str, str]:
    """The names that clients use, by the names in the repository. UsageError for --model-name where there are several.

    `name`: of --model-name. `default`: the name of the only model.
    """
    if "" in repository.members:
        return {"": name or default}
    if name:
        raise UsageError(
            f"--model-name names one model, and this repository has {len(repository.members)}.",
            hint=f"Omit it: clients call them {', '.join(repository.members)}.",
        )
    return {member: member for member in repository.members}


def read_keys(file: Path | None) -> tuple[str, ...]:
    """The API keys in a file, one per line; none without a file. UsageError if it has none: it would open the door."""
    if file is None:
        return ()
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Can't read the API keys in {file}.", why=str(error), hint="--api-keys FILE") from None
    keys = tuple(key for line in lines if (key := line.strip()) and not key.startswith("#"))
    if not keys:
        raise UsageError(f"{file} has no API key.", hint="Write one key per line.")
    return keys


def _positive(arguments: argparse.Namespace, name: str) -> int:
    value: int = getattr(arguments, name.replace("-", "_"))
    if value < 1:
        raise UsageError(f"--{name} must be at least 1 (got {value}).")
    return value
