"""JSON schemas as grammars: whatever xgrammar lets through is JSON and fulfils the schema.

A vocabulary of single bytes takes every path that a grammar has. Tokens are drawn at random, so these are the answers
of the worst model.
"""

from __future__ import annotations

import datetime
import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from byte_tokens import END, SIZE, write_info
from hypothesis import example, given, settings
from hypothesis import strategies as st

from builder.grammar import json_schema, matching
from builder.grammar.errors import GrammarError
from builder.grammar.guides import Guide
from builder.grammar.matching import Compiler


@pytest.fixture(scope="module")
def compiler_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_info(tmp_path_factory.mktemp("bytes") / "info.json")


@pytest.fixture(scope="module")
def compiler(compiler_file: Path) -> Compiler:
    return Compiler(compiler_file, SIZE)


def answer(compiler: Compiler, schema: Any, seed: int, *, strict: bool = True, most: int = 600) -> bytes | None:
    """A random answer to a schema; None if it did not end."""
    import torch

    match = compiler.match(Guide("ebnf_grammar", json_schema.grammar(schema, strict=strict)))
    chance, text = random.Random(seed), bytearray()
    for _ in range(most):
        allowed = (match.masked(torch.zeros(SIZE)) == 0).nonzero().flatten().tolist()
        assert allowed, (schema, bytes(text), "nothing can follow")
        token = END if END in allowed and chance.random() < 0.5 else chance.choice(allowed)
        match.accept(token)
        if token == END:
            return bytes(text)
        text.append(token)
    return None


def valid(text: bytes, schema: Any) -> None:
    """The text is JSON that fulfils the schema. Bytes that are not UTF-8 arrive as U+FFFD."""
    value = json.loads(text.decode("utf-8", "replace"))
    if "\ufffd" not in text.decode("utf-8", "replace"):  # else lengths are others (see strings.py)
        # Not FormatChecker(), whose time is that of an old draft, without the offset that RFC 3339 asks for.
        jsonschema.validate(value, schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)


def takes(compiler: Compiler, schema: Any, text: str) -> bool:
    """Whether this is an answer to the schema."""
    import torch

    match = compiler.match(Guide("ebnf_grammar", json_schema.grammar(schema)))
    for token in [*text.encode(), END]:
        if match.masked(torch.zeros(SIZE))[token] != 0:
            return False
        match.accept(token)
    return True


WORDS = st.lists(st.text("ab", min_size=1, max_size=6), min_size=3, max_size=7, unique=True)


@settings(max_examples=40)
@given(words=WORDS)
@example(words=["aab", "abaa", "abb", "babb", "a"])
@example(words=["11111", "2", "200", "210", "2111", "22111", "22200", "3000"])
def test_values_that_begin_alike_are_kept_apart(compiler: Compiler, words: list[str]) -> None:
    others = {word + word[-1] * more for word in words for more in (1, 2, 4)} | {word[:-1] for word in words}
    for schema in ({"enum": words}, {"type": "string", "pattern": f"^({'|'.join(words)})$"}):
        for word in others.union(words):
            assert takes(compiler, schema, json.dumps(word)) == (word in words), (schema, word)


@settings(max_examples=40)
@given(first=st.integers(0, 10**5), more=st.integers(0, 10**6), other=st.integers(0, 10**8))
@example(first=1001, more=998_998, other=66_473_716)
@example(first=72, more=1_058_756, other=126_614_242)
def test_a_range_takes_the_integers_within_it_alone(compiler: Compiler, first: int, more: int, other: int) -> None:
    last = first + more
    schema = {"type": "integer", "minimum": first, "maximum": last}
    for value in {first, last, (first + last) // 2, first - 1, last + 1, 10 * last + 5, 1000 * last + 5, other}:
        assert takes(compiler, schema, str(value)) == (first <= value <= last), value


TEXTS = st.text(st.characters(codec="utf-8"), max_size=6)
STRINGS = st.one_of(
    st.just({"type": "string"}),
    st.tuples(st.integers(0, 4), st.integers(0, 6)).map(
        lambda found: {"type": "string", "minLength": found[0], "maxLength": sum(found)}
    ),
    st.sampled_from(["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"]).map(
        lambda name: {"type": "string", "format": name}
    ),
    st.sampled_from(
        ["^a+b?$", "^.{1,3}$", "[^a-f]x", r"^\d{2,4}(-\w+)?$", "é|[ü-ö\\\\]$".replace("ü-ö", "à-ö"), r"^(\S\D|\W)$",
         "^[^é\\s]{2}$", "^\"\\\\/$", "(ab|c)*?d"]
    ).map(lambda pattern: {"type": "string", "pattern": pattern}),
)  # fmt: skip
BOUNDS = st.one_of(
    st.integers(-(10**6), 10**6), st.decimals(-1000, 1000, places=3).map(float), st.integers(-(2**63), 2**63)
)


@st.composite
def number_schemas(draw: st.DrawFn) -> dict[str, Any]:
    name = draw(st.sampled_from(["integer", "number"]))
    low, width = draw(BOUNDS), draw(st.one_of(st.integers(2, 9), st.integers(10, 10**7)))
    found: dict[str, Any] = {"type": name}
    if draw(st.booleans()):
        found[draw(st.sampled_from(["minimum", "exclusiveMinimum"]))] = low
    if draw(st.booleans()):
        found[draw(st.sampled_from(["maximum", "exclusiveMaximum"]))] = low + width
    return found


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(10**9), 10**9), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(TEXTS, inner, max_size=2)),
    max_leaves=4,
)
LEAVES = st.one_of(
    STRINGS, number_schemas(), st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"type": ["integer", "null"]}]),
    st.lists(VALUES, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    VALUES.map(lambda value: {"const": value}),
)  # fmt: skip


