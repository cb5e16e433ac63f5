"""A model's directory as the lint reads it: its config.pbtxt parsed by protobuf, with the line of each field."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder.triton.lint import positions
from builder.triton.lint.findings import Finding
from builder.triton.lint.positions import Field

CONFIG = "config.pbtxt"
FILL = "Fill the template: give this placeholder a value."
UNFILLED = ("${", "{{", "{%", "==SUPPRESS==")


@dataclass
class ModelFiles:
    """A model's directory. message: the ModelConfig, None if the text is not one. text: where its fields stand."""

    directory: Path
    root: Path
    message: Any = None
    text: Field = field(default_factory=lambda: Field("", 1))

    @property
    def name(self) -> str:
        """Its name in the repository: that of the directory."""
        return self.directory.name

    @property
    def file(self) -> str:
        """config.pbtxt, relative to the repository."""
        return f"{self.directory.relative_to(self.root)}/{CONFIG}"

    def finding(self, rule: str, at: Field | int | None, what: str, fix: str, **more: Any) -> Finding:
        """A finding in config.pbtxt. at: its field or line; None for the file as a whole."""
        line = at.line if isinstance(at, Field) else at or 0
        return Finding(rule, self.file, line, f"{self.name}: {what}", fix, **more)

    @property
    def parameters(self) -> dict[str, str]:
        """The model's parameters."""
        return {key: value.string_value for key, value in self.message.parameters.items()}

    def parameter(self, key: str) -> Field | None:
        """Where the value of a parameter stands."""
        for entry in self.text.all("parameters"):
            if (found := entry.first("key")) is not None and found.value == key:
                value = entry.first("value")
                return (value.first("string_value") if value else None) or entry
        return None

    def tensor(self, kind: str, name: str) -> Field | None:
        """Where an input or an output stands."""
        for entry in self.text.all(kind):
            if (found := entry.first("name")) is not None and found.value == name:
                return entry
        return None

    @property
    def versions(self) -> list[int]:
        """The numbers of its version directories."""
        names = (path.name for path in self.directory.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if name.isdecimal() and not name.startswith("0"))


