"""Triton model: converts text to token ids. An invalid request fails alone, not the batch that it is in.

Needs numpy and tokenizers. Triton loads each model.py by itself, so functions that several of them need are repeated.
The same file runs in NVIDIA's container and with the reference executor.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import traceback
import unicodedata
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils
from tokenizers import AddedToken, Tokenizer, models

# What may precede and follow a word in an answer. A tokenizer may encode a word differently at the start of a text,
# after a space, within a line, and together with the line break after it.
BEFORE = ("a", "1", ".", ")", "\n", "")
AFTER = ("", "\n", "\n\n", " ")
MAX_WORD = 1000  # characters of a stop word, bad word or biased word
BEFORE_LINE_BREAK = (*".,:;!?)]}'\"`>", "\n")  # many vocabularies have a token of each of these with a line break
MAX_VARIANTS = 32  # token sequences of one word: the engine compares each with the answer's end at every token

# The sampling values that TensorRT-LLM accepts (cpp/tensorrt_llm/executor/samplingConfig.cpp): (input, the client's
# name, test, rule). They are checked here because the engine's own errors show clients the names of C++ source files.
SAMPLING = (
    ("TEMPERATURE", "temperature", lambda x: 0 <= x < math.inf, "a finite number of 0 or more"),
    ("TOP_K", "top_k", lambda x: x >= 0, "0 or more"),
    ("TOP_P", "top_p", lambda x: 0 <= x <= 1, "from 0 to 1"),
    ("LENGTH_PENALTY", "length_penalty", math.isfinite, "a finite number"),
    ("REPETITION_PENALTY", "repetition_penalty", lambda x: 0 < x < math.inf, "a finite number above 0"),
    ("PRESENCE_PENALTY", "presence_penalty", math.isfinite, "a finite number"),
    ("FREQUENCY_PENALTY", "frequency_penalty", math.isfinite, "a finite number"),
    ("MIN_TOKENS", "min_tokens", lambda x: x >= 0, "0 or more"),
    ("NUM_RETURN_SEQUENCES", "num_return_sequences", lambda x: x >= 1, "1 or more"),
)
# A BPE model's keys in tokenizer.json beside vocab and merges: those of models.BPE have the same names.
BPE_OPTIONS = {"dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
               "ignore_merges"}  # fmt: skip
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")  # of a tokenizer beside its model and tokens


class TritonPythonModel:
    def initialize(self, args):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a prompt at a time needs no pool of threads
        parameters = {key: v["string_value"] for key, v in json.loads(args["model_config"])["parameters"].items()}
        root = Path(args["model_repository"]).parent
        self.tokenizer = read_tokenizer(root / parameters["tokenizer_dir"] / "tokenizer.json")
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.add_special_tokens = parameters["add_special_tokens"] == "true"
        self.parse_special_tokens = parameters["parse_special_tokens"] == "true"
        self.defaults = json.loads(parameters["sampling_defaults"])
        self.prefix = prefix_ids(self.encode)
        self.end_ids = json.loads(parameters["end_ids"])
        self.pad_id = int(parameters["pad_id"])
        self.vocab_size = int(parameters["vocab_size"])
        self.max_input_len = int(parameters["max_input_len"])
        self.max_seq_len = int(parameters["max_seq_len"])
        self.max_beam_width = int(parameters["max_beam_width"])
        self.has_context_logits = parameters["context_logits"] == "true"
        self.variants = lru_cache(1024)(self.variants)
        # A prompt with more characters cannot fit, so it is rejected without being tokenized.
        longest = max(len(token) for token in self.tokenizer.get_vocab())
        self.max_characters = self.max_input_len * longest
        release_memory()

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        try:
            outputs = self.outputs(request)
        except ValueError as error:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG))
        except Exception as error:
            traceback.print_exc()
            message = f"preprocessing failed: {type(error).__name__}; see the server's log"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])

    def outputs(self, request):
        """Every output by name, as an array with one row per prompt. ValueError for an invalid request."""
        stream = array(request, "STREAM")
        if stream is not None and stream.any():
            raise ValueError("the ensemble does not stream; send streaming requests to tensorrt_llm_bls")
        ids = [self.prompt(value) for value in required(request, "QUERY", "text_input").reshape(-1)]
        rows = len(ids)
        max_tokens = required(request, "REQUEST_OUTPUT_LEN", "max_tokens").reshape(rows, 1).astype(np.int32)
        for row, length in zip(ids, max_tokens[:, 0].tolist(), strict=True):
            self.check_lengths(len(row), length)
        stop_words = self.words(array(request, "STOP_WORDS_DICT"), "stop_words", rows)
        self.check_sampling(request)
        end_id, pad_id = self.token_id(request, "END_ID", "end_id"), self.token_id(request, "PAD_ID", "pad_id")
        if end_id is None:
            # The engine supports one end token. The others of a model (Qwen3 has two) are passed as stop words.
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
            **self.sampling(request, rows),
        }

    def prompt(self, value):
        """The token ids of one prompt. ValueError if it is empty, too long, or has tokens that the model lacks."""
        prompt = text(value, "text_input")
        if not prompt:
            raise ValueError("text_input is empty")
        if len(prompt) > self.max_characters:
            raise ValueError(
                f"the prompt has {len(prompt)} characters, too many for the {self.max_input_len} tokens (max_input_len)"
                " that this engine takes"
            )
        ids = without_repeated_prefix(self.encode(prompt), self.prefix)
        largest = max(ids, default=0)
        if largest >= self.vocab_size:  # the engine would read beyond its embedding table
            raise ValueError(
                f"text_input contains {self.tokenizer.id_to_token(largest)!r}, which this model does not know"
            )
        return ids

    def encode(self, prompt):
        self.tokenizer.encode_special_tokens = not self.parse_special_tokens  # True reads them as text
        try:
            # "fast" leaves out the offsets of the tokens in the text.
            return self.tokenizer.encode_batch_fast([prompt], add_special_tokens=self.add_special_tokens)[0].ids
        finally:
            self.tokenizer.encode_special_tokens = False

    def check_lengths(self, prompt, max_tokens):
        """ValueError if a prompt of so many tokens, with max_tokens, exceeds the engine's limits."""
        if prompt == 0:
            raise ValueError("text_input has no tokens")
        if prompt > self.max_input_len:
            raise ValueError(f"the prompt has {prompt} tokens; this engine takes {self.max_input_len} (max_input_len)")
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; it must be 1 or more")
        if prompt + max_tokens > self.max_seq_len:
            raise ValueError(
                f"the prompt has {prompt} tokens and max_tokens is {max_tokens}, together {prompt + max_tokens};"
                f" this engine takes {self.max_seq_len} (max_seq_len): max_tokens can be {self.max_seq_len - prompt}"
            )

    def check_sampling(self, request):
        """ValueError for a sampling value that TensorRT-LLM would reject, or that this engine does not support."""
        for name, client_name, valid, rule in SAMPLING:
            values = array(request, name)
            for value in [] if values is None else values.reshape(-1).tolist():
                if not valid(value):
                    raise ValueError(f"{client_name} is {value:g}; it must be {rule}")
        beams = array(request, "BEAM_WIDTH")
        for width in [] if beams is None else beams.reshape(-1).tolist():
            if not 1 <= width <= self.max_beam_width:
                raise ValueError(
                    f"beam_width is {width}; this engine takes 1 to {self.max_beam_width} (max_beam_width)"
                )
        logits = array(request, "RETURN_CONTEXT_LOGITS")
        if logits is not None and logits.any() and not self.has_context_logits:
            raise ValueError("return_context_logits needs an engine built with gather_context_logits")

    def sampling(self, request, rows):
        """The sampling values that have a default: the client's own, or the default. Temperature 0 is greedy."""
        found = {}
        for name, default in self.defaults.items():
            given = array(request, name)
            kind = np.int32 if isinstance(default, int) else np.float32
            found[name] = np.full((rows, 1), default, kind) if given is None else given.reshape(rows, 1).astype(kind)
        if "TOP_K" in found and array(request, "TOP_K") is None:
            found["TOP_K"][found["TEMPERATURE"] == 0] = 1
        return {f"OUT_{name}": values for name, values in found.items()}

    def token_id(self, request, name, client_name):
        ids = array(request, name)
        for id in [] if ids is None else ids.reshape(-1).tolist():
            if not -1 <= id < self.vocab_size:
                raise ValueError(
                    f"{client_name} is {id}; it must be a token id below {self.vocab_size}, or -1 for none"
                )
        return ids

    def words(self, values, name, rows):
        """For each row, every token sequence that an answer can contain for each of its words."""
        return [[ids for word in row for ids in self.variants(word)] for row in texts(values, name, rows)]

    def variants(self, word):
        """The token sequences that contain the word. One that contains another is redundant and left out."""
        if not word:
            return []
        leads = ("",) if word[0].isspace() else ("", " ")
        found = [self.in_context(x, lead + word, after) for lead in leads for x in BEFORE for after in AFTER]
        if word[0] == "\n":
            found += [self.merged(before, word) for before in BEFORE_LINE_BREAK]
        kept = []
        for ids in sorted(filter(None, found), key=len):
            if max(ids) < self.vocab_size and not any(contains(ids, other) for other in kept):
                kept.append(ids)
        return kept[:MAX_VARIANTS]

    def merged(self, before, word):
        """The ids of `before` and the word, if a token covers `before` and the word's first character; else None."""
        alone, whole = self.word_ids(before), self.word_ids(before + word)
        return whole if len(alone) == 1 and whole[:1] != alone else None

    def in_context(self, before, word, after=""):
        """The ids of the word after `before`; None if the tokenizer merges the two or cannot encode the word."""
        first = self.word_ids(before)
        whole = self.word_ids(before + word + after)
        ids = whole[len(first) :]
        if not word or whole[: len(first)] != first or not ids:
            return None
        readable = self.tokenizer.decode(whole, skip_special_tokens=False)
        return ids if normalized(word) in normalized(readable) else None

    def word_ids(self, word):
        return self.tokenizer.encode(word, add_special_tokens=False).ids

    def bias(self, request, rows):
        """The bias to add to the logits, float32 [rows, vocab_size]; [rows, 0] for a request without biases."""
        words, weights = array(request, "EMBEDDING_BIAS_WORDS"), array(request, "EMBEDDING_BIAS_WEIGHTS")
        if words is None and weights is None:
            return np.zeros((rows, 0), np.float32)
        if words is None or weights is None or words.shape != weights.shape:
            raise ValueError("embedding_bias_words and embedding_bias_weights must come together, with equal shapes")
        bias = np.zeros((rows, self.vocab_size), np.float32)
        if not np.isfinite(weights).all():
            raise ValueError("embedding_bias_weights must be finite numbers")
        found = texts(words, "embedding_bias_words", rows)
        for row, row_words, values in zip(bias, found, weights.reshape(rows, -1), strict=True):
            for word, value in zip(row_words, values, strict=True):
                row[self.biased_ids(word)] += value
        return bias

    def biased_ids(self, word):
        """The ids of the word at the start of a text and within one, without the space that some tokenizers add."""
        inside = next((ids for before in BEFORE if (ids := self.in_context(before, word))), [])
        start = (not word[:1].isspace() and self.in_context("", word)) or []
        while len(start) > 1 and not self.tokenizer.decode(start[:1]).strip():
            start = start[1:]
        ids = sorted({*inside, *start})
        if word and (not ids or ids[-1] >= self.vocab_size):
            raise ValueError(f"embedding_bias_words contains {word!r}, which this model does not know")
        return ids


