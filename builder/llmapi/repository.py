"""Checkpoint -> Repository for the llmapi target: a python model around TensorRT-LLM's LLM, and its model.yaml."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from builder.checkpoint.layouts import Checkpoint, hf_quant_config, read_json
from builder.core import paths
from builder.core.errors import IntegrityError
from builder.core.store import Store, library_versions, sources_digest
from builder.formats import kv_cache
from builder.hub.snapshot import Snapshot
from builder.llmapi import arguments as llmapi_arguments
from builder.llmapi import guided_decoding, lora
from builder.llmapi import versions as llmapi_versions
from builder.llmapi.arguments import Argument
from builder.recipe import schema
from builder.recipe.schema import Resolved
from builder.triton import model_config
from builder.triton.repository import Repository
from builder.triton.template_values import text_facts
from builder.trtllm import references

MODEL = "tensorrt_llm"  # upstream's name of it, which clients know
TEMPLATE = paths.data("triton_templates", "llmapi", MODEL)
TENSORS = paths.data("configs", "trtllm", "llmapi-tensors.json")
QUEUE = ("max_queue_size", "queue_timeout_seconds", "stall_timeout_seconds")  # keys of the recipe, and parameters
HEADER = (
    "# Arguments of tensorrt_llm.LLM, and what Triton's side reads (triton_config). `builder plan` tells why each.\n"
)


def render(
    checkpoint: Checkpoint, snapshot: Snapshot, arguments: Sequence[Argument], resolved: Resolved, *, store: Store
) -> Repository:
    """The model repository that serves this checkpoint's Hugging Face layout."""
    adapters = lora.digests({argument.name: argument.value for argument in arguments})
    ingredients = {
        "target": "llmapi",
        "checkpoint": checkpoint.digest,
        "checkpoint_path": references.relative(store.place(checkpoint.unified), store.root),
        "snapshot": snapshot.digest,
        "arguments": llmapi_arguments.tree(arguments),
        "triton_config": [vars(one) for one in llmapi_arguments.triton_config(resolved.recipe.repository)],
        **({"adapters": adapters} if adapters else {}),
        "tensorrt_llm": resolved.recipe.engine.tensorrt_llm,
        "penalties": llmapi_versions.load(resolved.recipe.engine.tensorrt_llm).penalties,
        "part": resolved.recipe.repository.model_dump(mode="json"),
        "libraries": library_versions("jinja2", "pyyaml"),
        "sources": sources_digest(
            "builder/llmapi/repository.py", "builder/triton/repository.py", "builder/triton/model_config.py",
            "builder/model/files.py", "builder/model/multimodal.py", "builder/tokenizer/special_ids.py",
            "builder/tokenizer/sampling_defaults.py", "builder/triton/template_values.py", "builder/grammar",
            "builder/llmapi/guided_decoding.py", "builder/triton/guided_decoding.py",
            "builder/trtllm/references.py", TEMPLATE, model_config.MACROS, TENSORS,
        ),
    }  # fmt: skip

    def make(directory: Path) -> Mapping[str, Any]:
        facts = write(directory / "models", checkpoint.unified.resolve(), snapshot.path, arguments, resolved)
        snapshot.source.check_unchanged()  # the tokenizer is copied from it
        return {**facts, "arguments": [vars(argument) for argument in arguments]}

    artifact = store.stage("repository", ingredients, make)
    return Repository(artifact.path, artifact.digest, artifact.facts)


