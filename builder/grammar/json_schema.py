"""A JSON schema as a grammar in xgrammar's EBNF: every text of the grammar is valid JSON that fulfils the schema. Pure.

xgrammar has a converter of its own. It is not used, because what it accepts depends on its version: 0.1.25, which
TensorRT-LLM 1.2 has, writes 1k5 for a number between 1 and 2 and ignores multipleOf; 0.2.9, too, writes control
characters into a string with a maxLength, which is then no JSON, and ignores uniqueItems (both tried here).

The grammar may allow less than the schema: properties come in the schema's order, those that it does not name are left
out (as OpenAI's strict mode has it), and between two of JSON's tokens is at most a line break with its indentation, so
that a model can't go on with white space for ever.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from builder.grammar import scalars, strings
from builder.grammar.alternatives import alternatives
from builder.grammar.errors import GrammarError
from builder.grammar.rules import ANY_OBJECT, ANY_VALUE, Rules

DEPTH = 64  # of a schema
NOTES = frozenset(
    ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "$schema", "$id", "$comment",
     "$defs", "definitions")
)  # fmt: skip
KEYWORDS: Mapping[str, frozenset[str]] = {
    "string": frozenset(("minLength", "maxLength", "pattern", "format")),
    "integer": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    "number": frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")),
    "object": frozenset(("properties", "required", "additionalProperties", "minProperties", "maxProperties")),
    "array": frozenset(("items", "prefixItems", "minItems", "maxItems")),
    "boolean": frozenset(),
    "null": frozenset(),
}
TYPES = tuple(KEYWORDS)
INDEX = re.compile("0|[1-9][0-9]{0,8}")  # RFC 6901: no leading zeros, so that each place has one pointer
_ALONE = ("$ref", "const", "enum", "anyOf", "oneOf", "allOf")


def grammar(schema: Any, *, strict: bool = False) -> str:
    """The grammar of a schema's values. GrammarError if there is none.

    strict: also for a keyword that the grammar does not fulfil; otherwise it is ignored.
    """
    rules = Rules()
    rule(schema, rules, strict=strict, name="root")
    return rules.text()


def rule(schema: Any, rules: Rules, *, strict: bool, name: str = "") -> str:
    """Adds the rule of a schema's values, under this name or a new one, which is returned. GrammarError as above."""
    name = name or rules.name()
    _Converter(schema, strict, rules).add(name)
    return name


