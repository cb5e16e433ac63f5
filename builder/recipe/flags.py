"""The flags that set values of the recipe, for those who parse them and those who print a command to type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# Recipe flags: option, dotted key of the recipe, type, help.
RECIPE_FLAGS: tuple[tuple[str, str, Callable[[str], Any], str], ...] = (
    ("--model", "model.id", str, "Hub id (Qwen/Qwen3-8B) or a local directory"),
    ("--revision", "model.revision", str, "branch, tag or commit on the Hub"),
    ("--name", "name", str, "name of the link in OUTPUT/models, moved to this build (default: from the recipe)"),
    ("--gpu", "gpu", str, "GPU profile: sm120, cpu, ... or auto (`builder gpus`)"),
    ("--target", "target", str, "engine (trtllm-build), llmapi (no engine) or reference (no GPU)"),
    ("--calib-data", "calibration.data", str, "a .jsonl file, a Hub dataset id, or builtin:python-docs"),
    ("--calib-samples", "calibration.samples", int, "rows to calibrate on"),
    ("--calib-seq-len", "calibration.seq_len", int, "tokens of a row, at most"),
    ("--kv-cache-dtype", "quantization.kv_cache_dtype", str, "fp8, or auto for the model's own type"),
    (
        "--sensitivity-data",
        "sensitivity.data",
        str,
        "texts that each layer's loss is measured on: .jsonl or Hub dataset",
    ),
    ("--sensitivity-texts", "sensitivity.texts", int, "how many of them"),
    ("--max-batch-size", "engine.max_batch_size", int, "requests in one iteration"),
    ("--max-input-len", "engine.max_input_len", int, "tokens of a prompt"),
    ("--max-seq-len", "engine.max_seq_len", int, "tokens of prompt and answer"),
    ("--max-num-tokens", "engine.max_num_tokens", int, "tokens in one iteration"),
    ("--tp", "engine.tp", int, "tensor parallel size: GPUs that share each layer"),
    ("--pp", "engine.pp", int, "pipeline parallel size: GPUs that follow one another"),
    ("--min-score", "evaluation.min_score", float, "gate: PPL of BF16 / PPL x 100 must reach it, as 98"),
    ("--max-kl", "evaluation.max_kl", float, "gate: the mean KL(BF16 || model) must not pass it, in nats"),
)
# Those without a value: option, dotted key, the value that it sets, help.
SWITCHES: tuple[tuple[str, str, bool, str], ...] = (
    ("--no-quality-check", "quality.check", False, "do not measure what quantization cost before publishing"),
    ("--trust-remote-code", "model.trust_remote_code", True, "run Python code that comes with the model"),
)
# Of `eval` alone.
TASK_FLAGS: tuple[tuple[str, str, Callable[[str], Any], str], ...] = (
    ("--tasks", "tasks.names", str, "questions through lm-eval: mmlu,gsm8k (besides the texts)"),
    ("--task-dir", "tasks.directory", str, "more task files (YAML), as lm-eval reads them"),
    ("--task-limit", "tasks.limit", int, "so many questions of each task, for trying out"),
    ("--fewshot", "tasks.fewshot", int, "examples before each question (default: the task's own)"),
)
# Those that may be given several times: option, dotted key, placeholder, help.
LIST_FLAGS = (
    (
        "--keep-bf16",
        "quantization.keep_bf16",
        "PATTERN",
        "leave these linear layers in BF16: '*.down_proj', or auto:KL; repeatable",
    ),
    (
        "--keep-fp8",
        "quantization.keep_fp8",
        "PATTERN",
        "put these linear layers in FP8: '*.down_proj', or auto:KL; repeatable",
    ),
    ("--data", "evaluation.data", "FILE|ID", "evaluate on this .jsonl file or Hub dataset; repeatable"),
    ("--runner", "evaluation.runners", "RUNNER", "measure bf16, simulated, checkpoint, reference, served, or all"),
)
