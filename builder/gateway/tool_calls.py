"""Finds tool calls in an answer's text, across the borders of its pieces.

Arguments are passed on while they come. Whatever turns out not to be a call, of a function that the request has and
with arguments that are a JSON object, is content again, with all of its text. White space around calls is dropped.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Collection, Generator
from typing import Any

from builder.gateway.chat_forms import ToolCallForm
from builder.gateway.text_parts import Part, beginning_at_end
from builder.grammar.tool_calls import SPACE

HEADER = re.compile(
    r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*'
)
NAME = re.compile(r"[\w.-]{1,128}")
ATOMS = frozenset("+-.,:0123456789abcdefghijklmnopqrstuvwxyzE \t\r\n")  # outside of strings, besides brackets

Reading = Generator[None, str, Any]  # gets one character at a time, "" at the end of the text


class _Malformed(Exception):
    """What follows an opening is no call."""


class ToolCalls:
    """Reads an answer to a request with functions of these names. single: the answer ends after its first call."""

    def __init__(self, form: ToolCallForm, names: Collection[str], *, single: bool = False) -> None:
        self._form, self._names, self._single = form, names, single
        self._marks = [mark for mark in form.openings if mark]
        self._starts = "" in form.openings  # a call needs no opening if it begins the answer
        self._held = ""
        self._reading: Reading | None = None
        self._next: str | None = None  # a character that was looked at
        self._raw: list[str] = []  # what was read since the opening or the last complete call
        self._first = False  # since the opening, no call is complete
        self._out: list[Part] = []
        self._count = 0
        self._name = ""
        self._open: list[str] | None = None  # the arguments so far of a call that was passed on
        self._fresh = True  # nothing but white space so far
        self._after_call = False
        self._ended = False

    @property
    def held(self) -> int:
        """The number of characters that are held back."""
        return len(self._held) + (0 if self._open else len(self._raw))

    @property
    def ended(self) -> bool:
        """Whether no more text is wanted."""
        return self._ended

    def add(self, text: str) -> list[Part]:
        """The parts that are known now."""
        self._feed(text)
        return self._taken()

    def rest(self) -> list[Part]:
        """What was held back when the answer ended."""
        while self._reading:
            self._feed(self._read(""))
        held, self._held = self._held, ""
        self._content(held)
        return self._taken()

    def _feed(self, text: str) -> None:
        while text and not self._ended:
            text = self._read(text) if self._reading else self._find(text)

    def _taken(self) -> list[Part]:
        taken, self._out = self._out, []
        return taken

    def _emit(self, kind: str, text: str, id: str = "") -> None:
        """Adds a part, or its text to the last one, if that is of the same kind."""
        last = self._out[-1] if self._out else None
        number = self._count - 1 if kind != "content" else 0
        if last and last.kind == kind and kind in ("content", "arguments"):
            self._out[-1] = last._replace(text=last.text + text)
        else:
            self._out.append(Part(kind, text, number, id))

    def _content(self, text: str) -> None:
        if self._after_call:
            text = text.lstrip()
        if text:
            self._after_call = False
            self._fresh = self._fresh and not text.strip(SPACE)
            self._emit("content", text)

    def _find(self, text: str) -> str:
        """Passes on the text up to an opening. Returns what is left after it."""
        text, self._held = self._held + text, ""
        at, mark = min(
            ((at, mark) for mark in self._marks if (at := text.find(mark)) >= 0), default=(len(text), "")
        )  # fmt: skip
        if self._starts and (self._fresh or self._after_call) and text.lstrip(SPACE).startswith("{"):
            at, mark = text.index("{"), ""
        if at == len(text):
            known = text[: at - beginning_at_end(text, self._marks)].rstrip()
            self._content(known)
            self._held = text[len(known) :]
            return ""
        before = text[:at].rstrip()
        self._content(before)
        self._raw, self._first = list(text[len(before) : at] + mark), True
        self._reading = self._calls()
        next(self._reading)
        return text[at + len(mark) :]

    def _read(self, text: str) -> str:
        """Reads the characters of calls ("": the end). Returns what is left after them."""
        assert self._reading is not None
        for place, character in enumerate(text or [""]):
            before = ""
            try:
                self._reading.send(character)
            except StopIteration:
                self._raw.clear()
            except _Malformed:
                before = self._given_back()
            else:
                if not self._ended:
                    continue
            self._reading = None
            left, self._next = text[place + (self._next is None) :], None
            return before + left
        return ""

    def _given_back(self) -> str:
        """What was read is no call: content, or after a complete call a text that may have another opening."""
        if self._open is not None:
            self._open = None
            self._emit("dropped", "")
        raw, self._raw = "".join(self._raw), []
        if not self._first:
            return raw
        self._content(raw)
        return ""

    def _calls(self) -> Reading:
        """Reads what follows an opening."""
        form = self._form
        yield from self._space()
        if form.listed and (yield from self._peek()) != form.listed:
            yield from self._named()
            return
        yield from self._literal(form.listed)
        yield from self._call()
        yield from self._space()
        while form.separator and (yield from self._peek()) == form.separator:
            self._take()
            yield from self._call()
            yield from self._space()
        if not form.closing:
            raise _Malformed  # the end, or text that is no call
        yield from self._literal(form.closing)

    def _call(self) -> Reading:
        """Reads {"name": ..., "arguments": {...}}, in either order."""
        yield from self._space()
        found = _parsed((yield from self._object(1)))
        name, arguments = found.get("name"), found.get("arguments", found.get("parameters"))
        if self._open is not None:
            if arguments != _parsed("".join(self._open)) or name != self._name:
                raise _Malformed  # a key that occurs twice
            self._complete()
            return
        if isinstance(arguments, str):
            arguments = _parsed(arguments)
        if not isinstance(name, str) or name not in self._names or not isinstance(arguments, dict | None):
            raise _Malformed
        self._start(name)
        self._emit("arguments", json.dumps(arguments or {}, ensure_ascii=False))
        self._complete()

    def _named(self) -> Reading:
        """Reads name[ARGS]{...} and name[CALL_ID]...[ARGS]{...}; the id is not that of the answer's call."""
        name = []
        while (character := (yield from self._peek())) and NAME.fullmatch(character):
            name.append(character)
            self._take()
        if "".join(name) not in self._names:
            raise _Malformed
        yield from self._space()
        if (yield from self._peek()) == "[":
            yield from self._literal("[")
            if (yield from self._peek()) == "C":
                yield from self._literal("CALL_ID]")
                while (yield from self._peek()) not in ("[", ""):
                    self._take()
                yield from self._literal("[")
            yield from self._literal("ARGS]")
        yield from self._space()
        if (yield from self._peek()) != "{":
            raise _Malformed
        self._start("".join(name))
        _parsed((yield from self._object(0)))
        self._complete()

    def _start(self, name: str) -> None:
        self._name, self._open = name, []
        self._count += 1
        id = uuid.uuid4().hex
        self._emit("call", name, id[:9] if self._form.short_ids else f"call_{id}")

    def _complete(self) -> None:
        self._open, self._first = None, False
        self._raw.clear()
        self._fresh, self._after_call, self._ended = False, True, self._single

    def _object(self, level: int) -> Reading:
        """Reads an object and returns its text. Passes on the object at this depth in it, if that is the arguments."""
        text: list[str] = []
        closings: list[str] = []  # of the brackets that are open
        quoted = escaped = passing = False
        while True:
            character = yield from self._peek()
            if not character or not (text or character == "{"):
                raise _Malformed
            if quoted:
                if character < " ":
                    raise _Malformed
                quoted, escaped = escaped or character != '"', not escaped and character == "\\"
            elif character == '"':
                quoted = True
            elif character in "{[":
                if character == "{" and len(closings) == level and not passing:
                    passing = self._arguments_begin(level, text)
                closings.append("}" if character == "{" else "]")
            elif character in "}]":
                if closings.pop() != character:
                    raise _Malformed
            elif character not in ATOMS:
                raise _Malformed
            self._take()
            text.append(character)
            if passing:
                assert self._open is not None
                self._open.append(character)
                self._emit("arguments", character)
                passing = len(closings) > level
            if not closings:
                return "".join(text)

    def _arguments_begin(self, level: int, text: list[str]) -> bool:
        """Whether the arguments begin after this text of a call. If so, the call is passed on."""
        if level == 0:
            return True
        header = HEADER.fullmatch("".join(text)) if self._open is None else None
        if header is None or (name := _parsed_name(header.group(1))) not in self._names:
            return False
        self._start(name)
        return True

    def _space(self) -> Reading:
        while (yield from self._peek()).isspace():
            self._take()

    def _literal(self, text: str) -> Reading:
        for character in text:
            if (yield from self._peek()) != character:
                raise _Malformed
            self._take()

    def _peek(self) -> Generator[None, str, str]:
        """The next character, which is not taken yet."""
        if self._next is None:
            self._next = yield
        return self._next

    def _take(self) -> None:
        assert self._next is not None
        self._raw.append(self._next)
        self._next = None


def _parsed(text: str) -> dict[str, Any]:
    """The JSON object. _Malformed if it is something else."""
    try:
        found = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise _Malformed from None
    if not isinstance(found, dict):
        raise _Malformed
    return found


def _parsed_name(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError:
        return ""


def _no_constant(name: str) -> None:
    raise ValueError(name)
