"""Where a checkpoint's configuration files contradict each other, or say what its tensors do not have."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import translate

from builder.architectures import names
from builder.checkpoint.inspection.layout import CONFIG, Layout

# Layers after the last one that predict several tokens ahead: DeepSeek-V3, GLM-4.5 (num_nextn_predict_layers).
EXTRA_LAYERS = "num_nextn_predict_layers"
_ONE_LAYER = re.compile(r"layers\\?\.\d+")
STEP = 1 << 20


def check(layout: Layout) -> None:
    """Reports what the files say wrongly."""
    for sentence in layout.said.contradictions:
        file, _, what = sentence.partition(" ")
        if file.endswith(".json"):  # what contradicts the tensors is reported for each tensor
            layout.report(file, what.rstrip("."), "configuration")
    _check_excluded(layout)
    _check_layers(layout)
    _check_head(layout)
    scales = layout.cache_scales()
    if scales and not layout.opened.incomplete and not layout.tensorrt_llm and not layout.said.has_cache_scales:
        layout.report(f"{' and '.join(scales)}", "are absent in all layers", "kv-scales-absent")


def _check_excluded(layout: Layout) -> None:
    """Reports patterns and listed layers that name no module. Only those of decoder layers: heads, embeddings, routers
    and other towers are listed whether or not the checkpoint has them."""
    if layout.opened.lost or layout.opened.incomplete or layout.tensorrt_llm:
        return
    known = set(_names(layout))
    for pattern in (*layout.formats.excluded, *layout.formats.layers):
        if not _ONE_LAYER.search(pattern) or pattern in known:
            continue
        expression = re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else translate(pattern))
        if not any(expression.match(name) for name in known):
            layout.report(pattern, "matches no layer of the checkpoint", "excludes-nothing")


def _names(layout: Layout) -> Iterator[str]:
    """What the configuration may call the modules that are there: by name, alias, fused name, and those around them."""
    for module in {name.rpartition(".")[0] for name in layout.tensors}:
        fused = layout.fused(module)
        for name in (module, *layout.formats.aliases(module), *([fused] if fused else [])):
            yield name
            while name := name.rpartition(".")[0]:
                yield name


def _check_layers(layout: Layout) -> None:
    count = layout.config.get("num_hidden_layers")
    if layout.tensorrt_llm or not isinstance(count, int):
        return
    numbers = {n for name in layout.tensors if (n := names.layer_of(layout.architecture, name)) is not None}
    if numbers and max(numbers) >= count + int(layout.config.get(EXTRA_LAYERS) or 0):
        what = f"says num_hidden_layers {count}; the tensors have {max(numbers) + 1} layers"
        layout.report(CONFIG, what, "layer-count")


def _check_head(layout: Layout) -> None:
    """With tied weights transformers takes the embedding for the output layer, whatever the file holds."""
    if layout.tensorrt_llm or not layout.config.get("tie_word_embeddings") or not layout.names:
        return
    head, embedding = f"{layout.names.head}.weight", f"{layout.names.embedding}.weight"
    if head not in layout.tensors or embedding not in layout.tensors:
        return
    one, two = layout.tensors.stored(head), layout.tensors.stored(embedding)
    same = len(one) == len(two) and all(one[n : n + STEP] == two[n : n + STEP] for n in range(0, len(one), STEP))
    if not same:
        layout.report(head, f"differs from {embedding}; config.json says tie_word_embeddings", "tied-head")
