"""What follows from recipe, GPU profile, config.json, tensor headers and probe answers: computed once per command.

Nothing here reads a weight. A build prepares before it downloads, and a plan prepares the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from builder.checkpoint import requested_layouts
from builder.core.errors import UnsupportedError
from builder.core.output import seconds, size
from builder.core.store import STAGES, Store
from builder.formats.assignment import Layers
from builder.formats.registry import BF16, FP8
from builder.hub.snapshot import Source, open_source
from builder.llmapi import lora as llmapi_lora
from builder.lora import model_checks
from builder.lora.adapter import Adapter
from builder.lora.source import open_adapters
from builder.model import multimodal
from builder.preflight import adapter_memory, advice, checks, memory, quantized, suggestions, ways
from builder.preflight.learning import Learning, learning
from builder.preflight.memory import Machine, Serving, Sizes
from builder.preflight.model_facts import ModelFacts
from builder.preflight.quantized import NO_ORIGINAL, Quantized
from builder.preflight.ways import Choice
from builder.quantize import exclude, pseudo_names
from builder.quantize.modelopt import gpus
from builder.recipe.schema import Calibration, Recipe, Resolved
from builder.recipe.target_facts import LLMAPI
from builder.targets import target
from builder.targets.base import Inputs, Settings, Stages, Target
from builder.transform.stage import expected
from builder.trtllm import probe_store
from builder.trtllm.rules import Note

NOTHING_QUANTIZED = "nothing is quantized"


@dataclass(frozen=True)
class Prepared:
    """A recipe with everything that follows from it and its model.

    source: the model's config.json and tensor headers. model: the same as it is quantized, so transformed if the recipe
    says so, with the layers that are in another format.
    settings: trtllm-build's flags or the LLM class's arguments, each with its reason. quantized: what the model is if
    it is quantized already; its formats are then in the recipe, and `model` is what it was before. zero_layers: linear
    layers whose weights are all zero, once the weights are there.
    """

    inputs: Inputs
    source: Source
    settings: Settings
    model: ModelFacts
    quantized: Quantized | None = None
    zero_layers: tuple[str, ...] = ()

    @property
    def resolved(self) -> Resolved:
        """The recipe with its GPU profile and the origin of each value."""
        return self.inputs.resolved

    @property
    def recipe(self) -> Recipe:
        """The recipe."""
        return self.inputs.resolved.recipe

    @property
    def target(self) -> Target:
        """What will serve the checkpoint."""
        return target(self.recipe.target)

    @cached_property
    def serving(self) -> Serving:
        """What memory at run time depends on."""
        found = replace(memory.serving(self.recipe, self.settings), fixed_formats=self.quantized is not None)
        return adapter_memory.serving(found, self.inputs, self.settings)

    @cached_property
    def sizes(self) -> Sizes:
        """Bytes to download, to keep and to hold while calibrating."""
        found = checks.sizes(self.recipe, self.model, self.serving)
        if self.recipe.transform.rotates:
            found = found.transformed(checks.sizes(self.recipe, checks.facts_of(self.source), self.serving))
        if self.recipe.quantization.as_it_is or self.data_free:
            return replace(found, calibration_memory=0)
        return found if self.quantized is None else self.quantized.sizes(found)

    @property
    def calibration(self) -> Calibration | None:
        """How the model, or only its scales, is calibrated; None if nothing is."""
        part = self.recipe.calibration
        needed = part.scales if self.quantized else not (self.recipe.quantization.as_it_is or part.data_free)
        return part if needed else None

    @property
    def data_free(self) -> bool:
        """Whether the model is quantized without calibration rows."""
        nothing = self.quantized is not None or self.recipe.quantization.as_it_is
        return self.recipe.calibration.data_free and not nothing

    def way(self, host: Machine) -> Choice | None:
        """How this machine quantizes the model or calibrates scales of a quantized one; None if it does neither."""
        if self.calibration is None and not self.data_free:
            return None
        if host not in self._ways:
            scales = self.quantized is not None
            self._ways[host] = ways.choose(self.recipe, self.model, ways.device(host), scales=scales)
        return self._ways[host]

    @cached_property
    def _ways(self) -> dict[Machine, Choice]:
        """Those that were asked for: for a mixture of many experts each takes a while."""
        return {}

    def learning(self, host: Machine) -> Learning | None:
        """What learning its rotations takes on this machine; None if none are learned."""
        return learning(self.recipe, self.model, ways.device(host))

    @property
    def why_not_checked(self) -> str:
        """Why there is no quality check of this build; "" if there is one, unless a gate replaces it."""
        if self.recipe.quantization.as_it_is:
            return NOTHING_QUANTIZED
        if self.quantized and not self.quantized.original:
            return NO_ORIGINAL
        return "" if self.recipe.quality.check else "--no-quality-check"

    @property
    def why_not_calibrated(self) -> str:
        """Why nothing is calibrated; "" if something is."""
        if self.calibration is not None:
            return ""
        if self.data_free:
            return "data-free: scales follow from a rule"
        return "quantized already" if self.quantized else NOTHING_QUANTIZED

    @cached_property
    def notes(self) -> list[Note]:
        """What a user should know before the build, and a reader of the report after it."""
        own = self.quantized.notes if self.quantized else checks.transform_notes(self.recipe)
        return own + checks.notes(self.inputs, self.settings, self.model.directory)

    def chosen_formats(self) -> list[tuple[str, str, str]]:
        """(what, format, reason) of the formats that the GPU profile chose, because the user named none."""
        part, found = self.recipe.quantization, []
        for what, key, value in (
            ("format", "quantization.format", part.format),
            ("KV cache", "quantization.kv_cache_dtype", part.kv_cache_dtype),
        ):
            origin, _, reason = self.resolved.origins.get(key, "").partition(": ")
            found += [(what, value, reason)] if origin == f"GPU profile {self.resolved.gpu.name}" else []
        return found

    def stages(self, wanted: Sequence[str], store: Store) -> Stages:
        """What the target needs to go on from the checkpoint."""
        return Stages(self.inputs, self.settings, wanted, store)

    def with_chosen(self, modules: Sequence[str]) -> Prepared:
        """With these layers in another format too: those that `auto` chose."""
        return replace(self, model=checks.with_chosen(self.recipe, self.model, modules))

    def with_layers(self, layers: Layers) -> Prepared:
        """With these layers in formats of their own. UnsupportedError if the target can't load them."""
        found = {name: tuple(modules) for name, modules in layers.items() if modules}
        made = replace(self, model=replace(self.model, layers=found))
        checks.check_kept(made.recipe, made.model, made.settings)
        return made


