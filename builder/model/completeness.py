"""Checks that a source model is complete: its tensors against its index and config.json, by headers alone. Pure.

transformers initializes missing tensors at random and only logs that, so no later stage would notice. Local directories
and models on the Hub are checked alike, the latter before any weight is downloaded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from builder.architectures import catalog
from builder.architectures import names as module_names
from builder.architectures.facts import Architecture
from builder.core.errors import IntegrityError, UnsupportedError
from builder.core.output import listed
from builder.core.safetensors_io import PATCH
from builder.model import config_values, multimodal, quantization_signs, tensor_names
from builder.model.tensor_names import Want

Header = tuple[str, tuple[int, ...]]  # a tensor's dtype and shape
SHOWN = 10  # names in a message
# Prefixes that wrappers leave in every tensor's name, and the wrappers.
WRAPPERS: Mapping[str, str] = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel or DistributedDataParallel",
    "_fsdp_wrapped_module.": "FullyShardedDataParallel",
    "_forward_module.": "Lightning or DeepSpeed",
    "base_model.model.": "PEFT",
    "pretrained_model.": "TRL",
}
# Copies of a buffer that transformers computes itself; it ignores them too.
IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
EXPERT = re.compile(r"(.*\.experts)\.(\d{1,6})\.(.+)")
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


def check(
    config: Mapping[str, Any],
    files: Mapping[str, Mapping[str, Header]],
    index: Mapping[str, str] | None,
    where: str,
    *,
    quantized: bool = False,
) -> dict[str, Header]:
    """The model's tensors, {name: (dtype, shape)}; of a multimodal model, those of its language model.

    files: the header of each safetensors file, {file: {tensor: (dtype, shape)}}. index: {tensor: file}, None without
    one. where: the model's name in messages. IntegrityError, with names, if tensors are missing, unexpected, of another
    shape or stored twice, or if the index and the files disagree; UnsupportedError for a quantized model; UsageError if
    config.json lacks a size that the shapes depend on. quantized: the model is in a layout that can be served; its
    tensors depend on its formats, so they are checked later, with its description (checkpoint/quantized_source.py).
    """
    files = _patched(files, index or {})
    tensors = _merged(files, where)
    if index is not None:
        _check_index(files, index, where)
    tensors = multimodal.language_tensors(config, tensors)
    _check_wrapper(tensors, where)
    if quantized:
        return tensors
    quantization_signs.check_tensors(tensors, where)
    if tensor_names.known(config):
        config_values.require(config, tensor_names.NEEDED, where)
        _check_table(config, tensors, where)
    else:
        _check_layers(config, tensors, where)
        _check_embedding(config, tensors, where)
        _check_experts(config, tensors, where)
    _check_floats(tensors, where)
    return tensors


def names(found: Iterable[str]) -> str:
    """The first SHOWN of these names, for a message."""
    return listed(sorted(found), SHOWN)


def _patched(files: Mapping[str, Mapping[str, Header]], index: Mapping[str, str]) -> Mapping[str, Mapping[str, Header]]:
    """The files without tensors that `builder repair` replaced: the index names its patch for them."""
    if not any(PATCH.fullmatch(file) for file in files):
        return files
    new = {name for name, file in index.items() if PATCH.fullmatch(file)}
    return {
        file: {name: info for name, info in header.items() if name not in new or index[name] == file}
        for file, header in files.items()
    }


def _merged(files: Mapping[str, Mapping[str, Header]], where: str) -> dict[str, Header]:
    counts = Counter(name for header in files.values() for name in header)
    twice = sorted(name for name, count in counts.items() if count > 1)
    if twice:
        holders = [file for file, header in sorted(files.items()) if twice[0] in header]
        raise IntegrityError(
            f"{where} stores {len(twice)} tensor{'s' * (len(twice) > 1)} in more than one file.",
            why=f"{names(twice)}. {twice[0]} is in {' and in '.join(holders)}; only one copy would be loaded.",
            hint="Save the model again with transformers' save_pretrained, into an empty directory.",
        )
    return {name: info for header in files.values() for name, info in header.items()}


def _check_index(files: Mapping[str, Mapping[str, Header]], index: Mapping[str, str], where: str) -> None:
    absent = sorted(f"{name} (not in {file})" for name, file in index.items() if name not in files.get(file, {}))
    unlisted = sorted(f"{name} (in {file})" for file, h in files.items() for name in h if index.get(name) != file)
    if absent or unlisted:
        why = [f"In the index, but not in that file: {names(absent)}."] * bool(absent)
        why += [f"In a file, but not in the index: {names(unlisted)}."] * bool(unlisted)
        raise IntegrityError(
            f"{where}: model.safetensors.index.json and the files disagree on {len(absent) + len(unlisted)} tensors.",
            why="\n".join(why),
            hint="Copy or download the whole model again, all files of the same revision.",
        )


def _check_wrapper(tensors: Mapping[str, Header], where: str) -> None:
    for prefix, wrapper in WRAPPERS.items():
        found = [name for name in tensors if name.startswith(prefix) or f".{prefix}" in name]
        if found:
            raise IntegrityError(
                f"{where} was saved inside a wrapper: {len(found)} of its {len(tensors)} tensors are named {prefix}...",
                why=f"{wrapper} adds this prefix, as in {found[0]}. transformers would not find these weights and "
                "would use random ones.",
                hint="Save the model without its wrapper (model._orig_mod, model.module or merge_and_unload()), with "
                "save_pretrained.",
            )


def _check_table(config: Mapping[str, Any], tensors: Mapping[str, Header], where: str) -> None:
    """Compares all tensors with those that the architecture has for this config.json."""
    found = {name: shape for name, (_, shape) in tensors.items() if not IGNORED.search(name)}
    table = tensor_names.table(config)
    assert table is not None
    norm = f"{table.final_norm}.weight"
    prefix, _, base_norm = norm.partition(".")
    if norm not in found and base_norm in found:
        raise IntegrityError(
            f"{where} holds a base model: the names of its tensors lack the prefix {prefix}., and it has no head.",
            why=f"It has {base_norm} where {config['architectures'][0]} has {norm}.",
            hint="Load it once with transformers' AutoModelForCausalLM, and save that with save_pretrained.",
        )
    _check_layers(config, found, where)
    want = tensor_names.expected(config)
    head, embedding = tensor_names.head(config), tensor_names.embedding(config)
    if config.get("tie_word_embeddings") and head in found:  # many models store the tied head too
        want[head] = want[embedding]
    missing, unexpected = sorted(want.keys() - found.keys()), sorted(found.keys() - want.keys())
    misshapen = {name: found[name] for name in sorted(found.keys() & want.keys()) if found[name] != want[name].shape}
    if missing or unexpected or misshapen:
        raise _incomplete(config, missing, unexpected, misshapen, want, where)


def _incomplete(
    config: Mapping[str, Any],
    missing: Sequence[str],
    unexpected: Sequence[str],
    misshapen: Mapping[str, Sequence[int]],
    want: Mapping[str, Want],
    where: str,
) -> IntegrityError:
    counts = {"missing": len(missing), "unexpected": len(unexpected), "misshapen": len(misshapen)}
    why = [f"Missing: {names(missing)}."] * bool(missing) + [f"Unexpected: {names(unexpected)}."] * bool(unexpected)
    why += [
        f"{name} is {list(shape)}; by config.json it is {list(want[name].shape)} ({want[name].by})."
        for name, shape in list(misshapen.items())[:SHOWN]
    ]
    hint = "Copy or download the whole model again, with the config.json that belongs to it."
    ends = {tensor_names.embedding(config), head := tensor_names.head(config)}
    if list(missing) == [head] and not unexpected:
        hint = f"If the head is tied to the embedding, set tie_word_embeddings to true in config.json. If not: {hint}"
    elif list(misshapen) and set(misshapen) <= ends:
        hint = (
            "Set vocab_size in config.json to the number of rows in the file, or save the model again after "
            "model.resize_token_embeddings(ROWS)."
        )
    return IntegrityError(
        f"{where} is not the {config['architectures'][0]} that its config.json describes: "
        f"{', '.join(f'{count} tensors {what}' for what, count in counts.items() if count)}.",
        why="\n".join(why),
        hint=hint,
    )


def _check_layers(config: Mapping[str, Any], tensors: Iterable[str], where: str) -> None:
    """IntegrityError unless there are num_hidden_layers decoder layers; DeepSeek and GLM may have more, which predict
    further tokens."""
    layers, extra = config.get("num_hidden_layers"), config.get("num_nextn_predict_layers") or 0
    architecture = catalog.of(config)
    numbers = {number for number in (_layer_of(architecture, name) for name in tensors) if number is not None}
    if not layers or not numbers:
        return
    if (absent := next((n for n in range(layers) if n not in numbers), None)) is not None:
        problem = f"its files hold no tensor of layer {absent}"
    elif max(numbers) >= layers + extra:
        problem = f"its files hold layers up to {max(numbers)}"
    else:
        return
    raise IntegrityError(
        f"{where} is not complete: config.json says num_hidden_layers {layers}, but {problem}.",
        why=f"Layers are numbered from 0; the files hold {len(numbers)}. transformers would initialize missing layers "
        "at random and ignore surplus ones.",
        hint="Copy or download the whole model again, with the config.json that belongs to it.",
    )


def _layer_of(architecture: Architecture, name: str) -> int | None:
    """The number of the decoder layer that a tensor belongs to, whatever the layers are called."""
    if architecture.tensors:
        return module_names.layer_of(architecture, name)
    found = LAYER.search(name)
    return int(found[1][:9]) if found else None


def _check_embedding(config: Mapping[str, Any], tensors: Mapping[str, Header], where: str) -> None:
    """For architectures without a table: IntegrityError unless embedding and head have vocab_size rows."""
    rows = config.get("vocab_size")
    shapes = {name: shape for name, (_, shape) in sorted(tensors.items()) if _is_embedding(catalog.of(config), name)}
    wrong = {name: shape for name, shape in shapes.items() if shape[:1] != (rows,)}
    if rows and wrong:
        want = {name: Want((rows, *shape[1:]), "vocab_size rows") for name, shape in wrong.items()}
        raise _incomplete(config, (), (), wrong, want, where)


def _is_embedding(architecture: Architecture, name: str) -> bool:
    module, _, leaf = name.rpartition(".")
    ends = (module_names.is_embedding, module_names.is_head)
    return leaf == "weight" and any(is_end(architecture, module) for is_end in ends)


def _check_experts(config: Mapping[str, Any], tensors: Iterable[str], where: str) -> None:
    """IntegrityError unless all experts have the same tensors, and are as many as config.json says. Checks models that
    store each expert's tensors apart."""
    found: dict[tuple[str, str], set[int]] = {}
    for match in map(EXPERT.match, tensors):
        if match:
            found.setdefault((match[1], match[3]), set()).add(int(match[2]))
    count = config_values.routed_experts(config) or 1 + max((max(numbers) for numbers in found.values()), default=-1)
    numbers = range(count)
    missing = [f"{parent}.{n}.{leaf}" for (parent, leaf), there in found.items() for n in numbers if n not in there]
    extra = [f"{parent}.{n}.{leaf}" for (parent, leaf), there in found.items() for n in there if n not in numbers]
    if missing or extra:
        raise _incomplete(config, missing, extra, {}, {}, where)


def _check_floats(tensors: Mapping[str, Header], where: str) -> None:
    odd = [f"{name} ({dtype})" for name, (dtype, _) in tensors.items() if dtype not in quantization_signs.FLOATS]
    odd = [text for text in odd if not quantization_signs.BUFFERS.search(text.partition(" ")[0])]
    if odd:
        raise UnsupportedError(
            f"{where} has {len(odd)} tensors of a dtype that can't be quantized.",
            why=f"{names(odd)}. Supported dtypes: {', '.join(quantization_signs.FLOATS)}.",
            hint="Load the model with transformers, model.to(torch.bfloat16), and save it with save_pretrained.",
        )
