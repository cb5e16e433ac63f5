"""Chat templates are untrusted programs: rendered as transformers does, and killed if they don't end."""

from __future__ import annotations

import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from builder import pipeline, plan
from builder.calibration import rows as calibration_rows
from builder.core import paths
from builder.core.errors import IntegrityError, UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.recipe import schema
from builder.tokenizer import chat_template
from builder.tokenizer.chat_template import ChatTemplate, Renderer, TemplateProblem
from tests.tokenizer.test_files import check, edit, resolved

TINY = Path(__file__).parents[1] / "data" / "tiny-qwen3"
DIALOGUE = [{"role": "user", "content": "Grüße?"}, {"role": "assistant", "content": "Grüße 🙂"}]
NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='x' * 9) %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}"
HOSTILE = {
    NESTED: ("endless", "3 s of CPU time"),
    "{% for a in range(10**12) %}{% endfor %}": ("endless", "Range too big"),
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": ("endless", "calls itself"),
    "{{ (10**9) ** (10**9) }}": ("endless", "3 s of CPU time"),
    DOUBLING: ("memory", "1024 MiB"),
    "{{ 'x' * 10**12 }}": ("memory", "1024 MiB"),
    "{{ 'x' * 10**8 }}": ("memory", "16,777,216 characters"),
    "{% if %}": ("syntax", "line 1"),
    "a\n{{ nothing": ("syntax", "line 2"),
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": ("endless", "calls itself"),
    "{{ raise_exception('Roles must alternate') }}": ("refused", "Roles must alternate"),
    "{{ ''.__class__.__mro__ }}": ("refused", "unsafe"),
    "{{ messages.append(1) }}": ("refused", "unsafe"),
    "{{ messages[7].content }}": ("refused", "no element 7"),
    "{{ cycler.__init__.__globals__.os.system('touch x') }}": ("refused", "unsafe"),
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    for file in TINY.iterdir():
        if file.suffix == ".safetensors":
            (directory / file.name).symlink_to(file)
        else:
            shutil.copyfile(file, directory / file.name)
    return directory


def render(text: str, messages: Any = DIALOGUE, **variables: Any) -> str:
    with Renderer(ChatTemplate(text, "chat_template.jinja", variables)) as renderer:
        return renderer.render(messages)


@pytest.mark.parametrize("template", HOSTILE)
def test_a_hostile_template_is_ended(template: str) -> None:
    kind, says = HOSTILE[template]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(TemplateProblem) as caught:
        render(template)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert caught.value.kind == kind
    assert says in caught.value.why
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < chat_template.CPU_SECONDS + 3


def test_a_conversation_of_a_thousand_has_its_own_limit() -> None:
    """A rejected conversation does not affect the others, and the worker process stays the same."""
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}"
    with Renderer(ChatTemplate(template + "{% endfor %}", "chat_template.jinja")) as renderer:
        start = time.monotonic()
        for _ in range(1000):
            assert renderer.render(DIALOGUE) == "Grüße?Grüße 🙂"
        assert time.monotonic() - start < 20
        with pytest.raises(TemplateProblem, match="TemplateError: no"):
            renderer.render([{"role": "system", "content": ""}])
        assert renderer.render(DIALOGUE) == "Grüße?Grüße 🙂"


REAL = {
    "tiny-qwen3": json.loads((TINY / "tokenizer_config.json").read_text())["chat_template"],
    # The shapes that common models have: Llama 3 (trim, offsets), Mistral (alternation), Gemma (renamed roles),
    # Qwen3 (tojson, namespace, slices), and the block that marks what the assistant says.
    "llama": "{{ bos_token }}{% for message in messages %}{% set content = '<|start|>' + message['role'] + '\n\n'+ "
    "message['content'] | trim + '<|eot_id|>' %}{{ content }}{% endfor %}{% if add_generation_prompt %}x{% endif %}",
    "mistral": "{%- for message in loop_messages | default(messages) -%}\n    {%- if (message['role'] == 'user') != "
    "(loop.index0 % 2 == 0) -%}\n        {{- raise_exception('alternate') -}}\n    {%- endif -%}\n    "
    "{{- '[INST] ' + message['content'] + '[/INST]' -}}\n{%- endfor -%}",
    "gemma": "{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}"
    "{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim }}"
    "{% if not loop.last %}{% continue %}{% endif %}{% endfor %}",
    "qwen3": "{%- set ns = namespace(i=0) %}\n{%- for m in messages[::-1] %}\n    {%- set ns.i = ns.i + 1 %}\n    "
    "{{- m | tojson }}{{- {'ü': [1, 2]} | tojson(indent=2) }} {{ ns.i }}\n{%- endfor %}\n{% if tools %}t{% endif %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}",
}


