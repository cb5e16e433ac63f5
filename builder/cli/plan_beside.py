"""`builder plan --with`: several models on one GPU, before any of them is built."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builder.cli import combine
from builder.cli.options import path, with_same_recipe
from builder.core.errors import UnsupportedError, UsageError
from builder.core.output import Output, size
from builder.core.store import Store

if TYPE_CHECKING:
    from builder.plan import Plan
    from builder.publish.planned import Neighbour, Split
    from builder.recipe.schema import Resolved

RECIPES = (".yaml", ".yml")


@dataclass(frozen=True)
class Planned:
    """A model that is not built: its name for clients, its plan, the command that builds it, and its link then."""

    name: str
    found: Plan
    build: Sequence[str]
    link: str


@dataclass(frozen=True)
class Asked:
    """The models of a plan, and how `builder combine` takes them: the repository's name, and its --add options."""

    plans: Sequence[Planned]
    neighbours: Sequence[Neighbour]
    repository: str
    adds: Sequence[str]


def add(command: argparse.ArgumentParser) -> None:
    """Adds the options that name other models."""
    group = command.add_argument_group("several models on one GPU")
    group.add_argument("--with", metavar="WHAT[=MODEL]", dest="beside", action="append", default=[],
                       help="a model beside this one: a recipe file or a built repository; repeatable")  # fmt: skip
    group.add_argument("--as", metavar="MODEL", dest="model_as", help="this model's name for clients")
    group.add_argument("--kv-fraction", metavar="MODEL=X", action="append", default=[],
                       help="part of the GPU's free memory for its KV cache; repeatable")  # fmt: skip


def check(arguments: argparse.Namespace) -> None:
    """UsageError for options that have no effect alone."""
    for option, value in (("--as", arguments.model_as), ("--kv-fraction", arguments.kv_fraction)):
        if value and not arguments.beside:
            raise UsageError(f"{option} has no effect without --with.", hint="--with code.yaml, or leave it out.")


def check_add(arguments: argparse.Namespace, resolved: Resolved, root: Path) -> None:
    """UnsupportedError, before a build, if `builder render --add` could not add its model because it would not fit."""
    from builder.preflight.prepare import prepare
    from builder.publish import links, planned

    store, name = Store(root, Output("quiet"), dry=True), getattr(arguments, "add", None)
    link = root / "models" / Path(name or "").name
    if not name or not link.is_symlink():
        return
    model = links.link(resolved, root / "repository" / "none", store).name
    planned.check_add(link, arguments.model_as or model, prepare(resolved, store), store)


def run(first: Plan, arguments: argparse.Namespace, out: Output) -> None:
    """Prints the plan, those of the other models in short, and how the card is divided.

    UnsupportedError if a model does not fit, alone or beside the others.
    """
    from builder.cli import plan_view
    from builder.publish import planned

    asked = _asked(first, arguments)
    cards = planned.profile_cards(first.prepared, first.memory)
    if first.memory.card not in cards:
        raise UsageError(
            f"The memory of {first.resolved.gpu.title} is not known, so it can't be divided.",
            hint="Name the card: --gpu 'RTX 5090' (`builder gpus` lists them).",
        )
    fractions = dict(combine.fraction_of(text) for text in arguments.kv_fraction)
    divided = planned.split(cards, first.memory.card, asked.neighbours, fractions)
    plan_view.show(first, out, complete=arguments.all, beside=_as_object(divided))
    for one in asked.plans[1:]:
        plan_view.show_decisions(one.found, out)
    _show(divided, out)
    _check(divided, asked.plans)
    _show_next(divided, asked, str(arguments.output), out)


def _asked(first: Plan, arguments: argparse.Namespace) -> Asked:
    """What the options name. UsageError for a file or a repository that is none."""
    from builder.publish import planned
    from builder.triton.repository import open_repository

    store = Store(arguments.output, Output("quiet"), dry=True)
    build = with_same_recipe("build", arguments)
    plans = [Planned(arguments.model_as or _link(first, store), first, build, _link(first, store))]
    built: list[Neighbour] = []
    adds, combined = [], []
    for text in arguments.beside:
        what, name = _named(text)
        if what.is_file() or what.suffix in RECIPES:
            found = _other(what, first, store)
            link = _link(found, store)
            plans.append(Planned(name or link, found, _build(what, found, arguments), link))
        else:
            built += planned.built(what, store, name)
            several = "" not in open_repository(what).members
            combined += [what.name] if several else []
            adds += [] if several else [f"{what}={name or what.name}"]
    if len(combined) > 1:
        raise UsageError(
            f"{' and '.join(combined)} are repositories of several models.",
            why="A model is added to one of them.",
            hint="Name one, and the repositories of the other models.",
        )
    neighbours = [*(planned.planned(one.name, one.found.prepared) for one in plans), *built]
    adds = [*(f"{store.root / 'models' / one.link}={one.name}" for one in plans), *adds]
    return Asked(plans, neighbours, combined[0] if combined else "NAME", adds)


def _named(text: str) -> tuple[Path, str]:
    place, _, model = text.rpartition("=") if "=" in text else (text, "", "")
    return path(place), model


