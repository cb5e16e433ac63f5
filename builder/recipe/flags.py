"""The command line flags that set recipe keys, for the parser and for messages that suggest a command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Flags with one value: (option, dotted key, type, help).
RECIPE_FLAGS: tuple[tuple[str, str, Callable[[str], Any], str], ...] = (
    ("--model", "model.id", str, "Hub id (Qwen/Qwen3-8B) or a local directory"),
    ("--revision", "model.revision", str, "branch, tag or commit on the Hub"),
    ("--original", "model.original", str, "for a quantized model: the model that it was made from"),
    ("--name", "name", str, "name of the link in OUTPUT/models (default: from model and recipe)"),
    ("--gpu", "gpu", str, "card or GPU profile: rtx5090, b200, sm120, cpu, or auto (`builder gpus`)"),
    ("--target", "target", str, "engine (trtllm-build), llmapi (no engine) or reference (no GPU)"),
    ("--calib-data", "calibration.data", str, "a .jsonl file, a Hub dataset id, or builtin:python-docs"),
    ("--calib-samples", "calibration.samples", int, "number of rows to calibrate on; 0: --data-free"),
    ("--calib-seq-len", "calibration.seq_len", int, "longest row, in tokens; longer ones are cut"),
    ("--transform", "transform.name", str, "spinquant: rotate the weights before they are quantized; none"),
    ("--format", "quantization.format", str, "nvfp4, fp8, int4_awq, ... (default: the card's best, `builder gpus`)"),
    ("--kv-cache-dtype", "quantization.kv_cache_dtype", str, "fp8, nvfp4, or auto: the model's own type"),
    (
        "--algorithm",
        "quantization.algorithm",
        str,
        "how weights are rounded: max (default), gptq; NVFP4 also mse, hessian",
    ),
    (
        "--memory",
        "quantization.memory",
        str,
        "to calibrate and measure in: whole (all layers), low (one at a time), or auto",
    ),
    (
        "--layouts",
        "quantization.layouts",
        str,
        "of the checkpoint: unified,tensorrt_llm,compressed-tensors (the last for vLLM, SGLang, transformers)",
    ),
    (
        "--sensitivity-data",
        "sensitivity.data",
        str,
        "texts to measure each layer's loss on: a .jsonl file or a Hub dataset",
    ),
    ("--sensitivity-texts", "sensitivity.texts", int, "number of these texts"),
    ("--max-batch-size", "engine.max_batch_size", int, "most requests in one iteration"),
    ("--max-input-len", "engine.max_input_len", int, "longest prompt, in tokens"),
    ("--max-seq-len", "engine.max_seq_len", int, "longest prompt and answer together, in tokens"),
    ("--max-num-tokens", "engine.max_num_tokens", int, "most tokens in one iteration"),
    ("--tp", "engine.tp", int, "tensor parallel size: GPUs that share each layer"),
    ("--pp", "engine.pp", int, "pipeline parallel size: GPUs that each hold some layers"),
    (
        "--min-score",
        "evaluation.min_score",
        float,
        "accuracy gate: minimum of PPL of BF16 / PPL x 100, e.g. 98",
    ),
    (
        "--max-kl",
        "evaluation.max_kl",
        float,
        "accuracy gate: maximum of mean KL(BF16 || model), in nats",
    ),
)
# Flags without a value: (option, dotted key, the value that it sets, help).
SWITCHES: tuple[tuple[str, str, bool | int | str, str], ...] = (
    ("--data-free", "calibration.samples", 0, "quantize without calibration rows: scales follow from a rule"),
    ("--save-pseudo", "quantization.save_pseudo", "bf16", "also save the dequantized weights as an ordinary model"),
    ("--no-quality-check", "quality.check", False, "publish without measuring what quantization cost"),
    ("--calibrate-scales", "calibration.scales", True, "calibrate only the scales of a quantized model's activations"),
    ("--trust-remote-code", "model.trust_remote_code", True, "run Python code that comes with the model"),
)
# Flags of `eval` only.
TASK_FLAGS: tuple[tuple[str, str, Callable[[str], Any], str], ...] = (
    ("--tasks", "tasks.names", str, "also run these lm-eval tasks: mmlu,gsm8k"),
    ("--task-dir", "tasks.directory", str, "directory with more lm-eval task files (YAML)"),
    ("--task-limit", "tasks.limit", int, "questions of each task, for a trial run"),
    ("--fewshot", "tasks.fewshot", int, "few-shot examples before each question (default: the task's own)"),
)
# Flags that may be repeated: (option, dotted key, placeholder, help).
LIST_FLAGS = (
    (
        "--keep-bf16",
        "quantization.keep_bf16",
        "PATTERN",
        "keep these linear layers in BF16: '*.down_proj', or auto:KL; repeatable",
    ),
    (
        "--keep-fp8",
        "quantization.keep_fp8",
        "PATTERN",
        "quantize these linear layers to FP8: '*.down_proj', or auto:KL; repeatable",
    ),
    ("--lora", "lora.adapters", "NAME=PLACE", "serve this PEFT adapter too, a directory or a Hub id; repeatable"),
    ("--data", "evaluation.data", "FILE|ID", "evaluate on this .jsonl file or Hub dataset; repeatable"),
    ("--runner", "evaluation.runners", "RUNNER", "measure bf16, simulated, checkpoint, reference, served, or all"),
)
