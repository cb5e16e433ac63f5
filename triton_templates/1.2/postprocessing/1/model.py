"""Triton model: converts token ids to text, for every beam up to its sequence length.

Needs numpy and tokenizers. Triton loads each model.py by itself, so functions that several of them need are repeated.
The same file runs in NVIDIA's container and with the reference executor.
"""

from __future__ import annotations

import ctypes
import json
import traceback
from array import array
from bisect import bisect_left
from functools import lru_cache
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer


class TritonPythonModel:
    def initialize(self, args):
        parameters = {key: v["string_value"] for key, v in json.loads(args["model_config"])["parameters"].items()}
        root = Path(args["model_repository"]).parent
        self.exclude_input = parameters["exclude_input_in_output"] == "true"
        path = root / parameters["tokenizer_dir"] / "tokenizer.json"
        self.read(path, parameters["add_special_tokens"] == "true", parameters["skip_special_tokens"] == "true")
        release_memory()

    def read(self, path, add_special_tokens, skip_special_tokens):
        """Keeps what is needed of the tokenizer."""
        tokenizer = Tokenizer.from_file(str(path))
        self.prefix = prefix_ids(lambda text: tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        self.context = context_ids(tokenizer)
        self.vocabulary = Vocabulary(tokenizer, skip_special_tokens)

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        try:
            return pb_utils.InferenceResponse([pb_utils.Tensor("OUTPUT", self.decode(request))])
        except ValueError as error:
            message = str(error)
        except Exception as error:
            traceback.print_exc()
            message = f"postprocessing failed: {type(error).__name__}; see the server's log"
        return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))

    def decode(self, request):
        """The texts of a request: UTF-8 bytes of shape [batch, beams]. ValueError for invalid output of the engine."""
        tokens = pb_utils.get_input_tensor_by_name(request, "TOKENS_BATCH").as_numpy()
        lengths = pb_utils.get_input_tensor_by_name(request, "SEQUENCE_LENGTH").as_numpy()
        texts = np.empty(lengths.shape, dtype=object)
        for index, length in np.ndenumerate(lengths):
            if not 0 <= length <= tokens.shape[-1]:
                raise ValueError(f"the engine reports a sequence of {length} tokens but returned {tokens.shape[-1]}")
            ids = tokens[index][:length].tolist()
            if min(ids, default=0) < 0:
                raise ValueError("the engine returned a negative token id within a sequence")
            texts[index] = self.text(ids).encode("utf-8")
        return texts

    def text(self, ids):
        """The text of an answer, or of a prompt with its answer.

        Steps after a decoupled engine cannot see the request. So the leading <s> tells which of the two it is, or the
        repository's setting if the tokenizer adds no <s>.
        """
        has_prompt = ids[: len(self.prefix)] == self.prefix if self.prefix else not self.exclude_input
        return self.vocabulary.text_after([] if has_prompt else self.context, ids)


class Vocabulary:
    """What decoding needs of a tokenizer: its tokens, in 16 to 20 bytes each, and its decoder.

    The tokenizers library keeps each token in two maps (0.22 and 0.23), which takes more than 10 times as much.
    """

    def __init__(self, tokenizer, skip_special_tokens):
        added = tokenizer.get_added_tokens_decoder().values()
        self.skipped = {token.content for token in added if token.special} if skip_special_tokens else set()
        self.ids = array("I", sorted(set(tokenizer.get_vocab().values())))
        self.content, self.ends = bytearray(), array("I", [0])
        for id in self.ids:
            self.content += tokenizer.id_to_token(id).encode("utf-8")
            self.ends.append(len(self.content))
        self.decoder = tokenizer.decoder
        self.token = lru_cache(8192)(self.token)

    def token(self, id):
        """The token with this id; None if there is none or it is left out of texts."""
        index = bisect_left(self.ids, id)
        if index == len(self.ids) or self.ids[index] != id:
            return None
        token = self.content[self.ends[index] : self.ends[index + 1]].decode("utf-8")
        return None if token in self.skipped else token

    def text(self, ids):
        """The same text as the tokenizer's decode."""
        tokens = [token for token in map(self.token, ids) if token is not None]
        return self.decoder.decode(tokens) if self.decoder else " ".join(tokens)

    def text_after(self, context, ids):
        """The text of the ids as the continuation of a text, here of the context."""
        before, whole = self.text(context), self.text([*context, *ids])
        return whole[len(before) :] if whole.startswith(before) else self.text(ids)


def prefix_ids(encode):
    """The ids, such as that of <s>, that `encode` puts in front of every text."""
    common = []
    for ids in zip(encode(""), encode("a"), encode("b"), strict=False):
        if len(set(ids)) > 1:
            break
        common.append(ids[0])
    return common


def context_ids(tokenizer):
    """The ids of an ordinary token, to decode answers after it; empty if there is none.

    At the start of a text, tokenizers like Llama 2's drop the leading space of the first token. The prompt and its
    answer would run together.
    """
    byte_ids = {id for token, id in tokenizer.get_vocab().items() if len(token) == 6 and token.startswith("<0x")}
    for text in ("a", "b", "1", "."):
        ids = tokenizer.encode(text, add_special_tokens=False).ids[-1:]
        if ids and ids[0] not in byte_ids and tokenizer.decode(ids):
            return ids
    return []


def release_memory():
    """Returns memory to the system: reading a tokenizer's file takes more than twice what the tokenizer keeps."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)  # a function of glibc