def _other(file: Path, first: Plan, store: Store) -> Plan:
    """The plan of another recipe for the server of the first one."""
    from builder import plan
    from builder.recipe import schema, sources

    own = sources.flatten(sources.load_yaml(file))
    if "model.id" not in own:
        raise UsageError(f"{file} names no model.", hint="Add to it: model: {id: Qwen/Qwen3-8B}, or a local directory.")
    card = first.resolved.gpu.card
    of_first = {
        "gpu": card.name if card else first.resolved.gpu.name,
        "target": first.resolved.recipe.target,
        "engine.tensorrt_llm": first.resolved.recipe.engine.tensorrt_llm,
    }
    flags = {key: value for key, value in of_first.items() if key not in own}
    resolved = schema.resolve(flags, recipe_file=file)
    _check_card(resolved, first.resolved, file)
    return plan.plan(resolved, store)


def _check_card(resolved: Resolved, first: Resolved, file: Path) -> None:
    if (resolved.gpu.name, resolved.gpu.card) != (first.gpu.name, first.gpu.card):
        raise UsageError(
            f"{file} is for another GPU: {_gpu(resolved)}, and the first model for {_gpu(first)}.",
            why="They are to share one.",
            hint="Leave `gpu` out of that file, or name the same.",
        )


def _gpu(resolved: Resolved) -> str:
    return resolved.gpu.card.name if resolved.gpu.card else resolved.gpu.name


def _build(file: Path, found: Plan, arguments: argparse.Namespace) -> list[str]:
    """The command that builds it: with what its file does not say and the first recipe does."""
    words = ["builder", "build", "--recipe", str(file)]
    origins = found.resolved.origins
    said = {"gpu": _gpu(found.resolved), "target": found.resolved.recipe.target}
    for key, value in said.items():
        words += [f"--{key}", value] if origins.get(key) == "command line" else []
    if origins.get("engine.tensorrt_llm") == "command line":
        words += ["--set", f"engine.tensorrt_llm={found.resolved.recipe.engine.tensorrt_llm}"]
    return [*words, "--output", str(arguments.output)]


def _link(found: Plan, store: Store) -> str:
    """The name in OUTPUT/models that its build will have."""
    from builder.publish import links

    return links.link(found.resolved, store.root / "repository" / "none", store).name


def _show(divided: Split, out: Output) -> None:
    columns = ["model", "weights", "workspace", "LoRA adapters", "KV cache", "one sequence", "fraction", "from"]
    rows = []
    for one in divided.neighbours:
        share, memory = one.share, divided.memory
        adapters = size(share.adapters(memory)) if share.adapter_fraction else ""
        least, most = divided.least(share), share.most(memory)
        cache = size(most) if least == most else f"{size(least)} to {size(most)}"
        fraction = "" if share.fraction is None else f"{share.fraction:g}"
        rows.append(
            (one.name, size(share.weights), size(share.workspace), adapters, cache, size(share.sequence), fraction,
             one.origin)
        )  # fmt: skip
    out.table(f"beside each other on {divided.card}, {size(divided.memory)}", columns, rows)
    if divided.refusal is None:
        out.text(f"left       {size(divided.left)}, if each KV cache is as large as it may be")


def _check(divided: Split, plans: Sequence[Planned]) -> None:
    from builder.preflight import suggestions

    for one in plans:
        if error := one.found.refusal:
            raise UnsupportedError(f"{one.name}: {error.what}", why=error.why, hint=error.hint)
    if divided.refusal:
        raise divided.refusal
    missing = {one.name: one.found.missing for one in plans}
    if refusal := suggestions.disk_refusal(missing, plans[0].found.host, sum(missing.values())):
        raise refusal


def _show_next(divided: Split, asked: Asked, output: str, out: Output) -> None:
    """The commands that build the models, if this machine can, and combine them."""
    blocked = any(one.found.blocked for one in asked.plans)
    for number, one in enumerate([] if blocked else asked.plans):
        out.text(f"{'then' if number else 'next':<10} {shlex.join(one.build)}")
    words = ["builder", "combine", asked.repository, *(word for add in asked.adds for word in ("--add", add))]
    for neighbour in divided.neighbours:
        share = neighbour.share
        words += ["--kv-fraction", f"{share.name}={share.fraction:g}"] if neighbour.changed else []
    out.text(f"{'then':<10} {shlex.join([*words, '--output', output])}")


def _as_object(divided: Split) -> dict[str, Any]:
    memory = divided.memory
    models = [
        {
            "model": one.name,
            "weights": one.share.weights,
            "workspace": one.share.workspace,
            "adapters": one.share.adapters(memory),
            "kv_cache": {"least": divided.least(one.share), "most": one.share.most(memory)},
            "sequence": one.share.sequence,
            "fraction": one.share.fraction,
            "from": one.origin,
        }
        for one in divided.neighbours
    ]
    refusal = divided.refusal
    return {
        "card": divided.card,
        "memory": memory,
        "models": models,
        "left": divided.left,
        "fits": refusal is None,
        "refusal": refusal.what if refusal else None,
    }