def write(
    models: Path, unified: Path, snapshot: Path, arguments: Sequence[Argument], resolved: Resolved
) -> dict[str, Any]:
    """Renders the model into `models`, checks it, and returns the facts that a client needs.

    IntegrityError if the checkpoint contradicts the arguments.
    """
    check_checkpoint(unified, arguments)
    part, tensors = resolved.recipe.repository, json.loads(TENSORS.read_text(encoding="utf-8"))
    facts = llmapi_versions.load(resolved.recipe.engine.tensorrt_llm)
    texts = _text_facts(snapshot, part, facts)
    switches = {
        "exclude_input_in_output": part.exclude_input_in_output,
        "penalties": facts.penalties,
        "add_special_tokens": part.add_special_tokens,
        "skip_special_tokens": part.skip_special_tokens,
        "parse_special_tokens": part.parse_special_tokens != "never",
    }
    parameters = {name: str(value).lower() for name, value in switches.items()}
    parameters["sampling_defaults"] = json.dumps(texts["sampling_defaults"])
    parameters["vocab_size"] = str(read_json(unified / "config.json")["vocab_size"])
    parameters["end_ids"] = json.dumps(texts["end_ids"])
    for name in QUEUE:
        parameters[name] = str(getattr(part, name))
    parameters["tensorrt_llm"] = resolved.recipe.engine.tensorrt_llm  # compatibility.py compares it
    values = {"decoupled": part.decoupled, "tensors": tensors, "parameters": parameters}
    directory = models / MODEL / "1"
    directory.mkdir(parents=True)
    guided = {}
    if part.guided_decoding:
        size = int(parameters["vocab_size"])
        guided["guided_decoding"] = guided_decoding.write(models / MODEL, snapshot, texts["end_ids"], size)
    (models / MODEL / "config.pbtxt").write_text(model_config.render(TEMPLATE, values), encoding="utf-8")
    shutil.copyfile(TEMPLATE / "1" / "model.py", directory / "model.py")
    path = references.relative(unified, models / MODEL)
    (directory / "model.yaml").write_text(model_yaml(path, arguments, part), encoding="utf-8")
    model_config.check(models, max_batch_size=0, decoupled=part.decoupled)
    made = _facts(unified, texts, llmapi_arguments.tree(arguments), resolved, tensors["names"])
    return {**made, **guided, "checkpoint": references.relative(unified, models.parent)}


def _text_facts(snapshot: Path, part: schema.Repository, facts: llmapi_versions.Facts) -> dict[str, Any]:
    """Without the penalties of generation_config.json for a version whose sampler has none."""
    texts = text_facts(snapshot, part)
    ignored = () if facts.penalties else llmapi_arguments.PENALTIES
    kept = {name: value for name, value in texts["sampling_defaults"].items() if name not in ignored}
    return {**texts, "sampling_defaults": kept}


def model_yaml(path: str, arguments: Sequence[Argument], part: schema.Repository) -> str:
    """The text of model.yaml. triton_config is as in upstream's model.py, so that either can read it.

    `path`: the checkpoint's, from the model's directory.
    """
    own = {one.name: yaml.safe_load(one.value) for one in llmapi_arguments.triton_config(part)}
    content = {
        "model": path,
        "backend": "pytorch",
        **llmapi_arguments.tree(arguments),
        "triton_config": own,
    }
    return HEADER + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=1 << 16)


def check_checkpoint(unified: Path, arguments: Sequence[Argument]) -> None:
    """IntegrityError if kv_cache_config.dtype contradicts hf_quant_config.json; upstream fails on it when it loads."""
    quantization = hf_quant_config(unified).get("quantization") or {}
    said = quantization.get("kv_cache_quant_algo")
    asked = next(argument.value for argument in arguments if argument.name == "kv_cache_config.dtype")
    if kv_cache.get(asked).quant_algo != said:
        raise IntegrityError(
            f"The checkpoint's KV cache is in {said}, and kv_cache_config.dtype is {asked}.",
            why=f"{unified / 'hf_quant_config.json'}",
            hint="Quantize again: --force quantize",
        )


def _facts(
    unified: Path,
    texts: Mapping[str, Any],
    arguments: Mapping[str, Any],
    resolved: Resolved,
    names: Mapping[str, str],
) -> dict[str, Any]:
    """As repository.py's. `names` are this model's for the other targets' inputs; no tensor has a batch dimension.

    A decoupled model takes no `infer` (Triton answers 501), one that is not can't stream.
    """
    part = resolved.recipe.repository
    adapters = [Path(path).name for path in (arguments.get("lora_config") or {}).get("lora_dir") or ()]
    return {
        "target": "llmapi",
        "models": {"generate": MODEL, ("stream" if part.decoupled else "infer"): MODEL},
        "names": names,
        "batched": False,
        "required": ["text_input"],
        "decoupled": part.decoupled,
        **{name: arguments[name] for name in ("max_batch_size", "max_input_len", "max_seq_len")},
        "vocab_size": read_json(unified / "config.json").get("vocab_size"),
        "end_id": texts["end_ids"][0] if texts["end_ids"] else None,
        **texts,
        "parameters": [vars(one) for one in llmapi_arguments.triton_config(part)],
        **({"adapters": adapters} if adapters else {}),
        "tensorrt_llm": resolved.recipe.engine.tensorrt_llm,
        "world_size": resolved.recipe.engine.world_size,
    }
