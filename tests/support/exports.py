"""Real ModelOpt exports of the fixture models, for tests: quantized here, on the CPU, in well under a second each.

Works with ModelOpt 0.37 (transformers 4.57) and 0.47 (transformers 5). Imports torch and ModelOpt when called.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import struct
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from builder.checkpoint import layouts
from builder.core.safetensors_io import NewTensor, Tensors, write
from builder.formats import kv_cache
from builder.formats.assignment import ModelFormats
from builder.quantize.source_weights import SourceModel

DATA = Path(__file__).parents[1] / "data"
MODELS = {
    "qwen3": DATA / "tiny-qwen3",
    "llama": DATA / "arch-variants" / "llama",
    "mistral": DATA / "arch-variants" / "mistral",
    "qwen2": DATA / "arch-variants" / "qwen2",
}
try:
    MODELOPT = tuple(int(part) for part in version("nvidia-modelopt").split(".")[:2])
except PackageNotFoundError:  # in llm-compressor's environment
    MODELOPT = ()


def batches(seed: int = 0) -> list[Any]:
    """Random tokens to calibrate with."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 4000, (2, 64), generator=generator) for _ in range(2)]


def quantized(
    source: Path | Any,
    *,
    config: str = "NVFP4_DEFAULT_CFG",
    kv_cache: bool = True,
    seed: int = 0,
    kept: Sequence[str] = (),
    fp8: Sequence[str] = (),
) -> Any:
    """The model (a directory, or loaded) with ModelOpt's quantizers, calibrated with random tokens: as `config` of
    ModelOpt says, none in the modules `kept`, FP8 in those of `fp8`, and FP8 for the KV cache if asked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ModelOpt's own, on import and after
        return _quantized(source, config, kv_cache, seed, kept, fp8)


def _quantized(
    source: Path | Any, name: str, kv_cache: bool, seed: int, kept: Sequence[str], fp8: Sequence[str]
) -> Any:
    import modelopt.torch.quantization as mtq
    import torch
    from transformers import AutoModelForCausalLM

    is_loaded = not isinstance(source, Path)
    model: Any = source if is_loaded else AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    config = copy.deepcopy(getattr(mtq, name))
    if kv_cache and isinstance(config["quant_cfg"], dict):  # up to 0.43
        config["quant_cfg"].update(mtq.FP8_KV_CFG["quant_cfg"])
    elif kv_cache:
        config["quant_cfg"] = [*config["quant_cfg"], *mtq.FP8_KV_CFG["quant_cfg"]]
    asked: dict[str, dict[str, Any]] = {f"{name}.*_quantizer": {"enable": False} for name in kept}
    e4m3 = {"num_bits": (4, 3), "axis": None}
    if isinstance(config["quant_cfg"], dict):
        config["quant_cfg"] |= asked | {f"{name}.{x}_quantizer": e4m3 for name in fp8 for x in ("weight", "input")}
    else:
        config["quant_cfg"] += [{"quantizer_name": name, **off} for name, off in asked.items()]
        names = [f"{name}.{x}_quantizer" for name in fp8 for x in ("weight", "input")]
        config["quant_cfg"] += [{"quantizer_name": name, "cfg": e4m3} for name in names]

    def calibrate(model: Any) -> None:
        for batch in batches(seed):
            model(batch % model.config.vocab_size, use_cache=False)

    with torch.no_grad():
        mtq.quantize(model, config, calibrate)
    return model


def export(model: Any, unified: Path, tensorrt_llm: Path | None = None, *, tp: int = 1, pp: int = 1) -> None:
    """ModelOpt's exports of one quantized model, in one layout or in both. Exporting changes the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _export(model, unified, tensorrt_llm, tp, pp)


def _export(model: Any, unified: Path, tensorrt_llm: Path | None, tp: int, pp: int) -> None:
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import nvfp4_tensor

    if MODELOPT < (0, 45):  # it asks CUDA for its version on a CPU too
        nvfp4_tensor.fp4_compatible = lambda: False
    if tensorrt_llm is not None:
        _export_tensorrt_llm(copy.deepcopy(model), tensorrt_llm, tp, pp)
    export_hf_checkpoint(model, dtype=torch.bfloat16, export_dir=str(unified))


def export_resmoothed(model: Any, tensorrt_llm: Path, *, tp: int = 1) -> None:
    """ModelOpt's TensorRT-LLM export of an AWQ model, after what its Hugging Face exporter does first: one scale for
    layers with the same input, folded into the norm. By itself this export keeps them. Changes the model."""
    import torch
    from modelopt.torch.export import unified_export_hf
    from modelopt.torch.quantization.qtensor import nvfp4_tensor

    if MODELOPT < (0, 45):
        nvfp4_tensor.fp4_compatible = lambda: False
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        unified_export_hf.requantize_resmooth_fused_llm_layers(model)
        _export_tensorrt_llm(model, tensorrt_llm, tp, 1)


