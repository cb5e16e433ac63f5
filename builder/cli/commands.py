"""What each command does: call, then print. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.core.errors import ServingError, UnsupportedError, UsageError
from builder.core.output import Output, seconds
from builder.recipe.flags import LIST_FLAGS, RECIPE_FLAGS, SWITCHES, TASK_FLAGS

if TYPE_CHECKING:
    from builder.pipeline import Built
    from builder.recipe.schema import Resolved
    from builder.serving.container import ContainerServer
    from builder.serving.server import Server
    from builder.serving.smoke import SmokeReport
    from builder.triton.repository import Repository

# The stages by the names that people use for --force and --from; the values are the store's.
STAGE_NAMES = {
    "fetch": "snapshot",
    "calibrate": "calibration",
    "quantize": "checkpoint",
    "split": "ranks",
    "engine": "engine",
    "render": "repository",
    "smoke": "smoke",
}
# For --force alone: what measures, and the stages of the store that it fills.
MEASUREMENTS = {
    "quality": ["quality"],
    "texts": ["texts"],
    "scores": ["scores"],
    "tasks": ["tasks"],
    "sensitivity": ["sensitivity", "proxy"],
    "selection": ["selection"],
}


def _resolve(arguments: argparse.Namespace) -> Resolved:
    from builder.recipe import schema
    from builder.recipe.evaluation import RUNNERS

    values = vars(arguments)
    keys = ["evaluation.compare_kv", *(key for _, key, _, _ in SWITCHES)]
    keys += [key for _, key, _, _ in (*RECIPE_FLAGS, *LIST_FLAGS, *TASK_FLAGS)]
    flags = {key: values[key] for key in keys if values.get(key) is not None}
    if "all" in flags.get("evaluation.runners", ()):
        flags["evaluation.runners"] = RUNNERS
    return schema.resolve(flags, sets=arguments.set, recipe_file=arguments.recipe, preset=arguments.preset)


def run_build(arguments: argparse.Namespace, out: Output) -> int:
    """build, and the commands that stop earlier."""
    if getattr(arguments, "dry_run", False):
        return run_plan(arguments, out)
    resolved = _resolve(arguments)
    from builder import pipeline
    from builder.cli import summary
    from builder.core.store import STAGES, Store
    from builder.preflight import doctor
    from builder.serving.smoke import SmokeFailed

    force = _forced(arguments)
    if arguments.start:
        force |= set(STAGES[STAGES.index(STAGE_NAMES[arguments.start]) :])
    until = STAGE_NAMES.get(arguments.command, "smoke")
    if getattr(arguments, "no_smoke", False):
        until = "repository"
    if os.environ.get(doctor.INSIDE) and "engine" in STAGES[: STAGES.index(until) + 1]:
        asked = resolved.recipe
        doctor.require(resolved.gpu, asked.engine.tensorrt_llm, arguments.output, target=asked.target)
    store = Store(arguments.output, out, force=sorted(force))
    try:
        with store.in_use():
            built = pipeline.build(resolved, store, until=until)
    except SmokeFailed as failed:
        _write_junit(failed.report, arguments)
        out.result({"smoke": failed.report.as_dict()})
        raise
    if built.smoke:
        _write_junit(built.smoke, arguments)
    summary.show(built, resolved, store, until, out)
    _check_quality(built, resolved, arguments)
    if built.evaluation:
        built.evaluation.check()
    return 0


def _check_quality(built: Built, resolved: Resolved, arguments: argparse.Namespace) -> None:
    """Raises if the build failed its quality check; the error lists the commands to try next."""
    if built.quality is None:
        return
    from builder.report.quality_summary import error

    found = error(built.quality, resolved.recipe.quality.min_score, _again("build", arguments))
    if found:
        raise found


def _forced(arguments: argparse.Namespace) -> set[str]:
    """The stages of the store that --force names."""
    return {stage for name in arguments.force for stage in MEASUREMENTS.get(name) or [STAGE_NAMES[name]]}


def run_eval(arguments: argparse.Namespace, out: Output) -> int:
    """Builds what is to be measured, as far as the store lacks it, and measures it."""
    resolved = _resolve(arguments)
    from builder import pipeline
    from builder.core.store import Store
    from builder.evaluate.stage import show

    store = Store(arguments.output, out, force=sorted(_forced(arguments)))
    with store.in_use():
        found = pipeline.measure(resolved, store)
    show(found, out)
    out.text(f"kept       {found.path / 'evaluation.json'}")
    found.check()
    return 0


def run_sensitivity(arguments: argparse.Namespace, out: Output) -> int:
    """Measures each group of layers by itself."""
    resolved = _resolve(arguments)
    from builder import pipeline
    from builder.core.store import Store
    from builder.evaluate.sensitivity.stage import show

    store = Store(arguments.output, out, force=sorted(_forced(arguments)))
    with store.in_use():
        found = pipeline.measure_layers(resolved, store, proxy=arguments.proxy)
    show(found, _again("quantize", arguments), out)
    return 0


def _again(name: str, arguments: argparse.Namespace) -> list[str]:
    """Another command with the recipe and the output of this one."""
    values = vars(arguments)
    words = ["builder", name]
    for option, key, *_ in RECIPE_FLAGS:
        words += [option, str(values[key])] if values[key] is not None else []
    lists = [*((option, values[key]) for option, key, *_ in LIST_FLAGS), ("--set", arguments.set)]
    words += [word for option, found in lists for value in found or () for word in (option, value)]
    for option, value in (
        ("--recipe", arguments.recipe),
        ("--preset", arguments.preset),
        ("--output", arguments.output),
    ):
        words += [option, str(value)] if value is not None else []
    return words + [option for option, key, value, _ in SWITCHES if values[key] is value]


def _write_junit(report: SmokeReport, arguments: argparse.Namespace) -> None:
    from builder.serving.smoke import write_junit

    if getattr(arguments, "junit", None):
        write_junit(report, arguments.junit)


def run_plan(arguments: argparse.Namespace, out: Output) -> int:
    """What a build would do, or the command that `engine` would run. Exit code 3 after it, where it would not fit."""
    resolved = _resolve(arguments)
    from builder import plan
    from builder.cli import plan_view
    from builder.core.store import Store

    found = plan.plan(resolved, Store(arguments.output, Output("quiet"), dry=True))
    (plan_view.show_command if arguments.command == "engine" else plan_view.show)(found, out)
    if found.refusal:
        raise found.refusal
    return 0


def run_inspect(arguments: argparse.Namespace, out: Output) -> int:
    """The checkpoint's gate, on any checkpoint."""
    from builder.checkpoint.validate import inspect

    inspection = inspect(arguments.path)
    out.table("checkpoint", ["", "value"], inspection.summary.items())
    out.result(inspection.facts())
    inspection.check()
    out.info("no problem found")
    return 0