class _Converter:
    def __init__(self, schema: Any, strict: bool, rules: Rules) -> None:
        self._schema, self._strict, self._rules = schema, strict, rules
        self._named: dict[str, str] = {}  # JSON pointer of a $ref -> rule

    def add(self, name: str) -> None:
        """Adds the rule of the whole schema."""
        self._named["#"] = name
        self._rules.add(name, self._value(self._schema, "#", frozenset({"#"}), 0))

    def _value(self, schema: Any, path: str, open_refs: frozenset[str], depth: int) -> str:
        """An expression for a schema. open_refs: pointers that lead here without a character between."""
        if depth > DEPTH:
            raise GrammarError(f"the schema is nested more than {DEPTH} deep", path)
        if schema is True or schema == {}:
            return ANY_VALUE
        if not isinstance(schema, Mapping):
            why = "false allows no value" if schema is False else "a schema must be an object"
            raise GrammarError(why, path)
        alone = [name for name in _ALONE if name in schema]
        if alone:
            return self._alone(alone[0], schema, path, open_refs, depth)
        return self._of_types(self._types(schema, path), schema, path, depth)

    def _alone(self, name: str, schema: Mapping[str, Any], path: str, open_refs: frozenset[str], depth: int) -> str:
        value, below = schema[name], f"{path}/{name}"
        if name == "$ref":
            self._only(schema, {name}, path)
            return self._reference(value, path, open_refs, depth)
        if name in ("const", "enum"):
            self._only(schema, {name, "type"}, path)
            return self._listed([value] if name == "const" else value, schema, below)
        self._only(schema, {name}, path)
        if not isinstance(value, list) or not value:
            raise GrammarError("must be a list with at least one schema", below)
        if name == "allOf" and len(value) > 1:
            raise GrammarError("allOf with more than one schema is not supported", path)
        if name == "oneOf" and self._strict and len(value) > 1:
            raise GrammarError("oneOf is not supported; use anyOf", path)
        found = [self._value(one, f"{below}/{n}", open_refs, depth + 1) for n, one in enumerate(value)]
        return alternatives(found)

    def _listed(self, values: Any, schema: Mapping[str, Any], path: str) -> str:
        """The values of enum or const that have the schema's type."""
        if not isinstance(values, list) or not values:
            raise GrammarError("must be a list with at least one value", path)
        types = self._types(schema, path)
        kept = [value for value in values if _type(value) in types or (_type(value) == "integer" and "number" in types)]
        if not kept:
            raise GrammarError("no value has the schema's type", path)
        try:
            "".join(map(str, kept)).encode()
        except UnicodeEncodeError:
            raise GrammarError("half of a surrogate pair is no character", path) from None
        try:
            return alternatives(map(strings.json_literal, kept))
        except ValueError:
            raise GrammarError("a number is too large for JSON", path) from None

    def _reference(self, pointer: Any, path: str, open_refs: frozenset[str], depth: int) -> str:
        if not isinstance(pointer, str) or not (pointer == "#" or pointer.startswith("#/")):
            raise GrammarError("$ref must point into the schema itself (#/...)", path)
        if pointer in open_refs:
            raise GrammarError(f"{pointer} refers to itself", path)
        if pointer not in self._named:
            self._named[pointer] = name = self._rules.name()
            target = self._target(pointer, path)
            self._rules.add(name, self._value(target, pointer, open_refs | {pointer}, depth + 1))
        return self._named[pointer]

    def _target(self, pointer: str, path: str) -> Any:
        found: Any = self._schema
        for part in pointer.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and INDEX.fullmatch(key) and int(key) < len(found):
                found = found[int(key)]
            elif isinstance(found, Mapping) and key in found:
                found = found[key]
            else:
                raise GrammarError(f"{pointer[:200]} does not exist", path)
        return found

    def _types(self, schema: Mapping[str, Any], path: str) -> Sequence[str]:
        """The types that a schema allows: those that it names; without, those that its keywords are about, or all."""
        named = schema.get("type")
        if named is None:
            about = [name for name in TYPES if any(keyword in schema for keyword in KEYWORDS[name])]
            return [name for name in about if name != "integer"] or TYPES
        types = named if isinstance(named, list) else [named]
        for name in types:
            if name not in TYPES:
                raise GrammarError(f"the type {str(name)[:100]!r} is not one of JSON's", path)
        if not types:
            raise GrammarError("type is an empty list", path)
        return types

    def _of_types(self, types: Sequence[str], schema: Mapping[str, Any], path: str, depth: int) -> str:
        self._only(schema, {"type"}.union(*(KEYWORDS[name] for name in types)), path)
        found = []
        for name in types:
            if name == "boolean":
                found += ['"true"', '"false"']
            elif name == "null":
                found.append('"null"')
            elif name == "integer" and "number" in types:
                continue
            else:
                found.append(self._of_type(name, schema, path, depth))
        return alternatives(found)

    def _of_type(self, name: str, schema: Mapping[str, Any], path: str, depth: int) -> str:
        if name == "string":
            return scalars.string(schema, path, strict=self._strict)
        if name in ("integer", "number"):
            return scalars.number(schema, path, whole=name == "integer")
        return (self._object if name == "object" else self._array)(schema, path, depth)

    def _object(self, schema: Mapping[str, Any], path: str, depth: int) -> str:
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if not isinstance(properties, Mapping):
            raise GrammarError("properties must be an object", path)
        if not isinstance(required, list) or not all(isinstance(one, str) for one in required):
            raise GrammarError("required must be a list of names", path)
        least, most = scalars.count(schema, "minProperties", path), scalars.count(schema, "maxProperties", path)
        extra = schema.get("additionalProperties", bool(not properties and "properties" not in schema))
        missing = {one: True if extra is False else extra for one in required if one not in properties}
        if missing and schema.get("additionalProperties") is False:
            raise GrammarError(f"{next(iter(missing))[:100]} is required, and properties lacks it", path)
        if not properties and not missing and extra is not False:
            if self._strict and (least or 0) > 1:
                raise GrammarError("minProperties above 1 is not supported: names can repeat", path)
            return self._map(extra, (least or 0, most), path, depth)
        if self._strict and (least is not None or most is not None):
            raise GrammarError("minProperties and maxProperties are supported only without properties", path)
        always = frozenset(required)
        pairs = [
            (self._pair(key, value, f"{path}/properties/{key}", depth), key in always)
            for key, value in {**properties, **missing}.items()
        ]
        return f'"{{" ws {self._members(pairs)} ws "}}"' if pairs else '"{" ws "}"'

    def _pair(self, key: str, schema: Any, path: str, depth: int) -> str:
        try:
            key.encode()
        except UnicodeEncodeError:
            raise GrammarError("half of a surrogate pair is no character", path) from None
        return self._rules.new(
            f'{strings.json_literal(key)} ws ":" ws {self._value(schema, path, frozenset(), depth + 1)}'
        )

    def _members(self, pairs: Sequence[tuple[str, bool]]) -> str:
        """The properties of an object, in order. There are two rules for each place: before it, nothing was written, or
        something was."""
        after, first = '""', '""'
        for place, (pair, required) in reversed(list(enumerate(pairs))):
            last = place == len(pairs) - 1
            written = pair if last else f"{pair} {after}"
            behind = f'ws "," ws {written}'
            if place:
                after = self._rules.new(behind if required else f"{behind} | {after}")
            first = self._rules.new(written if required else f"{written} | {first}")
        return first

    def _map(self, value: Any, counts: tuple[int, int | None], path: str, depth: int) -> str:
        if value is True and counts == (0, None):
            return ANY_OBJECT
        made = self._value(value, f"{path}/additionalProperties", frozenset(), depth + 1)
        pair = self._rules.new(f'string ws ":" ws {made}')
        return f'"{{" ws {_list(pair, *counts, path)} ws "}}"'

    def _array(self, schema: Mapping[str, Any], path: str, depth: int) -> str:
        least, most = scalars.count(schema, "minItems", path) or 0, scalars.count(schema, "maxItems", path)
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise GrammarError("prefixItems must be a list", path)
        found = [
            self._rules.new(self._value(one, f"{path}/prefixItems/{n}", frozenset(), depth + 1))
            for n, one in enumerate(first)
        ]
        rest = schema.get("items", not first)
        if most is not None and most < len(found):
            found, rest = found[:most], False
        if rest is False:
            if least > len(found):
                raise GrammarError("minItems asks for more items than the schema has", path)
            return f'"[" ws {_comma(found)} ws "]"'
        item = self._rules.new(self._value(rest, f"{path}/items", frozenset(), depth + 1))
        if not found:
            return f'"[" ws {_list(item, least, most, path)} ws "]"'
        more = scalars.repeat(max(least - len(found), 0), None if most is None else most - len(found), path)
        return f'"[" ws {_comma(found)} (ws "," ws {item}){more} ws "]"'

    def _only(self, schema: Mapping[str, Any], known: set[str] | frozenset[str], path: str) -> None:
        """GrammarError, if strict, for keywords that are not fulfilled."""
        unknown = [name for name in schema if name not in known and name not in NOTES]
        if unknown and self._strict:
            raise GrammarError(f"{unknown[0][:100]} is not supported here", path)


def _comma(items: Sequence[str]) -> str:
    return ' ws "," ws '.join(items) or '""'


def _list(item: str, least: int, most: int | None, path: str) -> str:
    """So many items, with commas between."""
    if most == 0:
        return '""'
    inner = f'{item} (ws "," ws {item}){scalars.repeat(max(least - 1, 0), None if most is None else most - 1, path)}'
    return inner if least else f"({inner})?"


def _type(value: Any) -> str:
    """The type of a JSON value, in JSON Schema's words."""
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    kinds = {type(None): "null", bool: "boolean", int: "integer", str: "string", list: "array"}
    return kinds.get(type(value), "object")
