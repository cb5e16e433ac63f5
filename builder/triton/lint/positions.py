"""Where each field of a text-format protobuf message stands. protobuf's own parser keeps no lines.

This reads well-formed text only; whether it is, protobuf decides (model_files.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

TOKEN = re.compile(
    r"""(?P<skip>\s+|\#[^\n]*)|(?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')"""
    r"""|(?P<template>\$\{\w*\}|\{\{.*?\}\}|\{%.*?%\})"""  # of text that is a template still
    r"""|(?P<mark>[{}\[\]<>:;,])|(?P<word>[^\s{}\[\]<>:;,\#"']+)|(?P<open>["'])""",
    re.DOTALL,
)
CLOSING = {"{": "}", "<": ">", "[": "]"}


@dataclass
class Field:
    """A field: its name, line, and either the text of its value or the fields inside it. named: the line of its name,
    which in a list is above that of the value."""

    name: str
    line: int
    text: str | None = None
    fields: list[Field] = field(default_factory=list)
    named: int = 0

    def all(self, name: str) -> list[Field]:
        """Those inside it with this name."""
        return [one for one in self.fields if one.name == name]

    def first(self, name: str) -> Field | None:
        """The first inside it with this name."""
        return next(iter(self.all(name)), None)

    @property
    def value(self) -> str:
        """Its value, without quotes; "" for a message."""
        text = self.text or ""
        return text[1:-1] if text[:1] in ('"', "'") else text

    def walk(self) -> Iterator[Field]:
        """All fields inside it, at any depth."""
        for one in self.fields:
            yield one
            yield from one.walk()


class _Reader:
    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, int]] = []
        self._at, line = 0, 1
        for found in TOKEN.finditer(text):
            if found.lastgroup != "skip":
                self._tokens.append((found.group(), line))
            line += found.group().count("\n")

    def peek(self) -> str:
        return self._tokens[self._at][0] if self._at < len(self._tokens) else ""

    def take(self) -> tuple[str, int]:
        self._at += 1
        return self._tokens[self._at - 1]

    def fields(self, end: str) -> list[Field]:
        found: list[Field] = []
        while (token := self.peek()) and token != end:
            if token in ",;":
                self.take()
                continue
            name, line = self.take()
            if self.peek() == ":":
                self.take()
            found += self._values(name, line)
        if self.peek():
            self.take()
        return found

    def _values(self, name: str, line: int) -> list[Field]:
        opening = self.peek()
        if opening != "[":
            return [self._value(name, line)]
        self.take()
        found = []
        while (token := self.peek()) and token != "]":
            if token == ",":
                self.take()
                continue
            found.append(self._value(name, self._tokens[self._at][1], line))
        if self.peek():
            self.take()
        return found

    def _value(self, name: str, line: int, named: int = 0) -> Field:
        if self.peek() in ("{", "<"):
            opening, _ = self.take()
            return Field(name, line, fields=self.fields(CLOSING[opening]), named=named or line)
        text = self.take()[0] if self.peek() else ""
        while text[:1] in ('"', "'") and self.peek()[:1] in ('"', "'"):  # adjacent strings are one
            text = text[:-1] + self.take()[0][1:]
        return Field(name, line, text, named=named or line)


def depth(text: str) -> int:
    """How deep its brackets nest."""
    deepest = current = 0
    for found in TOKEN.finditer(text):
        if found.lastgroup == "mark":
            current += (found.group() in CLOSING) - (found.group() in CLOSING.values())
            deepest = max(deepest, current)
    return deepest


def well_formed(text: str) -> bool:
    """Whether strings end and brackets match."""
    open_ones = []
    for found in TOKEN.finditer(text):
        if found.lastgroup == "open":
            return False
        if found.lastgroup == "mark" and (mark := found.group()) in CLOSING:
            open_ones.append(CLOSING[mark])
        elif found.lastgroup == "mark" and mark in CLOSING.values() and (not open_ones or open_ones.pop() != mark):
            return False
    return not open_ones


def read(text: str) -> Field:
    """The message as a field without a name."""
    return Field("", 1, fields=_Reader(text).fields(""))