@st.composite
def objects(draw: st.DrawFn, inner: st.SearchStrategy[Any]) -> dict[str, Any]:
    properties = draw(st.dictionaries(TEXTS, inner, max_size=4))
    required = draw(st.lists(st.sampled_from(sorted(properties)), unique=True)) if properties else []
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner),
        inner.map(lambda one: {"type": "array", "items": one, "maxItems": 3}),
        st.lists(inner, min_size=1, max_size=3).map(lambda all: {"type": "array", "prefixItems": all, "items": False}),
        st.lists(inner, min_size=1, max_size=3).map(lambda all: {"anyOf": all}),
        inner.map(lambda one: {"type": "object", "additionalProperties": one, "maxProperties": 2}),
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150)
@given(schema=SCHEMAS, seed=st.integers(0, 1 << 30))
def test_every_finished_answer_fulfils_the_schema(compiler: Compiler, schema: Any, seed: int) -> None:
    text = answer(compiler, schema, seed)
    if text is not None:
        valid(text, schema)


@settings(deadline=None, max_examples=60)
@given(schema=number_schemas(), seed=st.integers(0, 1 << 30))
def test_numbers_keep_their_bounds(compiler: Compiler, schema: Any, seed: int) -> None:
    text = answer(compiler, schema, seed)
    assert text is not None
    valid(text, schema)


def accepts(compiler: Compiler, schema: Any, text: str, *, strict: bool = False) -> bool:
    match = compiler.match(Guide("ebnf_grammar", json_schema.grammar(schema, strict=strict)))
    try:
        for token in [*text.encode(), END]:
            match.accept(token)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("seed", range(20))
def test_times_have_an_offset(compiler: Compiler, seed: int) -> None:
    for name, read in (("time", datetime.time.fromisoformat), ("date-time", datetime.datetime.fromisoformat)):
        text = answer(compiler, {"type": "string", "format": name}, seed)
        assert text is not None
        assert read(json.loads(text)).utcoffset() is not None


