"""The rules of a grammar in xgrammar's EBNF, and those that every grammar of JSON has."""

from __future__ import annotations

from builder.grammar import numbers, strings

ANY_OBJECT, ANY_VALUE = "anyobject", "anyvalue"
_COMMON = {
    "hex": "[0-9A-Fa-f]",
    "plain": strings.char_class([*strings.ASCII, *strings.BEYOND]),
    "character": strings.CHARACTER,
    "string": '"\\"" character* "\\""',
    "ws": '"" | " " | "\\n" [ \\t]{0,32}',
    "anynumber": numbers.NUMBER,
    "anypair": f'string ws ":" ws {ANY_VALUE}',
    ANY_OBJECT: '"{" ws (anypair (ws "," ws anypair)*)? ws "}"',
    "anyarray": f'"[" ws ({ANY_VALUE} (ws "," ws {ANY_VALUE})*)? ws "]"',
    ANY_VALUE: f'{ANY_OBJECT} | anyarray | string | anynumber | "true" | "false" | "null"',
}


class Rules:
    """Rules by name. Names that are made here are r0, r1, ..."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}
        self._made = 0

    def name(self) -> str:
        """A new name, for a rule that is added later."""
        self._made += 1
        return f"r{self._made - 1}"

    def add(self, name: str, expression: str) -> None:
        """Adds a rule."""
        self._rules[name] = expression

    def new(self, expression: str) -> str:
        """Adds a rule under a new name, which is returned."""
        name = self.name()
        self.add(name, expression)
        return name

    def text(self) -> str:
        """The grammar, with those of JSON's own rules that it uses. `root` comes first."""
        order = ["root", *(name for name in self._rules if name != "root"), *_COMMON]
        every = {**_COMMON, **self._rules}
        return "".join(f"{name} ::= {every[name]}\n" for name in order)
