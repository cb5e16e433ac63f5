"""Parameters of NVIDIA's Triton models (configs/triton/parameters.yaml): their kinds, and what a recipe can set."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from builder.core import paths
from builder.core.errors import UsageError
from builder.core.untrusted_text import parse_yaml

MODELS = ("tensorrt_llm", "preprocessing", "postprocessing", "tensorrt_llm_bls")
PLACEHOLDERS = "placeholders"
PREFIX = "repository.parameters."
SWITCHES = ("true", "false", "True", "False", "TRUE", "FALSE", "1", "0")
PATTERNS = {
    "count": (r"[1-9][0-9]*", "a number of 1 or more"),
    "number": (r"[0-9]+", "a number of 0 or more"),
    "counts": (r"[0-9]+(,[0-9]+)*", "numbers with commas between them"),
    "devices": (r"[0-9]+([,;][0-9]+)*", "numbers of GPUs with commas between them"),
}
LARGEST = {"count": 1 << 31, "number": 1 << 63}  # the backend reads an int, or a size of memory


@functools.cache
def known() -> Mapping[str, Any]:
    """configs/triton/parameters.yaml."""
    found = parse_yaml(paths.data("configs", "triton", "parameters.yaml").read_bytes())
    assert isinstance(found, Mapping)
    return found


def kinds(model: str) -> dict[str, str | Sequence[str]]:
    """{name: kind} of a model's parameters."""
    return {name: spec["kind"] if isinstance(spec, Mapping) else spec for name, spec in known()[model].items()}


def wrong(kind: str | Sequence[str], value: str) -> str:
    """What the value should be and is not, or ""."""
    if not isinstance(kind, str):
        return "" if value in kind else " or ".join(kind)
    if "${" in value:
        return "a value instead of the placeholder"
    if kind == "switch":
        return "" if value in SWITCHES else "true or false"
    if kind == "fraction":
        return "" if _is_fraction(value) else "a number from 0 to 1"
    pattern, title = PATTERNS.get(kind, (".*", ""))
    if not re.fullmatch(pattern, value):
        return title
    return f"a number below {LARGEST[kind]}" if kind in LARGEST and _is_above(value, LARGEST[kind]) else ""


def _is_above(digits: str, limit: int) -> bool:
    """Python reads no number of thousands of digits."""
    digits = digits.lstrip("0")
    return len(digits) > len(str(limit)) or int(digits or 0) >= limit


def _is_fraction(value: str) -> bool:
    """In the digits that C++ reads: Python also takes 0_1, and those of other scripts."""
    return re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,4})?", value) is not None and float(value) <= 1


def text(value: Any) -> str:
    """A value of YAML as config.pbtxt has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(text, value)) if isinstance(value, (list, tuple)) else str(value)


def checked(values: Mapping[str, Any]) -> dict[str, str]:
    """`repository.parameters` as texts. ValueError for a name that a recipe can't set, or a value of another kind."""
    found = {}
    for name, value in values.items():
        spec = _spec(name)
        if "key" in spec:
            raise ValueError(f"{name} is set by {spec['key']}")
        if "fixed" in spec:
            raise ValueError(f"{name} can't be set: {spec['fixed']}")
        found[name] = text(value)
        if should := wrong(spec["kind"], found[name]):
            raise ValueError(f"{name} is {found[name]!r}; it must be {should}")
    return found


def to_own_keys(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A source of settings in which parameters that have a recipe key of their own are under that key.

    UsageError if it sets both to different values.
    """
    part = layer.get("repository")
    given = part.get("parameters") if isinstance(part, Mapping) else None
    if not isinstance(part, Mapping) or not isinstance(given, Mapping):
        return dict(layer)
    own = {name: key.removeprefix("repository.") for name in given if (key := _specs().get(str(name), {}).get("key"))}
    moved = {key: given[name] for name, key in own.items()}
    for name, key in own.items():
        if key in part and part[key] != given[name]:
            raise UsageError(
                f"repository.{key} is {part[key]}, and {PREFIX}{name} is {given[name]}.",
                why="The two are one value.",
                hint=f"Set it once: --set repository.{key}={text(given[name])}",
            )
    rest = {name: value for name, value in given.items() if name not in own}
    kept = {key: value for key, value in part.items() if key != "parameters"}
    return {**layer, "repository": {**kept, **moved, **({"parameters": rest} if rest else {})}}


@functools.cache
def _specs() -> dict[str, Mapping[str, Any]]:
    """Each name, with `kind`, and with `key` or `fixed` if `repository.parameters` does not set it."""
    found: dict[str, Mapping[str, Any]] = {}
    for model in (*MODELS, PLACEHOLDERS):
        for name, spec in known()[model].items():
            found.setdefault(name, spec if isinstance(spec, Mapping) else {"kind": spec})
    return found


def _spec(name: str) -> Mapping[str, Any]:
    if name not in _specs():
        near = difflib.get_close_matches(name, _specs(), 1)
        raise ValueError(f"there is no parameter {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return _specs()[name]
