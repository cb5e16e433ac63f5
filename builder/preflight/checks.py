"""Checks before any expensive work: machine, model, tokenizer, excluded layers, accuracy gate, disk and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from builder.architectures import names
from builder.architectures.facts import Architecture
from builder.calibration import rows as calibration_rows
from builder.checkpoint import requested_layouts, sharding
from builder.checkpoint.requested_layouts import COMPRESSED_TENSORS
from builder.core import process, workers
from builder.core.errors import UnsupportedError, UsageError
from builder.core.store import Store, library_versions
from builder.formats.assignment import grouped, merged
from builder.formats.base import NumberFormat
from builder.formats.registry import BF16, FP8
from builder.hub.snapshot import Source, local_directory, open_source
from builder.model import multimodal, tensor_names
from builder.model.files import needs_remote_code
from builder.preflight import advice, memory, suggestions
from builder.preflight.memory import Machine, Serving, Sizes
from builder.preflight.model_facts import ModelFacts
from builder.preflight.ways import Choice
from builder.quantize import exclude, kv_safety, modelopt
from builder.quantize.modelopt import ENVIRONMENT
from builder.recipe import card_formats
from builder.recipe.schema import Model, Recipe, Resolved
from builder.recipe.target_facts import LLMAPI
from builder.serving import installation, limits, private_directory
from builder.targets import target
from builder.targets.base import Excluded, Inputs, Settings
from builder.tokenizer import files as tokenizer_files
from builder.tokenizer.sampling_defaults import sampling_defaults
from builder.tokenizer.special_ids import special_ids
from builder.transform import advice as transform_advice
from builder.trtllm.rules import Note

# Notes that are warnings.
FP8_KV = "FP8 KV cache"
ROTATED = "rotated weights"


def check_machine(resolved: Resolved, *, serving: bool = True) -> None:
    """UnsupportedError if this machine cannot build the target or, with `serving`, serve it."""
    target(resolved.recipe.target).check_machine(resolved, serving=serving)
    if serving:
        installation.check_paths()
        private_directory.check_place()
        limits.check_machine()


def check_model(inputs: Inputs, *, layouts: bool = True) -> Settings:
    """The target's settings for a model: flags or arguments.

    layouts: also check that the target can load the model. UsageError or UnsupportedError if it cannot, with advice
    that was tried (advice.py).
    """
    if layouts:
        check_served(inputs.resolved)
    try:
        return _settings(inputs, layouts)
    except (UnsupportedError, UsageError) as error:
        raise advice.tried(error, inputs, _settings) from error


def check_served(resolved: Resolved) -> None:
    """UnsupportedError for formats that no target of TensorRT-LLM serves."""
    lacking = [one for one in resolved.quantized_formats if one.compressed_only]
    if not lacking:
        return
    recipe, title = resolved.recipe, " and ".join(one.title for one in lacking)
    made = resolved.stored is not None  # by someone else: there is nothing to quantize
    free = " --data-free" * (not any(tensor.calibrated for one in lacking for tensor in one.tensors))
    write = f"`builder quantize --model {recipe.model.id} --gpu {resolved.gpu.name} --format {lacking[0].name}{free}`"
    raise UnsupportedError(
        f"TensorRT-LLM does not serve {title}, so there is nothing to build, serve or plan.",
        why=lacking[0].targets_source,
        hint="Measure it with `builder eval`, or serve it with one of those."
        if made
        else f"{write} writes it in the compressed-tensors layout, and `builder eval` measures it. To serve it with "
        f"TensorRT-LLM, leave --format out: the default is the card's best.",
    )


def _settings(inputs: Inputs, layouts: bool) -> Settings:
    by = target(inputs.resolved.recipe.target)
    if layouts:
        by.check_model(inputs)
    return by.settings(inputs)


def check_tokenizer(recipe: Recipe, directory: Path, config: Mapping[str, Any]) -> None:
    """Checks the recipe against the tokenizer files in `directory`.

    UsageError for end ids that the model does not have, and for calibration conversations (in a local or bundled file)
    that its chat template cannot render. IntegrityError for sampling values in generation_config.json that are none.
    """
    size, largest = tokenizer_files.vocab_size(config), tokenizer_files.largest_token_id(directory)
    known = largest + 1 if size is None else min(size, largest + 1)
    wrong = [id for id in recipe.repository.end_ids or () if id >= known]
    if wrong:
        raise UsageError(
            f"repository.end_ids has {wrong}, and the model's tokens are 0 to {known - 1}.",
            hint="tokenizer.json lists the special tokens and their ids under added_tokens.",
        )
    sampling_defaults(directory, recipe.repository.sampling_defaults)
    calibration_rows.check_conversations(calibration_rows.first_rows(recipe.calibration), directory)


def tokenizer_notes(recipe: Recipe, directory: Path, config: Mapping[str, Any]) -> list[Note]:
    """What a user should know about the tokenizer, above all whether its files agree on what ends an answer."""
    ids = special_ids(directory, recipe.repository.end_ids)
    return [Note(rule, text) for rule, text in tokenizer_files.notes(directory, config, ids["end_ids"])]


def notes(inputs: Inputs, settings: Settings, directory: Path | None = None) -> list[Note]:
    """What a user should know about this model on this target, for the plan and the report.

    directory: holds the model's tokenizer files.
    """
    recipe = inputs.resolved.recipe
    risk = kv_safety.warning(inputs.config, recipe.quantization.kv_cache_dtype)
    known = [Note(FP8_KV, risk)] if risk else []
    if text := multimodal.note(inputs.config):
        known.append(Note("multimodal", text))
    known += tokenizer_notes(recipe, directory, inputs.config) if directory else []
    return known + target(recipe.target).notes(inputs, settings)


def transform_notes(recipe: Recipe) -> list[Note]:
    """What a user should know before the weights are rotated."""
    text = transform_advice.warning(recipe)
    return [Note(ROTATED, text)] if text else []


def keep_patterns(recipe: Recipe, model: ModelFacts, settings: Settings) -> ModelFacts:
    """The model with the layers that the recipe puts in another format than most: by its scheme, and by patterns, which
    override the scheme.

    UsageError for a pattern that matches nothing, UnsupportedError for layers that must not be left in that format.
    """
    part, known = recipe.quantization, exclude.linears(model.written, model.architecture)
    patterns = [*part.kept_patterns, *by_family(recipe, model.architecture, known)]
    kept = exclude.keep(patterns, known, architecture=model.architecture)
    fp8 = exclude.keep(part.fp8_patterns, known, "--keep-fp8", model.architecture)
    exclude.check_apart(kept, fp8, known)
    scheme = exclude.assigned(part.scheme, known, model.architecture) if part.scheme else {}
    formats = {**scheme, **dict.fromkeys(kept, BF16), **dict.fromkeys(fp8, FP8)}
    exclude.check_left(formats, known, part.number_format)
    layers = grouped({name: formats[name] for name in known if name in formats})
    model = replace(model, layers=layers, number_format=part.number_format)
    check_kept(recipe, model, settings)
    return model


def check_sizes(inputs: Inputs, model: ModelFacts, *, layouts: bool = True) -> None:
    """UnsupportedError if a linear layer's sizes can't be stored in its format, with the formats that were tried for
    this model, card and target, and fit."""
    for one, weights in _weights(model).items():
        if not all(map(one.fits, weights.values())):
            asked = inputs.resolved.recipe
            known = card_formats.running(inputs.resolved.gpu, asked.target, asked.engine.tensorrt_llm)
            runs = [other for other in known if other is not BF16 and _takes(other, inputs, model, layouts)]
            modelopt.check_sizes(weights, one, runs)


def _takes(one: NumberFormat, inputs: Inputs, model: ModelFacts, layouts: bool) -> bool:
    """Whether the model would be quantized to this format, with the rest of the recipe as it is."""
    try:
        changed = inputs.resolved.changed({"quantization.format": one.name})
        settings = _settings(replace(inputs, resolved=changed), layouts)
        found = _weights(keep_patterns(changed.recipe, model, settings))
    except (UnsupportedError, UsageError):
        return False
    return all(all(map(one.fits, weights.values())) for one, weights in found.items())


def _weights(model: ModelFacts) -> dict[NumberFormat, dict[str, Sequence[int]]]:
    """{format: {weight: [outputs, inputs]}} of the linear layers that can be quantized."""
    found: dict[NumberFormat, dict[str, Sequence[int]]] = {}
    for name, (_, shape) in sorted(model.written.items()):
        if names.is_quantizable(model.architecture, name, shape):
            found.setdefault(model.format_of(name), {})[name] = shape
    return found


def by_family(recipe: Recipe, architecture: Architecture, known: Sequence[str]) -> list[str]:
    """The patterns of layers that the target loads in BF16 alone (configs/architectures, `unquantized`)."""
    part = architecture.llmapi if recipe.target == LLMAPI.name else None
    return [one for one in (part.unquantized if part else ()) if any(fnmatchcase(name, one) for name in known)]


def with_chosen(recipe: Recipe, model: ModelFacts, modules: Sequence[str]) -> ModelFacts:
    """The model with these layers excluded too, in the format that `auto` was given for."""
    order = exclude.linears(model.written, model.architecture)
    return replace(model, layers=merged(model.layers, recipe.quantization.kept_format, modules, order))


def check_kept(recipe: Recipe, model: ModelFacts, settings: Settings) -> None:
    """UnsupportedError if the target cannot load the excluded layers in their formats."""
    exclude.check_split(model.single, model.config, sharding.Parallel(recipe.engine.tp, recipe.engine.pp))
    known = exclude.linears(model.written, model.architecture)
    excluded = Excluded(model.single, known, model.number_format, model.architecture)
    target(recipe.target).check_excluded(excluded, settings)


def check_gate(recipe: Recipe, settings: Settings) -> None:
    """UsageError for a gate on the served model if that model will return no logits of a prompt."""
    if not recipe.evaluation.limits or "served" not in recipe.evaluation.runners:
        return
    if not target(recipe.target).returns_logits(settings):
        raise UsageError(
            "The gate needs the served model's perplexity, but that model would not return prompt logits.",
            why="trtllm-build leaves them out unless gather_context_logits is on.",
            hint="Add --set engine.flags.gather_context_logits=enable, or evaluate the checkpoint: --runner checkpoint",
        )


def host_refusal(way: Choice | None, found: Sizes, host: Machine, remaining: Sequence[str]) -> UnsupportedError | None:
    """The error if the remaining stages need more disk, or quantizing more memory, than there is.

    way: how the model is quantized; None if it is not."""
    missing = sum(found.disk.get(stage, 0) for stage in remaining if stage != "snapshot")
    if refusal := suggestions.disk_refusal(found.disk, host, missing):
        return refusal
    return way.refusal if way is not None and "checkpoint" in remaining else None


def sizes(recipe: Recipe, model: ModelFacts, asked: Serving) -> Sizes:
    """The sizes of this recipe's model, checkpoint, ranks and engine."""
    rows = recipe.calibration
    local = local_directory(recipe.model) is not None
    found = memory.sizes(model, asked, calibration_tokens=rows.batch_size * rows.seq_len, local=local)
    if COMPRESSED_TENSORS not in recipe.quantization.layouts:
        return found
    packed = [n for n, (_, shape) in model.written.items() if model.quantizes(n, shape) and _has_shape(model, n)]
    # Its tensors have the bytes of the unified ones.
    return found.with_disk("layouts", found.unified + requested_layouts.SHAPE_BYTES * len(packed))


