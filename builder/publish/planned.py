"""Models that are to be served by one server, before they are built: whether they fit on its card, and how their KV
caches divide the memory that the weights leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from builder.core.errors import UnsupportedError, UsageError
from builder.core.store import Store
from builder.preflight import beside, suggestions
from builder.preflight import memory as preflight_memory
from builder.preflight.beside import Share
from builder.preflight.memory import Machine, Serving
from builder.preflight.model_facts import ModelFacts
from builder.preflight.prepare import Prepared
from builder.preflight.suggestions import Change, MemoryCheck
from builder.publish import versions
from builder.publish.combination import members_of, opened, share
from builder.triton import combined
from builder.triton.combined import Kind, Member
from builder.triton.repository import open_repository

FRACTION = "repository.kv_cache_free_gpu_mem_fraction"
ROOM = tuple(
    n / 20 for n in range(20, 9, -1)
)  # of what the others leave, for a change that fits whichever is loaded first


@dataclass(frozen=True)
class Neighbour:
    """A model that shares the card. origin: where its fraction comes from; fixed: someone chose it. prepared: its
    recipe, if it is not built. changed: the fraction is not that of its repository."""

    share: Share
    kind: Kind
    origin: str
    fixed: bool = False
    prepared: Prepared | None = None
    changed: bool = False

    @property
    def name(self) -> str:
        """What clients call it."""
        return self.share.name


@dataclass(frozen=True)
class Split:
    """How a card of `memory` bytes is divided. refusal: why the models do not fit."""

    card: str
    memory: int
    neighbours: tuple[Neighbour, ...]
    refusal: UnsupportedError | None = None

    @property
    def shares(self) -> list[Share]:
        """What each takes."""
        return [one.share for one in self.neighbours]

    @property
    def left(self) -> int:
        """Bytes that are left if each takes all that it may."""
        return self.memory - sum(one.taken(self.memory) for one in self.shares)

    def least(self, one: Share) -> int:
        """The KV cache of a model that is loaded last."""
        others = sum(other.taken(self.memory) for other in self.shares if other is not one)
        return max(0, min(one.most(self.memory), one.least(self.memory, others)))


def planned(name: str, prepared: Prepared) -> Neighbour:
    """A model that is to be built."""
    recipe, facts = prepared.recipe, prepared.target.facts
    sm = prepared.resolved.gpu.sm if facts.builds_tensorrt else None
    kind = Kind(recipe.target, recipe.engine.tensorrt_llm, recipe.engine.world_size, sm)
    origin = prepared.resolved.origins.get(FRACTION, "default") if facts.needs_gpu else ""
    taken = _share(name, prepared.model, prepared.serving)
    return Neighbour(taken, kind, origin, facts.needs_gpu and origin != "default", prepared)


def _share(name: str, model: ModelFacts, asked: Serving) -> Share:
    found = preflight_memory.memory(model, asked, "", 0)
    return Share(
        name,
        found.weights,
        found.sequence,
        float(asked.fraction) if asked.facts.needs_gpu else None,
        float(asked.adapter_fraction),
        asked.adapter,
        found.workspace,
    )


def built(path: Path, store: Store, name: str = "") -> list[Neighbour]:
    """The models of a repository in the store. name: for a repository of one model; by default that of its link."""
    if "" in open_repository(path).members:
        return [_built(name or path.name, Member(opened(path, store), path.name), store)]
    if name:
        raise UsageError(f"{path} has several models, which have names.", hint=f"Leave ={name} out.")
    return [_built(model, member, store) for model, member in members_of(path).items()]


def _built(name: str, member: Member, store: Store) -> Neighbour:
    record = versions.record(store.root, member.repository.path)
    if not record or not record.get("memory"):
        raise UsageError(
            f"What {name} takes is not known: there is no build record of it with the memory of a card.",
            why=f"{member.repository.path} was built by an older version, or for a card of unknown memory.",
            hint="Build it again; every finished stage is reused.",
        )
    taken = share(name, member, record["memory"][0])  # only the cards' own sizes differ
    fixed = member.fraction is not None
    origin = "" if taken.fraction is None else "builder combine" if fixed else "its build"
    return Neighbour(taken, combined.kind_of(member.repository), origin, fixed)


def profile_cards(prepared: Prepared, found: MemoryCheck) -> dict[str, int]:
    """{card: bytes}: those of the verdict, and if one was named the others of its profile."""
    gpu, host = replace(prepared.resolved.gpu, card=None), Machine(0, 0, 0)
    others = preflight_memory.cards(prepared.serving, gpu, host)[0] if prepared.target.facts.needs_gpu else []
    return {**dict(others), **{one.card: one.memory for one in found.cards}}


def split(
    cards: Mapping[str, int], card: str, neighbours: Sequence[Neighbour], fractions: Mapping[str, float] | None = None
) -> Split:
    """Divides a card among models: with these fractions and those that they have or, if they do not fit so, with others
    for the models whose fraction nobody chose. cards: {card: bytes}, also of others that might be suggested.

    UsageError for a name that is used twice or unknown, UnsupportedError for models that one server can't serve.
    """
    check_together(neighbours)
    if unknown := [name for name in fractions or {} if name not in [one.name for one in neighbours]]:
        known = ", ".join(one.name for one in neighbours)
        raise UsageError(f"--kv-fraction: there is no model {unknown[0]!r}.", hint=f"Models: {known}.")
    found = Split(card, cards[card], tuple(_given(one, fractions or {}) for one in neighbours))
    if not beside.problem(found.memory, found.shares):
        return found
    fixed = [one.name for one in found.neighbours if one.fixed]
    if better := beside.suggested(found.memory, found.shares, fixed):
        return replace(found, neighbours=tuple(_divided(one, better[one.name]) for one in found.neighbours))
    refusal = beside.refusal(card, found.memory, found.shares, _hint(found, cards))
    return replace(found, refusal=refusal)


def check_add(link: Path, name: str, prepared: Prepared, store: Store) -> None:
    """UnsupportedError if a model that is to be built could not be added to the repository of this link.

    As `builder combine` checks it then: a model without a build record is left out, and a card that fits is enough.
    """
    members = {model: member for model, member in members_of(link).items() if model != name}
    records = {model: versions.record(store.root, member.repository.path) for model, member in members.items()}
    known = [model for model, record in records.items() if record and record.get("memory")]
    neighbours = [planned(name, prepared), *(_built(model, members[model], store) for model in known)]
    check_together(neighbours)
    shares, host = [one.share for one in neighbours], preflight_memory.machine(store.root)
    found = suggestions.judge(prepared.model, prepared.serving, prepared.resolved.gpu, host).cards
    of_records = [{card["card"] for card in (records[model] or {})["memory"]} for model in known]
    cards = {one.card: one.memory for one in found if all(one.card in names for names in of_records)}
    if not cards or any(not beside.problem(memory, shares) for memory in cards.values()):
        return
    card, memory = max(cards.items(), key=lambda item: item[1])
    hint = "Serve it on another card, or build it with a smaller --max-seq-len, --max-batch-size or --format."
    if better := beside.suggested(memory, shares):
        own = better.pop(name)
        hint = f"Divide the memory: builder combine {link.name} {beside.typed(better)}, then --set {FRACTION}={own:g}"
    raise beside.refusal(card, memory, shares, hint)


def check_together(neighbours: Sequence[Neighbour]) -> None:
    """UsageError for two models of one name, UnsupportedError for models that one server can't serve."""
    kinds: dict[str, Kind] = {}
    for one in neighbours:
        if one.name in kinds:
            raise UsageError(
                f"Two of the models are called {one.name}.",
                why="Clients choose a model by its name.",
                hint="Name them: --as MODEL for the first, --with WHAT=MODEL for the others.",
            )
        kinds[one.name] = one.kind
    combined.check_names(kinds)
    combined.check_kinds(kinds)


