"""The one way a model is loaded in transformers: from exactly the files that were hashed, every tensor in its place.

transformers (4.57 and 5) fills missing or misshapen tensors with random numbers, leaves out those it does not expect,
and only logs both. Here each of them is an error. Imports transformers when called.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.safetensors_io import Tensors
from builder.model import dtypes, tensor_names
from builder.model.completeness import names
from builder.model.files import CONFIG, GENERATION, json_object, parse_config
from builder.model.hashed_files import SourceFiles


def load(job: Mapping[str, Any], *, dtype: Any, **options: Any) -> Any:
    """The source model of a job (`model`, `source`, `trust_remote_code`) as transformers' causal language model.

    IntegrityError with the names of all tensors that are missing, unexpected or misshapen, or if a file changed since
    it was hashed; UnsupportedError if transformers can't read the model at all. Architectures without a table in
    tensor_names.py are put together without weights first, so that this is known before any weight is read.
    """
    source = SourceFiles.of_job(job)
    source.check_unchanged()
    # transformers rejects sampling values that do not fit together, some only when it saves the quantized model.
    with source.alone(without=[GENERATION]) as directory:
        config = parse_config((directory / CONFIG).read_bytes(), str(source.root))
        if not tensor_names.known(config):
            check_architecture(directory, source.root, trust_remote_code=job["trust_remote_code"])
        model = from_directory(
            directory, source.root, trust_remote_code=job["trust_remote_code"], dtype=dtype, **options
        )
        check_tied(config, directory, source.root)
    _set_end_ids(model, source.root)
    source.check_unchanged()
    model.name_or_path = model.config._name_or_path = str(source.root)  # not the directory of links
    return model.eval()


def to_quantize(job: Mapping[str, Any], **options: Any) -> Any:
    """The source model in the 16-bit type that it is served in (weight_types.py)."""
    import torch

    source = SourceFiles.of_job(job)
    config = parse_config((source.root / CONFIG).read_bytes(), str(source.root))
    if not dtypes.stated(config):
        files = [source.root / name for name in sorted(source.files) if name.endswith(".safetensors")]
        headers = {name: (info.dtype, info.shape) for name, info in Tensors(source.root, files).items()}
        config = dtypes.with_type(config, headers)
    return load(job, dtype=getattr(torch, dtypes.served(config)), **options)


def _set_end_ids(model: Any, directory: Path) -> None:
    """The end ids of generation_config.json, all that is read of it here."""
    ends = json_object(directory / GENERATION).get("eos_token_id")
    if ends is not None and getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = ends


def check_tied(config: Mapping[str, Any], directory: Path, shown: Path) -> None:
    """IntegrityError if the model's head is its embedding by config.json, and something else in the files: transformers
    4.57 drops the head that is stored, 5 keeps it, and a TensorRT-LLM engine takes what was exported."""
    if not config.get("tie_word_embeddings"):
        return
    head, embedding, stored = tensor_names.head(config), tensor_names.embedding(config), Tensors(directory)
    if head not in stored or embedding not in stored:
        return
    pairs = zip(stored.chunks(head), stored.chunks(embedding), strict=False)
    if stored[head].nbytes != stored[embedding].nbytes or any(one != other for one, other in pairs):
        raise IntegrityError(
            f"{shown} says tie_word_embeddings, and its {head} differs from its {embedding}.",
            why="Either the head was trained by itself, or one of the two is left from another model.",
            hint="Set tie_word_embeddings to false in config.json if the head that is stored is the right one.",
        )


def check_architecture(directory: Path, shown: Path | str, *, trust_remote_code: bool) -> None:
    """Raises as `load` does, by the headers alone: transformers builds the model on the meta device, which has no
    memory behind it, and reads no weight."""
    from_directory(directory, shown, trust_remote_code=trust_remote_code, dtype="auto", device_map="meta")


def from_directory(directory: Path, shown: Path | str, *, trust_remote_code: bool, **options: Any) -> Any:
    """The model in a directory that holds nothing else; `shown` is its name in messages."""
    from transformers import AutoModelForCausalLM

    with refused(shown):
        model, info = AutoModelForCausalLM.from_pretrained(
            str(directory),
            local_files_only=True,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are listed, by `info`, instead of in a RuntimeError
            **options,
        )
    check_loaded(model, info, shown)
    return model


@contextmanager
def refused(shown: Path | str) -> Iterator[None]:
    """Turns what transformers raises while it reads a model into an error of ours. It has no class for that: a wrong
    value in config.json may end in any exception. Errors of the machine (memory, disk) pass through."""
    try:
        yield
    except Exception as error:
        text = (str(error).strip().splitlines() or [type(error).__name__])[0]
        machine = isinstance(error, MemoryError) or getattr(error, "errno", None) is not None
        if machine or "out of memory" in text or "DefaultCPUAllocator" in text:
            raise
        if "conversion of the weights" in text:  # 5.x joins a mixture's experts, and lacks some
            raise IntegrityError(
                f"{shown} is not whole: transformers can't join its experts' tensors.",
                why=f"{text} The log shows which.",
                hint="Copy or download the whole model again, with the config.json that belongs to it.",
            ) from error
        raise UnsupportedError(
            f"transformers has no causal language model for {shown}.",
            why=f"{type(error).__name__}: {text}",
            hint="Choose a decoder that transformers knows, with the config.json that belongs to it; code that comes "
            "with a model is run with --trust-remote-code alone.",
        ) from error


def check_loaded(model: Any, info: Mapping[str, Any], shown: Path | str) -> None:
    """IntegrityError unless every tensor of the model came from the files, and every tensor of the files went into it.

    transformers has already taken out of `info` what the class declares ignorable (`_keys_to_ignore_on_load_*`) and
    tied weights.
    """
    why = [
        f"{label}: {names(_keys(info.get(key, ())))}."
        for key, label in (
            ("missing_keys", "Missing, which transformers fills with random numbers"),
            ("unexpected_keys", "Unexpected, which transformers leaves out"),
            ("mismatched_keys", "Of another shape than the model's"),
            ("error_msgs", "Errors"),
            ("conversion_errors", "Not to be joined"),
        )
        if info.get(key)
    ]
    if why:
        raise IntegrityError(
            f"{shown} is not the whole {type(model).__name__} that its config.json describes.",
            why="\n".join(why),
            hint="Copy or download the whole model again, with the config.json that belongs to it.",
        )


def _keys(found: Iterable[Any]) -> list[str]:
    """Names; 5 has (name, shape found, shape wanted) of mismatched ones."""
    return [_key(one) for one in found]


def _key(one: Any) -> str:
    if isinstance(one, str):
        return one
    name, *shapes = one
    return f"{name} ({' instead of '.join(str(list(shape)) for shape in shapes)})" if shapes else str(name)