def _has_shape(model: ModelFacts, tensor: str) -> bool:
    """Whether compressed-tensors stores the shape of this weight beside it."""
    scheme = model.format_of(tensor).compressed_tensors
    return scheme is not None and scheme.has_shape


def read_model(model: Model, store: Store) -> ModelFacts:
    """Reads config.json and the tensor headers from the directory, or from the Hub by ranged requests."""
    return facts_of(open_source(model, store=store))


def facts_of(source: Source) -> ModelFacts:
    """The facts of a model that open_source opened."""
    return ModelFacts(source.config, source.tensors, directory=source.directory)


def check_architecture(model: Model, facts: ModelFacts, store: Store) -> None:
    """Compares the tensor names and shapes with those that transformers derives from config.json.

    Only for an architecture that tensor_names does not know; a worker process does it, and no weight is read. Skipped
    if transformers is not installed or the model's class comes with the model. IntegrityError if they differ.
    """
    installed = "absent" not in library_versions("torch", "transformers").values()
    if tensor_names.known(facts.config) or needs_remote_code(facts.config) or not installed:
        return
    log = store.log("architecture")
    job = {"name": model.id, "config": facts.config, "tensors": facts.tensors}
    process.run_job(
        workers.MODEL_ARCHITECTURE,
        job,
        log=log,
        bar=process.Bar(store.out, "comparing with transformers"),
        env=ENVIRONMENT,
    )
    for file in (log, process.job_file(log)):
        file.unlink(missing_ok=True)
