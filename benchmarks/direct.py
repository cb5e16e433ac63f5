"""The baseline of benchmarks/chain.py: calls ModelOpt's quantize and export directly, as its documentation shows.

python benchmarks/direct.py MODEL ROWS.jsonl SEQ_LEN OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model_path: str, rows: str, seq_len: str, output: str) -> None:
    """Quantizes a model to NVFP4 with an FP8 KV cache, calibrated on the rows, and exports it to `output`."""
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

    default, kv = mtq.NVFP4_DEFAULT_CFG["quant_cfg"], mtq.FP8_KV_CFG["quant_cfg"]
    merged = [*default, *kv] if isinstance(default, list) else {**default, **kv}
    mtq.quantize(model, {"quant_cfg": merged, "algorithm": "max"}, forward_loop)
    export_hf_checkpoint(model, export_dir=output)
    tokenizer.save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
