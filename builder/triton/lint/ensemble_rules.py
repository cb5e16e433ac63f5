"""Faults between an ensemble and the models that are its steps."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from builder.triton.lint.findings import Finding
from builder.triton.lint.model_files import ModelFiles
from builder.triton.lint.positions import Field

Models = Mapping[str, ModelFiles]
Shape = tuple[int, tuple[int, ...]]  # data type, dimensions with that of the batch


def check(ensemble: ModelFiles, models: Models) -> Iterator[Finding]:
    """All of them. A step whose model is absent or does not parse is not compared."""
    steps = _steps(ensemble)
    for entry, step in steps:
        yield from _step(ensemble, entry, step, models)
    yield from _tensors(ensemble, steps, models)


def _steps(ensemble: ModelFiles) -> list[tuple[Field, Any]]:
    scheduling = ensemble.text.first("ensemble_scheduling")
    places = scheduling.all("step") if scheduling else []
    return list(zip(places, ensemble.message.ensemble_scheduling.step, strict=False))


def _step(ensemble: ModelFiles, entry: Field, step: Any, models: Models) -> Iterator[Finding]:
    at, name = entry.first("model_name") or entry, step.model_name
    if name == ensemble.name:
        yield ensemble.finding("step", at, "it is a step of itself", "Name another model.")
        return
    if name not in models:
        near = difflib.get_close_matches(name, models, 1)
        fix = f"Write {near[0]}." if near else "Add that model to the repository, or name one that is there."
        yield ensemble.finding("step", at, f"step {name!r} is not a model of the repository", fix)
        return
    model = models[name]
    if step.model_version > 0 and step.model_version not in model.versions:
        fix = f"Write -1 (the latest), or one of {model.versions}."
        said = f"version {step.model_version} of {name} is not there"
        yield ensemble.finding("step", entry.first("model_version"), said, fix)
    if model.message is None:
        return
    if 0 < model.message.max_batch_size < ensemble.message.max_batch_size:
        most = model.message.max_batch_size
        said = f"max_batch_size {ensemble.message.max_batch_size} is more than {name}'s, {most}"
        yield ensemble.finding("batch", ensemble.text.first("max_batch_size"), said, f"Write {most} at most.")
    yield from _maps(ensemble, entry, step, model)


def _maps(ensemble: ModelFiles, entry: Field, step: Any, model: ModelFiles) -> Iterator[Finding]:
    for kind, mapped in (("input", step.input_map), ("output", step.output_map)):
        tensors = {one.name: one for one in getattr(model.message, kind)}
        keys: set[str] = set()
        for place in entry.all(f"{kind}_map"):
            key = place.first("key")
            if key is not None and key.value in keys:
                fix = "Keep one of them: Triton takes the last and does not say so."
                yield ensemble.finding("duplicate", key, f"{kind} {key.value} of {model.name} is mapped twice", fix)
            keys.add(key.value if key else "")
        for name in mapped:
            if name not in tensors:
                near = difflib.get_close_matches(name, tensors, 1)
                fix = f"Write {near[0]}." if near else f"Remove it: {model.name} has no such {kind}."
                at = _place(entry, kind, name)
                yield ensemble.finding("map", at, f"{model.name} has no {kind} {name!r}", fix)
        lacking = [name for name, one in tensors.items() if kind == "input" and not one.optional and name not in mapped]
        for name in lacking:
            fix = f'Add input_map {{ key: "{name}" value: "..." }}.'
            yield ensemble.finding("map", entry, f"input {name} of {model.name} is needed and not mapped", fix)


def _place(entry: Field, kind: str, key: str) -> Field:
    maps = entry.all(f"{kind}_map")
    return next((one for one in maps if (found := one.first("key")) and found.value == key), entry)


def _tensors(ensemble: ModelFiles, steps: Sequence[tuple[Field, Any]], models: Models) -> Iterator[Finding]:
    """Tensors of the ensemble: each has one source, is read, and has one type and shape throughout."""
    made: dict[str, Shape | None] = {one.name: _shape(ensemble, one) for one in ensemble.message.input}
    read: set[str] = set()
    for entry, step in steps:
        for key, name in step.output_map.items():
            at = _place(entry, "output", key)
            if name in made:
                fix = "Give the outputs of different steps different names."
                yield ensemble.finding("tensor", at, f"tensor {name} has two sources", fix)
            made[name] = _of(models, step.model_name, "output", key)
    for entry, step in steps:
        for key, name in step.input_map.items():
            at = _place(entry, "input", key)
            read.add(name)
            yield from _joined(ensemble, at, name, made, _of(models, step.model_name, "input", key))
    for one in ensemble.message.output:
        at = ensemble.tensor("output", one.name) or Field("", 0)
        yield from _joined(ensemble, at, one.name, made, _shape(ensemble, one))
    outputs = {one.name for one in ensemble.message.output}
    for one in ensemble.message.input:
        if one.name not in read and one.name not in outputs:
            fix = "Map it to an input of a step, or remove it."
            yield ensemble.finding("tensor", ensemble.tensor("input", one.name), f"input {one.name} is not read", fix)


def _joined(
    ensemble: ModelFiles, at: Field, name: str, made: Mapping[str, Shape | None], to: Shape | None
) -> Iterator[Finding]:
    """Faults where a tensor is read."""
    from tritonclient.grpc import model_config_pb2

    if name not in made:
        near = difflib.get_close_matches(name, made, 1)
        fix = f"Write {near[0]}." if near else "Map an output of a step to it."
        yield ensemble.finding("tensor", at, f"no step and no input makes tensor {name!r}", fix)
        return
    source = made[name]
    if source is None or to is None:
        return
    if source[0] != to[0]:
        kinds = [model_config_pb2.DataType.Name(kind) for kind in (source[0], to[0])]
        fix = f"Declare {name} with one data_type in both models."
        yield ensemble.finding("type", at, f"tensor {name} is {kinds[0]} where it is made and {kinds[1]} here", fix)
    elif not _fits(source[1], to[1]):
        fix = f"Declare {name} with the same dims in both models."
        said = f"tensor {name} is {list(source[1])} where it is made and {list(to[1])} here (with the batch)"
        yield ensemble.finding("shape", at, said, fix)


def _fits(one: Sequence[int], other: Sequence[int]) -> bool:
    return len(one) == len(other) and all(a == b or -1 in (a, b) for a, b in zip(one, other, strict=True))


def _of(models: Models, name: str, kind: str, tensor: str) -> Shape | None:
    model = models.get(name)
    if model is None or model.message is None:
        return None
    return next((_shape(model, one) for one in getattr(model.message, kind) if one.name == tensor), None)


def _shape(model: ModelFiles, tensor: Any) -> Shape:
    return tensor.data_type, ((-1,) if model.message.max_batch_size > 0 else ()) + tuple(tensor.dims)


def cycles(models: Models) -> Iterator[Finding]:
    """Ensembles that are steps of each other."""
    steps = {
        name: {step.model_name for step in model.message.ensemble_scheduling.step}
        for name, model in models.items()
        if model.message is not None
    }
    for name, own in steps.items():
        reached, queue = set[str](), list(own - {name})
        while queue:
            other = queue.pop()
            if other not in reached:
                reached.add(other)
                queue += steps.get(other, set())
        if name in reached:
            at = models[name].text.first("ensemble_scheduling")
            yield models[name].finding("step", at, "its steps lead back to it", "Remove one of these steps.")
