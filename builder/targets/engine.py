"""The engine target: trtllm-build, then Triton's C++ backend `tensorrtllm`."""

from __future__ import annotations

from pathlib import Path

from builder.architectures import attention, served
from builder.checkpoint import sharding
from builder.checkpoint.layouts import Checkpoint
from builder.core.errors import UsageError
from builder.hub.snapshot import Snapshot
from builder.lora import model_checks, source
from builder.model import config_values, dtypes
from builder.quantize import exclude
from builder.recipe.schema import Resolved
from builder.recipe.target_facts import ENGINE, TargetFacts
from builder.reference import supported
from builder.targets.base import Excluded, Inputs, Launch, Made, Served, Settings, Stages, flags_of
from builder.triton import engine_parameters, repository, stream_capacity
from builder.triton.engine_parameters import Parameter
from builder.triton.template_values import template_files
from builder.trtllm import engine
from builder.trtllm import flags as trtllm_flags
from builder.trtllm.rules import Note

REFERENCE_RUNNER = "reference"  # evaluation.runners: the checkpoint is then run by the reference executor too


class EngineTarget:
    """A TensorRT engine. The reference target shares what does not depend on TensorRT."""

    facts: TargetFacts = ENGINE

    def check_machine(self, resolved: Resolved, *, serving: bool) -> None:
        """UnsupportedError without trtllm-build or the GPUs that it measures kernels on."""
        engine.check_machine(resolved, serving=serving)

    def check_templates(self, tensorrt_llm: str) -> None:
        """UnsupportedError where no Triton templates exist for this version."""
        template_files(tensorrt_llm)

    def check_model(self, inputs: Inputs) -> None:
        """UnsupportedError for a model without a TensorRT-LLM layout, or one that cannot be split as asked."""
        recipe, config = inputs.resolved.recipe, inputs.config
        _check_no_arguments(inputs)
        version = recipe.engine.tensorrt_llm if self.facts.builds_tensorrt else None
        served.check_engine(config, version)
        config_values.require(config, config_values.SHAPE, recipe.model.id)
        attention.rope(config)
        if not self.facts.needs_gpu or REFERENCE_RUNNER in recipe.evaluation.runners:
            supported.check_model(config)
        part, number_format = recipe.engine, recipe.quantization.number_format
        sharding.check(config, part.tp, part.pp, number_format=number_format, gemm=self.facts.builds_tensorrt)
        model_checks.check_fits(inputs.adapters, config)
        model_checks.check_engine(inputs.adapters, config)

    def settings(self, inputs: Inputs) -> Settings:
        """trtllm-build's flags. The parameters that serve the engine are checked against them."""
        _check_no_arguments(inputs)
        found = trtllm_flags.resolve(inputs.resolved, inputs.config, inputs.answers, inputs.adapters)
        self.parameters(inputs, found)
        return found

    def check_excluded(self, excluded: Excluded, settings: Settings) -> None:
        """UnsupportedError for layers that trtllm-build would take for layers in the format of the others."""
        values = {flag.name: flag.value for flag in flags_of(settings)}
        exclude.check_flags(excluded.formats, values, excluded.whole, excluded.architecture)

    def why_output_is_quantized(self, settings: Settings, number_format: str) -> str:
        """The attention kernel's own output format decides, whatever the projection is left in."""
        return exclude.output_must_be_quantized({flag.name: flag.value for flag in flags_of(settings)})

    def returns_logits(self, settings: Settings) -> bool:
        """Only an engine built with gather_context_logits does."""
        return any(flag.name == "gather_context_logits" and flag.value in ("enable", "") for flag in flags_of(settings))

    def notes(self, inputs: Inputs, settings: Settings) -> list[Note]:
        """What the flags cost, what trtllm-build will choose, and what it does not know of the model."""
        found = trtllm_flags.notes(inputs.resolved, inputs.config, flags_of(settings), inputs.answers)
        found += [Note("LoRA", text) for text in model_checks.sizes_note(inputs.adapters)]
        return found + self.warnings(inputs, settings)

    def warnings(self, inputs: Inputs, settings: Settings) -> list[Note]:
        """A sliding window, which an engine ignores; adapters of another model."""
        found = trtllm_flags.window_notes(inputs.config, flags_of(settings))
        adapters = model_checks.notes(inputs.adapters, inputs.resolved.recipe.model.id)
        return found + [Note("LoRA", text) for text in adapters]

    def serve_layout(self, checkpoint: Checkpoint, snapshot: Snapshot, stages: Stages) -> Served:
        """Splits the checkpoint into ranks, builds the engine and renders the repository around it."""
        resolved, wanted, store = stages.inputs.resolved, stages.wanted, stages.store
        part = resolved.recipe.engine
        split = sharding.split_checkpoint(checkpoint, sharding.Parallel(part.tp, part.pp), store=store)
        if "engine" not in wanted:
            return Served()
        built = engine.build(split, flags_of(stages.settings), resolved, store=store)
        if "repository" not in wanted:
            return Served(built)
        adapters = source.fetched(stages.inputs.adapters, store=store)
        return Served(built, repository.render(built, snapshot, resolved.recipe.repository, adapters, store=store))

    def launch(self, inputs: Inputs, settings: Settings, made: Made) -> Launch:
        """trtllm-build's command for the checkpoint in the store, or for one that a placeholder stands for."""
        part = inputs.resolved.recipe.engine
        stage = "ranks" if part.world_size > 1 else "checkpoint"
        found = next((artifact.path for artifact in made.artifacts if artifact.stage == stage), None)
        command = trtllm_flags.command(
            flags_of(settings),
            checkpoint=(found or Path(stage.upper())) / "tensorrt_llm",
            output=Path("ENGINE"),
            timing_cache=engine.timing_cache(made.root, part.tensorrt_llm),
        )
        return Launch(command, None if found else stage.upper())

    def parameters(self, inputs: Inputs, settings: Settings) -> list[Parameter]:
        """Those of the C++ backend."""
        recipe = inputs.resolved.recipe
        mapping = {"world_size": recipe.engine.world_size}
        pretrained = {**inputs.config, "dtype": dtypes.served(inputs.config), "mapping": mapping}
        version = trtllm_flags.load(recipe.engine.tensorrt_llm)
        build = trtllm_flags.build_config(version, flags_of(settings), pretrained)
        return engine_parameters.resolve({"build_config": build, "pretrained_config": pretrained}, recipe.repository)

    def streams(self, inputs: Inputs, max_batch_size: int) -> tuple[int, int, str] | None:
        """What tensorrt_llm_bls carries."""
        part = inputs.resolved.recipe.repository
        needs = stream_capacity.memory(part.bls_instances, int(inputs.config.get("vocab_size") or 0))
        return stream_capacity.streams(part, max_batch_size), needs, stream_capacity.explain(part, max_batch_size)


def _check_no_arguments(inputs: Inputs) -> None:
    recipe = inputs.resolved.recipe
    if recipe.llmapi.args:
        raise UsageError(
            f"llmapi.args are arguments of TensorRT-LLM's LLM class, which the {recipe.target} target does not use.",
            hint="--target llmapi, or leave them out.",
        )
