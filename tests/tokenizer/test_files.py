"""Tokenizer files are checked before any weight is read: broken files, other models' files, contradictory end ids."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import Fault, Hub

from builder import pipeline, plan
from builder.checkpoint import huggingface
from builder.checkpoint.layouts import read_json
from builder.core.errors import IntegrityError, UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.hub import snapshot
from builder.preflight.prepare import prepare, tell
from builder.recipe import schema
from builder.tokenizer import files as tokenizer_files
from builder.tokenizer.special_ids import special_ids

DATA = Path(__file__).parents[1] / "data"
TINY = DATA / "tiny-qwen3"
IM_END, ENDOFTEXT = 4089, 4087
Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the bundled model, with links to its weights."""
    directory = tmp_path / "model"
    directory.mkdir()
    for file in TINY.iterdir():
        if file.suffix == ".safetensors":
            (directory / file.name).symlink_to(file)
        else:
            shutil.copyfile(file, directory / file.name)
    return directory


def edit(path: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def check(directory: Path) -> tokenizer_files.Tokenizer:
    return tokenizer_files.check(directory, read_json(directory / "config.json"), str(directory))


def resolved(directory: Path | str, **flags: Any) -> schema.Resolved:
    asked = {"model.id": str(directory), "gpu": "cpu", "calibration.data": "builtin:python-docs-text"}
    return schema.resolve(asked | {name.replace("__", "."): value for name, value in flags.items()})


def text_of(directory: Path, name: str) -> str:
    return (directory / name).read_text(encoding="utf-8")


BROKEN: dict[str, tuple[str, Any, str]] = {
    "empty": ("tokenizer.json", "", "not JSON.*the file is empty"),
    "cut": ("tokenizer.json", lambda text: text[:5000], "not JSON"),
    "a list": ("tokenizer.json", "[]", "a JSON list, not an object"),
    "null": ("tokenizer.json", "null", "a JSON NoneType, not an object"),
    "nested": ("tokenizer.json", "[" * 100_000, "not JSON"),
    "not UTF-8": ("tokenizer.json", b"\xff\xfe{}", "not JSON"),
    "no model": ("tokenizer.json", "{}", "can't be loaded as a tokenizer.*Model missing"),
    "a page of HTML": ("tokenizer.json", "<html><body>Log in</body></html>", "not JSON"),
    "a panic": (
        "tokenizer.json",
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        },
        "can't be loaded as a tokenizer.*no entry found",
    ),
    "no vocabulary": (
        "tokenizer.json",
        {"model": {"type": "BPE", "vocab": {}, "merges": []}},
        "It produces no tokens",
    ),
    "added tokens of the wrong type": ("tokenizer.json", {"added_tokens": {}}, "expected a sequence"),
    "an added token under another id": (
        "tokenizer.json",
        {"added_tokens": [{"id": 7, "content": "<|endoftext|>", "single_word": False, "lstrip": False,
                           "rstrip": False, "normalized": False, "special": True}]},
        "do not get the ids that the file lists: '<.endoftext.>' is listed as 7",
    ),
    "config empty": ("tokenizer_config.json", "", "tokenizer_config.json is not JSON.*the file is empty"),
    "config a list": ("tokenizer_config.json", "[1]", "tokenizer_config.json is a JSON list"),
    "config's class": ("tokenizer_config.json", {"tokenizer_class": 3}, "tokenizer_class is 3"),
    "config's eos": ("tokenizer_config.json", {"eos_token": 5}, "eos_token is 5, not a text"),
    "config's tokens": ("tokenizer_config.json", {"added_tokens_decoder": [1]}, r"added_tokens_decoder is \[1\]"),
    "config's ids": ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "a"}}}, "has 'x'"),
    "config's template": ("tokenizer_config.json", {"chat_template": 4}, "template in .*config.json is not a text"),
    "template list": ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "is not a text"),
    "template not UTF-8": ("chat_template.jinja", b"\xff\xfe", "chat_template.jinja is not a text"),
    "map a list": ("special_tokens_map.json", "[]", "special_tokens_map.json is a JSON list"),
    "map's eos": ("special_tokens_map.json", {"eos_token": {"lstrip": True}}, "special_tokens_map.json .*eos_token"),
    "added_tokens.json": ("added_tokens.json", '{"<x>": "seven"}', "'<x>' has the id 'seven'"),
    "generation": ("generation_config.json", "{", "generation_config.json is not JSON"),
    "generation's eos": ("generation_config.json", {"eos_token_id": ["a"]}, r"generation_config.json has \['a'\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_before_any_weight_is_read(name: str, model: Path, store: Store) -> None:
    file, content, says = BROKEN[name]
    path = model / file
    if callable(content):
        content = content(path.read_text())
    if isinstance(content, dict):
        edit(path, **content)
    else:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    for command in (lambda: snapshot.fetch(schema.Model(id=str(model)), store=store), lambda: plan_of(model, store)):
        with pytest.raises(IntegrityError, match=rf"(?s){says}") as caught:
            command()
        assert file in caught.value.what
        assert caught.value.hint
    assert not list(store.root.glob("snapshot/[!.]*"))


def plan_of(model: Path | str, store: Store, **flags: Any) -> plan.Plan:
    return plan.plan(resolved(model, **flags), Store(store.root, Output("quiet"), dry=True))


def test_every_model_of_ours_passes() -> None:
    for directory in (TINY, *(DATA / "arch-variants").iterdir()):
        found = check(directory)
        assert (found.max_id, found.eos, found.end_of_turn) == (4095, (IM_END, "<|im_end|>"), (IM_END, "<|im_end|>"))
        assert found.template_problem is None
        ids = special_ids(directory)["end_ids"]
        assert tokenizer_files.notes(directory, read_json(directory / "config.json"), ids) == []


def test_the_check_is_quick_and_done_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(model)
    monkeypatch.setattr(tokenizer_files, "_run_worker", lambda *_: pytest.fail("an unchanged tokenizer is read again"))
    check(model)


def test_plan_and_help_import_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'tokenizers', 'jinja2'}"
    code = f"import sys, builder.plan, builder.cli.main; print({heavy} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_a_tokenizer_of_a_larger_model(model: Path, store: Store) -> None:
    edit(model / "config.json", vocab_size=4000)
    assert tokenizer_files.largest_token_id(model) == 4095
    with pytest.raises(IntegrityError, match="does not match the model") as caught:
        check(model)
    assert "largest id is 4089, and config.json has a vocab_size of 4000" in caught.value.why


