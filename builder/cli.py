"""The commands: parse, call, print. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder import __version__
from builder.errors import BuilderError, EvaluationError, ServingError, UnsupportedError, UsageError
from builder.output import Output, seconds, size

if TYPE_CHECKING:
    from builder.evaluate import Evaluation
    from builder.pipeline import Built
    from builder.recipe import Resolved
    from builder.repository import Repository
    from builder.serve import Server
    from builder.serve_container import ContainerServer
    from builder.smoke import SmokeReport
    from builder.store import Store

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
# Recipe flags: option, dotted key of the recipe, type, help.
RECIPE_FLAGS: tuple[tuple[str, str, Callable[[str], Any], str], ...] = (
    ("--model", "model.id", str, "Hub id (Qwen/Qwen3-8B) or a local directory"),
    ("--revision", "model.revision", str, "branch, tag or commit on the Hub"),
    ("--gpu", "gpu", str, "GPU profile: sm120, cpu, ... or auto (`builder gpus`)"),
    ("--target", "target", str, "engine (trtllm-build), llmapi (no engine) or reference (no GPU)"),
    ("--calib-data", "calibration.data", str, "a .jsonl file, a Hub dataset id, or builtin:python-docs"),
    ("--calib-samples", "calibration.samples", int, "rows to calibrate on"),
    ("--calib-seq-len", "calibration.seq_len", int, "tokens of a row, at most"),
    ("--kv-cache-dtype", "quantization.kv_cache_dtype", str, "fp8, or auto for the model's own type"),
    (
        "--sensitivity-data",
        "sensitivity.data",
        str,
        "texts that each layer's loss is measured on: .jsonl or Hub dataset",
    ),
    ("--sensitivity-texts", "sensitivity.texts", int, "how many of them"),
    ("--max-batch-size", "engine.max_batch_size", int, "requests in one iteration"),
    ("--max-input-len", "engine.max_input_len", int, "tokens of a prompt"),
    ("--max-seq-len", "engine.max_seq_len", int, "tokens of prompt and answer"),
    ("--max-num-tokens", "engine.max_num_tokens", int, "tokens in one iteration"),
    ("--tp", "engine.tp", int, "tensor parallel size: GPUs that share each layer"),
    ("--pp", "engine.pp", int, "pipeline parallel size: GPUs that follow one another"),
    ("--min-score", "evaluation.min_score", float, "gate: PPL of BF16 / PPL x 100 must reach it, as 98"),
    ("--max-kl", "evaluation.max_kl", float, "gate: the mean KL(BF16 || model) must not pass it, in nats"),
)
# Those that may be given several times: option, dotted key, placeholder, help.
LIST_FLAGS = (
    (
        "--keep-bf16",
        "quantization.keep_bf16",
        "PATTERN",
        "leave these linear layers in BF16: '*.down_proj', or auto:KL; repeatable",
    ),
    ("--data", "evaluation.data", "FILE|ID", "evaluate on this .jsonl file or Hub dataset; repeatable"),
    ("--runner", "evaluation.runners", "RUNNER", "measure bf16, simulated, checkpoint, reference, served, or all"),
)
EXAMPLES = """examples:
  builder build --model Qwen/Qwen3-8B --gpu sm120
  builder build --model tests/data/tiny-qwen3 --gpu cpu --output /tmp/demo
  builder plan  --model Qwen/Qwen3-8B --gpu sm120 --max-seq-len 8192
  builder serve artifacts/models/tiny-qwen3-cpu-nvfp4
  builder eval  --model tests/data/tiny-qwen3 --gpu cpu --data tests/data/eval/prose.jsonl

