"""Triton model: converts token ids to text, for every beam up to its sequence length.

Needs numpy and tokenizers. Triton loads each model.py by itself, so functions that several of them need are repeated.
The same file runs in NVIDIA's container and with the reference executor.
"""

from __future__ import annotations

import ctypes
import json
import traceback
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import Tokenizer


class TritonPythonModel:
    def initialize(self, args):
        parameters = {key: v["string_value"] for key, v in json.loads(args["model_config"])["parameters"].items()}
        root = Path(args["model_repository"]).parent
        self.tokenizer = Tokenizer.from_file(str(root / parameters["tokenizer_dir"] / "tokenizer.json"))
        self.skip_special_tokens = parameters["skip_special_tokens"] == "true"
        self.exclude_input = parameters["exclude_input_in_output"] == "true"
        adds = parameters["add_special_tokens"] == "true"
        self.prefix = prefix_ids(lambda text: self.tokenizer.encode(text, add_special_tokens=adds).ids)
        self.context = context_ids(self.tokenizer)
        release_memory()

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
            if any(id < 0 for id in ids):
                raise ValueError("the engine returned a negative token id within a sequence")
            texts[index] = self.text(ids).encode("utf-8")
        return texts

    def text(self, ids):
        """The text of an answer, or of a prompt with its answer.

        Steps after a decoupled engine cannot see the request. So the leading <s> tells which of the two it is, or the
        repository's setting if the tokenizer adds no <s>.
        """
        has_prompt = ids[: len(self.prefix)] == self.prefix if self.prefix else not self.exclude_input
        context = [] if has_prompt else self.context
        return decode_after(self.tokenizer, context, ids, self.skip_special_tokens)


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


def decode_after(tokenizer, context, ids, skip_special_tokens):
    """The text of the ids as the continuation of a text, here of the context."""
    before = tokenizer.decode(context, skip_special_tokens=skip_special_tokens)
    whole = tokenizer.decode([*context, *ids], skip_special_tokens=skip_special_tokens)
    if not whole.startswith(before):
        return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    return whole[len(before) :]


def release_memory():
    """Returns memory to the system: reading a tokenizer's file takes more than twice what the tokenizer keeps."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)  # a function of glibc
