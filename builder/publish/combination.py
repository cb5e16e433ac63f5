"""models/<name> for a repository of several models: which ones it has, whether they fit, and the link to it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from builder.core.errors import UsageError
from builder.core.store import Store, root_of
from builder.preflight import beside
from builder.preflight.beside import Share
from builder.publish import links, verdict, versions
from builder.recipe.target_facts import target_facts
from builder.triton import combined
from builder.triton.combined import Member
from builder.triton.repository import Repository, open_repository


@dataclass(frozen=True)
class Change:
    """What to change in a repository of several models.

    add: {model: a repository, by its directory or link}. update: models to take again from the links that they came
    from. remove: models. fractions: {model: kv_cache_free_gpu_mem_fraction}. ungated: also models that failed a check.
    """

    add: Mapping[str, Path] = field(default_factory=dict)
    update: Sequence[str] = ()
    remove: Sequence[str] = ()
    fractions: Mapping[str, float] = field(default_factory=dict)
    ungated: bool = False


@dataclass(frozen=True)
class Combination:
    """The models of a combined repository after a change, and what each takes: {card: (bytes, shares)}. repository is
    None in a dry run."""

    link: Path
    members: Mapping[str, Member]
    cards: Mapping[str, tuple[int, Sequence[Share]]]
    unknown: tuple[str, ...]  # models whose memory is not known
    repository: Repository | None


def change(name: str, asked: Change, *, store: Store) -> Combination:
    """Renders the repository with the change and moves models/NAME to it. Nothing is changed if it raises.

    UsageError for a name that is taken or unknown, UnsupportedError for models that can't share a server or a card,
    EvaluationError for one that failed its quality check.
    """
    link = store.root / links.MODELS / name
    with store.locked("combine", name):
        members = _changed(link, members_of(link), asked, store)
        combined.check_names(members)
        combined.check_compatible({model: member.repository for model, member in members.items()})
        cards, unknown = _cards(store.root, members)
        beside.check(cards)
        if store.dry:
            return Combination(link, members, cards, unknown, None)
        made = combined.combine(members, store=store)
        with store.locked("publish", "models"):
            members_of(link)  # a build may have taken the name meanwhile
            versions.remember(store.root, link, made.path)
            links.move(link, made.path)
    return Combination(link, members, cards, unknown, made)


def check_beside(repositories: Mapping[str, Path]) -> None:
    """UnsupportedError if the repositories (by what to call them) do not fit on one card at the same time."""
    members, root = {}, Path()
    for name, path in repositories.items():
        opened = open_repository(path)
        root = opened.path.parents[1]
        if "" in opened.members:
            members[name] = Member(opened, path.name)
        else:
            members |= {f"{name} {model}": member for model, member in members_of(opened.path).items()}
    hint = (
        "Stop `builder serve` and start it again, or leave room for both: build with a smaller "
        "repository.kv_cache_free_gpu_mem_fraction."
    )
    beside.check(_cards(root, members)[0], hint)


def members_of(link: Path) -> dict[str, Member]:
    """The models of a combined repository; none if there is no such link. UsageError if something else has the name."""
    if not os.path.lexists(link):
        return {}
    found = open_repository(link)
    if "" in found.members:
        raise UsageError(
            f"{link} serves one model of its own.",
            why="A repository of several models has another name.",
            hint=f"builder combine NAME --add {link} --add OTHER",
        )
    root = found.path.parents[1]
    return {
        name: Member(open_repository(root / "repository" / facts["repository"]), facts["link"], facts["fraction"])
        for name, facts in found.members.items()
    }


def check_free(name: str, model: str, members: Mapping[str, Member]) -> None:
    """UsageError if the repository already has a model of this name."""
    if model in members:
        link = members[model].link
        raise UsageError(
            f"{name} already has a model {model!r}.",
            why=f"Clients choose a model by its name. It came from models/{link}.",
            hint=f"Add it by another name, or take the new version of models/{link}: "
            f"builder combine {name} --update {model}",
        )


def _changed(link: Path, members: Mapping[str, Member], asked: Change, store: Store) -> dict[str, Member]:
    found = dict(members)
    for model in (*asked.remove, *asked.update):
        if model not in found:
            raise UsageError(
                f"{link.name} has no model {model!r}.",
                why=f"It has {', '.join(found) or 'none'}.",
                hint=f"Add it: builder combine {link.name} --add REPOSITORY={model}",
            )
    for model in asked.remove:
        del found[model]
    for model in asked.update:
        newest = opened(store.root / links.MODELS / found[model].link, store, ungated=asked.ungated)
        found[model] = replace(found[model], repository=newest)
    for model, path in asked.add.items():
        check_free(link.name, model, found)
        found[model] = Member(opened(path, store, ungated=asked.ungated), path.name)
    for model, fraction in asked.fractions.items():
        if model not in found:
            raise UsageError(f"--kv-fraction: there is no model {model!r}.", hint=f"Models: {', '.join(found)}.")
        found[model] = replace(found[model], fraction=fraction)
    if not found:
        raise UsageError(f"{link.name} would have no model.", hint=f"To remove it: builder clean {link.name}")
    return found


def opened(path: Path, store: Store, *, ungated: bool = False) -> Repository:
    """A repository of one model in this store, which passed its checks, if it must (`ungated`)."""
    found = open_repository(path)
    if "" not in found.members:
        raise UsageError(
            f"{path} has several models itself: {', '.join(found.members)}.", hint="Add the repository of each."
        )
    if root_of(found.path) != store.root:
        raise UsageError(
            f"{path} is not in {store.root}.",
            why="A repository of several models refers to engines of its own output directory.",
            hint="Name the output directory: --output DIR",
        )
    if not ungated:
        verdict.check(path)
    return found


def _cards(root: Path, members: Mapping[str, Member]) -> tuple[dict[str, tuple[int, Sequence[Share]]], tuple[str, ...]]:
    """What each model takes of each card that all of them name in their build records; and models without a record."""
    shares: dict[str, dict[str, tuple[int, Share]]] = {}
    for name, member in members.items():
        record = versions.record(root, member.repository.path)
        if record is not None:
            shares[name] = {card["card"]: (card["memory"], share(name, member, card)) for card in record["memory"]}
    common = set.intersection(*(set(cards) for cards in shares.values())) if shares else set()
    first = next(iter(shares.values()), {})
    cards: dict[str, tuple[int, Sequence[Share]]] = {
        card: (first[card][0], [of[card][1] for of in shares.values()]) for card in common
    }
    return cards, tuple(name for name in members if name not in shares)


def share(name: str, member: Member, card: Mapping[str, Any]) -> Share:
    """What a member takes of a card, by this card's entry in its build record."""
    held = {"weights": card["weights"], "workspace": card["workspace"]}
    # Older records have only what is needed for one sequence, of which the cache gets a fraction.
    sequence = card.get("sequence", card["needed"] - card["weights"] - card["workspace"])
    if not target_facts(member.repository.facts["target"]).needs_gpu:
        return Share(name, sequence=sequence, fraction=None, **held)
    adapter_fraction, adapter = combined.adapters_of(member)
    fraction = combined.fraction_of(member)
    return Share(name, sequence=sequence, fraction=fraction, adapter_fraction=adapter_fraction, adapter=adapter, **held)
