"""The commands for what was built: reports, other layouts, integrity, garbage collection."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.cli.options import add_command, add_output, path
from builder.core.errors import UsageError
from builder.core.output import Output, size

if TYPE_CHECKING:
    from builder.checkpoint.conversion import Options

TITLE = "keep"
LAYOUTS = ("unified", "tensorrt_llm", "compressed-tensors")  # checkpoint/conversion.py
PSEUDO = "pseudo"  # quantize/pseudo_stage.py


def add(commands: Any) -> None:
    """Adds report, convert, export, verify and clean."""
    command = add_command(
        commands, "report", "write what is known of a repository as HTML and Markdown", run_report,
        examples=[
            "builder report artifacts/models/tiny-qwen3-cpu-nvfp4",
            "builder report artifacts/models/tiny-qwen3-cpu-nvfp4 --markdown README.md",
        ],
    )  # fmt: skip
    command.add_argument("repository", type=path, help="a repository, as in artifacts/models/")
    for option, text in (("html", "the page"), ("markdown", "the model card"), ("csv", "the table that grows")):
        command.add_argument(f"--{option}", type=path, metavar="FILE", help=f"{text} (default: in OUTPUT/reports/)")

    _add_convert(commands)
    command = add_command(
        commands, "export", "copy a repository with its engine, to move both elsewhere", run_export,
        examples=["builder export artifacts/models/qwen3-8b-sm120-nvfp4 /mnt/share/served"],
    )  # fmt: skip
    command.add_argument("repository", type=path, help="a repository, as in artifacts/models/")
    command.add_argument("destination", type=path, help="the output directory to write, or to add it to")
    command.add_argument("--ungated", action="store_true", help="export it even if it failed a gate")
    command = add_command(commands, "verify", "check every stored file against its SHA-256", run_verify,
                          examples=["builder verify", "builder verify --output /data/artifacts"])  # fmt: skip
    add_output(command)
    command = add_command(
        commands, "clean", "remove leftovers, and builds by name or age", run_clean,
        examples=[
            "builder clean --dry-run --older-than 7d",
            "builder clean tiny-qwen3-cpu-nvfp4",
            "builder clean --all",
        ],
    )  # fmt: skip
    command.add_argument("names", metavar="NAME", nargs="*",
                         help="a link in OUTPUT/models or STAGE/KEY: removed with what only it needs")  # fmt: skip
    add_output(command)
    command.add_argument("--older-than", metavar="AGE",
                         help="also remove what no link needs and no build used for this long: 7d, 12h")  # fmt: skip
    command.add_argument("--all", action="store_true", help="remove all builds and their links")
    command.add_argument("--dry-run", action="store_true", help="only list what would be removed, what stays, and why")


def _add_convert(commands: Any) -> None:
    command = add_command(
        commands, "convert", "write a quantized checkpoint in another layout", run_convert,
        examples=[
            "builder convert artifacts/store/checkpoint/KEY qwen3-8b-vllm --to compressed-tensors",
            "builder convert Qwen3-8B-NVFP4-llmc qwen3-8b --to unified --shard-size 2GB",
            "builder convert engine-input qwen3-8b --to unified --model Qwen3-8B",
            "builder convert Qwen3-8B-NVFP4 qwen3-8b-pseudo --to pseudo --dtype fp16",
        ],
    )  # fmt: skip
    command.add_argument("source", metavar="SOURCE", type=path,
                         help="a directory with a quantized checkpoint, or a checkpoint of the store")  # fmt: skip
    command.add_argument("destination", metavar="DESTINATION", type=path, help="the directory to write; must not exist")
    command.add_argument("--to", metavar="LAYOUT", required=True, choices=[*LAYOUTS, PSEUDO],
                         help=f"the layout to write: {', '.join(LAYOUTS)}; or pseudo: "
                         "the dequantized weights as an ordinary model")  # fmt: skip
    command.add_argument("--dtype", choices=["bf16", "fp16"],
                         help="of the weights of --to pseudo (default: bf16)")  # fmt: skip
    command.add_argument("--model", type=path, metavar="DIR",
                         help="the source model's directory, for its config.json and tokenizer: "
                         "TensorRT-LLM's layout lacks them")  # fmt: skip
    command.add_argument("--shard-size", metavar="SIZE",
                         help="largest file to write, as 500MB or 5GB (default: 5GB; pseudo: 50GB)")  # fmt: skip


def run_convert(arguments: argparse.Namespace, out: Output) -> int:
    """Converts; warns of what the new layout can't hold and of scales that can't be right."""
    from builder.checkpoint import conversion

    if arguments.dtype and arguments.to != PSEUDO:
        raise UsageError(
            f"--dtype has no effect with --to {arguments.to}, which keeps the types of all tensors.",
            hint="Leave --dtype out, or write the dequantized weights: --to pseudo",
        )
    default = "50GB" if arguments.to == PSEUDO else "5GB"
    shard_bytes = conversion.parse_size(arguments.shard_size or default)
    source = conversion.source_directory(arguments.source)
    if arguments.to == PSEUDO:
        return _convert_to_pseudo(source, arguments, conversion.Options(arguments.model, shard_bytes), out)
    made = conversion.convert_with_progress(
        source, arguments.destination, conversion.LAYOUTS[arguments.to],
        conversion.Options(arguments.model, shard_bytes), out,
    )  # fmt: skip
    for sentence in made.lost:
        out.warn(sentence)
    if made.suspicious:
        shown = ", ".join(made.suspicious[:3]) + ", ..." * (len(made.suspicious) > 3)
        out.warn(f"{len(made.suspicious)} scales are not finite and positive: {shown}")
    out.result({"source": str(source), "destination": str(arguments.destination), **asdict(made)})
    files = f"{len(made.files)} files" if len(made.files) > 1 else made.files[0]
    out.text(f"{arguments.destination}: {files}, {size(made.nbytes)}")
    out.text(f"Check it: builder inspect {arguments.destination}")
    return 0


def _convert_to_pseudo(source: Path, arguments: argparse.Namespace, options: Options, out: Output) -> int:
    from builder.quantize.pseudo_stage import convert_to_pseudo

    facts = convert_to_pseudo(source, arguments.destination, arguments.dtype or "bf16", options, out)
    out.result({"source": str(source), "destination": str(arguments.destination), **facts})
    out.text(f"{arguments.destination}: {len(facts['files'])} files, {size(facts['nbytes'])}")
    out.text(f"An ordinary model, loaded by transformers; its scales are in {facts['files'][-1]}")
    return 0


def run_report(arguments: argparse.Namespace, out: Output) -> int:
    """Writes the page, the model card and the table's row, from manifests and the build record."""
    from builder.report import render

    render.publish(arguments.repository, out, page=arguments.html, card=arguments.markdown, table=arguments.csv)
    return 0


