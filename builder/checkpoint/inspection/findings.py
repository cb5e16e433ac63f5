"""What an inspection can find in a checkpoint: kinds of findings, what each does to answers, and what helps. Pure.

Sources: "the LLM class" is TensorRT-LLM's, whose NVFP4LinearMethod.load_weight_scales asserts that layers it joins have
one input_scale and one weight_scale_2 (_torch/modules/linear.py@00bbf71e). load_expert_fc31_alpha_nvfp4 asserts it for
the experts (_torch/modules/fused_moe/quantization.py; TensorRT-LLM #6569 has checkpoints that fail there).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from builder.core.errors import IntegrityError

Severity = Literal["error", "warning"]
CHECKPOINT = "CHECKPOINT"  # stands for the inspected directory in a fix


@dataclass(frozen=True)
class Kind:
    """A kind of finding.

    title: for people. effect: on answers. fix: for a checkpoint from anywhere; CHECKPOINT is its directory. fix_here:
    where this build has just made the checkpoint; "" where it is the same.
    """

    title: str
    effect: str
    fix: str
    fix_here: str = ""
    severity: Severity = "error"


FETCH = "Fetch or copy the checkpoint again."
REPAIR = f"builder repair {CHECKPOINT}"
REPAIR_FIRST = "Repair the Hugging Face layout that it was made from (`builder repair`), and build from that."
QUANTIZE = "Quantize the model again."
SOURCE = "Check the source model: fetch it again, or take another revision."
AGAIN = "Quantize again (`--force quantize`); if it remains, report it with the model's name."
OTHER_DATA = "Quantize again with other calibration rows (`--calib-data`)."
KINDS: Mapping[str, Kind] = {
    # Files.
    "truncated": Kind("a file is cut off", "Loaders stop, or read bytes that are not the tensor's.", FETCH),
    "damaged": Kind("a file is damaged", "Loaders can't read the file.", FETCH),
    "overlap": Kind(
        "tensors share bytes, or leave a gap",
        "Layers compute with another layer's numbers.",
        f"{FETCH} If it is the same, the tool that wrote it is at fault.",
    ),
    "index": Kind(
        "the index and the files disagree",
        "Loaders that follow the index don't find these tensors, or take others.",
        FETCH,
    ),
    "index-size": Kind(
        "the index states another size",
        "None for answers: loaders use the number to plan memory.",
        "Nothing needs to be done. If files were exchanged by hand, fetch the checkpoint again.",
        severity="warning",
    ),
    "missing-file": Kind("a file is missing", "The layers in it can't be loaded.", "Fetch the missing file."),
    "duplicate": Kind(
        "a tensor is in two files",
        "Which of the two is used depends on the loader.",
        "Remove the file that the index does not name, or fetch the checkpoint again.",
    ),
    # Configuration.
    "configuration": Kind(
        "configuration files contradict each other",
        "Servers that read different files run different models.",
        "Correct the file that is wrong, or fetch the checkpoint again.",
        AGAIN,
    ),
    "excludes-nothing": Kind(
        "a pattern matches no layer",
        "None, unless a layer was meant to stay unquantized and is not.",
        "Correct or remove the pattern if it names a layer of this model.",
        severity="warning",
    ),
    "layer-count": Kind(
        "num_hidden_layers is not the number of layers",
        "Servers skip layers, or don't start.",
        "Correct num_hidden_layers in config.json, or fetch the checkpoint again.",
        AGAIN,
    ),
    "tied-head": Kind(
        "a tied output layer differs from the embedding",
        "Loaders that honour tie_word_embeddings ignore the output layer, others use it: logits differ.",
        "Set tie_word_embeddings to false in config.json if the output layer is the right one, else remove it.",
        AGAIN,
    ),
    "kv-scales-absent": Kind(
        "an FP8 KV cache without scales",
        "Servers use 1.0: keys and values above 448 are cut off.",
        "Serve with --kv-cache-dtype auto, or calibrate them: builder build --model CHECKPOINT --calibrate-scales",
        severity="warning",
    ),
    # Form.
    "missing": Kind("a tensor is missing", "The layer can't be loaded.", FETCH, AGAIN),
    "missing-scale": Kind("a scale is missing", "The layer can't be loaded, or computes with 1.", REPAIR, AGAIN),
    "dtype": Kind(
        "a tensor has another dtype",
        "Its bytes are read as other numbers, or it can't be loaded.",
        "Correct the configuration if it names the wrong format for this layer; else quantize the model again.",
        AGAIN,
    ),
    "shape": Kind("a tensor has another shape", "The layer can't be loaded.", FETCH, AGAIN),
    "unexpected": Kind(
        "a tensor belongs to nothing",
        "Loaders ignore it: what it should do is not done.",
        "Check that config.json is this model's. If it is, the tensor can stay.",
        severity="warning",
    ),
    "orphan-scale": Kind(
        "a scale without its weight",
        "The layer can't be loaded, or computes with another weight than the scale was made for.",
        FETCH,
        AGAIN,
    ),
    "quantized-head": Kind(
        "the output layer is quantized", "TensorRT-LLM reads it as unquantized.", "Quantize without lm_head.", AGAIN
    ),
    "unquantized": Kind(
        "nothing is quantized", "Servers read the weights as another format.", "Correct the configuration.", AGAIN
    ),
    # Values.
    "not-finite": Kind("NaN or Inf", "One NaN makes every logit NaN.", f"{FETCH} If it is the same: {SOURCE}", SOURCE),
    "input-scale": Kind(
        "an input scale is not a scale",
        "The layer's inputs become NaN, zero or noise; one NaN makes every logit NaN.",
        f"{REPAIR} (or calibrate: builder build --model {CHECKPOINT} --calibrate-scales)",
        OTHER_DATA,
    ),
    "kv-scale": Kind(
        "a KV cache scale is not a scale",
        "Keys or values become NaN, zero or noise from the first token on.",
        f"{REPAIR} (or serve with --kv-cache-dtype auto)",
        f"{OTHER_DATA} Or leave the cache unquantized: --kv-cache-dtype auto",
    ),
    "weight-scale": Kind(
        "a weight's global scale is not a scale",
        "The layer's weights become NaN, zero or noise.",
        REPAIR,
        SOURCE,
    ),
    "block-scales": Kind(
        "block scales are NaN, negative or zero",
        "The blocks' weights are NaN, have the wrong sign or are lost.",
        f"{FETCH} If it is the same, quantize the model again: block scales can't be recovered.",
        AGAIN,
    ),
    "zero": Kind(
        "a weight is all zero",
        "The layer outputs nothing.",
        f"{FETCH} If the source model's weight is zero too, quantize again with --keep-bf16 for this layer: "
        "calibrating again does not help.",
        AGAIN,
    ),
    "hole": Kind(
        "a part of a weight is zero",
        "Outputs of the layer are lost, unless they are zero in the model too.",
        f"{FETCH} A file that was not written to its end has such holes; padded and pruned models have them too.",
        severity="warning",
    ),
    "identical": Kind(
        "two layers hold the same bytes",
        "One of the two layers is lost, unless the model repeats layers on purpose.",
        "Compare with the source model. Self-merged models repeat layers: then it is right.",
        severity="warning",
    ),
    # Scales compared with each other.
    "unequal": Kind(
        "scales of layers that are served as one differ",
        "TensorRT-LLM's LLM class stops at an assertion; other servers use one of them for all, so weights are wrong.",
        f"{QUANTIZE} Weights were rounded under these scales, so no other tool can join them without loss.",
        AGAIN,
    ),
    "unequal-input": Kind(
        "input scales of layers that are served as one differ",
        "TensorRT-LLM's LLM class stops at an assertion; others take one of them, which may cut inputs off.",
        f"{REPAIR} (takes the largest, as ModelOpt does)",
        AGAIN,
    ),
    "unequal-fp8": Kind(
        "FP8 scales of layers that are served as one differ",
        "Servers round the weights a second time, to the largest scale. There is no TensorRT-LLM layout of it.",
        "Serve it with --target llmapi, or quantize the model again.",
        AGAIN,
        severity="warning",
    ),
    "input-outlier": Kind(
        "an input scale is far from those of its kind",
        "Too large: the layer's inputs round to zero. Too small: they are cut off.",
        f"Calibrate again: builder build --model {CHECKPOINT} --calibrate-scales",
        OTHER_DATA,
    ),
    "input-wide": Kind(
        "an input scale is unusual for its kind",
        "The layer's small inputs round to zero, if the scale is too large.",
        "Compare with `builder eval`. Models with massive activations have such layers: --keep-bf16 helps there.",
        severity="warning",
    ),
    "kv-outlier": Kind(
        "a KV cache scale is far from those of its kind",
        "Too large: keys or values round to zero. Too small: they are cut off.",
        f"Calibrate again: builder build --model {CHECKPOINT} --calibrate-scales (or --kv-cache-dtype auto)",
        f"{OTHER_DATA} Or leave the cache unquantized: --kv-cache-dtype auto",
    ),
    "weight-outlier": Kind(
        "weights are far from those of their kind",
        "The layer's weights are too large or too small by that factor: answers are noise.",
        f"{QUANTIZE} The scale in the file is wrong, or the source model is.",
        SOURCE,
    ),
    "unused-range": Kind(
        "a global scale does not fit the weights",
        "Small weights of the layer round to zero.",
        QUANTIZE,
        AGAIN,
    ),
}


@dataclass(frozen=True)
class Finding:
    """What is wrong with one tensor or file of one layout.

    what: the rest of a sentence that begins with the tensor's name. kind: a key of KINDS.
    """

    layout: str
    tensor: str
    what: str
    effect: str
    fix: str
    kind: str
    severity: Severity = "error"

    def __str__(self) -> str:
        return f"{self.layout}: {self.tensor} {self.what}"


def finding(layout: str, tensor: str, what: str, kind: str, *, here: bool = False) -> Finding:
    """A finding with its kind's effect and fix. here: this build has just made the checkpoint."""
    one = KINDS[kind]
    fix = (here and one.fix_here) or one.fix
    if layout.startswith("tensorrt_llm"):
        fix = fix.replace(REPAIR, REPAIR_FIRST)
    return Finding(layout, tensor, what, one.effect, fix, kind, one.severity)


