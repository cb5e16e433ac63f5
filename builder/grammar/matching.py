"""Grammars compiled for a vocabulary, and which tokens they allow next: xgrammar, as in TensorRT-LLM.

Follows its GuidedDecoder (batch_manager/guidedDecoder.cpp@000a01de). Imports torch and xgrammar where first used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from builder.grammar.guides import KINDS, TOKENIZER_STR, Guide

NOT_INSTALLED = "xgrammar is not installed: pip install 'trtllm-builder[guided]'"

CACHE = 256 << 20  # bytes of compiled grammars to keep; xgrammar's default is all of them, and clients send new ones


class Compiler:
    """Compiles guides for one vocabulary. `vocab_size`: the length of the model's logits."""

    def __init__(self, file: Path, vocab_size: int) -> None:
        """ValueError for a file of another layout than vocabulary.py's; ModuleNotFoundError without xgrammar."""
        import xgrammar

        info = json.loads(file.read_text(encoding="utf-8"))
        if info["tokenizer_str"] != TOKENIZER_STR:
            raise ValueError(f"{file} was not written by this builder")
        self._xgrammar = xgrammar
        self._vocab_size = vocab_size
        tokens = xgrammar.TokenizerInfo(
            info["encoded_vocab"][:vocab_size],
            vocab_type=xgrammar.VocabType.BYTE_LEVEL,
            vocab_size=vocab_size,
            stop_token_ids=info["stop_token_ids"],
        )
        self._compiler = xgrammar.GrammarCompiler(tokens, max_threads=1, cache_limit_bytes=CACHE)

    def compile(self, guide: Guide) -> Any:
        """The compiled grammar. ValueError, with xgrammar's reason, if it can't be compiled."""
        if guide.kind not in KINDS:
            raise ValueError(f"the kind {guide.kind!r} is not one of {', '.join(KINDS)}")
        try:
            if guide.kind == "json":
                return self._compiler.compile_builtin_json_grammar()
            if guide.kind == "json_schema":
                return self._compiler.compile_json_schema(guide.text)
            if guide.kind == "regex":
                return self._compiler.compile_regex(guide.text)
            return self._compiler.compile_grammar(guide.text)
        except (RuntimeError, ValueError, UnicodeError) as error:
            raise ValueError(str(error).strip()[-500:]) from None

    def match(self, guide: Guide) -> Match:
        """A new answer's place in the grammar. ValueError if it can't be compiled."""
        return Match(self._xgrammar, self.compile(guide), self._vocab_size)


class Match:
    """Where one answer is in its grammar."""

    def __init__(self, xgrammar: Any, compiled: Any, vocab_size: int) -> None:
        self._xgrammar = xgrammar
        self._matcher = xgrammar.GrammarMatcher(compiled)
        self._mask = xgrammar.allocate_token_bitmask(1, vocab_size)

    def masked(self, logits: Any) -> Any:
        """A copy of the logits [vocab] with those of tokens that can't follow at minus infinity."""
        self._matcher.fill_next_token_bitmask(self._mask)
        allowed = logits.clone()
        self._xgrammar.apply_token_bitmask_inplace(allowed[None], self._mask)
        return allowed

    @property
    def ended(self) -> bool:
        """Whether one of the stop tokens was accepted, so that nothing can follow."""
        return bool(self._matcher.is_terminated())

    def accept(self, token: int) -> None:
        """Goes on by one token, which the mask allowed."""
        if not self._matcher.accept_token(token):
            raise RuntimeError(f"the grammar does not allow token {token}")