def add_token(directory: Path, content: str, *, special: bool = True) -> int:
    tokenizer = json.loads(text_of(directory, "tokenizer.json"))
    id = max(token["id"] for token in tokenizer["added_tokens"]) + 1
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"].append({"id": id, "content": content, "special": special, **flags})
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    return id


def test_an_added_token_without_an_embedding_is_a_note_unless_a_text_uses_it(model: Path) -> None:
    """Gemma 3's text-only sizes list <image_soft_token> but have no embedding for it."""
    assert add_token(model, "<image_soft_token>") == 4096
    check(model)
    ((rule, text),) = tokenizer_files.notes(model, read_json(model / "config.json"), [IM_END, ENDOFTEXT])
    assert rule == "tokens without embedding"
    assert "'<image_soft_token>' (4096)" in text
    (model / "chat_template.jinja").write_text("{% for m in messages %}<image_soft_token>{{ m.content }}{% endfor %}")
    with pytest.raises(IntegrityError, match="does not match the model"):
        check(model)


def test_an_added_token_under_another_id_that_nobody_uses_is_a_note(model: Path) -> None:
    tokenizer = json.loads(text_of(model, "tokenizer.json"))
    tokenizer["added_tokens"][-1]["id"] += 50  # </think>
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    check(model)
    ((rule, text),) = tokenizer_files.notes(model, read_json(model / "config.json"), [IM_END, ENDOFTEXT])
    assert (rule, "'</think>' of tokenizer.json do not get the ids" in text) == ("special tokens", True)


# ---- what ends an answer


