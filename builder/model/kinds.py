"""Rejects models other than text decoders: adapters, other file formats, multimodal and encoder models. Pure.

Runs before all other checks, so that a message says what the model is and not which file or key it lacks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any

from builder.core.errors import UnsupportedError, UsageError
from builder.model import multimodal

# How transformers names classes that decode token by token; encoder-decoders and multimodal models have other names.
CAUSAL = ("ForCausalLM", "LMHeadModel")
ADAPTER = "adapter_config.json"  # PEFT's save_pretrained
# Files of other formats: what they are, and what to do. Looked for only if config.json is missing.
OTHER_FORMATS = (
    ("model_index.json", "a diffusers pipeline", "Give a text model, such as Qwen/Qwen3-8B."),
    ("*.gguf", "a GGUF model", "Give the model that it was converted from, in the format of transformers."),
    ("params.json", "a model in the format of its publisher", "Give the version that was published for transformers."),
    ("model_config.yaml", "a NeMo model", "Export it to the Hugging Face format first."),
    ("*.onnx", "an ONNX model", "Give the model that it was exported from, in the format of transformers."),
)
# Keys that only multimodal models have in config.json: those of transformers' classes, and of models that bring their
# own code (LLaVA, Phi-4 multimodal, InternVL, MiniCPM-V, Qwen-VL).
MULTIMODAL = (
    "vision_config", "audio_config", "video_config", "image_token_id", "image_token_index", "audio_token_id",
    "vision_start_token_id", "mm_vision_tower", "vision_tower", "mm_projector_type", "audio_processor", "embd_layer",
    "img_processor", "visual", "visual_tokenizer_config", "thinker_config", "perceiver_config", "speech_config",
)  # fmt: skip
OTHER_TASKS: Mapping[str, str] = {
    "ForSequenceClassification": "it classifies texts",
    "ForTokenClassification": "it classifies tokens",
    "ForQuestionAnswering": "it finds answers in a text",
    "ForMaskedLM": "it fills gaps in a text",
    "ForRewardModel": "it scores texts",
    "Model": "it has no language model head, like embedding models",
}
TEXT_MODEL = "Give a decoder-only text model, such as Qwen/Qwen3-8B."


def check_names(names: Collection[str], where: str) -> None:
    """UsageError or UnsupportedError if the files of a directory without config.json show that it is something else."""
    if ADAPTER in names:
        raise adapter(where)
    for pattern, kind, hint in OTHER_FORMATS:
        found = sorted(name for name in names if fnmatchcase(name, pattern))
        if found:
            raise UnsupportedError(
                f"{where} is {kind}; only models in the format of transformers are supported.",
                why=f"It has {', '.join(found[:3])} and no config.json.",
                hint=hint,
            )


def adapter(where: str) -> UsageError:
    """The error for a LoRA or another PEFT adapter, with or without a config.json beside it."""
    return UsageError(
        f"{where} is an adapter (LoRA), not a complete model.",
        why=f"{ADAPTER} is PEFT's file: the directory holds only the weights that training changed, without the base "
        "model.",
        hint="Merge it into its base model and give that directory. With peft: "
        "AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(DIRECTORY); then copy "
        "the tokenizer files there.",
    )


def check_config(config: Mapping[str, Any], where: str) -> None:
    """UnsupportedError unless config.json describes a causal language model, or was taken out of a multimodal model
    (multimodal.py)."""
    name = (config.get("architectures") or [""])[0]
    found = [key for key in MULTIMODAL if config.get(key) not in (None, False, {}, [])]
    if found or (name.endswith("ForConditionalGeneration") and "text_config" in config):
        sign = f"its config.json has {', '.join(found[:3])}" if found else "its config.json has a text_config"
        raise UnsupportedError(
            f"{where} is a multimodal model ({name or 'no architecture named'}), and its language model can't be taken "
            "alone.",
            why=f"It takes more than text: {sign}. Only text is served, and language models are taken out of these: "
            f"{', '.join(multimodal.known())}.",
            hint=f"{TEXT_MODEL} This ends here: no flag makes this model work.",
        )
    if config.get("is_encoder_decoder"):
        raise UnsupportedError(
            f"{where} is an encoder-decoder model ({name or 'no architecture named'}), not a decoder-only one.",
            why="is_encoder_decoder is true in its config.json.",
            hint=TEXT_MODEL,
        )
    if not name.endswith(CAUSAL):
        task = next((text for end, text in OTHER_TASKS.items() if name.endswith(end)), "")
        raise UnsupportedError(
            f"{where} is not a causal language model.",
            why=f"Its config.json names the architecture {name or '(none)'}{': ' + task if task else ''}. The names "
            f"of causal language models end in {' or '.join(CAUSAL)}.",
            hint=TEXT_MODEL,
        )
