"""What can be refused or said before any work: the target on this machine, the model by its config.json, what fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from builder.architectures import attention, served
from builder.calibration import rows as calibration_rows
from builder.checkpoint import sharding
from builder.core import process, workers
from builder.core.errors import UnsupportedError, UsageError
from builder.core.output import size
from builder.core.store import STAGES, Store, library_versions
from builder.core.untrusted_text import read_regular
from builder.hub.snapshot import check_directory, check_tensors, local_directory, read_headers
from builder.llmapi import arguments as llmapi_arguments
from builder.model import config_values, dtypes, tensor_names
from builder.model.files import CONFIG, needs_remote_code, parse_config
from builder.preflight import memory, suggestions
from builder.preflight.memory import Machine, ModelFacts, Sizes
from builder.quantize import exclude, kv_safety
from builder.quantize.modelopt import ENVIRONMENT, gpus
from builder.recipe.schema import Model, Resolved
from builder.recipe.target_facts import target_facts
from builder.reference import supported
from builder.serving import installation, limits, private_directory
from builder.tokenizer import files as tokenizer_files
from builder.tokenizer.special_ids import special_ids
from builder.trtllm import engine
from builder.trtllm import flags as trtllm_flags
from builder.trtllm.probe_results import Answer

# trtllm-build's flags, or the LLM arguments of the llmapi target: both have name, value, reason and source.
Settings = Sequence[trtllm_flags.Flag] | Sequence[llmapi_arguments.Argument]

FP8_KV = "FP8 KV cache"  # the note that is a warning


def no_engine() -> UsageError:
    """Where an engine, or the command that builds it, was asked of the llmapi target."""
    return UsageError(
        "The llmapi target has no engine: the checkpoint is loaded as it is.",
        hint="As far as the repository: `builder render`.",
    )


def check_machine(resolved: Resolved, *, serving: bool = True) -> None:
    """Whether this machine has what the target needs, before the first expensive byte."""
    if resolved.recipe.target != "llmapi":
        engine.check_machine(resolved, serving=serving)
    elif serving:
        llmapi_arguments.check_machine(resolved)
    if serving:
        installation.check_paths()
        private_directory.check_place()
        limits.check_machine()


def check_model(
    resolved: Resolved, config: Mapping[str, Any], *, layouts: bool, answers: Sequence[Answer] = ()
) -> Settings:
    """The target's settings for a model by its config.json, and what cards answered to probes (probe_answers).

    With `layouts` also that the target can load it.
    """
    asked = resolved.recipe
    if asked.target == "llmapi":
        if layouts:
            config_values.require(config, config_values.SHAPE, asked.model.id)
            llmapi_arguments.check_model(resolved, config)
        return llmapi_arguments.resolve(resolved, config)
    if asked.llmapi.args:
        raise UsageError(
            f"llmapi.args are arguments of TensorRT-LLM's LLM class, which the {asked.target} target does not use.",
            hint="--target llmapi, or leave them out.",
        )
    if layouts:
        served.check_engine(config, asked.engine.tensorrt_llm if asked.target == "engine" else None)
        config_values.require(config, config_values.SHAPE, asked.model.id)
        attention.rope(config)
        if asked.target == "reference" or "reference" in asked.evaluation.runners:
            supported.check_model(config)
        number_format, gemm = asked.quantization.number_format, target_facts(asked.target).builds_tensorrt
        sharding.check(config, asked.engine.tp, asked.engine.pp, number_format=number_format, gemm=gemm)
    return trtllm_flags.resolve(resolved, config, answers)


def check_tokenizer(resolved: Resolved, directory: Path, config: Mapping[str, Any]) -> None:
    """UsageError, by the tokenizer files in `directory`, for end ids that the model does not have, and for calibration
    rows of messages (in a file here or bundled) that its chat template can't write."""
    recipe = resolved.recipe
    size, largest = tokenizer_files.vocab_size(config), tokenizer_files.largest_token_id(directory)
    known = largest + 1 if size is None else min(size, largest + 1)
    wrong = [id for id in recipe.repository.end_ids or () if id >= known]
    if wrong:
        raise UsageError(
            f"repository.end_ids has {wrong}, and the model's tokens are 0 to {known - 1}.",
            hint="tokenizer.json lists the special tokens and their ids under added_tokens.",
        )
    calibration_rows.check_conversations(calibration_rows.first_rows(recipe.calibration), directory)


def tokenizer_notes(resolved: Resolved, directory: Path, config: Mapping[str, Any]) -> list[trtllm_flags.Note]:
    """What a user should know of the model's tokenizer: above all whether its files agree on what ends an answer."""
    ids = special_ids(directory, resolved.recipe.repository.end_ids)
    return [trtllm_flags.Note(rule, text) for rule, text in tokenizer_files.notes(directory, config, ids["end_ids"])]


def notes(
    resolved: Resolved, config: Mapping[str, Any], answers: Sequence[Answer] = (), directory: Path | None = None
) -> list[trtllm_flags.Note]:
    """What a user should know before building this model for this target, and a reader of the report after it.
    `directory` holds the model's tokenizer files."""
    risk = kv_safety.warning(config, resolved.recipe.quantization.kv_cache_dtype)
    known = [trtllm_flags.Note(FP8_KV, risk)] if risk else []
    known += tokenizer_notes(resolved, directory, config) if directory else []
    if resolved.recipe.target == "llmapi":
        return known + llmapi_arguments.notes(resolved, llmapi_arguments.resolve(resolved, config))
    flags = trtllm_flags.resolve(resolved, config, answers)
    return known + trtllm_flags.notes(resolved, config, flags, answers) + trtllm_flags.window_notes(config, flags)


