"""Tokenizers of the kinds that real models have, trained on the fixture's texts in a fraction of a second."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

DATA = Path(__file__).parents[1] / "data"
TEXTS = [json.loads(line)["text"] for line in (DATA / "eval" / "prose.jsonl").read_text().splitlines()]


@cache
def llama2() -> Tokenizer:
    """Like Llama 2 and Mistral 0.1 to 0.3: BPE with byte fallback; a space piece and <s> before every text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, *["User: Hello world ### the a ."] * 50], trainer)
    written = json.loads(tokenizer.to_str())
    # Bytes are ordinary tokens, and spaces are replaced by the normalizer, as in the conversions of Llama 2.
    written["added_tokens"] = [one for one in written["added_tokens"] if one["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(written | {"pre_tokenizer": None}))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


@cache
def unigram() -> Tokenizer:
    """Like T5 and many SentencePiece models: Unigram pieces, a space piece before every text, no byte fallback."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=1500, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@cache
def byte_level() -> Tokenizer:
    """The fixture's own tokenizer, like Qwen's."""
    return Tokenizer.from_file(str(DATA / "tiny-qwen3" / "tokenizer.json"))


KINDS = {"llama2": llama2, "unigram": unigram, "byte-level": byte_level}


def write_snapshot(directory: Path, tokenizer: Tokenizer, end: str) -> Path:
    """Writes the part of a snapshot that rendering a repository needs."""
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    ids = {"eos_token_id": tokenizer.token_to_id(end), "pad_token_id": tokenizer.token_to_id(end)}
    (directory / "config.json").write_text(json.dumps(ids))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return directory
