"""The recipes to try for a budget, cheapest first, with what each takes. No weight is read.

Cheaper means fewer bytes, of the checkpoint and of the KV cache of one sequence of max_seq_len tokens; of nearly equal
bytes (SAME) the format that the GPU profile prefers; then the way that takes less time to make. What the user named
in the recipe is not varied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

from builder.architectures.attention import cached_values
from builder.core.errors import UnsupportedError, UsageError
from builder.core.store import Store
from builder.formats import kv_cache, registry, schemes
from builder.formats.algorithms import ALGORITHMS, MAX
from builder.formats.assignment import to_keep
from builder.formats.schemes import SCHEMES
from builder.preflight.memory import Machine
from builder.preflight.prepare import Prepared, prepare
from builder.recipe import card_formats
from builder.recipe.algorithm import refusal
from builder.recipe.schema import Recipe, Resolved
from builder.recommend.request import named

# Bytes that differ by less count as equal: weights without a scale for inputs are smaller, but not by a share that
# anyone would notice.
SAME = 1.01
WEIGHTS_ALONE = "w4a16_{}"  # the name of a format that leaves the inputs of another one exact


@dataclass(frozen=True)
class Settings:
    """What varies between candidates. kept: linear layers in `kept_format`, beside those that the user keeps."""

    format: str
    algorithm: str
    cache: str
    rotates: bool = False
    kept: tuple[str, ...] = ()
    kept_format: str = ""

    def flags(self, base: Recipe) -> dict[str, Any]:
        """The values of the recipe, by dotted key. base: the recipe as the user gave it."""
        part = base.quantization
        kept = {"bf16": part.keep_bf16, "fp8": part.keep_fp8}
        whole = schemes.whole(self.format)
        if whole in (registry.FP8, registry.BF16) or whole.scales_inputs:
            kept["fp8"] = ()  # they are in FP8 anyway, or can't be
        if whole is registry.BF16:
            kept["bf16"] = ()
        if self.kept:
            kept[self.kept_format] = (*kept[self.kept_format], *self.kept)
        return {
            "quantization.format": self.format,
            "quantization.algorithm": self.algorithm,
            "quantization.kv_cache_dtype": self.cache,
            "quantization.keep_bf16": kept["bf16"],
            "quantization.keep_fp8": kept["fp8"],
            "transform.name": base.transform.name if self.rotates else "none",
        }


@dataclass(frozen=True)
class Candidate:
    """A recipe to try. searches: layers are to be kept in more bits until the budget is met; its bytes are then those
    without such layers. speed: the place of its format in the GPU profile's order."""

    settings: Settings
    resolved: Resolved
    prepared: Prepared = field(repr=False)
    speed: int
    searches: bool = False

    @cached_property
    def weights(self) -> int:
        """Bytes of the checkpoint in the layout that is served."""
        sizes = self.prepared.sizes
        return sizes.checkpoint if self.prepared.target.facts.has_engine else sizes.unified

    @cached_property
    def cache(self) -> int:
        """Bytes of the KV cache of one sequence of max_seq_len tokens."""
        recipe = self.prepared.recipe
        one_token = cached_values(self.prepared.model.config)
        return recipe.quantization.cache_format.nbytes(one_token * recipe.engine.max_seq_len)

    @property
    def nbytes(self) -> int:
        """What the budget of bytes counts."""
        return self.weights + self.cache

    @property
    def exact(self) -> bool:
        """Whether nothing is quantized, so that nothing is lost."""
        return self.prepared.recipe.quantization.as_it_is

    def seconds(self, host: Machine) -> float | None:
        """The estimated time to make the checkpoint here; None where there is no basis."""
        way = self.prepared.way(host)
        return way.taken.seconds if way else 0.0


@dataclass(frozen=True)
class Listed:
    """The candidates in the order to try them, and what can't be built, {label: why}."""

    candidates: tuple[Candidate, ...]
    impossible: Mapping[str, str]


def title(one: Settings, *, searches: bool = False) -> str:
    """A candidate in a few words: nvfp4 gptq, KV fp8, 12 layers in FP8."""
    words = one.format if one.algorithm == MAX.name else f"{one.format} {one.algorithm}"
    words += f", KV {one.cache}" + (", rotated" if one.rotates else "")
    if searches:
        return f"{words}, some layers in {to_keep(schemes.whole(one.format)).name.upper()}"
    kept = f"{len(one.kept)} layer{'s' * (len(one.kept) > 1)} in {one.kept_format.upper()}"
    return f"{words}, {kept}" if one.kept else words