def prefix_ids(encode):
    """The ids, such as that of <s>, that `encode` puts in front of every text."""
    common = []
    for ids in zip(encode(""), encode("a"), encode("b"), strict=False):
        if len(set(ids)) > 1:
            break
        common.append(ids[0])
    return common


def without_repeated_prefix(ids, prefix):
    """`ids` without a second prefix: chat templates often write <s> themselves. Calibration follows the same rule."""
    length = len(prefix)
    return ids[length:] if length and ids[length : 2 * length] == prefix else ids


def array(request, name):
    """An input as an array; None if the request does not have it."""
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    return None if tensor is None else tensor.as_numpy()


def required(request, name, client_name):
    """A required input as an array. ValueError if it is missing.

    Triton itself only counts inputs, so an optional one can take the place of a required one.
    """
    found = array(request, name)
    if found is None:
        raise ValueError(f"{client_name} is missing")
    return found


def text(value, name):
    """Decodes a string, which Triton passes as unchecked bytes. ValueError for invalid UTF-8."""
    try:
        return value if isinstance(value, str) else value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not valid UTF-8 at byte {error.start}") from None


def texts(values, name, rows):
    """The words of each row; empty lists if the request has none. ValueError for invalid or too long words."""
    if values is None:
        return [[] for _ in range(rows)]
    found = [[text(value, name) for value in row] for row in values.reshape(rows, -1)]
    longest = max((len(word) for row in found for word in row), default=0)
    if longest > MAX_WORD:
        raise ValueError(f"{name} has a word of {longest} characters; the limit is {MAX_WORD}")
    return found


