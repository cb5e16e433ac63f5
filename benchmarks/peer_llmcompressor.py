"""llm-compressor's own ways, as its documentation shows them: what benchmarks compare with. In its environment:

    python benchmarks/peer_llmcompressor.py oneshot MODEL OUTPUT
    python benchmarks/peer_llmcompressor.py model_free_ptq MODEL OUTPUT
    python benchmarks/peer_llmcompressor.py calibrated MODEL OUTPUT ROWS.jsonl SEQ_LEN
    python benchmarks/peer_llmcompressor.py gptq MODEL OUTPUT ROWS.jsonl SEQ_LEN

Documentation: https://docs.vllm.ai/projects/llm-compressor/en/stable/ (examples/quantization_w4a16_fp4,
examples/quantization_w4a4_fp4, examples/quantization_kv_cache, guides/entrypoints/model-free-ptq)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def one_shot(model_path: str, output: str, modifier: Any, **calibration: Any) -> None:
    """`oneshot` with one modifier, and the compressed save."""
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype="auto")
    oneshot(model=model, recipe=modifier, **calibration)
    model.save_pretrained(output, save_compressed=True)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(output)


def data_free(model_path: str, output: str) -> None:
    """NVFP4 weights; without a dataset, `oneshot` chooses its data-free pipeline."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    one_shot(model_path, output, QuantizationModifier(targets="Linear", scheme="NVFP4A16", ignore=["lm_head"]))


def model_free(model_path: str, output: str) -> None:
    """NVFP4 weights, file by file, without the model's definition."""
    from llmcompressor import model_free_ptq

    model_free_ptq(
        model_stub=model_path,
        save_directory=output,
        scheme="NVFP4A16",
        ignore=["lm_head", "model.embed_tokens"],
        max_workers=os.cpu_count() or 1,
        device="cpu",
    )


def calibrated(model_path: str, output: str, rows: str, seq_len: str) -> None:
    """NVFP4 with an FP8 KV cache, calibrated on the rows."""
    from llmcompressor.modifiers.quantization import QuantizationModifier

    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}
    modifier = QuantizationModifier(targets="Linear", scheme="NVFP4", ignore=["lm_head"], kv_cache_scheme=cache)
    one_shot(model_path, output, modifier, **dataset(model_path, rows, seq_len))


def gptq(model_path: str, output: str, rows: str, seq_len: str) -> None:
    """NVFP4 by GPTQ with its default settings."""
    from llmcompressor.modifiers.gptq import GPTQModifier

    modifier = GPTQModifier(targets="Linear", scheme="NVFP4", ignore=["lm_head"])
    one_shot(model_path, output, modifier, **dataset(model_path, rows, seq_len))


def dataset(model_path: str, rows: str, seq_len: str) -> dict[str, Any]:
    """Calibration rows as arguments of `oneshot`."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    texts = [json.loads(line)["text"] for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    tokens = [tokenizer(text, truncation=True, max_length=int(seq_len), padding=False) for text in texts]
    found = Dataset.from_list([{key: one[key] for key in ("input_ids", "attention_mask")} for one in tokens])
    return {"dataset": found, "max_seq_length": int(seq_len), "num_calibration_samples": len(texts)}


if __name__ == "__main__":
    ways = {"oneshot": data_free, "model_free_ptq": model_free, "calibrated": calibrated, "gptq": gptq}
    ways[sys.argv[1]](*sys.argv[2:])