def read(directory: Path, root: Path) -> tuple[ModelFiles, list[Finding]]:
    """The model, and what keeps its config.pbtxt from being one."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    model = ModelFiles(directory, root)
    try:
        text = (directory / CONFIG).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        fix = "Save the file as UTF-8."
        return model, [model.finding("encoding", None, f"{CONFIG} is not UTF-8 (byte {error.start})", fix)]
    except OSError as error:
        said = f"{CONFIG} can't be read: {error.strerror}"
        return model, [model.finding("config", None, said, "Let this user and Triton's read the file.")]
    if positions.depth(text) > DEEPEST:
        said = f"it does not parse: its messages nest more than {DEEPEST} deep"
        return model, [model.finding("syntax", None, said, "Close each message: no field of Triton's nests so deep.")]
    model.text = positions.read(text)
    message = model_config_pb2.ModelConfig()
    found = list(_unfilled(model, text))
    if positions.well_formed(text):
        found += _fields(model, model.text, message.DESCRIPTOR)
    try:
        text_format.Parse(text, message)
        model.message = message
    except text_format.ParseError as error:
        if not any(one.rule in PARSING for one in found):
            fix = "Correct the text; `protoc --decode` and Triton read it as protobuf does."
            said = str(error).partition(" : ")[2] or str(error)
            found.append(model.finding("syntax", error.GetLine() or 0, f"it does not parse: {said}", fix))
    return model, found


DEEPEST = 64  # messages in messages; Triton's have fewer than ten, and each takes a call here and in protobuf
PARSING = ("unfilled", "unknown-field", "unknown-value", "repeated-field", "wrong-type")


def _unfilled(model: ModelFiles, text: str) -> Iterator[Finding]:
    """Placeholders that a template tool left. In the value of a parameter they may mean unset (parameter_rules.py)."""
    values = {one.line for entry in model.text.all("parameters") for one in entry.walk() if one.name == "string_value"}
    for number, line in enumerate(text.split("\n"), 1):
        code = line.partition("#")[0] if '"' not in line else line
        left = next((mark for mark in UNFILLED if mark in code and not line.lstrip().startswith("#")), None)
        if left and not (left == "${" and number in values and "string_value" in line):
            yield model.finding("unfilled", number, f"a placeholder is not filled: {line.strip()[:80]}", FILL)


def _fields(model: ModelFiles, text: Field, kind: Any) -> Iterator[Finding]:
    """Names, types and repetitions that a message of this kind does not have. protobuf stops at the first."""
    known = kind.fields_by_name
    seen: set[str] = set()
    unknown: set[tuple[str, int]] = set()
    for one in text.fields:
        expected = known.get(one.name)
        if expected is None and (one.name, one.named) in unknown:
            continue  # another element of one list
        if expected is None:
            unknown.add((one.name, one.named))
            near = difflib.get_close_matches(one.name, known, 1, 0.6)
            fix = f"Write {near[0]}." if near else f"Remove it. Known are: {', '.join(sorted(known))}."
            where = f"{kind.name} has no field" if kind.name != "ModelConfig" else "there is no field"
            yield model.finding("unknown-field", one.named, f"{where} {one.name!r}", fix)
            continue
        if not _repeats(expected) and one.name in seen:
            fix = "Keep one of them."
            yield model.finding("repeated-field", one, f"{one.name} is given twice", fix)
        seen.add(one.name)
        yield from _value(model, one, expected)


def _value(model: ModelFiles, one: Field, expected: Any) -> Iterator[Finding]:
    if any(mark in (one.text or "") for mark in UNFILLED):
        return  # said already
    if expected.message_type is not None:
        if one.text is not None:
            yield model.finding(
                "wrong-type", one, f"{one.name} is {one.text}, not a message", f"Write {one.name} {{ ... }}."
            )
        else:
            yield from _fields(model, one, expected.message_type)
        return
    if one.text is None:
        yield model.finding("wrong-type", one, f"{one.name} is a message, not a value", f"Write {one.name}: VALUE.")
    elif expected.enum_type is not None:
        names = expected.enum_type.values_by_name
        if one.text not in names and not one.text.isdecimal():
            near = difflib.get_close_matches(one.value.upper(), names, 1, 0.5)
            fix = f"Write {near[0]}." if near else f"Write one of {', '.join(names)}."
            yield model.finding("unknown-value", one, f"{one.name} has no value {one.text}", fix)
    elif wrong := _wrong_scalar(one.text, expected):
        yield model.finding("wrong-type", one, f"{one.name} is {one.text}, and should be {wrong}", f"Write {wrong}.")


def _repeats(expected: Any) -> bool:
    return bool(expected.is_repeated if hasattr(expected, "is_repeated") else expected.label == expected.LABEL_REPEATED)


def _wrong_scalar(text: str, expected: Any) -> str:
    """What a value should be and is not, or ""."""
    quoted, kind = text[:1] in ('"', "'"), expected.cpp_type
    if kind == expected.CPPTYPE_STRING:
        return "" if quoted else "a string in quotes"
    if kind == expected.CPPTYPE_BOOL:
        return "" if text in ("true", "false", "True", "False", "t", "f", "1", "0") else "true or false"
    if kind in (expected.CPPTYPE_FLOAT, expected.CPPTYPE_DOUBLE):
        return "a number" if quoted or not _is_number(text) else ""
    unsigned = kind in (expected.CPPTYPE_UINT32, expected.CPPTYPE_UINT64)
    digits = text.removeprefix("-")
    if quoted or not (digits.isdecimal() or digits[:2].lower() == "0x"):
        return "an integer"
    return "a number of 0 or more" if unsigned and text.startswith("-") else ""


def _is_number(text: str) -> bool:
    try:
        float(text.rstrip("fF"))
    except ValueError:
        return False
    return True