def run_serve(arguments: argparse.Namespace, out: Output) -> int:
    """In the foreground, until it is told to stop (which is no failure) or dies (which is one)."""
    from builder.core import exit_status
    from builder.core.store import serving
    from builder.serving import health
    from builder.serving.server import stop_at_eof

    repository = _repository(arguments)
    if arguments.until_eof:
        stop_at_eof()
    with serving(repository.path), _server(arguments, repository, out) as server:
        try:  # told to stop while it says where it listens, it stops as well as later
            _say_where(server, repository, out)
            code = health.watch(server.http_url, server.wait, server.lost_a_model)
        except KeyboardInterrupt:
            out.info("stopping; answers that are under way are finished")
            return 0
        raise ServingError(f"The server {exit_status.describe(code)}.", hint=f"Its log: {server.log}")


def _say_where(server: Server | ContainerServer, repository: Repository, out: Output) -> None:
    out.result({"http": server.http_url, "grpc": server.grpc_url, "metrics": server.metrics_url, "pid": server.pid})
    out.text(f"http       {server.http_url}")
    out.text(f"grpc       {server.grpc_url}")
    out.text(f"metrics    {server.metrics_url}")
    out.text(f"try        {_curl(server.http_url, repository.facts)}")
    out.finish()  # now: whoever reads it wants to talk to the server
    sys.stdout.flush()


def _curl(url: str, facts: Mapping[str, Any]) -> str:
    tokens = facts.get("names", {}).get("max_tokens", "max_tokens")
    body = f'{{"text_input": "Return the number of", "{tokens}": 32}}'
    return f"curl -s http://{url}/v2/models/{facts['models']['generate']}/generate -d '{body}'"


def _repository(arguments: argparse.Namespace) -> Repository:
    from builder.triton import repository

    named = os.environ.get("MODEL_REPOSITORY")
    found = repository.open_repository(arguments.repository or repository.find(arguments.output, named))
    repository.check_served(found)
    return found


def _server(
    arguments: argparse.Namespace, repository: Repository, out: Output
) -> AbstractContextManager[Server | ContainerServer]:
    """A server for it, here or in a container. EvaluationError for one that failed its gate, without --ungated."""
    from builder.publish import verdict

    if not arguments.ungated:
        verdict.check(arguments.repository or repository.path)
    if arguments.container:
        from builder.serving.container import serve_container

        follow = arguments.command == "serve" and not arguments.quiet
        return serve_container(repository, out=out, image=arguments.image, follow_log=follow, **_where(arguments))
    from builder.serving.server import serve

    follow = getattr(arguments, "follow_log", False)
    return serve(repository.models, out=out, follow_log=follow, **_where(arguments))


def _where(arguments: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(arguments, key) for key in ("host", "http_port", "grpc_port", "metrics_port")}


