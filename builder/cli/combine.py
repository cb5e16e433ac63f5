"""The commands for repositories of several models, and for earlier versions of a model."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.cli.options import add_command, add_output, path
from builder.core.errors import UsageError
from builder.core.output import Output, size

if TYPE_CHECKING:
    from builder.core.store import Store
    from builder.publish.combination import Combination


def add(commands: Any) -> None:
    """Adds combine and rollback."""
    command = add_command(
        commands, "combine", "put several models into one repository", run_combine,
        examples=[
            "builder combine both --add artifacts/models/a-cpu-nvfp4=a --add artifacts/models/b-cpu-nvfp4=b",
            "builder combine both --kv-fraction a=0.5 --kv-fraction b=0.3 --dry-run",
            "builder combine both --update a",
            "builder combine both --remove b",
        ],
    )  # fmt: skip
    command.add_argument("name", metavar="NAME", help="the repository's name in OUTPUT/models; made if there is none")
    add_output(command)
    command.add_argument("--add", metavar="REPOSITORY[=MODEL]", action="append", default=[],
                         help="add a model, by the name MODEL for clients; repeatable")  # fmt: skip
    command.add_argument("--remove", metavar="MODEL", action="append", default=[], help="remove a model; repeatable")
    command.add_argument("--update", metavar="MODEL", action="append", default=[],
                         help="take the version that its own link names now; repeatable")  # fmt: skip
    command.add_argument("--kv-fraction", metavar="MODEL=X", action="append", default=[],
                         help="part of the GPU's free memory for its KV cache; repeatable")  # fmt: skip
    command.add_argument("--ungated", action="store_true", help="also take models that failed a gate")
    command.add_argument("--dry-run", action="store_true", help="only show what would be there, and whether it fits")
    command = add_command(
        commands, "rollback", "link a model's previous version again", run_rollback,
        examples=["builder rollback tiny-qwen3-cpu-nvfp4", "builder rollback tiny-qwen3-cpu-nvfp4 --list"],
    )  # fmt: skip
    command.add_argument("name", metavar="NAME", help="a link in OUTPUT/models")
    add_output(command)
    command.add_argument("--to", metavar="KEY", help="this version instead of the previous one")
    command.add_argument("--list", action="store_true", help="only list the versions")


def run_combine(arguments: argparse.Namespace, out: Output) -> int:
    """Changes a repository of several models, and shows what each takes."""
    from builder.core.store import Store
    from builder.publish.combination import Change, change

    asked = Change(
        {model: place for place, model in map(_added, arguments.add)},
        arguments.update,
        arguments.remove,
        dict(fraction_of(text) for text in arguments.kv_fraction),
        arguments.ungated,
    )
    if len(asked.add) < len(arguments.add):
        raise UsageError("--add names two models that are called the same.", hint="--add REPOSITORY=MODEL")
    if not (asked.add or asked.update or asked.remove or asked.fractions or arguments.dry_run):
        raise UsageError("There is nothing to change.", hint="--add, --remove, --update, --kv-fraction or --dry-run")
    store = Store(arguments.output, out, dry=arguments.dry_run)
    with store.in_use():
        show(change(_name(arguments.name), asked, store=store), out)
    return 0


def check_add(arguments: argparse.Namespace, root: Path) -> None:
    """UsageError, before a build, if `builder render --add` could not add its model afterwards."""
    from builder.publish.combination import check_free, members_of

    name, model = getattr(arguments, "add", None), getattr(arguments, "model_as", None)
    if name:
        members = members_of(root / "models" / _name(name))
        if model:
            _name(model)
            check_free(name, model, members)
    elif model:
        raise UsageError("--as names a model for --add.", hint="--add NAME --as MODEL")


def add_built(arguments: argparse.Namespace, link: Path, store: Store) -> None:
    """Adds what `builder render --add` built. A model that is there already and came from this link is updated."""
    from builder.publish.combination import Change, change, members_of

    name = getattr(arguments, "add", None)
    if not name:
        return
    model = arguments.model_as or link.name
    had = members_of(store.root / "models" / _name(name)).get(model)
    asked = Change(update=[model]) if had and had.link == link.name else Change(add={model: link})
    with store.in_use():
        show(change(_name(name), asked, store=store), store.out)


def show(made: Combination, out: Output) -> None:
    """Prints the models, and the memory that they take."""
    rows = [(name, member.link, member.repository.path.name) for name, member in made.members.items()]
    out.table("models", ["model", "repository", "version"], rows)
    for card, (memory, shares) in sorted(made.cards.items()):
        of = [
            (
                share.name,
                size(share.held),
                size(share.adapters(memory)) if share.adapter_fraction else "",
                size(share.most(memory)),
                "" if share.fraction is None else share.fraction,
            )
            for share in shares
        ]
        columns = ["model", "weights, workspace", "LoRA adapters", "KV cache, at most", "fraction"]
        out.table(f"{card}, {size(memory)}", columns, of)
    for name in made.unknown:
        out.warn(f"{name} has no build record, so it was not checked whether the models fit beside each other")
    repository = made.repository
    out.result(
        {
            "link": str(made.link),
            "repository": str(repository.path) if repository else None,
            "models": {name: member.link for name, member in made.members.items()},
            "memory": {card: {s.name: s.taken(m) for s in shares} for card, (m, shares) in made.cards.items()},
        }
    )
    if repository:
        out.text(f"repository {made.link}")
        out.text(f"next       builder serve {made.link}")


def run_rollback(arguments: argparse.Namespace, out: Output) -> int:
    """Moves the link back, or lists the versions."""
    from builder.core.store import Store
    from builder.publish import versions

    store, name = Store(arguments.output, out), Path(arguments.name).name  # a build's name may be a long one
    if arguments.list:
        now = versions.current(store.root, name)
        found = versions.read(store.root, name)
        if not found:
            raise UsageError(f"{name} has no versions.", hint="Name a link in OUTPUT/models.")
        rows = [(v.key, _when(v.since), _state(v, now, store.root)) for v in found]
        out.table(f"versions of {name}", ["version", "since", "state"], rows)
        out.result({"current": now, "versions": [{"key": v.key, "since": v.since} for v in found]})
        return 0
    had, version = versions.rollback(store, name, arguments.to)
    out.result({"link": str(store.root / "models" / name), "from": had, "to": version.key})
    out.text(f"models/{name} is version {version.key} again (it was {had})")
    out.text(f"back       builder rollback {name} --to {had}")
    return 0


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _state(version: Any, now: str | None, root: Path) -> str:
    return "current" if version.key == now else "" if version.repository(root).is_dir() else "removed"


def _added(text: str) -> tuple[Path, str]:
    place, _, model = text.rpartition("=") if "=" in text else (text, "", "")
    found = path(place)
    return found, model or found.absolute().name


def fraction_of(text: str) -> tuple[str, float]:
    """MODEL=X as --kv-fraction takes it."""
    model, _, number = text.rpartition("=")
    try:
        fraction = float(number)
    except ValueError:
        fraction = 0.0
    if not model or not 0 < fraction < 1:
        raise UsageError(f"--kv-fraction {text} is not MODEL=X with X between 0 and 1.", hint="--kv-fraction chat=0.45")
    return model, fraction


def _name(name: str) -> str:
    """A name in OUTPUT/models, also if its path was given."""
    from builder.triton.combined import check_names

    last = Path(name).name
    check_names({last: None})
    return last
