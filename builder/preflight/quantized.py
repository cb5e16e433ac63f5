"""A model that is quantized already, in a plan and before a build: what it is, and what of the recipe it decides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from builder.checkpoint import quantized_source
from builder.checkpoint.description import TITLES, Description, describe
from builder.checkpoint.quantized_source import Formats
from builder.core.errors import UnsupportedError, UsageError
from builder.core.output import listed
from builder.core.safetensors_io import TensorInfo, byte_size
from builder.core.store import Store
from builder.formats import kv_cache
from builder.formats.kv_cache import KvCacheFormat
from builder.formats.registry import FP8
from builder.hub.snapshot import Source, open_source
from builder.model.multimodal import MARK
from builder.preflight.memory import Sizes
from builder.preflight.model_facts import ModelFacts
from builder.quantize import exclude
from builder.recipe.schema import Model, Recipe, Resolved
from builder.recipe.target_facts import target_facts
from builder.trtllm.flags import asked_for
from builder.trtllm.rules import Note

ORIGIN = "the checkpoint"  # where format and KV cache of the recipe come from
# Keys that decide how to quantize, and the flags that set them.
DECIDED = {
    "format": "--format",
    "keep_bf16": "--keep-bf16",
    "keep_fp8": "--keep-fp8",
    "algorithm": "--algorithm",
}
NO_ORIGINAL = "no original to compare with; --original names the model that this one was made from"
NO_SCALES = "KV scales"  # the note that is a warning


@dataclass(frozen=True)
class Quantized:
    """A quantized model. cache: the KV cache that it will be served with. original: what it was made from, if named.
    calibrates: whether its scales of inputs and KV cache are calibrated. writes_engine_layout: whether TensorRT-LLM's
    layout is written, which only engines, the reference executor and its runner read.
    """

    found: Description
    formats: Formats
    cache: KvCacheFormat
    original: Source | None = None
    calibrates: bool = False
    writes_engine_layout: bool = True

    def sizes(self, found: Sizes) -> Sizes:
        """The sizes of a build from the unquantized model, as they are for this one: less to download, and no model in
        memory unless scales are calibrated."""
        download = sum(info.nbytes for info in self.found.headers.values())
        disk = {**found.disk, "snapshot": download if found.disk["snapshot"] else 0}
        memory, layout = found.calibration_memory * self.calibrates, found.checkpoint
        if not self.writes_engine_layout:
            disk["checkpoint"], layout = found.unified, 0
        artifacts = sum(disk.values()) - disk["snapshot"]
        return replace(
            found, download=download, disk=disk, checkpoint=layout, artifacts=artifacts, calibration_memory=memory
        )

    def explained(self) -> tuple[str, str, list[tuple[str, str]]]:
        """The tool, the layout, and for each format of linear layers its title and which layers are in it."""
        kinds: dict[str, Counter[str]] = {}
        for module, one in self.found.layers.items():
            kinds.setdefault(one.title, Counter())[_last(module)] += 1
        texts = [
            (title, f"{counts.total()} linear layers: {', '.join(sorted(counts))}") for title, counts in kinds.items()
        ]
        return str(self.found.producer), TITLES[self.found.layout], texts

    def facts(self) -> dict[str, Any]:
        """For JSON."""
        tool, _, kinds = self.explained()
        return {
            "tool": tool,
            "layout": self.found.layout,
            "formats": dict(kinds),
            "kv_cache": self.cache.name,
            "declared_kv_cache": self.found.cache.name,
            "bytes": sum(info.nbytes for info in self.found.headers.values()),
            "original": self.original.model.id if self.original else None,
        }

    @property
    def notes(self) -> list[Note]:
        """What a user should know about it."""
        if self.calibrates or self.cache is self.found.cache:
            return []
        return [
            Note(
                NO_SCALES,
                f"the checkpoint declares an {self.found.cache.title} and has no scales for it, so the cache stays in "
                "the model's own type; --calibrate-scales measures them",
            )
        ]


def take(resolved: Resolved, source: Source, *, store: Store) -> tuple[Resolved, Source, ModelFacts, Quantized]:
    """What follows from a quantized source: the recipe with its formats, the source with the config.json and tokenizer
    of the original where it has none, and the facts of the model.

    UsageError for a recipe that says how to quantize, or a KV cache that the checkpoint lacks; UnsupportedError and
    IntegrityError for a checkpoint that can't be taken.
    """
    recipe, where = resolved.recipe, source.model.id
    _check_recipe(resolved, where)
    found = opened(source)
    original = _original(resolved, found, store)
    if found.layout == "tensorrt_llm":
        assert original is not None
        _check_same_model(found, original, where)
        source = replace(source, config=original.config)
        tensors = dict(original.tensors)
        formats = quantized_source.formats_of_engine_layout(found, tensors, original.config)
    else:
        tensors = quantized_source.unquantized(found, where, scales=recipe.calibration.scales)
        formats = quantized_source.formats(found)
    cache = _cache(resolved, found, where)
    companions = original.directory if original and found.layout == "tensorrt_llm" else source.directory
    model = ModelFacts(source.config, tensors, formats.layers, companions, formats.whole)
    linears = exclude.linears(model.tensors, model.architecture)
    layout = _needs_engine_layout(recipe) and not any(one.compressed_only for one in formats.quantized)
    quantized = Quantized(found, formats, cache, original, recipe.calibration.scales, layout)
    return _with_formats(resolved, formats, cache, linears), source, model, quantized


def opened(source: Source) -> Description:
    """The description of a quantized source. UnsupportedError or IntegrityError for one that can't be taken."""
    where = source.model.id
    if MARK in source.config:
        raise UnsupportedError(
            f"{where} is a multimodal model that is quantized already.",
            why="Only text is served, and the language model of a quantized checkpoint is not taken out of it.",
            hint="Give the original model: its language model is taken out and quantized.",
        )
    tensors = source.tensors.items()
    headers = {name: TensorInfo(kind, shape, 0, byte_size(kind, shape)) for name, (kind, shape) in tensors}
    found = describe(source.documents, headers, where)
    quantized_source.check(found, where)
    return found