def prepare(resolved: Resolved, store: Store, *, layouts: bool = True, source: Source | None = None) -> Prepared:
    """Opens the model and checks it, the recipe and the target against each other.

    layouts: also that the target can load the model. source: the model if it is open. UsageError or UnsupportedError
    for what cannot be built.
    """
    ways.check_scales(resolved.recipe)
    source = source or open_source(resolved.recipe.model, store=store)
    if source.quantized:
        return _prepare_quantized(resolved, source, store, layouts)
    quantized.check_unquantized(resolved.recipe)
    made = expected(source, resolved.recipe.transform)
    inputs = Inputs(resolved, made.config, probe_store.answers(resolved, store.root), _adapters(resolved, store))
    settings = checks.check_model(inputs, layouts=layouts)
    checks.check_gate(resolved.recipe, settings)
    checks.check_tokenizer(resolved.recipe, source.directory, source.config)
    model = checks.keep_patterns(resolved.recipe, checks.facts_of(made), settings)
    ways.check(resolved.recipe, model)
    checks.check_sizes(inputs, model, layouts=layouts)
    part = resolved.recipe.quantization
    requested_layouts.check(part.layouts, [part.number_format, *model.single.values()], part.cache_format)
    if part.save_pseudo:
        pseudo_names.check_formats([part.number_format, *model.single.values()])
    return Prepared(inputs, source, settings, model)


def _adapters(resolved: Resolved, store: Store) -> tuple[Adapter, ...]:
    """The adapters that are built in. Those of the LLM class, which reads them itself, are only checked."""
    part, formats, rotated = resolved.recipe.lora, resolved.quantized_formats, resolved.recipe.transform.rotates
    if resolved.recipe.target == LLMAPI.name:
        model_checks.check_inputs(llmapi_lora.opened(part), formats, rotated=rotated)
        return ()
    found = open_adapters(part.adapters, store=store)
    model_checks.check_inputs(found, formats, rotated=rotated)
    return found


