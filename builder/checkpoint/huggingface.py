"""Completes ModelOpt's export so that transformers 4.57 and 5 load it. Standard library only."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from builder.architectures import catalog
from builder.checkpoint.layouts import read_json, write_json, write_quant_cfg
from builder.core.safetensors_io import NewTensor, Tensors, write
from builder.formats.declared import MIXED
from builder.model.files import GENERATION, INDEX, parse_config
from builder.tokenizer import files as tokenizer_files


def complete(unified: Path, source: Path) -> None:
    """Makes ModelOpt's export in `unified` load under transformers 4.57 and 5, and readable for other users.

    source: the model's directory. The exported config.json has the form of the transformers version that ran: 5 writes
    the rotary base to `rope_parameters` only, and 4.57 then silently uses 10000.
    """
    config = read_json(unified / "config.json")
    original = parse_config((source / "config.json").read_bytes(), str(source))
    known = catalog.find(original)
    if known:
        config["architectures"] = [known.name]  # transformers writes the name of its own class
    config |= {key: original[key] for key in ("rope_theta", "rope_scaling", "rope_parameters") if key in original}
    config |= _both_rope_spellings(config)
    dtype = config.get("dtype") or config.get("torch_dtype")
    said = unified / "hf_quant_config.json"
    for file, content in ((unified / "config.json", config | {"dtype": dtype, "torch_dtype": dtype}), (said, None)):
        if content is not None or file.is_file():
            write_json(file, _without_marks(read_json(file) if content is None else content))
    _rename(unified, known.renamed if known else {})
    quantization = read_json(said).get("quantization") or {} if said.is_file() else {}
    if quantization.get("quant_algo") == MIXED:
        write_quant_cfg(unified, quantization)
    # The source's files: 4.57 can't load those that transformers 5 writes ("Tokenizer class TokenizersBackend ...").
    tokenizer_files.copy(source, unified)
    if (source / GENERATION).is_file():  # ModelOpt's export turns do_sample on in its copy
        shutil.copyfile(source / GENERATION, unified / GENERATION)
    mode = (unified / "config.json").stat().st_mode
    for path in unified.iterdir():
        if path.is_file():
            path.chmod(mode)  # ModelOpt's safetensors have mode 0600


def _without_marks(value: Any) -> Any:
    """The JSON value with module names as they are meant.

    ModelOpt 0.47 appends a mark to a name while it undoes transformers' renaming, and does not find it again where
    `model` is renamed too: "backbone.embeddings.\x00backbone.pt_name_sentinel" (export/quant_aware_conversion.py,
    build_reverse_name_mapper).
    """
    if isinstance(value, str):
        return value.partition(".\x00")[0]
    if isinstance(value, list):
        return [_without_marks(one) for one in value]
    if isinstance(value, dict):
        return {_without_marks(key): _without_marks(one) for key, one in value.items()}
    return value


def _rename(unified: Path, names: Mapping[str, str]) -> None:
    """Gives tensors the names that TensorRT-LLM reads, {name that transformers writes: name}."""
    for file in sorted(unified.glob("*.safetensors")) if names else ():
        tensors = Tensors(unified, [file])
        if not names.keys() & tensors.keys():
            continue
        made = [NewTensor(names.get(n, n), i.dtype, i.shape, tensors.chunks(n)) for n, i in tensors.items()]
        write(renamed := file.with_suffix(".renamed"), made, {"format": "pt"})
        renamed.replace(file)
    index = unified / INDEX
    if names and index.is_file():
        content = read_json(index)
        content["weight_map"] = {names.get(name, name): file for name, file in content["weight_map"].items()}
        write_json(index, content)


def _both_rope_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta and rope_scaling (transformers 4) and rope_parameters (5), each derived from the other if absent."""
    parameters = dict(config.get("rope_parameters") or {})
    if any(isinstance(value, dict) for value in parameters.values()):  # one part for each kind of layer: Gemma 3
        full = parameters.get("full_attention", {})
        local = parameters.get("sliding_attention", {})
        made = {"rope_theta": full.get("rope_theta"), "rope_local_base_freq": local.get("rope_theta")}
        return {key: value for key, value in made.items() if value is not None and config.get(key) is None}
    theta = config.get("rope_theta") or parameters.pop("rope_theta", None)
    if theta is None:
        return {}
    scaling = {**parameters, **(config.get("rope_scaling") or {})}
    scaling.pop("rope_theta", None)
    scaling["rope_type"] = scaling.get("rope_type") or scaling.get("type") or "default"
    plain = scaling["rope_type"] == "default"
    return {
        "rope_theta": theta,
        "rope_scaling": None if plain else scaling,
        "rope_parameters": {**scaling, "rope_theta": theta},
    }
