"""Snapshot, Calibration -> Checkpoint with NVIDIA ModelOpt, in the formats of the recipe.

This module runs in the parent process and imports nothing heavy; `builder.quantize.worker` does the work.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from builder.architectures import catalog, names
from builder.architectures.facts import Architecture
from builder.calibration import coverage
from builder.calibration.rows import Calibration, required_tokens
from builder.checkpoint.finished import inspected
from builder.checkpoint.layouts import Checkpoint
from builder.core import workers
from builder.core.early_worker import EarlyWorker
from builder.core.errors import UnsupportedError
from builder.core.hashes import Hashes
from builder.core.process import Bar, job_file
from builder.core.safetensors_io import TensorInfo
from builder.core.store import Store, library_versions, sources_digest
from builder.formats.assignment import Layers, ModelFormats, by_layer, of_job
from builder.formats.base import NumberFormat
from builder.formats.kernels.packing import warn_if_slow
from builder.formats.registry import BF16, NVFP4, for_tensorrt_llm
from builder.hub.snapshot import Snapshot
from builder.machine.gpus import cuda_order, visible
from builder.model.source_tensors import open_tensors
from builder.recipe import schema
from builder.recipe.quantization import Quantization

LIBRARIES = ("torch", "transformers", "nvidia-modelopt", "safetensors", "tokenizers", "numpy", "accelerate")
SOURCES = (
    "builder/architectures",
    "builder/quantize/modelopt.py",
    "builder/quantize/worker.py",
    "builder/quantize/quantizers.py",
    "builder/quantize/experts.py",
    "builder/quantize/calibrated.py",
    "builder/quantize/ranges.py",
    "builder/quantize/stored_scales.py",
    "builder/quantize/source_weights.py",
    "builder/quantize/unified_files.py",
    "builder/quantize/unified_plan.py",
    "builder/quantize/writer.py",
    "builder/checkpoint/unified_config.py",
    "builder/model/tensor_names.py",
    "builder/calibration/coverage.py",
    "builder/quantize/simulation.py",
    "builder/quantize/device.py",
    "builder/calibration/rows.py",
    "builder/tokenizer/chat_template.py",
    "builder/tokenizer/chat_template_worker.py",
    "builder/tokenizer/special_tokens.py",
    "builder/tokenizer/files.py",
    "builder/tokenizer/loading.py",
    "builder/checkpoint/layouts.py",
    "builder/formats",
    "builder/checkpoint/layout_names.py",
    "builder/checkpoint/finished.py",
    "builder/checkpoint/validate.py",
    "builder/checkpoint/inspection",
    "builder/checkpoint/compressed_tensors/config.py",
    "builder/checkpoint/description.py",
    "builder/model/files.py",
    "builder/model/multimodal.py",
    "builder/model/source_tensors.py",
    "builder/model/loading.py",
    "builder/model/imports.py",
    "builder/checkpoint/sharding.py",
    "builder/core/safetensors_io.py",
    "builder/model/hashed_files.py",
    "builder/checkpoint/tensor_checks.py",
    "builder/checkpoint/huggingface.py",
    "builder/model/dtypes.py",
)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # everything is in the snapshot
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONHASHSEED": "0",
    # Threads that spin while they wait slow a busy machine down: 21 s instead of 3 for 64 batches on 2 cores.
    "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive"),
    **cuda_order(),  # the order of `gpus`
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # makes cuBLAS reproducible (its manual, "Reproducibility")
}
# Other variables that change results; the worker inherits them: TF32 instead of FP32, instruction sets and precision of
# CPU kernels, and the number of threads that sums are split over (manuals of PyTorch, oneDNN and oneMKL).
NUMERICS = (
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "DNNL_MAX_CPU_ISA",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "DNNL_DEFAULT_FPMATH_MODE",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
)


@dataclass(frozen=True)
class QuantizeRequest:
    """What to quantize to, and how to calibrate.

    layers: the linear layers in a format of their own, by its name: what the recipe's patterns match, what `auto`
        chose, and layers of zeros.
    zero_layers: those whose weights are all zero, for the manifest.
    """

    quantization: Quantization
    calibration: schema.Calibration
    layers: Layers = field(default_factory=dict)
    trust_remote_code: bool = False
    zero_layers: Sequence[str] = ()


def worker(store: Store) -> EarlyWorker:
    """The process that quantizes. It may begin before `quantize` is called."""
    return EarlyWorker(workers.QUANTIZE, ENVIRONMENT, lambda: store.log("quantize"))


def quantize(
    snapshot: Snapshot,
    calibration: Calibration,
    asked: QuantizeRequest,
    *,
    store: Store,
    early: EarlyWorker | None = None,
) -> Checkpoint:
    """Calibrates on the rows and writes both layouts, `unified/` and `tensorrt_llm/`, then inspects them.

    early: the `worker`, which may have begun.
    UnsupportedError if ModelOpt or the format can't take the model, before any calibration where that can be known;
    IntegrityError with the tensors' names if the inspection finds a problem. Such a checkpoint is not kept.
    """
    part, rows = asked.quantization, asked.calibration
    layers = {name: list(modules) for name, modules in sorted(asked.layers.items()) if modules}
    architecture = catalog.of(snapshot.config)
    ingredients = {
        "snapshot": snapshot.digest,
        "architecture": catalog.ingredients(architecture),
        "calibration": calibration.digest,
        "quantization": part.model_dump(exclude={"keep_bf16", "keep_fp8", "layouts", "save_pseudo", "memory", "gptq"}),
        **part.rounding,
        "layers": layers,
        "seq_len": rows.seq_len,
        "batch_size": rows.batch_size,
        "min_tokens": required_tokens(rows),
        "libraries": library_versions(*LIBRARIES),
        "sources": sources_digest(*SOURCES),
        "gpus": calibrating(),
        "environment": numerics(),
        "trust_remote_code": asked.trust_remote_code,
    }
    job = {
        **snapshot.source.as_job(),
        "rows": str(calibration.path.absolute()),
        "seq_len": rows.seq_len,
        "batch_size": rows.batch_size,
        "min_tokens": ingredients["min_tokens"],
        "format": part.number_format.name,
        "kv_cache_dtype": part.kv_cache_dtype,
        **part.rounding,
        "layers": layers,
        "trust_remote_code": asked.trust_remote_code,
        "gpus": ingredients["gpus"],
    }

    def make(tmp: Path) -> dict[str, Any]:
        warn_if_slow(store.out)
        check(open_tensors(snapshot.path), architecture, layers, part.number_format)
        with snapshot.source.explain_failures():
            facts = _run(job, tmp, store, early)
        facts |= {"layers": layers, "zero_layers": list(asked.zero_layers)}
        with Hashes(tmp, facts["hashed"]) as hashes:
            return {**facts, **inspected(hashes)}

    artifact = store.stage("checkpoint", ingredients, make)
    return Checkpoint(path=artifact.path, digest=artifact.digest, facts=artifact.facts)


def gpus() -> list[str]:
    """The names of the GPUs that CUDA_VISIBLE_DEVICES leaves visible, in CUDA's order.

    If NVML does not tell (MIG, for example), all GPUs that the driver lists in /proc.
    """
    seen = visible()
    if seen is not None:
        return [gpu.name for gpu in seen]
    found = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    return [line.partition(":")[2].strip() for path in found for line in path.read_text().splitlines()[:1]]


def calibrating() -> list[str]:
    """The GPUs that PyTorch computes on, for keys, because results differ between GPUs; [] with a CPU build."""
    return [] if library_versions("torch")["torch"].endswith("+cpu") else gpus()


def numerics() -> dict[str, str]:
    """The environment variables that are set and change numerical results, for keys."""
    names = NUMERICS if visible() is not None else (*NUMERICS, "CUDA_VISIBLE_DEVICES")
    return {name: os.environ[name] for name in names if name in os.environ}


def check(
    tensors: Mapping[str, TensorInfo],
    architecture: Architecture,
    layers: Layers = MappingProxyType({}),
    number_format: NumberFormat = NVFP4,
) -> None:
    """UnsupportedError if a library is absent, or if a linear layer does not fit its format."""
    absent = [name for name in ("torch", "transformers", "nvidia-modelopt") if library_versions(name)[name] == "absent"]
    if absent:
        raise UnsupportedError(
            f"Quantizing needs {', '.join(absent)}, not installed in this Python environment.",
            hint="Install the project with its quantize extra, or run the build in the container.",
        )
    single, found = by_layer(layers), defaultdict[NumberFormat, dict[str, Sequence[int]]](dict)
    for name, info in sorted(tensors.items()):
        if names.is_quantizable(architecture, name, info.shape):
            found[single.get(name.removesuffix(".weight"), number_format)][name] = info.shape
    for one, members in found.items():
        check_sizes(members, one)


def check_sizes(
    weights: Mapping[str, Sequence[int]],
    number_format: NumberFormat = NVFP4,
    runs: Sequence[NumberFormat] | None = None,
) -> None:
    """UnsupportedError if one of these weights, [outputs, inputs], can't be stored in the format.

    runs: the formats to choose from instead; None where the card is not known.
    """
    reasons = {name: number_format.misfit(shape) for name, shape in weights.items()}
    reason = next(filter(None, reasons.values()), "")
    if not reason:
        return
    wrong = [f"{name} {list(weights[name])}" for name, found in reasons.items() if found == reason]
    others = (one for one in for_tensorrt_llm() if one.quant_algo is not None) if runs is None else runs
    fitting = ", ".join(one.name for one in others if all(map(one.fits, weights.values())))
    hint = f"Formats that fit these sizes: --format {fitting}"
    if runs is None:
        hint += ". `builder gpus` says which of them a card runs"
    raise UnsupportedError(
        f"{len(wrong)} linear layers have {reason}.",
        why="\n".join(wrong[:10] + ["..."] * (len(wrong) > 10)),
        hint=hint if fitting else "Choose another model. The sizes are part of its architecture.",
    )


def _run(job: Mapping[str, Any], tmp: Path, store: Store, early: EarlyWorker | None) -> dict[str, Any]:
    """Runs the worker and returns the facts of the checkpoint."""
    with closing(early or worker(store)) as process:
        bar = Bar(store.out, "starting ModelOpt", "batches")
        events, finished, log = process.run({**job, "destination": str(tmp.absolute())}, bar)
    run = {"log": str(log), "job": str(job_file(log)), "max_rss": finished.max_rss}
    return checkpoint_facts(events["summary"], store, run, of_job(job))


def checkpoint_facts(
    summary: Mapping[str, Any], store: Store, run: Mapping[str, Any], formats: ModelFormats
) -> dict[str, Any]:
    """The facts of a checkpoint's manifest: the worker's summary and its run. Tells what was made, and warns."""
    counts = [f"{summary['quantized_linears']} linear layers in {formats.whole.title}"]
    for one, modules in formats.layers.items():
        counts += [f"{len(modules)} {'left ' * (one is BF16)}in {one.title}"] if modules else []
    saw = coverage.summary(summary)
    store.out.info(", ".join(counts) + (f", calibrated on {saw}" if saw else ""))
    for sentence in coverage.shortfalls(summary):
        store.out.warn(f"calibration covers little: {sentence}")
    if summary["large_kv"]:
        store.out.warn(
            f"{summary['large_kv']} of {summary['kv_scales']} KV cache scales are above 0.5, so an "
            f"{formats.cache.title} may cost accuracy; --kv-cache-dtype auto keeps the model's own type"
        )
    if summary["no_tensorrt_llm"] and not formats.whole.compressed_only:
        store.out.warn(f"only the unified layout was written: {summary['no_tensorrt_llm']}")
    return {**summary, **run}
