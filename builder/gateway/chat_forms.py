"""How models write tool calls and reasoning into an answer's text, and how a chat template tells which of them it uses.

Sources: the parsers and chat templates of vLLM (github.com/vllm-project/vllm@023f36c6, vllm/tool_parsers/ and
examples/tool_chat_template_*.jinja), which name the models of each form.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, replace

from builder.grammar import tool_calls

AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class ToolCallForm:
    """A way to write tool calls.

    openings: texts before calls, the usual one first; "": a call can begin the answer without one.
    listed, separator, closing: what stands before, between and after the calls that follow one opening.
    named: the function's name stands before the arguments (`name[ARGS]{...}`), not in a JSON object with them.
    key: of the arguments in the JSON object.
    tokens: special tokens of the form, which stay in an answer's text while it is parsed.
    short_ids: ids of calls have 9 letters and digits.
    """

    name: str
    openings: tuple[str, ...]
    listed: str = ""
    separator: str = ""
    closing: str = ""
    named: bool = False
    key: str = "arguments"
    tokens: tuple[str, ...] = ()
    short_ids: bool = False

    def forced(self, function: str | None) -> str:
        """The beginning of a call: of this function, or of one that the model chooses."""
        start = self.openings[0]
        if self.named:
            return start + (f"{function}[ARGS]" if function else "")
        start += f" {self.listed}" if self.listed else "\n" if start else ""
        return f'{start}{{"name": "{function}", "{self.key}":' if function else f'{start}{{"name": "'

    def grammar(self, special: Container[str]) -> tool_calls.Form:
        """As grammars have it. A grammar can't have a mark that is one of the model's special tokens: it ends there."""
        listed, separator, closing = ("", "", "") if self.named else (self.listed, self.separator, self.closing)
        before = tuple(filter(None, (self.openings[0], listed)))
        between = (separator,) if separator else (closing, *before)
        return tool_calls.Form(
            before=before,
            between=tuple(filter(None, between)),
            after=(closing,) if closing and closing not in special else (),
            key="" if self.named else self.key,
            marks=tuple(mark for mark in self.openings if mark),
            bare="" in self.openings,
        )


HERMES = ToolCallForm("hermes", ("<tool_call>",), closing="</tool_call>", tokens=("<tool_call>", "</tool_call>"))
# Calls are separated by semicolons (llama_tool_parser.py). The tag precedes calls of Llama 3.1's own tools, and some
# fine-tunes write it before every call.
LLAMA3 = ToolCallForm("llama3", ("", "<|python_tag|>"), separator=";", key="parameters", tokens=("<|python_tag|>",))
# Tokenizers before version 11, and later ones (mistral_tool_parser.py). In an answer both are found, with either name.
MISTRAL = ToolCallForm(
    "mistral", ("[TOOL_CALLS]",), listed="[", separator=",", closing="]",
    tokens=("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"), short_ids=True,
)  # fmt: skip
MISTRAL_NAMED = replace(MISTRAL, name="mistral-named", named=True)
TOOL_CALL_FORMS = {form.name: form for form in (HERMES, LLAMA3, MISTRAL, MISTRAL_NAMED)}


@dataclass(frozen=True)
class ReasoningForm:
    """The texts before and after the part of an answer in which a model reasons."""

    name: str
    opening: str
    closing: str


# Qwen3, DeepSeek-R1, QwQ and others; Magistral (mistral_reasoning_parser.py).
THINK = ReasoningForm("think", "<think>", "</think>")
MAGISTRAL = ReasoningForm("magistral", "[THINK]", "[/THINK]")
REASONING_FORMS = {form.name: form for form in (THINK, MAGISTRAL)}


def tool_call_form(template: str, vocabulary: Container[str], asked: str = AUTO) -> ToolCallForm | None:
    """The form of a model's tool calls, from its chat template and its tokens; None if it is not known.

    `asked`: the recipe's choice: "auto", "none" or a form's name.
    """
    if asked != AUTO:
        return TOOL_CALL_FORMS.get(asked)
    if "tools" not in template or "<function=" in template:  # Qwen3-Coder writes calls as XML
        return None
    if "[TOOL_CALLS]" in template:
        return MISTRAL_NAMED if "[ARGS]" in template or "[ARGS]" in vocabulary else MISTRAL
    if "<tool_call>" in template:
        return HERMES
    if '"parameters"' in template and ("<|python_tag|>" in template or "ipython" in template):
        return LLAMA3
    return None


def reasoning_form(template: str, vocabulary: Container[str], asked: str = AUTO) -> ReasoningForm | None:
    """The form of a model's reasoning; None if it has none. `asked`: the recipe's choice, as for tool calls."""
    if asked != AUTO:
        return REASONING_FORMS.get(asked)
    for form in REASONING_FORMS.values():
        if form.closing in template or (form.opening in vocabulary and form.closing in vocabulary):
            return form
    return None