def _export_tensorrt_llm(model: Any, directory: Path, tp: int, pp: int) -> None:
    import torch
    from modelopt.torch.export import export_tensorrt_llm_checkpoint

    # Without tensorrt_llm 0.37 refuses "qwen". The decoder's name changes nothing but config["decoder"].
    qwen = "Qwen" in type(model).__name__ and MODELOPT >= (0, 44)
    export_tensorrt_llm_checkpoint(
        model,
        "qwen" if qwen else "llama",
        torch.bfloat16,
        export_dir=str(directory),
        inference_tensor_parallel=tp,
        inference_pipeline_parallel=pp,
    )


def written(model: Any, source: Path, formats: ModelFormats, directory: Path) -> Path:
    """Both layouts of a model that the stage's worker calibrated, as it writes them: with our writer or, where that
    can't, with ModelOpt's exporter, which changes the model."""
    from builder.quantize import worker, writer

    opened = SourceModel.open(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranges = worker._ranges(model, worker._plan(opened, formats))
        if ranges is None:
            worker._export(model, opened, directory / "unified", formats)
        else:
            writer.write(opened, formats, ranges, directory / "unified")
    layouts.write_if_served(directory / "unified", opened.config, directory / "tensorrt_llm")
    return directory


Held = Mapping[str, tuple[str, tuple[int, ...], bytes]]


def held(directory: Path, files: list[Path] | None = None) -> Held:
    """{tensor: (dtype, shape, bytes)} of a directory, or of some of its files."""
    tensors = Tensors(directory, files) if files else Tensors(directory)
    return {name: (info.dtype, info.shape, tensors.read(name)) for name, info in tensors.items()}


def differ(ours: Held, theirs: Held) -> list[str]:
    """The tensors that are not the same in our unified layout and in the installed ModelOpt's.

    The scales of the KV cache are those of both versions that TensorRT-LLM reads best (builder/formats/kv_cache.py):
    0.37 raises those of an FP8 cache to 1, 0.47 multiplies those of an NVFP4 cache by 6.
    """
    changed = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
    return [name for name in changed if not (name.endswith(kv_cache.UNIFIED) and _same_scale(ours, theirs, name))]


def _same_scale(ours: Held, theirs: Held, name: str) -> bool:
    """Whether a scale of the KV cache is the same but for that."""
    if not (name in ours and name in theirs):
        return False
    (one,), (other,) = (struct.unpack("<f", both[name][2]) for both in (ours, theirs))
    return bool(other == max(one, 1.0) if MODELOPT < (0, 40) else math.isclose(other, 6 * one, rel_tol=1e-6))


def documents(unified: Path) -> dict[str, Any]:
    """What hf_quant_config.json and config.json say of the quantization, but for what our writer states otherwise.

    It names ModelOpt 0.47.0 and writes that version's documents. It always names the embedding as not quantized, and
    numbers the groups of a mixture in the order of the files. 0.37 has other patterns in exclude_modules, and says less
    in config.json: there the first document is compared without them, and the second by its algorithm.
    """
    said = json.loads((unified / "hf_quant_config.json").read_text())
    block = json.loads((unified / "config.json").read_text())["quantization_config"]
    for holder, key in ((said["quantization"], "exclude_modules"), (block, "ignore")):
        if key in holder:
            holder[key] = [name for name in holder[key] if not name.endswith(("embed_tokens", "embeddings"))]
    if "config_groups" in block:
        block["config_groups"] = sorted(block["config_groups"].values(), key=json.dumps)
    for producer in (said["producer"], block["producer"]):
        producer.pop("version")
    if MODELOPT < (0, 40):
        said["quantization"].pop("exclude_modules", None)
        block = {key: block.get(key) for key in ("quant_algo", "quant_method", "producer")}
    return {"hf_quant_config.json": said, "config.json": block}


def rewrite(checkpoint: Path, destination: Path, changes: Mapping[str, NewTensor | None]) -> Path:
    """Copies a checkpoint of one file, in either layout, with tensors replaced, added or (None) removed."""
    tensors = Tensors(checkpoint)
    shutil.copytree(checkpoint, destination, ignore=shutil.ignore_patterns("*.safetensors"))
    kept = [NewTensor(n, i.dtype, i.shape, tensors.chunks(n)) for n, i in tensors.items() if n not in changes]
    write(destination / tensors.files[0].name, [*kept, *(t for t in changes.values() if t)], {"format": "pt"})
    return destination