@dataclass(frozen=True)
class Group:
    """Findings of one kind in one layout, most often the same in many layers."""

    findings: tuple[Finding, ...]

    @property
    def first(self) -> Finding:
        """Its first finding."""
        return self.findings[0]

    @property
    def title(self) -> str:
        """The kind in words."""
        return KINDS[self.first.kind].title

    @property
    def scope(self) -> str:
        """How many tensors and layers it covers: "28 layers", "1 tensor"."""
        layers = {found[1] for one in self.findings if (found := _LAYER.search(one.tensor))}
        count = len({one.tensor for one in self.findings})
        if len(layers) > 1:
            return f"{len(layers)} layers, {count} tensors" if count > len(layers) else f"{len(layers)} layers"
        return f"{count} tensors" if count > 1 else "1 tensor"


_LAYER = re.compile(r"layers\.(\d+)\.")


def grouped(findings: Iterable[Finding]) -> list[Group]:
    """Findings by layout and kind, errors first, else in order of appearance."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for one in findings:
        groups.setdefault((one.layout, one.kind), []).append(one)
    made = [Group(tuple(members)) for members in groups.values()]
    return sorted(made, key=lambda group: group.first.severity != "error")


def error(findings: Sequence[Finding], path: Path | None = None) -> IntegrityError:
    """The error that names the groups, with one fix for each kind. path: the checkpoint, if it stays there."""
    groups = grouped(findings)
    lines = []
    for group in groups[:SHOWN]:
        lines += [f"{group.scope}: {group.title}. {group.first.effect}"]
        lines += [f"  {one}" for one in group.findings[:EXAMPLES]] + ["  ..."] * (len(group.findings) > EXAMPLES)
    lines += [f"and {len(groups) - SHOWN} other kinds"] * (len(groups) > SHOWN)
    fixes = dict.fromkeys(with_path(group.first.fix, _folder(path, group)) for group in groups[:SHOWN])
    number = len(findings)
    return IntegrityError(
        f"The quantized checkpoint has {number} problem{'s' * (number > 1)}.",
        why="\n".join(lines),
        hint="\n".join(fixes),
    )


SHOWN, EXAMPLES = 8, 10  # groups in an error, tensors in a group


def _folder(path: Path | None, group: Group) -> Path | None:
    """The directory of the group's layout."""
    return path / group.first.layout if path and (path / group.first.layout).is_dir() else path


def with_path(fix: str, path: Path | None) -> str:
    """A fix with the checkpoint's directory in it."""
    return fix.replace(CHECKPOINT, str(path)) if path else fix


def facts(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """For manifests and --json."""
    return [asdict(one) for one in findings]