def test_a_chat_fine_tune_with_the_base_models_end_id(model: Path, store: Store) -> None:
    edit(model / "generation_config.json", eos_token_id=ENDOFTEXT)
    edit(model / "config.json", eos_token_id=ENDOFTEXT)
    notes = {note.rule: note.text for note in plan_of(model, store).notes}
    assert "Answers stop at [4087], but the chat template ends with 4089 <|im_end|>" in notes["end ids"]
    assert "continue past the end of the turn" in notes["end ids"]
    assert "--set 'repository.end_ids=[4089, 4087]'" in notes["end ids"]
    chosen = plan_of(model, store, repository__end_ids=[IM_END, ENDOFTEXT])
    assert "end ids" not in {note.rule for note in chosen.notes}


@pytest.mark.parametrize(
    ("generation", "config", "token", "end_ids", "says"),
    [
        ([IM_END, ENDOFTEXT], IM_END, "<|im_end|>", [IM_END, ENDOFTEXT], []),
        (IM_END, ENDOFTEXT, "<|im_end|>", [IM_END], ["config.json ends with 4087: answers do not stop there"]),
        (ENDOFTEXT, ENDOFTEXT, "<|endoftext|>", [ENDOFTEXT], ["the chat template ends with 4089 <|im_end|>"]),
        (None, None, None, [], ["No file of the model names an end id"]),
        (999_999, None, "<|im_end|>", [999_999], ["ends with 4089", r"\[999999\] are outside of the vocabulary"]),
        (-1, None, "<|im_end|>", [-1], ["ends with 4089", r"\[-1\] are outside"]),
    ],
)
def test_end_ids_of_four_sources(
    generation: Any, config: Any, token: Any, end_ids: list[int], says: list[str], model: Path
) -> None:
    edit(model / "generation_config.json", eos_token_id=generation)
    edit(model / "config.json", eos_token_id=config)
    edit(model / "tokenizer_config.json", eos_token=token)
    edit(model / "special_tokens_map.json", eos_token=token)
    assert special_ids(model)["end_ids"] == end_ids
    texts = [text for _, text in tokenizer_files.notes(model, read_json(model / "config.json"), end_ids)]
    assert len(texts) == len(says)
    assert all(re.search(said, text) for said, text in zip(says, texts, strict=True)), texts


def test_the_end_of_turn_of_other_templates(model: Path) -> None:
    """The special token that follows an answer; None for a template that writes plain words."""
    cases = {
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}": None,
        "{% for m in messages %}{{ m.content | trim }}{{ eos_token }}{% endfor %}": (IM_END, "<|im_end|>"),
        "{% for m in messages %}{{ m.content }}\n\n<|endoftext|>{% endfor %}<|im_end|>": (ENDOFTEXT, "<|endoftext|>"),
        "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}": None,
    }
    for template, end in cases.items():
        (model / "chat_template.jinja").write_text(template)
        assert check(model).end_of_turn == end, template


@pytest.mark.parametrize("end_ids", [[4096], [1, 99_999]])
def test_end_ids_beyond_the_vocabulary(end_ids: list[int], model: Path, store: Store) -> None:
    with pytest.raises(
        UsageError, match=r"repository\.end_ids has \[(4096|99999)\], and the model's tokens are 0 to 4095"
    ):
        plan_of(model, store, repository__end_ids=end_ids)
    with pytest.raises(UsageError, match=r"repository\.end_ids"):
        pipeline.build(resolved(model, repository__end_ids=end_ids), store)
    assert not store.done


@pytest.mark.parametrize("end_ids", [[], [-1], ["x"], 5, [1.5]])
def test_end_ids_that_are_none(end_ids: Any) -> None:
    with pytest.raises(UsageError, match=r"repository\.end_ids"):
        resolved("m", repository__end_ids=end_ids)


# ---- saved by transformers 5


