"""Faults in how answers are streamed through engine, ensemble and tensorrt_llm_bls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from builder.triton.lint.findings import Finding
from builder.triton.lint.model_files import ModelFiles
from builder.triton.lint.parameter_rules import is_unset, role
from builder.trtllm.compatibility import BLS_MODEL, ENGINE_MODEL

Models = Mapping[str, ModelFiles]
MODEL = "tensorrt_llm_model_name"
NAMES = (MODEL, "preprocessing_model_name", "tensorrt_llm_draft_model_name", "multimodal_encoders_name")


def check(models: Models) -> Iterator[Finding]:
    """All of them."""
    for model in models.values():
        if model.message is None:
            continue
        if role(model) == BLS_MODEL:
            yield from _bls(model, models)
        if model.message.platform == "ensemble":
            yield from _ensemble(model, models)


def _bls(bls: ModelFiles, models: Models) -> Iterator[Finding]:
    named = {MODEL: ENGINE_MODEL, **{key: value for key in NAMES if not is_unset(value := bls.parameters.get(key, ""))}}
    for key, name in named.items():
        at = bls.parameter(key) or bls.text.first("name")
        if name not in models:
            fix = f"Name a model of the repository in parameter {key}."
            yield bls.finding("step", at, f"it calls {name}, which is not a model of the repository", fix)
    engine = models.get(named[MODEL])
    if engine is None or engine.message is None:
        return
    streams, decoupled = (one.message.model_transaction_policy.decoupled for one in (bls, engine))
    if streams and not decoupled:
        at = engine.text.first("model_transaction_policy") or engine.text.first("name")
        fix = "Set model_transaction_policy { decoupled: true } in both, or in neither."
        yield engine.finding("streaming", at, f"it is not decoupled, and {bls.name} streams from it", fix)
    if decoupled and not streams:
        at = bls.text.first("model_transaction_policy") or bls.text.first("name")
        fix = "Set model_transaction_policy { decoupled: true } here too."
        yield bls.finding("streaming", at, f"it is not decoupled, and {engine.name} is: it can't stream", fix)


def _ensemble(ensemble: ModelFiles, models: Models) -> Iterator[Finding]:
    """Steps after a decoupled engine get parts of one answer, which several instances return out of order."""
    steps = ensemble.message.ensemble_scheduling.step
    streaming = [step for step in steps if "streaming" in step.input_map and _decoupled(models.get(step.model_name))]
    for source in streaming:
        made = set(source.output_map.values())
        for step in steps:
            model = models.get(step.model_name)
            if model is None or model.message is None or not made & set(step.input_map.values()):
                continue
            count = sum(max(1, group.count) for group in model.message.instance_group) or 1
            if count > 1 and not model.message.dynamic_batching.preserve_ordering:
                at = model.text.first("instance_group")
                fix = "Write one instance, or dynamic_batching { preserve_ordering: true }."
                said = f"{count} instances return the parts of a streamed answer out of order"
                yield model.finding("streaming", at, said, fix)


def _decoupled(model: ModelFiles | None) -> bool:
    return model is not None and model.message is not None and model.message.model_transaction_policy.decoupled