def _prepare_quantized(resolved: Resolved, source: Source, store: Store, layouts: bool) -> Prepared:
    """The same for a model that is quantized already: its own formats are checked against GPU and target."""
    resolved, source, model, found = quantized.take(resolved, source, store=store)
    inputs = Inputs(resolved, source.config, probe_store.answers(resolved, store.root), _adapters(resolved, store))
    try:
        settings = checks.check_model(inputs, layouts=layouts)
        checks.check_kept(resolved.recipe, model, settings)
    except UnsupportedError as error:
        raise advice.possible(error, resolved) from None
    part = resolved.recipe.quantization
    requested_layouts.check(part.layouts, found.found.layers.values(), found.cache)
    if part.save_pseudo:
        pseudo_names.check_formats(found.found.layers.values())
    checks.check_gate(resolved.recipe, settings)
    checks.check_tokenizer(resolved.recipe, model.directory or source.directory, source.config)
    return Prepared(inputs, source, settings, model, found)


def check_fit(prepared: Prepared, store: Store, *, made: Callable[[], list[str]] = list) -> None:
    """UnsupportedError with the smallest change that would fit on the card, or if what is still to be made finds no
    room on the disk or in this machine's memory.

    made: returns the stages that are in the store; called only where the answer matters.
    """
    host, here = memory.machine(store.root), gpus()
    checked = suggestions.judge(prepared.model, prepared.serving, prepared.resolved.gpu, host, here)
    if checked.refusal:
        raise checked.refusal
    sizes, way = prepared.sizes, prepared.way(host)
    needs = way.taken.memory if way and not way.device.gpu else 0
    tight = needs > host.available or (way is not None and way.refusal is not None)
    if not tight and sizes.artifacts <= host.disk:
        return
    there = made()
    remaining = [stage for stage in STAGES if stage not in there]
    if refusal := checks.host_refusal(way, sizes, host, remaining):
        raise refusal
    if tight and "checkpoint" in remaining:
        free = size(host.available)
        store.out.warn(f"quantizing takes about {size(needs)}, and of this machine's memory {free} are free now")


def check_learning(prepared: Prepared, store: Store) -> None:
    """If rotations are learned, prints what that takes. UnsupportedError if this machine has too little memory."""
    needed = None if store.dry else prepared.learning(memory.machine(store.root))
    if needed and needed.refusal:
        raise needed.refusal
    if needed:
        took = "" if needed.seconds is None else f" and about {seconds(needed.seconds)}"
        store.out.info(f"learning rotations takes about {size(needed.memory)} of memory{took}")


def tell(prepared: Prepared, store: Store) -> None:
    """Prints what a build should not keep to itself: notes on the tokenizer, and layers that follow those named."""
    recipe, model = prepared.recipe, prepared.model
    for what, value, why in prepared.chosen_formats():
        store.out.info(f"{what}: {value}, {why}")
    for note in checks.tokenizer_notes(recipe, model.directory or prepared.source.directory, model.config):
        store.out.warn(note.text)
    if text := multimodal.note(model.config):
        store.out.warn(text)
    for note in prepared.quantized.notes if prepared.quantized else checks.transform_notes(recipe):
        store.out.warn(note.text)
    if prepared.quantized is None:
        _tell_layers(prepared, store)
    for note in prepared.target.warnings(prepared.inputs, prepared.settings):
        store.out.warn(note.text)


def _tell_layers(prepared: Prepared, store: Store) -> None:
    """Prints the layers that stay in another format without having been named."""
    recipe, model = prepared.recipe, prepared.model
    part = recipe.quantization
    needed = checks.by_family(recipe, model.architecture, model.modules(BF16.name))
    if needed:
        found = ", ".join(needed)
        store.out.info(f"{found} stays in BF16: TensorRT-LLM's {model.architecture.name} takes these layers so alone")
    for one, patterns in ((BF16, [*part.kept_patterns, *needed]), (FP8, part.fp8_patterns)):
        if more := exclude.widened(patterns, model.modules(one.name)):
            names = ", ".join(more[:4]) + ", ..." * (len(more) > 4)
            store.out.info(f"{len(more)} more layers stay in {one.title}, multiplied as one with those named: {names}")
