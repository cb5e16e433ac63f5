"""`builder serve --auto-update`: from the options to serving/updating.py."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from builder.cli import gateway
from builder.core.errors import UsageError
from builder.core.output import Output

if TYPE_CHECKING:
    from builder.gateway.settings import Place
    from builder.serving.gateway import Gateway
    from builder.serving.version import Version

UNUSED = ("container", "no_gateway", "http_port", "grpc_port", "metrics_port")


def run(arguments: argparse.Namespace, directory: Path, out: Output) -> int:
    """Serves until interrupted. UsageError for options that can't be kept over several servers."""
    from builder.gateway.settings import places
    from builder.publish.combination import check_beside
    from builder.serving.launch import Ports
    from builder.serving.updating import WATCHDOG, Updating
    from builder.triton import repository

    link: Path = arguments.repository
    check(arguments, link)

    def served(path: Path, grpc: str) -> tuple[Place, ...]:
        opened = repository.open_repository(path)
        repository.check_served(opened)
        gateway.check_model(arguments, opened)
        return places(opened, gateway.served_names(opened, arguments.model_name, link.absolute().name), grpc)

    def fits(current: Path, following: Path) -> None:
        check_beside({f"version {current.name}": current, f"version {following.name}": following})

    def front(version: Version, routes: Path) -> AbstractContextManager[Gateway]:
        from builder.serving.gateway import gateway as start

        options = [*gateway.options(arguments), "--routes", str(routes), "--watchdog", str(directory / WATCHDOG)]
        address, log = (arguments.host, arguments.port), directory / "gateway.log"
        return start(
            version.repository, version.addresses.grpc_url, address, log=log, options=options,
            follow_log=arguments.follow_log,
        )  # fmt: skip

    def show(version: Version, front: Gateway) -> None:
        out.result({"openai": front.url, "version": version.key, "pid": version.child.pid})
        out.text(f"openai     {front.url}")
        out.text(f"version    {version.key}")
        out.text(f"next       a build of the same model, builder combine or builder rollback {link.name}")
        out.finish()
        sys.stdout.flush()

    options = ["--ungated"] if arguments.ungated else []
    host = arguments.triton_host or Ports.host
    return Updating(link, served, fits, options, host, front, show, directory, out).run()


def check(arguments: argparse.Namespace, link: Path) -> None:
    """UsageError for what --auto-update can't follow or keep."""
    given = [name for name in UNUSED if getattr(arguments, name)]
    if given:
        option = f"--{given[0].replace('_', '-')}"
        raise UsageError(
            f"{option} has no effect with --auto-update.",
            why="Each version is a server of its own with free ports on this machine; clients talk to the gateway.",
            hint=f"Omit one of them: {option}.",
        )
    if not link.is_symlink():
        raise UsageError(
            f"{link} is not a link, so it can't name a new version.",
            hint="Name a link, as in artifacts/models/.",
        )
