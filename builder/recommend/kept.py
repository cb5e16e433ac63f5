"""Which layers of a candidate to keep in more bits: the search's two checkpoints, groups, and their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from builder.architectures import names
from builder.core.errors import UnsupportedError
from builder.core.store import Store
from builder.evaluate.mixtures import stage as mixtures
from builder.evaluate.mixtures.stage import Chosen, Pair
from builder.evaluate.sensitivity.stage import weight_errors
from builder.evaluate.variants import Models
from builder.formats.algorithms import MAX
from builder.formats.assignment import to_keep
from builder.formats.base import NumberFormat
from builder.formats.registry import BF16
from builder.pipeline import run_stages
from builder.preflight.model_facts import ModelFacts
from builder.preflight.prepare import prepare
from builder.quantize import exclude
from builder.recipe.schema import Resolved
from builder.recommend.candidates import Candidate, with_kept


@dataclass
class KeptSearch:
    """A candidate that keeps layers. groups: {group: its linear layers} that may be kept; prices: the bytes that each
    adds; order: the groups that fit into the bytes left, those first that win most per byte."""

    base: Candidate
    user: Resolved
    models: Models
    groups: Mapping[str, Sequence[str]]
    prices: Mapping[str, int]
    room: int | None
    store: Store
    order: list[str] = field(default_factory=list)

    def by_mixtures(self, limits: Mapping[str, float]) -> Chosen:
        """As few groups as meet the limits, measured without building any mixture. NotMixed where that can't be, and
        `order` is then by the errors of the weights alone."""
        recipe = self.base.prepared.recipe
        try:
            pair = self._pair()
            self._take(mixtures.rank(self.models, pair, recipe, store=self.store))
            return mixtures.choose(self.models, pair, recipe, limits, self.order, store=self.store)
        except mixtures.NotMixed:
            model = self.models.transformed or self.models.snapshot
            worst = weight_errors(model, self.base.prepared.model, self.store).losses
            won = {
                loss.name: loss.weight_error**2 / self.prices[loss.name] for loss in worst if loss.name in self.groups
            }
            self._take(sorted(won, key=lambda group: -won[group]))
            raise

    def candidate(self, number: int) -> Candidate:
        """The recipe that keeps the first groups of the order."""
        kept = [module for group in self.order[:number] for module in self.groups[group]]
        return with_kept(self.base, self.user, kept, self.store)

    def _take(self, order: Sequence[str]) -> None:
        """The order as far as there is room; at least one group must be left to quantize. UnsupportedError if not even
        one may be kept."""
        self.order, left = [], self.room
        for group in order[: len(self.groups) - 1]:
            left = None if left is None else left - self.prices[group]
            if left is not None and left < 0:
                break
            self.order.append(group)
        if not self.order:
            raise UnsupportedError("No layer can be kept in more bits.", why="Too few bytes are left.")

    def _pair(self) -> Pair:
        """Both checkpoints, built where they are not in the store."""
        assert self.models.checkpoint is not None
        one = to_keep(self.base.prepared.model.number_format)
        if one is BF16:
            return Pair(self.models.checkpoint, None, self.groups, self.prices)
        settings = replace(self.base.settings, format=one.name, algorithm=MAX.name)
        resolved = self.user.changed(settings.flags(self.user.recipe))
        other = run_stages(prepare(resolved, self.store), self.store, "checkpoint").checkpoint
        return Pair(self.models.checkpoint, other, self.groups, self.prices)


def open_search(one: Candidate, user: Resolved, most: int | None, *, store: Store) -> KeptSearch:
    """Builds the candidate without kept layers. UnsupportedError if none may be kept. most: bytes, None for any."""
    model, kept = one.prepared.model, to_keep(one.prepared.model.number_format)
    groups = _groups(one, model, kept)
    if len(groups) < 2:
        raise UnsupportedError("No layer can be kept in more bits.", why="There is one group of layers or none.")
    prices = {group: sum(_price(model, name, kept) for name in modules) for group, modules in groups.items()}
    models = run_stages(one.prepared, store, "checkpoint").models
    return KeptSearch(one, user, models, groups, prices, None if most is None else most - one.nbytes, store)


def _groups(one: Candidate, model: ModelFacts, kept: NumberFormat) -> dict[str, tuple[str, ...]]:
    """The groups of layers in the model's own format that the target loads in the other."""
    known = exclude.linears(model.written, model.architecture)
    found = exclude.groups((name for name in known if name not in model.single), model.architecture)
    if one.prepared.target.why_output_is_quantized(one.prepared.settings, kept.name):
        found = {group: names_ for group, names_ in found.items() if names.role(model.architecture, group) != "o"}
    return found


def _price(model: ModelFacts, name: str, kept: NumberFormat) -> int:
    """Bytes that a layer takes more, without the scales that both formats have."""
    shape = model.written[f"{name}.weight"][1]
    return kept.own_bytes(shape) - model.number_format.own_bytes(shape)