def _given(one: Neighbour, fractions: Mapping[str, float]) -> Neighbour:
    if one.name not in fractions:
        return one
    if one.share.fraction is None:
        raise UsageError(f"--kv-fraction has no effect on {one.name}: a CPU has no fraction.", hint="Leave it out.")
    return replace(_with(one, fractions[one.name], "--kv-fraction"), fixed=True)


def _divided(one: Neighbour, fraction: float) -> Neighbour:
    return one if fraction == one.share.fraction else _with(one, fraction, "so that all fit")


def _with(one: Neighbour, fraction: float, origin: str) -> Neighbour:
    return replace(one, share=replace(one.share, fraction=fraction), origin=origin, changed=True)


def _hint(found: Split, cards: Mapping[str, int]) -> str:
    """What to type next for models that do not fit: other fractions, a smaller model, or another card."""
    if better := beside.suggested(found.memory, found.shares):
        return f"With other fractions they fit: {beside.typed(better)}"
    hints = []
    if change := _smallest(found):
        hints.append(f"The smallest change of {change[0]} with which they fit: {' '.join(change[1].flags)}")
    if larger := [card for card, memory in cards.items() if _fits(found.shares, memory)]:
        hints.append(f"On another card of the profile they fit as they are: {', '.join(larger)}")
    return ". ".join(hints) or "Serve them on a card each."


def _fits(shares: Sequence[Share], memory: int) -> bool:
    return not beside.problem(memory, shares) or bool(beside.suggested(memory, shares))


def _smallest(found: Split) -> tuple[str, Change] | None:
    """The model and the change of its recipe with which all fit; the largest model is tried first."""
    for one in sorted(found.neighbours, key=lambda one: -one.share.held):
        others = [other.share for other in found.neighbours if other is not one]
        left = found.memory - sum(other.held + other.sequence for other in others)
        for part in ROOM if one.prepared and left > 0 else ():
            change = _change(one, int(part * left))
            if change and _fits([*others, _share(one.name, change.model, change.serving)], found.memory):
                return one.name, change
    return None


def _change(one: Neighbour, available: int) -> Change | None:
    """The smallest change of a recipe that fits into `available` bytes of one GPU."""
    assert one.prepared is not None
    asked = one.prepared.serving
    runs = suggestions.smaller(asked, one.prepared.resolved.gpu)
    change = suggestions.smallest(one.prepared.model, asked, available, runs)
    return change if change and change.serving.tp * change.serving.pp == 1 else None