def keep_patterns(resolved: Resolved, model: ModelFacts, flags: Settings) -> ModelFacts:
    """The model with the layers that the recipe leaves in BF16 or FP8. UsageError or UnsupportedError where it
    can't."""
    part, known = resolved.recipe.quantization, exclude.linears(model.tensors, model.architecture)
    kept = exclude.keep(part.kept_patterns, known, architecture=model.architecture)
    fp8 = exclude.keep(part.fp8_patterns, known, "--keep-fp8", model.architecture)
    exclude.check_apart(kept, fp8, known)
    model = replace(model, kept=kept, fp8=fp8, number_format=part.number_format)
    check_kept(resolved, model, flags)
    return model


def with_chosen(resolved: Resolved, model: ModelFacts, modules: Sequence[str]) -> ModelFacts:
    """The model with these layers kept too, in the format that auto is said for."""
    fp8 = resolved.recipe.quantization.kept_format == "fp8"
    kept = {*(model.fp8 if fp8 else model.kept), *modules}
    ordered = tuple(name for name in exclude.linears(model.tensors, model.architecture) if name in kept)
    return replace(model, fp8=ordered) if fp8 else replace(model, kept=ordered)


def check_kept(resolved: Resolved, model: ModelFacts, flags: Settings) -> None:
    """UnsupportedError if ranks or engine could not have the kept layers in their formats."""
    asked = resolved.recipe
    exclude.check_split(model.kept, model.fp8, model.config, sharding.Parallel(asked.engine.tp, asked.engine.pp))
    if asked.target == "llmapi":
        exclude.check_llm_class(
            model.kept, model.fp8, exclude.linears(model.tensors, model.architecture), model.architecture
        )
    if asked.target == "engine":
        exclude.check_flags(model.kept, model.fp8, {flag.name: flag.value for flag in flags}, model.architecture)


def check_gate(resolved: Resolved, flags: Settings) -> None:
    """UsageError, before anything is built, for a gate on a served model that will return no logits to judge by."""
    recipe = resolved.recipe
    if not recipe.evaluation.limits or "served" not in recipe.evaluation.runners or recipe.target == "llmapi":
        return  # the LLM class gives them to each request that asks
    if not any(flag.name == "gather_context_logits" and flag.value in ("enable", "") for flag in flags):
        raise UsageError(
            "The gate asks for the served model's perplexity, and it would return no logits of a prompt.",
            why="trtllm-build leaves them out unless gather_context_logits is on.",
            hint="Add --set engine.flags.gather_context_logits=enable, or judge what is on disk: --runner checkpoint",
        )


def check_fit(
    resolved: Resolved, model: ModelFacts, flags: Settings, store: Store, *, made: Callable[[], list[str]] = list
) -> None:
    """UnsupportedError with the smallest change that would fit on the card, or if what is still to be made finds no
    room on the disk or in this machine's memory. `made` tells the stages that are in the store."""
    host, here = memory.machine(store.root), gpus()
    verdict = suggestions.judge(model, memory.serving(resolved, flags), resolved, host, here)
    if verdict.refusal:
        raise verdict.refusal
    found = sizes(resolved, model, flags)
    tight = not here and found.calibration_memory > host.available
    if not tight and found.artifacts <= host.disk:
        return
    there = made()
    remaining = [stage for stage in STAGES if stage not in there]
    if refusal := host_refusal(resolved, model, found, host, remaining):
        raise refusal
    if tight and "checkpoint" in remaining:
        needs, free = size(found.calibration_memory), size(host.available)
        store.out.warn(f"calibrating takes about {needs}, and of this machine's memory {free} are free now")


def host_refusal(
    resolved: Resolved, model: ModelFacts, found: Sizes, host: Machine, remaining: Sequence[str]
) -> UnsupportedError | None:
    """Whether the stages that remain find no room on this machine: its disk, or its memory where no GPU calibrates."""
    missing = sum(found.disk.get(stage, 0) for stage in remaining if stage != "snapshot")
    if refusal := suggestions.disk_refusal(found, host, missing):
        return refusal
    if "checkpoint" not in remaining or gpus():
        return None
    return suggestions.calibration_refusal(model, resolved.recipe.calibration, host)


def sizes(resolved: Resolved, model: ModelFacts, flags: Settings) -> Sizes:
    """Of this recipe's model, checkpoint, ranks and engine."""
    rows = resolved.recipe.calibration
    local = local_directory(resolved.recipe.model) is not None
    tokens = rows.batch_size * rows.seq_len
    return memory.sizes(model, memory.serving(resolved, flags), calibration_tokens=tokens, local=local)


def read_model(model: Model, store: Store) -> ModelFacts:
    """config.json and tensor headers: from the directory, or from the Hub by ranged reads."""
    directory = local_directory(model)
    if directory is None:
        config, tensors, root = read_headers(model, store=store)
        return ModelFacts(dtypes.with_type(config, tensors), tensors, directory=root)
    files = check_directory(directory, trust_remote_code=model.trust_remote_code)
    config = parse_config(read_regular(directory / CONFIG), str(directory))
    return headers(directory, config, files)


def check_architecture(model: Model, facts: ModelFacts, store: Store) -> None:
    """IntegrityError if the model's tensors are not those that transformers builds from its config.json, for an
    architecture without a table in tensor_names.py. In a child, by headers: no weight is read. Nothing where
    transformers is not installed, or where the model's class comes with the model."""
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


def headers(directory: Path, config: Mapping[str, Any], files: Sequence[str]) -> ModelFacts:
    """A model's facts by its config.json and what its safetensors files begin with."""
    tensors = check_tensors(directory, files, config, str(directory))
    return ModelFacts(dtypes.with_type(config, tensors), tensors, directory=directory)