def _needs_engine_layout(recipe: Recipe) -> bool:
    return target_facts(recipe.target).has_engine or "reference" in recipe.evaluation.runners


def _check_recipe(resolved: Resolved, where: str) -> None:
    """UsageError if a user said how to quantize."""
    given = [flag for key, flag in DECIDED.items() if asked_for(resolved.origins.get(f"quantization.{key}", "default"))]
    given += ["--data-free"] if resolved.recipe.calibration.data_free else []
    if resolved.recipe.transform.rotates:
        raise UsageError(
            f"{where} is quantized already, and --transform would rotate its weights.",
            why="A rotation is folded into weights before they are quantized.",
            hint="Leave --transform out, or give the original model.",
        )
    if given:
        raise UsageError(
            f"{where} is quantized already, and {', '.join(given)} would quantize it.",
            why="A quantized checkpoint is served in its own formats. Quantizing it again would lose accuracy twice.",
            hint=f"Leave {' and '.join(given)} out, or give the original model.",
        )


def _original(resolved: Resolved, found: Description, store: Store) -> Source | None:
    """The model that --original names. UsageError if the layout needs it, or if that is quantized too."""
    name = resolved.recipe.model.original
    if name is None and found.layout == "tensorrt_llm":
        raise UsageError(
            f"{resolved.recipe.model.id} is in {TITLES[found.layout]}, which has no tokenizer.",
            why="Its config.json describes an engine, not a model of transformers.",
            hint="Name the model that it was made from: --original Qwen/Qwen3-8B. With --no-quality-check, its weights "
            "are not downloaded.",
        )
    if name is None:
        return None
    named = open_source(Model(id=name), store=store)
    if named.quantized:
        raise UsageError(
            f"{name} is quantized too; --original names the model that was quantized.",
            hint="Give the BF16 model, or leave --original out.",
        )
    return named


def _check_same_model(found: Description, original: Source, where: str) -> None:
    """UsageError if the original has other sizes than the checkpoint."""
    wrong = quantized_source.different_sizes(found.config, original.config)
    if wrong:
        raise UsageError(
            f"{where} was not made from {original.model.id}.",
            why=f"In the checkpoint, {listed(wrong)}.",
            hint="Name the model that it was made from with --original.",
        )