def list_candidates(base: Resolved, store: Store) -> Listed:
    """All candidates for the user's recipe. Raises what `prepare` raises if none of them can be built."""
    found: list[Candidate] = []
    impossible: dict[str, str] = {}
    first: UsageError | UnsupportedError | None = None
    best = [choice.format for choice in base.gpu.best]
    for settings in _settings(base):
        try:
            resolved = base.changed(settings.flags(base.recipe))
            speed = best.index(settings.format) if settings.format in best else len(best)
            found.append(Candidate(settings, resolved, prepare(resolved, store), speed))
        except (UsageError, UnsupportedError) as error:
            impossible[title(settings)] = f"{error.what} {error.why}".strip()
            first = first or error
    if not found and first is not None:
        raise first
    return Listed(tuple(_in_order([*found, *_searching(found)])), impossible)


def with_kept(one: Candidate, base: Resolved, kept: Sequence[str], store: Store) -> Candidate:
    """The same with these linear layers in more bits. Raises what `prepare` raises."""
    name = to_keep(schemes.whole(one.settings.format)).name
    settings = replace(one.settings, kept=tuple(kept), kept_format=name)
    resolved = base.changed(settings.flags(base.recipe))
    return Candidate(settings, resolved, prepare(resolved, store), one.speed)


def _settings(base: Resolved) -> Iterator[Settings]:
    recipe, fixed = base.recipe, named(base)
    rotations = (False, True) if recipe.transform.rotates else (False,)
    for name, rotates in product(_formats(base, fixed), rotations):
        caches = [recipe.quantization.kv_cache_dtype]
        if "quantization.kv_cache_dtype" not in fixed:
            usual, _ = card_formats.default_cache(base.gpu, recipe.target, name)
            caches = list(dict.fromkeys([usual, kv_cache.AUTO.name]))
        for cache, algorithm in product(caches, _algorithms(name, recipe, fixed)):
            if not (rotates and name == registry.BF16.name):
                yield Settings(name, algorithm, cache, rotates)


def _formats(base: Resolved, fixed: set[str]) -> list[str]:
    """The formats that the GPU and the target serve: those that the profile prefers, the same for weights alone, FP8,
    BF16. Of these the user may have named one."""
    part, gpu = base.recipe.quantization, base.gpu
    if "quantization.format" in fixed:
        return [part.format]
    served = [one.name for one in card_formats.running(gpu, base.recipe.target, base.recipe.engine.tensorrt_llm)]
    wanted = [choice.format for choice in gpu.best]
    wanted += [WEIGHTS_ALONE.format(name) for name in wanted] + [registry.FP8.name, registry.BF16.name]
    return [name for name in dict.fromkeys(wanted) if name in served]


def _algorithms(name: str, recipe: Recipe, fixed: set[str]) -> list[str]:
    """The algorithms that can round this format's weights, the quickest first. Where the user named one, it alone, but
    `max` for formats that it does not treat."""
    scheme, rows = SCHEMES.get(name), not recipe.calibration.data_free
    quantized = scheme.formats if scheme else (registry.get(name),)
    known = [
        algorithm.name
        for algorithm in ALGORITHMS.values()
        if not refusal(algorithm.name, name, quantized) and (rows or not algorithm.reads_rows)
    ]
    if "quantization.algorithm" in fixed or any(key.startswith("quantization.gptq.") for key in fixed):
        asked = recipe.quantization.algorithm
        return [asked if asked in known else MAX.name]
    return known


def _searching(found: Sequence[Candidate]) -> list[Candidate]:
    """For each format, KV cache and rotation the last algorithm, with layers to be kept in more bits."""
    last = {(one.settings.format, one.settings.cache, one.settings.rotates): one for one in found}
    return [replace(one, searches=True) for one in last.values() if one.settings.format != registry.BF16.name]


def _in_order(found: Sequence[Candidate]) -> list[Candidate]:
    """Cheapest first. A candidate that searches comes after all of about its bytes, because it will have more."""
    by_bytes = sorted(found, key=lambda one: one.nbytes)
    least, place, places = 0, 0, {}
    for one in by_bytes:
        if one.nbytes > SAME * least:
            least, place = one.nbytes, place + 1
        places[id(one)] = place
    names = list(ALGORITHMS)

    def key(one: Candidate) -> tuple[int, bool, int, bool, int]:
        made_by = names.index(one.settings.algorithm)
        return places[id(one)], one.searches, one.speed, one.settings.rotates, made_by

    return sorted(by_bytes, key=key)
