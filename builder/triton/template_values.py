"""The values that fill the templates of an engine's repository: from the engine's config.json and the recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.core import paths
from builder.core.errors import UnsupportedError
from builder.recipe import schema
from builder.recipe.triton_parameters import text
from builder.tokenizer.sampling_defaults import sampling_defaults
from builder.tokenizer.special_ids import special_ids
from builder.triton import adapter_files, engine_parameters, guided_decoding, sampling_tensors, stream_capacity
from builder.trtllm.compatibility import LOGITS_TYPES

TOKENIZER_DIR = "preprocessing/1/tokenizer"  # relative to the model repository
# Keys of the recipe that are facts, too. The last two matter to the gateway alone.
TEXT_KEYS = ("add_special_tokens", "skip_special_tokens", "parse_special_tokens", "tool_calls", "reasoning")
# Request inputs that tensorrt_llm_bls and ensemble_infer check themselves (see the note in triton-tensors.json).
REQUIRED = ("text_input", "max_tokens")


def template_files(version: str) -> tuple[Path, Path]:
    """The directory of templates for a TensorRT-LLM version, and the file that lists the tensors of its models.

    Templates belong to a minor version, tensors to an exact one. UnsupportedError for a version without either.
    """
    templates = paths.data("triton_templates", ".".join(version.split(".")[:2]))
    tensors = paths.data("configs", "trtllm", version, "triton-tensors.json")
    if not (templates.is_dir() and tensors.is_file()):
        known = sorted(path.parent.name for path in paths.data("configs", "trtllm").glob("*/triton-tensors.json"))
        raise UnsupportedError(
            f"There are no Triton templates for TensorRT-LLM {version}.",
            hint=f"Versions with templates: {', '.join(known)}.",
        )
    return templates, tensors


def text_facts(snapshot: Path, part: schema.Repository) -> dict[str, Any]:
    """What the models and the gateway need to know of texts: special ids and tokens, forms, sampling defaults.

    `snapshot` is the directory of the model's files. IntegrityError if one of them can't be read.
    """
    return {
        **special_ids(snapshot, part.end_ids),
        **{name: getattr(part, name) for name in TEXT_KEYS},
        "sampling_defaults": sampling_defaults(snapshot, part.sampling_defaults),
    }


def template_values(
    engine: str, config: Mapping[str, Any], texts: Mapping[str, Any], part: schema.Repository, *, guided: bool
) -> dict[str, Any]:
    """Every value that the templates use.

    `engine` is the engine's path from the model's directory, `config` its config.json, `texts` what `text_facts` says
    of the model, `part` the recipe's `repository`. `guided`: whether it has guided decoding.
    """
    pretrained, build = config["pretrained_config"], config["build_config"]
    tensors = _tensors(config["version"], pretrained["logits_dtype"])
    tensors = adapter_files.with_dtype(tensors, config)
    defaults = sampling_tensors.by_input(tensors, texts["sampling_defaults"])
    tensors = sampling_tensors.with_defaults(tensors, texts["sampling_defaults"])
    return {
        "max_batch_size": build["max_batch_size"],
        "decoupled": part.decoupled,
        **_processes(part, build["max_batch_size"]),
        "tensors": tensors,
        "required_inputs": [
            {key: value for key, value in entry.items() if key != "optional" or entry["name"] not in REQUIRED}
            for entry in tensors["request"]["input"]
        ],
        "steps": _steps(tensors),
        "tokenizer": {"tokenizer_dir": TOKENIZER_DIR, "skip_special_tokens": text(part.skip_special_tokens)},
        "answers": {
            "exclude_input_in_output": text(part.exclude_input_in_output),
            "add_special_tokens": text(part.add_special_tokens),
        },
        "limits": {**_prompts(config, texts, part), "sampling_defaults": json.dumps(defaults)},
        "engine": engine_parameters.values(engine_parameters.resolve(config, part, engine)),
        "guided": guided_decoding.parameters(guided),
        "bls": {
            "engine_decoupled": text(part.decoupled),
            "exclude_input_in_output": text(part.exclude_input_in_output),
            "preprocessing_model_name": "preprocessing",
            "tensorrt_llm_model_name": "tensorrt_llm",
            **{name: json.dumps(entries) for name, entries in tensors["maps"].items()},
        },
    }


def _processes(part: schema.Repository, max_batch_size: int) -> dict[str, Any]:
    """How many processes each model has, and how many requests run and wait in them."""
    return {
        "queue": {
            "delay_microseconds": part.max_queue_delay_microseconds,
            "size": part.max_queue_size,
            "timeout_microseconds": part.queue_timeout_seconds * 1_000_000,
        },
        "instances": {
            "preprocessing": part.preprocessing_instances,
            "postprocessing": part.postprocessing_instances,
            "bls": part.bls_instances,
        },
        "concurrency": {
            "threads": stream_capacity.threads(max_batch_size),
            "max_queue_size": part.max_queue_size,
            "queue_timeout_seconds": part.queue_timeout_seconds,
            "stall_timeout_seconds": part.stall_timeout_seconds,
        },
    }


def _prompts(config: Mapping[str, Any], texts: Mapping[str, Any], part: schema.Repository) -> dict[str, Any]:
    """How preprocessing reads a prompt, and which it rejects."""
    build = config["build_config"]
    return {
        "add_special_tokens": text(part.add_special_tokens),
        "parse_special_tokens": text(part.parse_special_tokens != "never"),
        "end_ids": json.dumps(texts["end_ids"]),
        "pad_id": texts["pad_id"],
        "vocab_size": config["pretrained_config"]["vocab_size"],
        "max_input_len": build["max_input_len"],
        "max_seq_len": build["max_seq_len"],
        "max_beam_width": build.get("max_beam_width", 1),
        "context_logits": text(bool(build.get("gather_context_logits"))),
    }


def _tensors(version: str, logits_dtype: str) -> dict[str, Any]:
    if logits_dtype not in LOGITS_TYPES:
        raise UnsupportedError(
            f"The engine's logits are {logits_dtype}, and Triton has no such type.",
            hint=f"Build the engine with one of {', '.join(LOGITS_TYPES)}.",
        )
    _, file = template_files(version)
    content = file.read_text(encoding="utf-8").replace("$logits_datatype", LOGITS_TYPES[logits_dtype])
    tensors: dict[str, Any] = json.loads(content)
    return tensors


def _steps(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensor maps of the ensemble's steps. A tensor between two steps is named _ and the output's name."""
    maps = tensors["maps"]
    preprocessed = {entry["name"]: f"_{entry['name']}" for entry in tensors["preprocessing"]["output"]}
    outputs = {entry["name"] for entry in tensors["request"]["output"]} - {"text_output"}
    from_request = {k: v for k, v in maps["tensorrt_llm_from_request"].items() if k != "streaming"}
    between = maps["postprocessing_from_tensorrt_llm"]
    return {
        "preprocessing": {
            "input": {**maps["preprocessing_from_request"], "STREAM": "stream"},
            "output": preprocessed,
        },
        "tensorrt_llm": {
            "input": {
                **{k: preprocessed[v] for k, v in maps["tensorrt_llm_from_preprocessing"].items()},
                **from_request,
            },
            "output": {**{name: f"_{name.upper()}" for name in between.values()}, **{n: n for n in sorted(outputs)}},
        },
        "postprocessing": {
            "input": {k: f"_{v.upper()}" for k, v in between.items()},
            "output": {"OUTPUT": "text_output"},
        },
    }