exit codes: 0 ok, 1 a stage failed, 2 usage or recipe, 3 does not fit or is not supported,
            4 the accuracy gate failed, or what was asked can't be measured, 5 serving or smoke test,
            6 integrity or version, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, runs one command, and turns what goes wrong into a message and an exit code."""
    arguments = parser().parse_args(argv)
    out = Output("json" if arguments.json else "quiet" if arguments.quiet else "human")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code: int = arguments.run(arguments, out)
        return code
    except BuilderError as error:
        if arguments.traceback:
            raise
        _print_error(error)
        out.result({"error": {"what": error.what, "why": error.why, "cure": error.cure}, "exit_code": error.exit_code})
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; finished stages are kept, nothing half-made is", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our stdout went away, as `| head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _print_error(error: BuilderError) -> None:
    print(f"error: {error.what}", file=sys.stderr)
    for part in (error.why, error.cure):
        for line in part.splitlines():
            print(f"  {line}", file=sys.stderr)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="builder",
        description="From a Hugging Face model and a GPU name to a tested Triton repository, quantized to NVFP4.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"builder {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    chain = {
        "build": ("model and GPU name in, tested Triton repository out", run_build),
        "plan": ("what a build would do, and why; nothing is made", run_plan),
        "fetch": ("the first stage: the model's files, verified", run_build),
        "quantize": ("as far as the checkpoint in both layouts, inspected", run_build),
        "engine": ("as far as the engine", run_build),
        "render": ("as far as the Triton repository, not served", run_build),
    }
    for name, (text, run) in chain.items():
        command = _command(commands, name, text, run)
        _add_recipe_flags(command)
        _add_output(command)
        if name != "plan":
            command.add_argument("--force", metavar="STAGE", action="append", default=[], choices=STAGE_NAMES,
                                 help=f"make this stage again: {', '.join(STAGE_NAMES)}")  # fmt: skip
            command.add_argument("--from", metavar="STAGE", dest="start", choices=STAGE_NAMES,
                                 help="make this stage and all after it again")  # fmt: skip
        if name == "engine":
            command.add_argument("--dry-run", action="store_true", help="print the trtllm-build command, make nothing")
        if name == "build":
            command.add_argument("--dry-run", action="store_true", help="the same as `builder plan`")
            command.add_argument("--no-smoke", action="store_true", help="leave the repository untested")
            command.add_argument("--junit", type=Path, metavar="FILE", help="smoke results as JUnit XML")

    command = _command(commands, "eval", "what quantization cost: perplexity, KL to BF16, agreement", run_eval)
    _add_recipe_flags(command)
    command.add_argument("--compare-kv", dest="evaluation.compare_kv", action="store_const", const=True,
                         help="the checkpoint also without its FP8 KV cache")  # fmt: skip
    _add_output(command)

    command = _command(commands, "sensitivity", "what each linear layer loses in NVFP4, worst first", run_sensitivity)
    _add_recipe_flags(command)
    command.add_argument(
        "--proxy", action="store_true", help="no KL: errors of outputs or, without texts, of weights; for large models"
    )
    _add_output(command)

    command = _command(commands, "inspect", "check a checkpoint: NaN, scales, shapes, bits per weight", run_inspect)
    command.add_argument("path", type=Path, metavar="CHECKPOINT")

    command = _command(commands, "serve", "serve a repository until Ctrl-C", run_serve)
    _add_served(command)
    command.add_argument("--follow-log", action="store_true", help="what the server says, on stderr too")
    command.add_argument("--until-eof", action="store_true", help="stop when stdin ends")
    command = _command(commands, "smoke", "start a repository's server, test every way to ask it, stop it", run_smoke)
    _add_served(command)
    command.add_argument("--http", metavar="HOST:PORT", help="test the server that runs there; start none")
    command.add_argument("--grpc", metavar="HOST:PORT", help="its gRPC port (with --http)")
    command.add_argument("--junit", type=Path, metavar="FILE", help="results as JUnit XML")

    command = _command(
        commands, "report", "what is known of a repository: one HTML page, a model card, a table", run_report
    )
    command.add_argument("repository", type=Path, help="a repository, as in artifacts/models/")
    for option, text in (("html", "the page"), ("markdown", "the model card"), ("csv", "the table that grows")):
        command.add_argument(f"--{option}", type=Path, metavar="FILE", help=f"{text} (default: in OUTPUT/reports/)")

    command = _command(commands, "verify", "hash every stored file again", run_verify)
    _add_output(command)
    command = _command(commands, "clean", "remove what no repository in OUTPUT/models was made from", run_clean)
    _add_output(command)
    command.add_argument("--all", action="store_true", help="remove the repositories too")
    command.add_argument("--dry-run", action="store_true", help="only say what would go")

    command = _command(commands, "probe", "ask this machine's card which doubtful flags build", run_probe)
    command.add_argument("--gpu", default="auto", help="the profile that it must be of (default: what is here)")
    command.add_argument("--only", metavar="QUESTION", action="append", default=[], help="ask this one (repeatable)")
    command.add_argument("--force", action="store_true", help="ask again what is answered")
    command.add_argument("--time-limit", type=int, metavar="SECONDS", help="for each engine (default: 1800)")
    _add_output(command)
    command = _command(
        commands, "doctor", "does this machine or container fit: driver, GPU, Docker, limits", run_doctor
    )
    command.add_argument("--gpu", help="profile to build for (default: the card that is here)")
    _add_output(command)

    _command(commands, "gpus", "the GPU profiles, what runs on them, the cards behind them", run_gpus)
    command = _command(commands, "explain", "a flag or LLM argument: meaning, defaults, rules, sources", run_explain)
    command.add_argument("flag", metavar="FLAG", help="as context_fmha, with or without dashes")
    _command(commands, "schema", "the JSON Schema of a recipe file", run_schema)
    return top


def _command(commands: Any, name: str, text: str, run: Callable[..., int]) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False
    )
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")
    command.add_argument("-q", "--quiet", action="store_true", help="say nothing but errors")
    command.add_argument("--traceback", action="store_true", help="show where an error was raised")
    command.set_defaults(run=run)
    return command


def _add_recipe_flags(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("recipe (flag > --set > --recipe > --preset > GPU profile > default)")
    for option, key, kind, text in RECIPE_FLAGS:
        group.add_argument(option, dest=key, type=kind, help=text)
    for option, key, placeholder, text in LIST_FLAGS:
        group.add_argument(option, dest=key, action="append", metavar=placeholder, help=text)
    group.add_argument(
        "--trust-remote-code", dest="model.trust_remote_code", action="store_const", const=True,
        help="run Python code that comes with the model",
    )  # fmt: skip
    group.add_argument("--preset", help="latency or throughput")
    group.add_argument("--recipe", type=Path, metavar="FILE", help="a YAML recipe (configs/recipes/)")
    group.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="any value of the recipe")


def _add_output(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--output", type=Path, default=Path(os.environ.get("BUILDER_OUTPUT", "artifacts")),
        help="where everything is kept (BUILDER_OUTPUT, default ./artifacts)",
    )  # fmt: skip


def _add_served(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "repository", type=Path, nargs="?",
        help="a repository, as in artifacts/models/; default: MODEL_REPOSITORY, or the only one in OUTPUT/models",
    )  # fmt: skip
    _add_output(command)
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    for name in ("http", "grpc", "metrics"):
        command.add_argument(f"--{name}-port", type=int, help="default: a free one")
    command.add_argument("--container", action="store_true", help="in a Docker container, which goes when we go")
    command.add_argument("--image", default=os.environ.get("BUILDER_IMAGE", "trtllm-builder"),
                         help="for --container (BUILDER_IMAGE, default trtllm-builder)")  # fmt: skip


def _resolve(arguments: argparse.Namespace) -> Resolved:
    from builder import recipe

    values = vars(arguments)
    keys = ["model.trust_remote_code", "evaluation.compare_kv"]
    keys += [key for _, key, _, _ in (*RECIPE_FLAGS, *LIST_FLAGS)]
    flags = {key: values[key] for key in keys if values.get(key) is not None}
    if "all" in flags.get("evaluation.runners", ()):
        flags["evaluation.runners"] = recipe.RUNNERS
    return recipe.resolve(flags, sets=arguments.set, recipe_file=arguments.recipe, preset=arguments.preset)


def run_build(arguments: argparse.Namespace, out: Output) -> int:
    """build, and the commands that stop earlier."""
    if getattr(arguments, "dry_run", False):
        return run_plan(arguments, out)
    resolved = _resolve(arguments)
    from builder import doctor, pipeline
    from builder.smoke import SmokeFailed
    from builder.store import STAGES, Store

    force = {STAGE_NAMES[name] for name in arguments.force}
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
        raise
    if built.smoke:
        _write_junit(built.smoke, arguments)
    _print_built(built, store, until, out)
    return _judge(built.evaluation)


def run_eval(arguments: argparse.Namespace, out: Output) -> int:
    """Builds what is to be measured, as far as the store lacks it, and measures it."""
    resolved = _resolve(arguments)
    from builder import pipeline
    from builder.evaluate import show
    from builder.store import Store

    store = Store(arguments.output, out)
    with store.in_use():
        found = pipeline.measure(resolved, store)
    show(found, out)
    out.text(f"kept       {found.path / 'evaluation.json'}")
    return _judge(found)


def _judge(found: Evaluation | None) -> int:
    """The exit code; what failed goes to stderr, for the one object of --json is printed already."""
    try:
        if found:
            found.check()
    except EvaluationError as error:
        _print_error(error)
        return error.exit_code
    return 0


def run_sensitivity(arguments: argparse.Namespace, out: Output) -> int:
    """Measures each group of layers by itself."""
    resolved = _resolve(arguments)
    from builder import pipeline
    from builder.sensitivity import show
    from builder.store import Store

    store = Store(arguments.output, out)
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
    return [*words, "--trust-remote-code"] if values["model.trust_remote_code"] else words


def _write_junit(report: SmokeReport, arguments: argparse.Namespace) -> None:
    from builder.smoke import write_junit

    if getattr(arguments, "junit", None):
        write_junit(report, arguments.junit)


def _print_built(built: Built, store: Store, until: str, out: Output) -> None:
    last = store.done[-1]
    out.result(
        {
            "path": str(last.path),
            "repository": str(built.link) if built.link else None,
            "stages": [
                {
                    "stage": done.stage,
                    "key": done.manifest["key"],
                    "path": str(done.path),
                    "cached": done.cached,
                    "seconds": done.manifest["seconds"],
                }
                for done in store.done
            ],
            "smoke": built.smoke.as_dict() if built.smoke else None,
            "evaluation": built.evaluation.as_dict() if built.evaluation else None,
        }
    )
    if all(done.cached for done in store.done):
        out.info("nothing to do: every stage was found in the store")
    if built.evaluation:
        from builder.evaluate import show_tables

        show_tables(built.evaluation, out)
    if built.smoke and built.smoke.sample:
        out.text(f"prompt     {built.smoke.sample.prompt!r}")
        out.text(f"answer     {built.smoke.sample.answer!r}")
    if built.link is None:
        out.text(str(last.path))
        return
    out.text(f"repository {built.link}" + ("" if until == "smoke" else "  (not served, not tested)"))
    out.text(f"next       builder serve {built.link}")


def run_plan(arguments: argparse.Namespace, out: Output) -> int:
    """What a build would do, or the command that `engine` would run. Exit code 3 after it, where it would not fit."""
    resolved = _resolve(arguments)
    from builder import plan
    from builder.store import Store

    found = plan.plan(resolved, Store(arguments.output, Output("quiet"), dry=True))
    (plan.show_command if arguments.command == "engine" else plan.show)(found, out)
    if found.refusal:
        _print_error(found.refusal)
        return found.refusal.exit_code
    return 0


def run_inspect(arguments: argparse.Namespace, out: Output) -> int:
    """The checkpoint's gate, on any checkpoint."""
    from builder.inspection import inspect

    inspection = inspect(arguments.path)
    out.table("checkpoint", ["", "value"], inspection.summary.items())
    out.result(inspection.facts())
    inspection.check()
    out.info("no problem found")
    return 0