def as_transformers_5(directory: Path, name: str = "TokenizersBackend") -> None:
    """tokenizer_config.json as transformers 5.14 saves it, with the template in its own file."""
    config = json.loads(text_of(directory, "tokenizer_config.json"))
    (directory / "chat_template.jinja").write_text(config["chat_template"])
    saved = {
        "backend": "tokenizers",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "extra_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "is_local": True,
        "model_max_length": 2048,
        "tokenizer_class": name,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(saved))
    (directory / "special_tokens_map.json").unlink()


@pytest.mark.parametrize("name", ["TokenizersBackend", "Qwen2Tokenizer", "NoSuchTokenizer"])
def test_a_tokenizer_saved_by_transformers_5(name: str, model: Path, tmp_path: Path) -> None:
    """transformers 4.57 supports neither the class nor a list of extra tokens; both versions load our copy."""
    transformers = pytest.importorskip("transformers")
    from builder.tokenizer import loading as tokenizer_loading

    text = "<|im_start|>user\nGrüße, 世界 12345<|im_end|>\n<think>"
    expected = transformers.AutoTokenizer.from_pretrained(TINY)
    as_transformers_5(model, name)
    check(model)
    tokenizer = tokenizer_loading.load(model)
    assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert tokenizer.chat_template == expected.chat_template
    assert tokenizer.eos_token_id == IM_END
    (tmp_path / "unified").mkdir()
    (tmp_path / "unified" / "config.json").write_text(text_of(model, "config.json"))
    huggingface.complete(tmp_path / "unified", model)
    if name == "NoSuchTokenizer":
        return
    served = transformers.AutoTokenizer.from_pretrained(tmp_path / "unified")
    assert served(text)["input_ids"] == expected(text)["input_ids"]
    assert "<|im_start|>" in served.all_special_tokens


def test_what_transformers_4_reads_stays_as_it_is(tmp_path: Path) -> None:
    tokenizer_files.copy(TINY, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    ]  # fmt: skip
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (TINY / file.name).read_bytes()


# ---- the Hub


def test_a_broken_tokenizer_on_the_hub_costs_no_weight(model: Path, hub: Hub, store: Store) -> None:
    (model / "tokenizer.json").write_text('{"model": {}}')
    hub.add("tiny/broken", model)
    for command in (
        lambda: plan_of("tiny/broken", store),
        lambda: snapshot.fetch(schema.Model(id="tiny/broken"), store=store),
    ):
        with pytest.raises(IntegrityError, match=r"tiny/broken/tokenizer\.json can.t be loaded as a tokenizer"):
            command()
    assert not [r for r in hub.requests if r.path.startswith("/cdn/") and r.path.endswith("safetensors")]


def test_a_tokenizer_damaged_on_its_way_is_fetched_again(hub: Hub, store: Store) -> None:
    hub.add("tiny/qwen3", TINY)
    hub.fail(Fault("tokenizer_config.json", "wrong-bytes"))
    assert plan_of("tiny/qwen3", store).notes == []
    [found] = (Path(os.environ["HF_HOME"]) / "hub").rglob("tokenizer_config.json")
    assert found.read_bytes() == (TINY / "tokenizer_config.json").read_bytes()


def test_the_notes_of_a_hub_model(model: Path, hub: Hub, store: Store) -> None:
    edit(model / "generation_config.json", eos_token_id=ENDOFTEXT)
    hub.add("tiny/chat", model)
    assert any("ends with 4089 <|im_end|>" in note.text for note in plan_of("tiny/chat", store).notes)
    with pytest.raises(UsageError, match="the model's tokens are 0 to 4095"):
        plan_of("tiny/chat", store, repository__end_ids=[5000])
    assert not [
        r for r in hub.requests if r.path.startswith("/cdn/") and r.path.endswith("safetensors") and not r.range
    ]


def test_a_build_warns_of_the_end_ids(model: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    edit(model / "generation_config.json", eos_token_id=ENDOFTEXT)
    tell(prepare(resolved(model), store), store)
    assert "the chat template ends with 4089 <|im_end|>" in capsys.readouterr().err
    tell(prepare(resolved(model, repository__end_ids=[IM_END, ENDOFTEXT]), store), store)
    assert "ends with" not in capsys.readouterr().err