def run_export(arguments: argparse.Namespace, out: Output) -> int:
    """Copies the repository and what it serves. EvaluationError if it failed its gate, without --ungated."""
    from builder.core.store import Store
    from builder.publish import verdict
    from builder.publish.export import export
    from builder.triton.repository import check_served, open_repository

    found = open_repository(arguments.repository)
    check_served(found)
    if not arguments.ungated:
        verdict.check(arguments.repository)
    store = Store(found.path.parents[1], out)
    with store.in_use():
        link = export(found, arguments.repository.absolute().name, arguments.destination, store)
    out.result({"link": str(link)})
    out.text(f"repository {link}")
    out.text(f"next       builder serve {link}")
    return 0


def run_verify(arguments: argparse.Namespace, out: Output) -> int:
    """Hashes every file of the store again. IntegrityError if one changed."""
    from builder.core import store

    found = store.verify(_existing(arguments.output), out)
    out.result({"artifacts": found})
    store.check_integrity(found)
    out.text(f"{len(found)} artifacts are unchanged")
    return 0


def run_clean(arguments: argparse.Namespace, out: Output) -> int:
    """Removes leftovers and what was named; lists what stays and why."""
    from builder.clean import environments, removal
    from builder.clean.reachability import Request
    from builder.core.store import Store

    older_than = None if arguments.older_than is None else removal.age(arguments.older_than)
    root = removal.check_root(arguments.output)
    request = Request(tuple(arguments.names), older_than, arguments.all)
    with Store(root, out).in_use(exclusive=True):
        made = removal.plan(root, request)
        made.remove += environments.find(0.0 if arguments.all else older_than)
        failed = [] if arguments.dry_run else removal.carry_out(made)
    removal.show(made, failed, out, dry=arguments.dry_run)
    removal.check_failed(failed, root)
    return 0


def _existing(root: Path) -> Path:
    if not root.is_dir():
        raise UsageError(f"There is no directory {root}.", hint="Name the output directory of a build: --output DIR")
    return root.resolve()