def run_serve(arguments: argparse.Namespace, out: Output) -> int:
    """In the foreground, until it is told to stop (which is no failure) or dies (which is one)."""
    from builder.serve import stop_at_eof

    repository = _repository(arguments)
    if arguments.until_eof:
        stop_at_eof()
    with _server(arguments, repository, out) as server:
        out.result({"http": server.http_url, "grpc": server.grpc_url, "metrics": server.metrics_url, "pid": server.pid})
        out.text(f"http       {server.http_url}")
        out.text(f"grpc       {server.grpc_url}")
        out.text(f"metrics    {server.metrics_url}")
        out.text(f"try        {_curl(server.http_url, repository.facts)}")
        sys.stdout.flush()
        try:
            code = server.wait()
        except KeyboardInterrupt:
            out.info("stopping; answers that are under way are finished")
            return 0
    raise ServingError(f"The server ended by itself with exit code {code}.", cure=f"Its log: {server.log}")


def _curl(url: str, facts: Mapping[str, Any]) -> str:
    tokens = facts.get("names", {}).get("max_tokens", "max_tokens")
    body = f'{{"text_input": "Return the number of", "{tokens}": 32}}'
    return f"curl -s http://{url}/v2/models/{facts['models']['generate']}/generate -d '{body}'"


def _repository(arguments: argparse.Namespace) -> Repository:
    from builder import repository

    named = os.environ.get("MODEL_REPOSITORY")
    return repository.open_repository(arguments.repository or repository.find(arguments.output, named))


