"""Faults of one model, whatever it serves."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from itertools import pairwise
from math import prod
from typing import Any

from builder.triton.lint.findings import Finding
from builder.triton.lint.model_files import ModelFiles
from builder.triton.lint.positions import Field

BACKENDS = ("tensorrtllm", "python")  # a misspelt one is told from another backend by its likeness to these
KINDS = ("input", "output")


def check(model: ModelFiles) -> Iterator[Finding]:
    """All of them, for a config.pbtxt that parses."""
    yield from _name(model)
    yield from _backend(model)
    yield from _versions(model)
    for kind in KINDS:
        yield from _tensors(model, kind)
    yield from _batching(model)
    yield from _instances(model)
    yield from _repeated_parameters(model)
    if model.message.response_cache.enable and model.message.model_transaction_policy.decoupled:
        fix = "Set response_cache.enable to false: Triton caches no responses of a decoupled model."
        yield model.finding("cache", model.text.first("response_cache"), "a decoupled model has a response cache", fix)


def _name(model: ModelFiles) -> Iterator[Finding]:
    name = model.message.name
    if name and name != model.name:
        fix = f'Write name: "{model.name}", or rename the directory.'
        yield model.finding("name", model.text.first("name"), f"its name is {name!r}, unlike its directory's", fix)


def _backend(model: ModelFiles) -> Iterator[Finding]:
    message, steps = model.message, model.text.first("ensemble_scheduling")
    at = model.text.first("backend") or model.text.first("platform")
    ensemble = message.platform == "ensemble"
    if ensemble and not message.ensemble_scheduling.step:
        yield model.finding(
            "backend", at, "it is an ensemble without steps", "Add ensemble_scheduling { step [ ... ] }."
        )
    elif steps is not None and not ensemble:
        yield model.finding("backend", steps, "it has steps and is no ensemble", 'Write platform: "ensemble".')
    elif not (message.backend or message.platform):
        yield model.finding("backend", None, "it names no backend", 'Write backend: "python", or the one that runs it.')
    backend = message.backend
    near = difflib.get_close_matches(backend, BACKENDS, 1, 0.75)
    if near and backend not in BACKENDS:
        fix = f'Write backend: "{near[0]}".'
        yield model.finding("backend", at, f"there is no backend {backend!r}", fix)


def _versions(model: ModelFiles) -> Iterator[Finding]:
    versions = model.versions
    if not versions:
        fix = f"Create {model.directory.name}/1, empty if the backend needs no file there."
        yield model.finding("version", None, "it has no version directory", fix)
    policy = model.text.first("version_policy")
    for number in model.message.version_policy.specific.versions:
        if number not in versions:
            fix = f"Create the directory {number}, or name one of {versions}."
            yield model.finding("version", policy, f"version {number} has no directory", fix)
    code = model.message.default_model_filename or "model.py"
    if model.message.backend == "python" and versions and not _has_code(model, code):
        fix = f"Put the model's code into {model.name}/{versions[-1]}/{code}."
        at = model.text.first("default_model_filename") or model.text.first("backend")
        yield model.finding("code", at, f"it is a Python model without {versions[-1]}/{code}", fix)


def _has_code(model: ModelFiles, code: str) -> bool:
    return any((model.directory / str(number) / code).is_file() for number in model.versions)


def _tensors(model: ModelFiles, kind: str) -> Iterator[Finding]:
    first: dict[str, Any] = {}
    for entry, tensor in zip(model.text.all(kind), getattr(model.message, kind), strict=False):
        name = tensor.name
        if not name:
            yield model.finding("tensor", entry, f"an {kind} has no name", 'Write name: "...".')
            continue
        if name in first:
            fix = "Keep one of them: clients and Triton find only one."
            same = first[name] == tensor
            said = f"{kind} {name} is declared twice" + ("" if same else ", and differently")
            yield model.finding("duplicate", entry, said, fix, severity="warning" if same else "error")
        first.setdefault(name, tensor)
        if not tensor.data_type:
            yield model.finding("tensor", entry, f"{kind} {name} has no data_type", "Write data_type: TYPE_INT32, ...")
        yield from _dims(model, kind, entry, tensor)


def _dims(model: ModelFiles, kind: str, entry: Field, tensor: Any) -> Iterator[Finding]:
    at = entry.first("dims") or entry
    if not tensor.dims:
        yield model.finding("tensor", entry, f"{kind} {tensor.name} has no dims", "Write dims: [ -1 ] or its sizes.")
    wrong = [size for size in tensor.dims if size == 0 or size < -1]
    if wrong:
        fix = "Write -1 for a size that varies, else 1 or more."
        yield model.finding("tensor", at, f"{kind} {tensor.name} has the size {wrong[0]}", fix)
    shape = tensor.reshape.shape
    if tensor.HasField("reshape") and -1 not in (*tensor.dims, *shape) and prod(tensor.dims) != prod(shape):
        fix = f"Write a shape of {prod(tensor.dims)} values."
        said = f"{kind} {tensor.name} is reshaped from {list(tensor.dims)} to {list(shape)}"
        yield model.finding("tensor", entry.first("reshape"), said, fix)


def _batching(model: ModelFiles) -> Iterator[Finding]:
    message, at = model.message, model.text.first("max_batch_size")
    batch = message.max_batch_size
    if batch < 0:
        yield model.finding("batch", at, f"max_batch_size is {batch}", "Write 0 (no batches) or more.")
    if not message.HasField("dynamic_batching"):
        return
    place = model.text.first("dynamic_batching")
    if batch == 0:
        fix = "Set max_batch_size to 1 or more, or remove dynamic_batching."
        yield model.finding("batch", place, "dynamic_batching needs batches, and max_batch_size is 0", fix)
        return
    preferred = list(message.dynamic_batching.preferred_batch_size)
    where = (place.first("preferred_batch_size") if place else None) or place
    for size in preferred:
        if not 0 < size <= batch:
            fix = f"Write sizes from 1 to {batch}, or raise max_batch_size."
            yield model.finding(
                "batch", where, f"preferred_batch_size {size} is not within max_batch_size {batch}", fix
            )
    if any(one == other for one, other in pairwise(sorted(preferred))):
        yield model.finding("batch", where, "preferred_batch_size names a size twice", "Keep one of them.")


def _instances(model: ModelFiles) -> Iterator[Finding]:
    from tritonclient.grpc import model_config_pb2

    kinds = model_config_pb2.ModelInstanceGroup
    for entry, group in zip(model.text.all("instance_group"), model.message.instance_group, strict=False):
        count = entry.first("count")
        if count is not None and group.count < 1:
            yield model.finding("instances", count, f"it has {group.count} instances", "Write count: 1 or more.")
        if group.gpus and group.kind == kinds.KIND_CPU:
            fix = "Remove gpus, or write kind: KIND_GPU."
            yield model.finding("instances", entry.first("gpus"), "instances of KIND_CPU name gpus", fix)
        if model.message.platform == "ensemble":
            yield model.finding("instances", entry, "an ensemble has no instances", "Remove instance_group.")


def _repeated_parameters(model: ModelFiles) -> Iterator[Finding]:
    seen: set[str] = set()
    for entry in model.text.all("parameters"):
        key = entry.first("key")
        if key is None or not key.value:
            yield model.finding("parameter", entry, "a parameter has no key", 'Write key: "...".')
            continue
        if key.value in seen:
            fix = "Keep one of them: Triton takes the last and does not say so."
            yield model.finding("duplicate", key, f"parameter {key.value} is given twice", fix)
        seen.add(key.value)
