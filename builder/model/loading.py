"""Loads a model with transformers from exactly the files that were hashed, and checks that every tensor was used.

transformers (4.57 and 5) initializes missing tensors and those of another shape at random, ignores unexpected ones, and
only logs both. Here each of them is an error. Imports transformers when called.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from builder.core.errors import IntegrityError, UnsupportedError, out_of_memory
from builder.core.safetensors_io import Tensors
from builder.model import dtypes, multimodal, tensor_names
from builder.model.completeness import names
from builder.model.files import CONFIG, GENERATION, json_object, parse_config
from builder.model.hashed_files import SourceFiles
from builder.model.imports import only_needed
from builder.model.source_tensors import open_tensors


def load(job: Mapping[str, Any], *, dtype: Any, **options: Any) -> Any:
    """The source model of a job (`model`, `source`, `trust_remote_code`) as transformers' causal language model.

    dtype, options: passed on to from_pretrained. IntegrityError with the names of all tensors that are missing,
    unexpected or of another shape, or if a file changed since it was hashed; UnsupportedError if transformers can't
    read the model. Models without a table of tensors are built without weights first, so that this is known before any
    weight is read.
    """
    source = SourceFiles.of_job(job)
    source.check_unchanged()
    # transformers rejects contradictory sampling values in it, some only when it saves the quantized model.
    with source.linked(without=[GENERATION, CONFIG]) as directory:
        config = parse_config((source.root / CONFIG).read_bytes(), str(source.root))
        options |= write_config(source.root, directory, config)
        if not tensor_names.known(config):
            mapping = {key: options[key] for key in ("key_mapping",) if key in options}
            check_architecture(directory, source.root, trust_remote_code=job["trust_remote_code"], **mapping)
        model = from_directory(
            directory, source.root, trust_remote_code=job["trust_remote_code"], dtype=dtype, **options
        )
        check_tied(config, source.root)
    _set_end_ids(model, source.root)
    source.check_unchanged()
    model.name_or_path = model.config._name_or_path = str(source.root)  # not that of the links
    return model.eval()


def write_config(root: Path, directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Gives the directory its config.json: the model's own file or, of a multimodal model, that of its language model.
    Returns the further options for from_pretrained."""
    if multimodal.MARK not in config:
        (directory / CONFIG).symlink_to(root.absolute() / CONFIG)
        return {}
    (directory / CONFIG).write_text(json.dumps(multimodal.own_config(config)), encoding="utf-8")
    return {"key_mapping": multimodal.key_mapping()}


def to_quantize(job: Mapping[str, Any], **options: Any) -> Any:
    """The source model in the 16-bit dtype that it is served in (dtypes.py)."""
    import torch

    source = SourceFiles.of_job(job)
    config = parse_config((source.root / CONFIG).read_bytes(), str(source.root))
    if not dtypes.stated(config):
        headers = {name: (info.dtype, info.shape) for name, info in open_tensors(source.root).items()}
        config = dtypes.with_type(config, headers)
    return load(job, dtype=getattr(torch, dtypes.served(config)), **options)


def _set_end_ids(model: Any, directory: Path) -> None:
    """Sets eos_token_id from generation_config.json. Nothing else of that file is used."""
    ends = json_object(directory / GENERATION).get("eos_token_id")
    if ends is not None and getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = ends


def check_tied(config: Mapping[str, Any], directory: Path) -> None:
    """IntegrityError if config.json ties the head to the embedding and the files hold two different ones.

    transformers 4.57 ignores the stored head, 5 keeps it, and a TensorRT-LLM engine uses what was exported.
    """
    if not config.get("tie_word_embeddings"):
        return
    head, embedding, stored = tensor_names.head(config), tensor_names.embedding(config), open_tensors(directory)
    if head not in stored or embedding not in stored:
        return
    pairs = zip(stored.chunks(head), stored.chunks(embedding), strict=False)
    if stored[head].nbytes != stored[embedding].nbytes or any(one != other for one, other in pairs):
        raise IntegrityError(
            f"{directory} sets tie_word_embeddings, but its {head} differs from its {embedding}.",
            why="Either the head was trained separately, or one of the two belongs to another model.",
            hint="If the stored head is the right one, set tie_word_embeddings to false in config.json.",
        )


def check_architecture(directory: Path, shown: Path | str, *, trust_remote_code: bool, **options: Any) -> None:
    """Raises what `load` raises, by the headers alone: transformers builds the model on the meta device, which
    allocates no memory, and reads no weight."""
    from_directory(directory, shown, trust_remote_code=trust_remote_code, dtype="auto", device_map="meta", **options)


