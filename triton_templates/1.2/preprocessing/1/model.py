"""Triton model: text -> token ids. What is wrong with one request is that request's error alone.

Needs numpy and tokenizers. Runs as it is in Triton's container and with the reference executor.
"""

from __future__ import annotations

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
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.add_special_tokens = parameters["add_special_tokens"] == "true"
        self.front = added_in_front(self.encode)
        self.end_ids = json.loads(parameters["end_ids"])
        self.pad_id = int(parameters["pad_id"])
        self.vocab_size = int(parameters["vocab_size"])
        self.max_input_len = int(parameters["max_input_len"])
        self.max_seq_len = int(parameters["max_seq_len"])
        # No prompt of more characters can fit, so nobody has to wait while it is tokenized to find out.
        longest = max(len(token) for token in self.tokenizer.get_vocab())
        self.max_characters = self.max_input_len * longest

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        try:
            outputs = self.outputs(request)
        except ValueError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        except Exception as error:
            traceback.print_exc()
            message = f"preprocessing failed: {type(error).__name__}; the server's log says more"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])

    def outputs(self, request):
        """Name -> array of every output. A request's batch has one prompt a row. ValueError says what is wrong."""
        stream = array(request, "STREAM")
        if stream is not None and stream.any():
            raise ValueError("the ensemble answers once; for an answer in pieces ask tensorrt_llm_bls")
        ids = [self.prompt(value) for value in required(request, "QUERY", "text_input").reshape(-1)]
        rows = len(ids)
        max_tokens = required(request, "REQUEST_OUTPUT_LEN", "max_tokens").reshape(rows, 1).astype(np.int32)
        for row, wanted in zip(ids, max_tokens[:, 0].tolist(), strict=True):
            self.check_lengths(len(row), wanted)
        stop_words = self.words(array(request, "STOP_WORDS_DICT"), "stop_words", rows)
        end_id, pad_id = array(request, "END_ID"), array(request, "PAD_ID")
        if end_id is None:
            # The engine knows one end; a model with more (Qwen3 has two) ends at the others as at stop words.
            stop_words = [words + [[end] for end in self.end_ids[1:]] for words in stop_words]
            end_id = np.full((rows, 1), self.end_ids[0] if self.end_ids else -1)
        if pad_id is None:
            pad_id = np.full((rows, 1), self.pad_id)
        padded = np.full((rows, max(len(row) for row in ids)), self.pad_id, np.int32)
        for i, row in enumerate(ids):
            padded[i, : len(row)] = row
        return {
            "INPUT_ID": padded,
            "REQUEST_INPUT_LEN": np.array([[len(row)] for row in ids], np.int32),
            "REQUEST_OUTPUT_LEN": max_tokens,
            "STOP_WORDS_IDS": word_lists(stop_words),
            "BAD_WORDS_IDS": word_lists(self.words(array(request, "BAD_WORDS_DICT"), "bad_words", rows)),
            "EMBEDDING_BIAS": self.bias(request, rows),
            "OUT_END_ID": end_id.astype(np.int32),
            "OUT_PAD_ID": pad_id.astype(np.int32),
        }

    def prompt(self, value):
        """The token ids of one prompt."""
        prompt = text(value, "text_input")
        if not prompt:
            raise ValueError("text_input is empty")
        if len(prompt) > self.max_characters:
            raise ValueError(
                f"the prompt has {len(prompt)} characters, too many for the {self.max_input_len} tokens (max_input_len)"
                " that this engine takes"
            )
        ids = without_repeat(self.encode(prompt), self.front)
        largest = max(ids, default=0)
        if largest >= self.vocab_size:  # the engine would read past the end of its embeddings
            raise ValueError(
                f"text_input holds {self.tokenizer.id_to_token(largest)!r}, which this model does not know"
            )
        return ids

    def encode(self, prompt):
        return self.tokenizer.encode(prompt, add_special_tokens=self.add_special_tokens).ids

    def check_lengths(self, prompt, max_tokens):
        if prompt == 0:
            raise ValueError("text_input holds no token")
        if prompt > self.max_input_len:
            raise ValueError(f"the prompt has {prompt} tokens; this engine takes {self.max_input_len} (max_input_len)")
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; it must be 1 or more")
        if prompt + max_tokens > self.max_seq_len:
            raise ValueError(
                f"the prompt has {prompt} tokens and max_tokens is {max_tokens}, together {prompt + max_tokens};"
                f" this engine takes {self.max_seq_len} (max_seq_len): max_tokens can be {self.max_seq_len - prompt}"
            )

    def words(self, values, name, rows):
        """For each row the token ids of each of its words."""
        if values is None:
            return [[] for _ in range(rows)]
        texts = [[text(value, name) for value in row] for row in values.reshape(rows, -1)]
        return [[self.tokenizer.encode(word, add_special_tokens=False).ids for word in row] for row in texts]

    def bias(self, request, rows):
        """[rows, vocab_size], or [rows, 0] where the request has no bias."""
        words, weights = array(request, "EMBEDDING_BIAS_WORDS"), array(request, "EMBEDDING_BIAS_WEIGHTS")
        if words is None and weights is None:
            return np.zeros((rows, 0), np.float32)
        if words is None or weights is None or words.shape != weights.shape:
            raise ValueError("embedding_bias_words and embedding_bias_weights come together, as many of each")
        bias = np.zeros((rows, self.vocab_size), np.float32)
        ids = self.words(words, "embedding_bias_words", rows)
        for row, tokens, values in zip(bias, ids, weights.reshape(rows, -1), strict=True):
            for word, value in zip(tokens, values, strict=True):
                row[word] += value
        return bias


def added_in_front(encode):
    """The ids, as that of <s>, that `encode` puts in front of every text."""
    common = []
    for ids in zip(encode(""), encode("a"), encode("b"), strict=False):
        if len(set(ids)) > 1:
            break
        common.append(ids[0])
    return common


def without_repeat(ids, front):
    """A chat template has often written <s> already: it is not added a second time. Calibration does the same."""
    length = len(front)
    return ids[length:] if length and ids[length : 2 * length] == front else ids


def array(request, name):
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def required(request, name, client_name):
    """Triton counts a request's inputs and no more: with an optional one in its place a required one may be missing."""
    found = array(request, name)
    if found is None:
        raise ValueError(f"{client_name} is missing")
    return found


def text(value, name):
    """Triton hands strings over as bytes, and does not look into them."""
    try:
        return value if isinstance(value, str) else value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not valid UTF-8 at byte {error.start}") from None


def word_lists(rows):
    """[rows, 2, n] int32: all words' ids one after another, and below them where each word ends; the rest is 0 and -1.

    The format that TensorRT-LLM reads in convertWordList (utils.cc). Clients send "" for no word: it is left out.
    """
    rows = [[word for word in words if word] for words in rows]
    flat = [[id for word in words for id in word] for words in rows]
    packed = np.zeros((len(rows), 2, max(1, *(len(ids) for ids in flat))), np.int32)
    packed[:, 1] = -1
    for row, words, ids in zip(packed, rows, flat, strict=True):
        row[0, : len(ids)] = ids
        row[1, : len(words)] = np.cumsum([len(word) for word in words])
    return packed
