"""Tokenizers of calibration rows."""

from __future__ import annotations

import json

import pytest

from builder.tokenizer import loading
from tests.support import exports


@pytest.mark.parametrize("model", exports.MODELS)
def test_tokenizer_json_alone_produces_the_tokens_that_transformers_does(model: str) -> None:
    directory, text = exports.MODELS[model], (exports.DATA / "eval" / "prose.jsonl").read_text()
    texts = [*(json.loads(line)["text"] for line in text.splitlines()), loading.SAMPLE, "", " a  b\n", "<|im_start|>x"]
    theirs, alone = loading.load(directory), loading.ServedTokenizer(directory)
    for one in texts:
        assert alone(one)["input_ids"] == list(theirs(one, verbose=False)["input_ids"])
