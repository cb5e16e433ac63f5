"""Which token ids end an answer and pad a prompt, read from a model's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from builder.tokenizer.special_ids import special_ids


def ids_of(tmp_path: Path, **files: Any) -> dict[str, Any]:
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return special_ids(tmp_path)


def test_special_ids_come_from_the_model_files(tmp_path: Path) -> None:
    assert ids_of(tmp_path, config={"eos_token_id": 5}) == {"end_ids": [5], "pad_id": 5}
    assert ids_of(tmp_path, generation_config={"eos_token_id": [7, 8], "pad_token_id": 0}) == {
        "end_ids": [7, 8],
        "pad_id": 0,
    }


def test_special_ids_come_from_the_tokenizer_if_no_config_has_them(tmp_path: Path) -> None:
    tokenizer = {"added_tokens": [{"id": 3, "content": "</s>"}, {"id": 4, "content": "<pad>"}]}
    named = {"eos_token": {"content": "</s>"}, "pad_token": "<pad>"}
    assert ids_of(tmp_path, config={}, tokenizer=tokenizer, tokenizer_config=named) == {"end_ids": [3], "pad_id": 4}
    for vocab in ({"a": 0, "</s>": 2}, [["a", -1.0], ["b", -1.0], ["</s>", -2.0]]):
        plain = {"added_tokens": [], "model": {"vocab": vocab}}
        found = ids_of(tmp_path, config={}, tokenizer=plain, tokenizer_config={"eos_token": "</s>"})
        assert found == {"end_ids": [2], "pad_id": 2}
    named_elsewhere = {"tokenizer_config": {}, "special_tokens_map": {"eos_token": "</s>"}}
    assert ids_of(tmp_path, config={}, tokenizer=tokenizer, **named_elsewhere)["end_ids"] == [3]
    assert special_ids(tmp_path / "nothing") == {"end_ids": [], "pad_id": 0}


def test_the_recipes_end_ids_take_precedence(tmp_path: Path) -> None:
    assert ids_of(tmp_path, config={"eos_token_id": 5})["end_ids"] == [5]
    assert special_ids(tmp_path, [9, 8, 9]) == {"end_ids": [9, 8], "pad_id": 9}