def normalized(word):
    """The word for comparisons: tokenizers replace composed and compatibility characters."""
    return unicodedata.normalize("NFKC", word)


def contains(ids, part):
    """Whether `part` is a contiguous part of `ids`."""
    return any(ids[i : i + len(part)] == part for i in range(len(ids) - len(part) + 1))


def word_lists(rows):
    """Packs words for the engine as int32 [rows, 2, n]: the ids of all words, and the end offset of each word.

    This is the format that TensorRT-LLM reads in convertWordList (utils.cc). Ids are padded with 0 and offsets with -1.
    Empty words, which clients send for none, are left out.
    """
    rows = [[word for word in words if word] for words in rows]
    flat = [[id for word in words for id in word] for words in rows]
    packed = np.zeros((len(rows), 2, max(1, *(len(ids) for ids in flat))), np.int32)
    packed[:, 1] = -1
    for row, words, ids in zip(packed, rows, flat, strict=True):
        row[0, : len(ids)] = ids
        row[1, : len(words)] = [*accumulate(len(word) for word in words)]
    return packed


def read_tokenizer(path):
    """The same tokenizer as Tokenizer.from_file makes, in less memory.

    from_file (tokenizers 0.22, 0.23) leaves the tokens of a BPE vocabulary scattered between what it frees: pages of
    22 MB with 262,144 tokens, which can't be returned to the system. Those of models.BPE stand side by side.
    """
    content = json.loads(path.read_bytes())
    bpe = bpe_model(content["model"])
    if bpe is None:
        return Tokenizer.from_file(str(path))
    tokenizer, added = Tokenizer(bpe), content["added_tokens"]
    content |= {"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
    rest = Tokenizer.from_str(json.dumps(content))
    for part in PARTS:
        if (value := getattr(rest, part)) is not None:
            setattr(tokenizer, part, value)
    tokenizer.add_tokens([AddedToken(**{key: token[key] for key in token if key != "id"}) for token in added])
    return tokenizer


def bpe_model(content):
    """The BPE model of this part of a tokenizer.json, which is used up. None if it is of another kind."""
    kind, vocab, merges = (content.pop(key, None) for key in ("type", "vocab", "merges"))
    if kind != "BPE" or merges is None or not content.keys() <= BPE_OPTIONS:
        return None
    for index, merge in enumerate(merges):  # in place: a second list would add to the peak of memory
        merges[index] = tuple(merge.split(" ") if isinstance(merge, str) else merge)
        if len(merges[index]) != 2:
            return None
    return models.BPE(vocab, merges, **{key: value for key, value in content.items() if value is not None})


def release_memory():
    """Returns memory to the system: reading a tokenizer's file takes more than twice what the tokenizer keeps."""
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)  # a function of glibc
