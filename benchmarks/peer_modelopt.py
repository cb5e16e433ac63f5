"""ModelOpt's own way, as its documentation shows it: what benchmarks compare with. In an environment that has ModelOpt:

    python benchmarks/peer_modelopt.py data-free MODEL OUTPUT
    python benchmarks/peer_modelopt.py calibrated MODEL OUTPUT ROWS.jsonl SEQ_LEN
    python benchmarks/peer_modelopt.py algorithm MODEL OUTPUT ROWS.jsonl SEQ_LEN mse|local_hessian

Documentation: https://nvidia.github.io/Model-Optimizer/guides/_pytorch_quantization.html and
https://nvidia.github.io/Model-Optimizer/deployment/3_unified_hf.html
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer


def data_free(model_path: str, output: str) -> None:
    """Quantizes the weights of a model to NVFP4 and exports it to `output`."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
    export(mtq.quantize(model, mtq.W4A16_NVFP4_CFG), AutoTokenizer.from_pretrained(model_path), output)


def calibrated(model_path: str, output: str, rows: str, seq_len: str) -> None:
    """Quantizes a model to NVFP4 with an FP8 KV cache, calibrated on the rows, and exports it to `output`."""
    default, kv = mtq.NVFP4_DEFAULT_CFG["quant_cfg"], mtq.FP8_KV_CFG["quant_cfg"]
    merged = [*default, *kv] if isinstance(default, list) else {**default, **kv}
    quantize(model_path, output, rows, seq_len, {"quant_cfg": merged, "algorithm": "max"})


def algorithm(model_path: str, output: str, rows: str, seq_len: str, name: str) -> None:
    """Quantizes a model to NVFP4 with block scales by a search (since 0.47).

    Without CUDA, with the builder's arithmetic instead of ModelOpt's kernels: the checkout must be on PYTHONPATH.
    """
    if not torch.cuda.is_available():
        from builder.quantize.simulation import enable_cpu_simulation

        enable_cpu_simulation()
    presets = {"mse": "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG", "local_hessian": "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG"}
    quantize(model_path, output, rows, seq_len, getattr(mtq, presets[name]))


def quantize(model_path: str, output: str, rows: str, seq_len: str, config: Any) -> None:
    """Quantizes a model by one of ModelOpt's configurations, with the rows one by one."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    texts = [json.loads(line) for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    batches = []
    for row in texts:
        text = row.get("text") or tokenizer.apply_chat_template(row["messages"], tokenize=False)
        batches.append(tokenizer(text, return_tensors="pt", truncation=True, max_length=int(seq_len)).input_ids)

    def forward_loop(model: torch.nn.Module) -> None:
        with torch.no_grad():
            for batch in batches:
                model(batch, use_cache=False)

    export(mtq.quantize(model, config, forward_loop), tokenizer, output)


def export(model: Any, tokenizer: Any, output: str) -> None:
    """Writes a checkpoint in the unified layout, with its tokenizer."""
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    ways = {"data-free": data_free, "calibrated": calibrated, "algorithm": algorithm}
    ways[sys.argv[1]](*sys.argv[2:])
