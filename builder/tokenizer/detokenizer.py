"""Token ids to text, one token at a time: every piece is whole characters, and the pieces join to the whole text.

The same rules as in triton_templates/1.2/tensorrt_llm_bls/1/model.py, which runs without this package.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

SINGLE_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # how byte-fallback vocabularies write the token of a byte


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer with what incremental decoding needs to know about it, computed once.

    incomplete: ids whose text depends on the ids after them: the single bytes of a byte-fallback vocabulary, which
        decodes a run of bytes together, and special tokens, which are left out of the text and do not end such a run.
    context: the id of an ordinary token. Tokenizers like Llama 2's drop the leading space of a text's first token, and
        an answer is not the start of a text.
    """

    tokenizer: Tokenizer
    incomplete: frozenset[int]
    context: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """Reads the tokenizer's vocabulary."""
        single_bytes = {id for token, id in tokenizer.get_vocab().items() if SINGLE_BYTE.fullmatch(token)}
        special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        return cls(tokenizer, frozenset(single_bytes | special), _context(tokenizer, single_bytes))

    def text(self, ids: Sequence[int]) -> str:
        """The text of these ids as the continuation of a text, without special tokens."""
        before = self.tokenizer.decode(list(self.context))
        whole: str = self.tokenizer.decode([*self.context, *ids])
        return whole[len(before) :] if whole.startswith(before) else str(self.tokenizer.decode(list(ids)))

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token, which may be a part of a character."""
        token = self.tokenizer.id_to_token(id) or ""
        if SINGLE_BYTE.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        if self.tokenizer.token_to_id(BYTE_LEVEL_SPACE) is not None and all(x in BYTE_OF for x in token):
            return bytes(BYTE_OF[x] for x in token)
        return self.text([id]).encode()


def _byte_level() -> dict[str, int]:
    """The characters by which byte-level vocabularies (GPT-2's and later) write bytes: itself for each printable byte
    of Latin-1, and those from U+0100 on, in order, for the others."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_level()
BYTE_LEVEL_SPACE = chr(0x120)


def _context(tokenizer: Tokenizer, single_bytes: set[int]) -> tuple[int, ...]:
    for text in ("a", "b", "1", "."):
        ids = tokenizer.encode(text, add_special_tokens=False).ids[-1:]
        if ids and ids[0] not in single_bytes and tokenizer.decode(ids):
            return tuple(ids)
    return ()


class Detokenizer:
    """The text of one answer. Text is returned only when later ids can no longer change it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._stream = DecodeStream(skip_special_tokens=True)
        for id in vocabulary.context:
            self._stream.step(vocabulary.tokenizer, id)
        self._ids: list[int] = []
        self._pending: list[int] = []
        self._returned = 0

    def add(self, ids: Sequence[int]) -> str:
        """The new text after these ids; "" if it is not complete yet."""
        self._ids += ids
        texts = []
        for id in ids:
            self._pending.append(id)
            if id not in self._vocabulary.incomplete:
                texts.append(self._stream.step(self._vocabulary.tokenizer, self._pending) or "")
                self._pending = []
        new = "".join(texts)
        self._returned += len(new)
        return new

    def rest(self) -> str:
        """The remaining text at the end: what decoding all ids yields for a character that was never completed."""
        return self._vocabulary.text(self._ids)[self._returned :]