@pytest.mark.parametrize("name", REAL)
def test_it_renders_what_transformers_renders(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.bos_token = "<|endoftext|>"
    expected = tokenizer.apply_chat_template(DIALOGUE, chat_template=REAL[name], tokenize=False)
    assert render(REAL[name], **tokenizer.special_tokens_map) == expected
    assert expected


def test_the_same_text_on_every_day() -> None:
    """Llama 3.1 writes the date, so calibration would depend on the day but its key would not."""
    assert render("{{ strftime_now('%d %b %Y') }}") == "01 Jan 2025"


def test_where_the_template_is(model: Path) -> None:
    found = chat_template.find(model)
    assert found is not None
    assert (found.file, found.text) == ("tokenizer_config.json", REAL["tiny-qwen3"])
    assert found.variables == {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    edit(model / "tokenizer_config.json", chat_template=[{"name": "tool_use", "template": "t"}])
    assert chat_template.find(model) is None
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    edit(model / "tokenizer_config.json", chat_template=named)
    assert chat_template.find(model).text == "d"  # type: ignore[union-attr]
    (model / "chat_template.jinja").write_text("file")
    assert chat_template.find(model) == ChatTemplate("file", "chat_template.jinja", found.variables)
    (model / "chat_template.jinja").write_text(" \n")
    assert chat_template.find(model) is None
    edit(model / "tokenizer_config.json", chat_template={"default": "d"})
    (model / "chat_template.jinja").unlink()
    with pytest.raises(IntegrityError, match="is not a text"):
        chat_template.find(model)


def without_template(model: Path) -> None:
    edit(model / "tokenizer_config.json", chat_template=None)


def plan_of(model: Path, store: Store, data: str) -> plan.Plan:
    return plan.plan(resolved(model, calibration__data=data), Store(store.root, Output("quiet"), dry=True))


def test_messages_for_a_model_without_a_template(model: Path, store: Store) -> None:
    """Detected before any weight is hashed; the hint names another data set, and following it works."""
    without_template(model)
    for command in (
        lambda: plan_of(model, store, "builtin:python-docs"),
        lambda: pipeline.build(resolved(model, calibration__data="builtin:python-docs"), store),
    ):
        with pytest.raises(UsageError, match="rows are messages, and this model's tokenizer has no chat template") as e:
            command()
        assert "--calib-data builtin:python-docs-text" in e.value.hint
    assert not store.done
    assert plan_of(model, store, "builtin:python-docs-text").stages
    rows = calibration_rows.first_rows(schema.Calibration(data="builtin:python-docs-text"))
    both = calibration_rows.first_rows(schema.Calibration(data="builtin:python-docs"))
    assert len(rows) == 32
    assert rows == [row for row in both if "text" in row]


@pytest.mark.parametrize("template", [NESTED, "{% if %}", DOUBLING])
def test_a_template_that_can_not_be_used(template: str, model: Path, store: Store) -> None:
    (model / "chat_template.jinja").write_text(template)
    problem = check(model).template_problem
    assert problem is not None
    says = chat_template.DESCRIPTIONS[problem.kind]
    with pytest.raises(UsageError, match=rf"chat template of this model \(chat_template\.jinja\) {says}") as caught:
        pipeline.build(resolved(model, calibration__data="builtin:python-docs"), store)
    assert "builtin:python-docs-text" in caught.value.hint
    assert not store.done
    # Rows of text need no template: the plan says what clients will meet.
    notes = {note.rule: note.text for note in plan_of(model, store, "builtin:python-docs-text").notes}
    assert f"The chat template (chat_template.jinja) {says}" in notes["chat template"]


def test_rows_that_only_the_finished_calibration_shows(model: Path, store: Store, tmp_path: Path) -> None:
    """Rows of a Hub dataset are checked before the model is loaded."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"messages": DIALOGUE}) + "\n")
    found = calibration_rows.calibrate(schema.Calibration(data=str(file)), store=store)
    calibration_rows.check_conversations(calibration_rows.read_rows(found), model)
    without_template(model)
    with pytest.raises(UsageError, match="no chat template"):
        calibration_rows.check_conversations(calibration_rows.read_rows(found), model)


def test_one_row_that_never_ends(tmp_path: Path) -> None:
    """If a template hangs on some conversations only, the message names the row."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = "{% if messages | length > 2 %}" + NESTED + "{% endif %}{{ messages[0].content }}"
    file = tmp_path / "rows.jsonl"
    rows = [{"messages": DIALOGUE}, {"text": "x"}, {"messages": DIALOGUE * 2}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UsageError, match=r"does not end \(calibration row 3\)"):
        calibration_rows.token_batches(file, tokenizer, seq_len=100, batch_size=1)


def test_the_bundled_text_set_is_the_half_of_the_other() -> None:
    whole = paths.data("configs", "calibration", "python-docs.jsonl").read_text(encoding="utf-8").splitlines()
    text = paths.data("configs", "calibration", "python-docs-text.jsonl").read_text(encoding="utf-8").splitlines()
    assert text == [line for line in whole if line.startswith('{"text"')]


@pytest.mark.parametrize("name", ["tiny-qwen3", "llama", "gemma"])
@pytest.mark.parametrize("ending", ["Grüße 🙂", "Grüße "])
def test_a_last_message_that_goes_on(name: str, ending: str) -> None:
    """As lm-eval does to prefill the answer."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    messages = [DIALOGUE[0], {"role": "assistant", "content": ending}]
    expected = tokenizer.apply_chat_template(
        messages, chat_template=REAL[name], tokenize=False, continue_final_message=True
    )
    with Renderer(ChatTemplate(REAL[name], "", {"bos_token": ""})) as renderer:
        assert renderer.render_open(messages) == expected
    with (
        Renderer(ChatTemplate("{{ messages[0].content }}", "")) as renderer,
        pytest.raises(TemplateProblem, match="drops the end"),
    ):
        renderer.render_open(messages)