def run_smoke(arguments: argparse.Namespace, out: Output) -> int:
    """A repository served, tested and stopped."""
    from builder.core.store import serving
    from builder.serving.smoke import smoke

    _both_ports(arguments)
    repository = _repository(arguments)
    if arguments.http:
        report = smoke(arguments.http, arguments.grpc, repository.facts, out=out)
    else:
        with serving(repository.path), _server(arguments, repository, out) as server:
            report = smoke(server.http_url, server.grpc_url, repository.facts, out=out)
    _write_junit(report, arguments)
    outcomes = {True: "ok", False: "FAILED", None: "not checked"}
    rows = [(outcomes[c.passed], c.name, seconds(c.seconds), c.detail) for c in report.checks]
    out.table("smoke test", ["", "check", "time", "detail"], rows)
    out.result(report.as_dict())
    report.check()
    return 0


def run_load(arguments: argparse.Namespace, out: Output) -> int:
    """A repository served, asked by many at once, and stopped; kept beside it for the report."""
    from builder.core.store import serving
    from builder.serving import benchmark

    _both_ports(arguments)
    concurrency = tuple(arguments.clients) or benchmark.Workload.concurrency
    workload = benchmark.Workload(
        concurrency,
        benchmark.default_requests(concurrency) if arguments.requests is None else arguments.requests,
        arguments.input_tokens,
        arguments.output_tokens,
    )
    repository = _repository(arguments)
    benchmark.check(workload, repository.facts)
    if arguments.http:
        report = benchmark.run(arguments.http, arguments.grpc, repository, workload, out=out)
    else:
        with serving(repository.path), _server(arguments, repository, out) as server:
            report = benchmark.run(server.http_url, server.grpc_url, repository, workload, out=out)
    kept = benchmark.save(repository, report, out)
    benchmark.show(report, out)
    out.result({**report.as_dict(), "path": str(kept) if kept else None})
    if kept:
        out.text(f"next       builder report {arguments.repository or repository.path}")
    return 0


def _both_ports(arguments: argparse.Namespace) -> None:
    if bool(arguments.http) != bool(arguments.grpc):
        raise UsageError("A running server is asked on both its ports.", hint="--http HOST:PORT --grpc HOST:PORT")


def run_report(arguments: argparse.Namespace, out: Output) -> int:
    """The page, the card and the table's rows, from manifests and the build record."""
    from builder.report import render

    render.publish(arguments.repository, out, page=arguments.html, card=arguments.markdown, table=arguments.csv)
    return 0


def run_verify(arguments: argparse.Namespace, out: Output) -> int:
    """Every file of the store against its sha256."""
    from builder.core import store

    found = store.verify(_existing(arguments.output), out)
    out.result({"artifacts": found})
    store.check_integrity(found)
    out.text(f"{len(found)} artifacts are what was made")
    return 0


def run_clean(arguments: argparse.Namespace, out: Output) -> int:
    """Removes what was asked, and leftovers; says what stays and why."""
    from builder.clean import removal
    from builder.clean.reachability import Request
    from builder.core.store import Store

    older_than = None if arguments.older_than is None else removal.age(arguments.older_than)
    root = removal.check_root(arguments.output)
    request = Request(tuple(arguments.names), older_than, arguments.all)
    with Store(root, out).in_use(exclusive=True):
        made = removal.plan(root, request)
        failed = [] if arguments.dry_run else removal.carry_out(made)
    removal.show(made, failed, out, dry=arguments.dry_run)
    removal.check_failed(failed, root)
    return 0


def _existing(root: Path) -> Path:
    if not root.is_dir():
        raise UsageError(f"There is nothing at {root}.", hint="Name the directory that a build wrote: --output DIR")
    return root.resolve()


def run_probe(arguments: argparse.Namespace, out: Output) -> int:
    """The card's answers to what the tables leave in doubt. Exit code 1 where a question stayed without one."""
    from builder.core.store import Store
    from builder.trtllm import probe

    store = Store(arguments.output, out)
    limit = arguments.time_limit or probe.TIME_LIMIT
    asking = probe.session(arguments.gpu, store, limit=limit, force=arguments.force)
    with store.in_use():
        found = probe.run(asking, probe.questions(asking, arguments.only))
    probe.show(asking, found)
    if open_ones := probe.unanswered(found):
        raise open_ones
    return 0


def run_doctor(arguments: argparse.Namespace, out: Output) -> int:
    """Exit code 3 if something does not fit."""
    from builder.machine import containers
    from builder.preflight import doctor
    from builder.recipe import schema

    version = schema.Engine().tensorrt_llm
    checks = doctor.examine(doctor.profile(arguments.gpu), version, arguments.output)
    return 0 if doctor.show(checks, containers.newest(version), out) else UnsupportedError.exit_code


def run_gpus(arguments: argparse.Namespace, out: Output) -> int:
    """The profiles, what runs on them and the cards behind them."""
    from builder.machine import gpus

    gpus.show(out)
    return 0


def run_explain(arguments: argparse.Namespace, out: Output) -> int:
    """One flag of trtllm-build, in every version."""
    from builder.cli import explain

    explain.show(explain.explain(arguments.flag), out)
    return 0


def run_schema(arguments: argparse.Namespace, out: Output) -> int:
    """The schema, as configs/recipe.schema.json holds it."""
    import json

    from builder.recipe import schema

    print(json.dumps(schema.schema(), indent=2))
    return 0