def _server(
    arguments: argparse.Namespace, repository: Repository, out: Output
) -> AbstractContextManager[Server | ContainerServer]:
    """A server for it, here or in a container."""
    if arguments.container:
        from builder.serve_container import serve_container

        follow = arguments.command == "serve" and not arguments.quiet
        return serve_container(repository, out=out, image=arguments.image, follow_log=follow, **_where(arguments))
    from builder.serve import followed_log, serve

    log = followed_log() if getattr(arguments, "follow_log", False) else None
    return serve(repository.models, out=out, log=log, **_where(arguments))


def _where(arguments: argparse.Namespace) -> dict[str, Any]:
    return {key: getattr(arguments, key) for key in ("host", "http_port", "grpc_port", "metrics_port")}


def run_smoke(arguments: argparse.Namespace, out: Output) -> int:
    """A repository served, tested and stopped."""
    from builder.smoke import smoke

    if bool(arguments.http) != bool(arguments.grpc):
        raise UsageError("A running server is asked on both its ports.", cure="--http HOST:PORT --grpc HOST:PORT")
    repository = _repository(arguments)
    if arguments.http:
        report = smoke(arguments.http, arguments.grpc, repository.facts, out=out)
    else:
        with _server(arguments, repository, out) as server:
            report = smoke(server.http_url, server.grpc_url, repository.facts, out=out)
    _write_junit(report, arguments)
    rows = [("ok" if c.passed else "FAILED", c.name, seconds(c.seconds), c.detail) for c in report.checks]
    out.table("smoke test", ["", "check", "time", "detail"], rows)
    out.result(report.as_dict())
    report.check()
    return 0