def from_directory(directory: Path, shown: Path | str, *, trust_remote_code: bool, **options: Any) -> Any:
    """Loads the model from a directory that holds nothing else. shown: its name in messages."""
    with only_needed():
        from transformers import AutoModelForCausalLM

    with refused(shown), _whole_names(directory) if "key_mapping" in options else nullcontext():
        model, info = AutoModelForCausalLM.from_pretrained(
            str(directory),
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `info` lists them instead of a RuntimeError
            **options,
        )
    if "key_mapping" in options:
        _forget_names(model, options["key_mapping"])
        others = {name for name in Tensors(directory) if multimodal.language_name(name) is None}
        # transformers lists those of the language model under the names that they are mapped to.
        info = {**info, "unexpected_keys": [key for key in _keys(info["unexpected_keys"]) if key not in others]}
    check_loaded(model, info, shown)
    return model


@contextmanager
def _whole_names(directory: Path) -> Iterator[None]:
    """Keeps transformers 4 from adding the base model's prefix to names that `key_mapping` has made complete: it looks
    for the prefix in the names before they are mapped (modeling_utils.py, _get_key_renaming_mapping, 4.57)."""
    from transformers import AutoConfig, AutoModelForCausalLM, __version__

    if not __version__.startswith("4."):
        yield
        return
    kind: Any = AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(directory, local_files_only=True))]
    prefix, kind.base_model_prefix = kind.base_model_prefix, ""
    try:
        yield
    finally:
        kind.base_model_prefix = prefix


def _forget_names(model: Any, mapping: Mapping[str, str]) -> None:
    """Keeps transformers 5 and ModelOpt from giving the multimodal names back when they save: they undo what loading
    did (core_model_loading.py, revert_weight_conversion; modelopt/torch/export/quant_aware_conversion.py)."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is not None:
        kept = [one for one in conversions if not {*getattr(one, "source_patterns", ())} & mapping.keys()]
        model._weight_conversions = [one for one in kept if type(one).__name__ != "PrefixChange"]


@contextmanager
def refused(shown: Path | str) -> Iterator[None]:
    """Turns exceptions of transformers in the block into IntegrityError or UnsupportedError.

    transformers has no class for a model that it can't read: a wrong value in config.json may raise any exception.
    Errors of the machine (memory, disk) pass through unchanged.
    """
    try:
        yield
    except Exception as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if out_of_memory(error) or getattr(error, "errno", None) is not None:
            raise
        if "conversion of the weights" in text:  # 5.x merges the experts of a mixture; some are missing
            raise IntegrityError(
                f"{shown} is not complete: transformers can't merge the tensors of its experts.",
                why=f"{text} The log names them.",
                hint="Copy or download the whole model again, with the config.json that belongs to it.",
            ) from error
        raise UnsupportedError(
            f"transformers has no causal language model for {shown}.",
            why=f"{type(error).__name__}: {text}",
            hint="Choose a decoder that transformers supports, with the config.json that belongs to it. Code that "
            "comes with a model runs only with --trust-remote-code.",
        ) from error


def check_loaded(model: Any, info: Mapping[str, Any], shown: Path | str) -> None:
    """IntegrityError unless every tensor of the model came from the files and every tensor of the files was used.

    info: transformers' loading info, which leaves out tied weights and what the class declares ignorable
    (`_keys_to_ignore_on_load_*`).
    """
    why = [
        f"{label}: {names(_keys(info.get(key, ())))}."
        for key, label in (
            ("missing_keys", "Missing, which transformers initializes at random"),
            ("unexpected_keys", "Unexpected, which transformers ignores"),
            ("mismatched_keys", "Of another shape than the model's"),
            ("error_msgs", "Errors"),
            ("conversion_errors", "Not mergeable"),
        )
        if info.get(key)
    ]
    if why:
        raise IntegrityError(
            f"{shown} is not the complete {type(model).__name__} that its config.json describes.",
            why="\n".join(why),
            hint="Copy or download the whole model again, with the config.json that belongs to it.",
        )


def _keys(found: Iterable[Any]) -> list[str]:
    """Names. transformers 5 gives (name, shape found, shape needed) for mismatched tensors."""
    return [_key(one) for one in found]


def _key(one: Any) -> str:
    if isinstance(one, str):
        return one
    name, *shapes = one
    return f"{name} ({' instead of '.join(str(list(shape)) for shape in shapes)})" if shapes else str(name)
