"""The llmapi target: a Python model in Triton around TensorRT-LLM's LLM class. There is no engine."""

from __future__ import annotations

from builder.checkpoint.layouts import Checkpoint
from builder.core.errors import UnsupportedError
from builder.formats.registry import BF16
from builder.hub.snapshot import Snapshot
from builder.llmapi import arguments, repository
from builder.model import config_values
from builder.quantize import exclude
from builder.recipe.schema import Resolved
from builder.recipe.target_facts import LLMAPI, TargetFacts
from builder.targets.base import Excluded, Inputs, Launch, Made, Served, Settings, Stages, arguments_of
from builder.triton.engine_parameters import Parameter
from builder.trtllm.rules import Note


class LlmApiTarget:
    """TensorRT-LLM's LLM API, which loads the checkpoint's Hugging Face layout."""

    facts: TargetFacts = LLMAPI

    def check_machine(self, resolved: Resolved, *, serving: bool) -> None:
        """UnsupportedError without TensorRT-LLM, which only serving needs."""
        if serving:
            arguments.check_machine(resolved)

    def check_templates(self, tensorrt_llm: str) -> None:
        """One template serves all versions."""

    def check_model(self, inputs: Inputs) -> None:
        """UnsupportedError for a model that the PyTorch backend does not serve on this card."""
        arguments.check_card(inputs.resolved)
        _check_cache(inputs)
        config_values.require(inputs.config, config_values.SHAPE, inputs.resolved.recipe.model.id)
        arguments.check_model(inputs.resolved, inputs.config)

    def settings(self, inputs: Inputs) -> Settings:
        """Arguments of the LLM class."""
        return arguments.resolve(inputs.resolved, inputs.config)

    def check_excluded(self, excluded: Excluded, settings: Settings) -> None:
        """UnsupportedError for layers in FP8 that the LLM class would load or feed in another format."""
        exclude.check_llm_class(excluded.formats, excluded.known, excluded.whole, excluded.architecture)

    def why_output_is_quantized(self, settings: Settings, number_format: str) -> str:
        """The LLM class takes q_proj's format for the attention's output, which matters where it is FP8."""
        return exclude.BY_Q_PROJ if number_format == "fp8" else ""

    def returns_logits(self, settings: Settings) -> bool:
        """The LLM class returns them to each request that asks."""
        return True

    def notes(self, inputs: Inputs, settings: Settings) -> list[Note]:
        """What is left to know about these arguments."""
        return arguments.notes(inputs.resolved, arguments_of(settings))

    def warnings(self, inputs: Inputs, settings: Settings) -> list[Note]:
        """None: the LLM class reads sliding_window."""
        return []

    def serve_layout(self, checkpoint: Checkpoint, snapshot: Snapshot, stages: Stages) -> Served:
        """Renders the repository around the checkpoint itself."""
        rendered = repository.render(
            checkpoint, snapshot, arguments_of(stages.settings), stages.inputs.resolved, store=stages.store
        )
        return Served(repository=rendered)

    def launch(self, inputs: Inputs, settings: Settings, made: Made) -> Launch:
        """The model.yaml, with a placeholder for the checkpoint."""
        part = inputs.resolved.recipe.repository
        text = repository.model_yaml("CHECKPOINT/unified", arguments_of(settings), part)
        return Launch(model_yaml=text)

    def parameters(self, inputs: Inputs, settings: Settings) -> list[Parameter]:
        """What model.yaml has under triton_config."""
        return arguments.triton_config(inputs.resolved.recipe.repository)

    def streams(self, inputs: Inputs, max_batch_size: int) -> tuple[int, int, str] | None:
        """No limit: the LLM API's own server carries them."""
        return None


def _check_cache(inputs: Inputs) -> None:
    """UnsupportedError for a quantized KV cache beside weights that are not quantized."""
    part = inputs.resolved.recipe.quantization
    if part.number_format is BF16 and part.cache_format.quantized:
        raise UnsupportedError(
            f"--target llmapi takes no {part.cache_format.title} beside weights in BF16.",
            why="TensorRT-LLM's LLM class rejects a checkpoint whose hf_quant_config.json has no quant_algo "
            "(tensorrt_llm/llmapi/llm_utils.py), and without that file finds no scales of the cache.",
            hint="--kv-cache-dtype auto",
        )