LIST: Any = {
    "$ref": "#/$defs/node",
    "$defs": {"node": {"type": "object", "properties": {"v": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}}}},
}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer", "minimum": 7, "maximum": 120}, ["7", "42", "120"], ["6", "121", "007", "7.0"]),
        ({"type": "number", "minimum": 0, "maximum": 1}, ["0", "0.25", "1", "0.999"], ["1.5", "-1", "1e5", "2"]),
        ({"type": "number", "exclusiveMinimum": 0}, ["0.5", "12", "1234.5"], ["0", "-3"]),
        # As doubles, which readers make of them, the bad ones reach the bound.
        ({"type": "number", "exclusiveMinimum": -(10**15) - 1}, ["-1000000000000000", "7"],
         ["-1000000000000000.9999999"]),
        ({"type": "number", "maximum": 2**63 - 1}, ["9223372036854775807"], ["9223372036854775806.9"]),
        ({"type": "number", "exclusiveMaximum": 0.1234567890123456}, ["0.123456789012345"], ["0.1234567890123455999"]),
        ({"type": "integer", "minimum": -(2**63)}, ["-9223372036854775808", "0", "77"], ["-9223372036854775809"]),
        (LIST, ['{"v": 1, "next": {"next": {}}}', "{}"], ['{"next": 1}', "[]"]),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "required": ["b"]},
         ['{"a": 1, "b": [true]}', '{"b":{"x":null}}', '{\n  "b": "é🎉"\n}'],
         ['{"a": 1}', '{"b": 1,}', '{"c": 1, "b": 1}']),
        ({"type": "array", "items": {"type": "null"}, "minItems": 2}, ["[null, null]"], ["[null]", "[null,null,]"]),
        ({"type": "array", "prefixItems": [{"type": "null"}], "maxItems": 2}, ["[null]"], ["[5]", "[null,5]"]),
        ({"type": "string", "maxLength": 3}, ['"é🎉!"', '"\\n\\u00e9"'], ['"abcd"', '"\n"', '"a']),
        ({"properties": {"a": {"const": 1}}}, ['{"a": 1}'], ['{"a": 2}']),
        ({"type": "object"}, ['{"x": {"y": [1.5e3]}}'], ["[]", '{"x": 01}']),
        ({"anyOf": [{"type": "null"}, {"enum": ["x", "y z"]}]}, ["null", '"y z"'], ['"z"']),
    ],
)  # fmt: skip
def test_what_a_grammar_accepts(compiler: Compiler, schema: Any, good: list[str], bad: list[str]) -> None:
    assert [text for text in good if not accepts(compiler, schema, text)] == []
    assert [text for text in bad if accepts(compiler, schema, text)] == []


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (False, "#: false allows no value"),
        ({"type": "text"}, "type 'text' is not one of JSON's"),
        ({"type": "object", "properties": {"a": {"type": []}}}, "#/properties/a: type is an empty list"),
        ({"enum": []}, "at least one value"),
        ({"$ref": "http://x/y"}, "must point into the schema itself"),
        ({"$ref": "#/$defs/x"}, "defs/x does not exist"),
        ({"$ref": "#"}, "# refers to itself"),
        ({"anyOf": [{"type": "null"}, {"$ref": "#"}]}, "# refers to itself"),
        ({"type": "string", "minLength": -1}, "minLength must be a whole number"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "a minimum is above its maximum"),
        ({"type": "integer", "minimum": 0.25, "maximum": 0.75}, "no number is within the bounds"),
        ({"type": "number", "minimum": 1e300}, "beyond 1e.20"),
        ({"type": "string", "pattern": "(("}, "the pattern can't be read"),
        ({"required": ["b"], "additionalProperties": False}, "b is required, and properties lacks it"),
        ({"allOf": [{}, {}]}, "allOf with more than one schema"),
        ({"const": "\ud800"}, "half of a surrogate pair"),
        ({"properties": {"\ud800": {}}}, r"#/properties/\\ud800: half of a surrogate pair"),
        ({"const": [1, float("inf")]}, "too large for JSON"),  # as Python reads 1e999
        ({"maximum": float("inf")}, "maximum is too large"),
        ({"prefixItems": [{}], "items": {"$ref": "#/prefixItems/00"}}, "#/prefixItems/00 does not exist"),
        ({"$ref": f"#/{'0' * 5000}"}, "does not exist"),
        ({"properties": []}, "properties must be an object"),
    ],
)  # fmt: skip
def test_a_schema_without_a_grammar_is_refused_with_a_reason(schema: Any, says: str) -> None:
    with pytest.raises(GrammarError, match=says):
        json_schema.grammar(schema)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "integer", "multipleOf": 3}, "multipleOf is not supported here"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems is not supported here"),
        ({"not": {"type": "null"}}, "not is not supported here"),
        ({"oneOf": [{"type": "null"}, {"type": "integer"}]}, "oneOf is not supported; use anyOf"),
        ({"type": "string", "format": "regex"}, "the format 'regex' is not supported; use date"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "pattern is supported only without other keywords"),
        ({"type": "string", "pattern": "(" * 240 + "a" + ")*" * 240}, "the pattern is nested too deep"),
        ({"type": "string", "pattern": "(?=a)b"}, "lookahead in a pattern is not supported"),
        ({"type": "string", "pattern": r"(a)\1"}, "a reference to a group in a pattern"),
        ({"type": "object", "properties": {"a": {}}, "minProperties": 1}, "supported only without properties"),
    ],
)
def test_strict_refuses_what_a_grammar_does_not_fulfil(compiler: Compiler, schema: Any, says: str) -> None:
    with pytest.raises(GrammarError, match=says):
        json_schema.grammar(schema, strict=True)
    compiler.compile(Guide("ebnf_grammar", json_schema.grammar(schema)))


def test_a_deep_schema_is_refused_and_a_long_one_is_short_as_a_grammar() -> None:
    deep: Any = {"type": "null"}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    with pytest.raises(GrammarError, match="nested more than 64 deep"):
        json_schema.grammar(deep)
    wide = {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(1000)}}
    assert len(json_schema.grammar(wide)) < 300_000


def test_a_compiler_keeps_grammars_up_to_a_limit(compiler_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "CACHE", 100_000)
    small = Compiler(compiler_file, SIZE)
    for number in range(200):
        small.compile(Guide("ebnf_grammar", json_schema.grammar({"const": f"{number}" * 20})))
    assert small._compiler.get_cache_size_bytes() < 150_000  # the limit and one more; all take 2.8 MB