def run_report(arguments: argparse.Namespace, out: Output) -> int:
    """The page, the card and the table's rows, from manifests and the build record."""
    from builder import report_page

    report_page.publish(arguments.repository, out, page=arguments.html, card=arguments.markdown, table=arguments.csv)
    return 0


def run_verify(arguments: argparse.Namespace, out: Output) -> int:
    """Every file of the store against its sha256."""
    from builder import store

    found = store.verify(_existing(arguments.output), out)
    out.result({"artefacts": found})
    store.check_integrity(found)
    out.text(f"{len(found)} artefacts are what was made")
    return 0


def run_clean(arguments: argparse.Namespace, out: Output) -> int:
    """Removes what nothing needs."""
    from builder import record
    from builder.store import Store, prune

    root = _existing(arguments.output)
    links = [path for path in sorted((root / "models").glob("*")) if path.is_symlink()]
    with Store(root, out).in_use(exclusive=True):
        if arguments.all and not arguments.dry_run:
            for link in links:
                link.unlink()
        keep = set() if arguments.all else {link.resolve() for link in links}
        removed, freed = prune(root, keep, dry=arguments.dry_run)
        removed += record.prune(root, gone=removed, dry=arguments.dry_run)
    out.result({"removed": [str(path) for path in removed], "bytes": freed})
    for path in removed:
        out.text(str(path))
    out.info(f"{'would free' if arguments.dry_run else 'freed'} {size(freed)}")
    return 0


def _existing(root: Path) -> Path:
    if not root.is_dir():
        raise UsageError(f"There is nothing at {root}.", cure="Name the directory that a build wrote: --output DIR")
    return root.resolve()


def run_probe(arguments: argparse.Namespace, out: Output) -> int:
    """The card's answers to what the tables leave in doubt. Exit code 1 where a question stayed without one."""
    from builder import probe
    from builder.store import Store

    store = Store(arguments.output, out)
    limit = arguments.time_limit or probe.TIME_LIMIT
    asking = probe.session(arguments.gpu, store, limit=limit, force=arguments.force)
    with store.in_use():
        found = probe.run(asking, probe.questions(asking, arguments.only))
    probe.show(asking, found)
    if open_ones := probe.unanswered(found):
        _print_error(open_ones)
        return open_ones.exit_code
    return 0


def run_doctor(arguments: argparse.Namespace, out: Output) -> int:
    """Exit code 3 if something does not fit."""
    from builder import containers, doctor, recipe

    version = recipe.Engine().tensorrt_llm
    checks = doctor.examine(doctor.profile(arguments.gpu), version, arguments.output)
    return 0 if doctor.show(checks, containers.newest(version), out) else UnsupportedError.exit_code


def run_gpus(arguments: argparse.Namespace, out: Output) -> int:
    """The profiles, what runs on them and the cards behind them."""
    from builder import gpus

    gpus.show(out)
    return 0


def run_explain(arguments: argparse.Namespace, out: Output) -> int:
    """One flag of trtllm-build, in every version."""
    from builder import explain

    explain.show(explain.explain(arguments.flag), out)
    return 0


def run_schema(arguments: argparse.Namespace, out: Output) -> int:
    """The schema, as configs/recipe.schema.json holds it."""
    import json

    from builder import recipe

    print(json.dumps(recipe.schema(), indent=2))
    return 0
