"""Grammars of answers that call functions: each call has the name of a function and arguments that fulfil its schema.

An answer is text in which calls may follow, or it must be calls, the first of which the prompt may have begun. Text
contains no mark that begins a call, so that whatever looks like a call is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from builder.grammar import json_schema
from builder.grammar.alternatives import alternatives
from builder.grammar.errors import GrammarError
from builder.grammar.rules import ANY_OBJECT, Rules
from builder.grammar.strings import json_literal, literal

SPACE = " \t\r\n"  # before the first call, or in text that turns out to have none
Begun = Literal["", "name", "arguments"]


@dataclass(frozen=True)
class Function:
    """A function that can be called. parameters: a JSON schema. strict: GrammarError if it can't be used; otherwise the
    arguments are then any object."""

    name: str
    parameters: Any
    strict: bool


@dataclass(frozen=True)
class Form:
    """How calls are written; white space may stand between two of these texts.

    before, between, after: calls. key: of the arguments in the call's object; "": NAME[ARGS] stands before them.
    marks: what the text before calls can't contain. bare: calls have no mark, so text can't begin with "{".
    """

    before: tuple[str, ...]
    between: tuple[str, ...]
    after: tuple[str, ...]
    key: str
    marks: tuple[str, ...]
    bare: bool = False


@dataclass(frozen=True)
class Answer:
    """What the answer is. begun: what the prompt has of the first call, up to its name or its arguments. many: several
    calls can follow. reasoning: what may begin and must end reasoning before everything else; opened: it has begun.
    content: the schema of an answer without calls, instead of any text; strict_content: as for functions.
    """

    begun: Begun = ""
    many: bool = True
    reasoning: tuple[str, str] | None = None
    opened: bool = False
    content: Any = None
    strict_content: bool = False


def grammar(functions: Sequence[Function], form: Form, answer: Answer) -> str:
    """The grammar. GrammarError, with the function's name, if a strict schema can't be used."""
    return _Calls(functions, form, answer).text()


def _text(rules: Rules, marks: Mapping[str, str], *, ends: bool, first: str = "") -> str:
    """Adds the rules of a text that goes on with its mark's expression as soon as it contains a mark ("": it can't
    contain that), and returns the name of the first. ends: it can end without. first: it can't begin with one of these.

    There is a rule for each beginning of a mark that the text may end with (the automaton of Aho and Corasick, 1975),
    so that one rule applies at a time: a rule for all of the text takes xgrammar 0.2.9 45 ms a token, this one 6 us
    (of a vocabulary of 49,000).
    """
    beginnings = {mark[:length] for mark in marks for length in range(len(mark))}
    names = {beginning: rules.name() for beginning in sorted(beginnings)}
    alphabet = sorted(set("".join(marks)))

    def following(before: str, excluded: str = "") -> str:
        found, other = ['""'] if ends else [], set(excluded)
        for character in alphabet:
            text = before + character
            known = next(text[at:] for at in range(len(text) + 1) if text[at:] in names or text[at:] in marks)
            if known:
                other.add(character)
                behind = marks[known] if known in marks else names[known]
                found += [f"{literal(character)} {behind}"] if behind else []
        return " | ".join([*found, f"{_none_of(other)} {names['']}"])

    for beginning, name in names.items():
        rules.add(name, following(beginning))
    return rules.new(following("", first)) if first else names[""]


def _none_of(characters: set[str]) -> str:
    escapes = {"\t": "\\t", "\r": "\\r", "\n": "\\n"} | {one: f"\\{one}" for one in "[]-^\\"}
    return f"[^{''.join(escapes.get(one, one) for one in sorted(characters))}]"


class _Calls:
    def __init__(self, functions: Sequence[Function], form: Form, answer: Answer) -> None:
        self._form, self._answer = form, answer
        self._rules = Rules()
        self._arguments = {literal(one.name): self._of(one) for one in functions}

    def text(self) -> str:
        """The whole grammar."""
        named = [f"{name} {self._behind_name(arguments)}" for name, arguments in self._arguments.items()]
        head = '"{" ws "\\"name\\"" ws ":" ws "\\""' if self._form.key else ""
        call = self._rules.new(f"{head} {alternatives(named)}")
        self._rules.add("root", self._forced(named, call) if self._answer.begun else self._free(call))
        return self._rules.text()

    def _behind_name(self, arguments: str) -> str:
        if not self._form.key:
            return f"{literal('[ARGS]')} {arguments}"
        return f'"\\"" ws "," ws {json_literal(self._form.key)} ws ":" ws {arguments} ws "}}"'

    def _forced(self, named: Sequence[str], call: str) -> str:
        """The rest of a call that the prompt has begun, and what follows it."""
        if self._answer.begun == "name":
            return f"{alternatives(named)} {self._more(call)}"
        end = 'ws "}"' if self._form.key else ""
        return f"ws {alternatives(self._arguments.values())} {end} {self._more(call)}"

    def _more(self, call: str) -> str:
        """What follows the first call."""
        more = f"(ws {_spaced(self._form.between)} ws {call})*" if self._answer.many else ""
        return f"{more} ws {_spaced(self._form.after)}" if self._form.after else more

    def _free(self, call: str) -> str:
        """Text, calls, or text and then calls."""
        form, answer = self._form, self._answer
        opening, *others = form.before or [""]
        calls = self._rules.new(f"{''.join(f'ws {literal(one)} ' for one in others)}ws {call} {self._more(call)}")
        if answer.content is not None:
            content = json_schema.rule(answer.content, self._rules, strict=answer.strict_content)
            return f"{content} | {literal(opening)} {calls}"
        if form.bare:
            text = _text(self._rules, dict.fromkeys(form.marks, ""), ends=True, first="{" + SPACE)
            rest = self._rules.new(f"{calls} | [ \\t\\r\\n]* {text}")
        else:
            rest = _text(self._rules, {opening: calls}, ends=True)
        if answer.reasoning is None:
            return rest
        begin, end = answer.reasoning
        reasoned = _text(self._rules, {end: rest}, ends=False)
        return reasoned if answer.opened else f"{rest} | ws {literal(begin)} {reasoned}"

    def _of(self, function: Function) -> str:
        """The name of the rule of a function's arguments, which are an object."""
        schema = function.parameters
        try:
            if not isinstance(schema, dict) or schema.get("type", "object") != "object":
                raise GrammarError("the type must be object")
            schema = {"type": "object", **schema}
            if not function.strict:
                json_schema.rule(schema, Rules(), strict=False)  # what fails half way leaves rules behind
            return json_schema.rule(schema, self._rules, strict=function.strict)
        except (GrammarError, RecursionError) as error:
            if not function.strict:
                return ANY_OBJECT
            why, path = (error.text, error.path) if isinstance(error, GrammarError) else ("nested too deep", "#")
            raise GrammarError(why, f"parameters of {function.name}: {path}") from None


def _spaced(texts: Sequence[str]) -> str:
    return " ws ".join(map(literal, texts))