def _cache(resolved: Resolved, found: Description, where: str) -> KvCacheFormat:
    """The KV cache to serve with. UsageError if a user asked for another one than the checkpoint has."""
    part, key = resolved.recipe.quantization, "quantization.kv_cache_dtype"
    if resolved.recipe.calibration.scales and part.cache_format.quantized:
        return part.cache_format
    cache = found.served_cache
    if not asked_for(resolved.origins.get(key, "default")) or part.kv_cache_dtype == cache.name:
        return cache
    if cache is kv_cache.AUTO:
        raise UsageError(
            f"{where} has no scales for an {part.cache_format.title}.",
            why="The scales are measured on texts, and this checkpoint was exported without them.",
            hint="Measure them: --calibrate-scales. Or leave --kv-cache-dtype out.",
        )
    raise UsageError(
        f"{where} has an {cache.title}, and --kv-cache-dtype {part.kv_cache_dtype} asks for another one.",
        why="A quantized checkpoint is served as it is.",
        hint="Leave --kv-cache-dtype out, or give the original model.",
    )


def _summarized(modules: Sequence[str], linears: Sequence[str]) -> list[tuple[str, bool]]:
    """(name, True) for a last part of names that stands for all of its layers, else (module, False)."""
    kinds = {kind: [one for one in linears if one.rpartition(".")[2] == kind] for kind in (_last(m) for m in modules)}
    whole = {kind for kind, same in kinds.items() if set(same) <= set(modules)}
    return [(kind, True) for kind in sorted(whole)] + [(m, False) for m in modules if _last(m) not in whole]


def _last(module: str) -> str:
    return module.rpartition(".")[2]


def _with_formats(resolved: Resolved, formats: Formats, cache: KvCacheFormat, linears: Sequence[str]) -> Resolved:
    """The recipe with the checkpoint's formats in the place of the defaults, also where advice changes the recipe.

    linears: the model's linear layers.
    """
    recipe, again = resolved.recipe, resolved.changed
    fp8 = tuple(
        f"*.{name}" if every else name for name, every in _summarized(formats.layers.get(FP8.name, ()), linears)
    )
    stated = {"format": formats.whole.name, "kv_cache_dtype": cache.name, "keep_fp8": fp8}
    part = recipe.quantization.model_copy(update=stated)
    origins = {**resolved.origins, **{f"quantization.{key}": ORIGIN for key, value in stated.items() if value}}
    return replace(
        resolved,
        recipe=recipe.model_copy(update={"quantization": part}),
        origins=origins,
        again=lambda more: _with_formats(again(more), formats, cache, linears),
        stored=formats.quantized,
    )


def check_unquantized(recipe: Recipe) -> None:
    """UsageError for settings that only a quantized model has."""
    given = {"--original": recipe.model.original, "--calibrate-scales": recipe.calibration.scales}
    if named := [flag for flag, value in given.items() if value]:
        raise UsageError(
            f"{recipe.model.id} is not quantized, and {' and '.join(named)} is for models that are.",
            why="An unquantized model is calibrated whole, and compared with itself.",
            hint=f"Leave {' and '.join(named)} out.",
        )


def compares(recipe: Recipe) -> bool:
    """Whether measuring the recipe's runners compares with the model before it was quantized."""
    return "bf16" in recipe.evaluation.runners or bool(recipe.evaluation.limits)


def check_runners(recipe: Recipe, quantized: Quantized) -> None:
    """UsageError for a measurement that needs what a quantized model does not have."""
    if "simulated" in recipe.evaluation.runners:
        raise not_quantizable(recipe.model.id, "The runner `simulated` measures")
    if quantized.original is None and compares(recipe):
        raise UsageError(
            f"{recipe.model.id} is quantized, and there is no original to compare it with.",
            why="The runner `bf16` and the limits of the gate compare with the model before it was quantized.",
            hint="Name that model: --original Qwen/Qwen3-8B. Or measure the checkpoint alone: --runner checkpoint",
        )


def not_quantizable(where: str, doing: str) -> UsageError:
    """The error for a command that quantizes, with a model that is quantized already."""
    return UsageError(
        f"{where} is quantized already.",
        why=f"{doing} what quantizing a model costs.",
        hint="Give the original model.",
    )
