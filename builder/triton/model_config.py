"""Renders Triton's config.pbtxt files from templates, and checks the result by parsing it as Triton does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from builder.core import paths
from builder.core.errors import IntegrityError

MACROS = paths.data("triton_templates", "macros.j2")
LEFTOVERS = ("${", "{{", "}}", "{%", "==SUPPRESS==")  # of our templates and of upstream's
# Models that take one prompt per request. The engine does the batching.
ONE_AT_A_TIME = ("tensorrt_llm_bls", "ensemble_infer")


def render(source: Path, values: Mapping[str, Any]) -> str:
    """The text of a model's config.pbtxt. `source` is the directory that holds config.pbtxt.j2.

    jinja2.UndefinedError if the template uses a name without a value.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([source.parent, MACROS.parent]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["quote"] = quote
    return environment.get_template(f"{source.name}/config.pbtxt.j2").render(values)


def quote(value: object) -> str:
    """A string literal of protobuf's text format. JSON's escapes are valid there, but DEL must be escaped as well."""
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\177")


def check(models: Path, *, max_batch_size: int, decoupled: bool) -> None:
    """IntegrityError if a config.pbtxt is invalid or inconsistent, with every problem. Triton would miss some of them.

    `max_batch_size` and `decoupled` are the values that the models must have.
    """
    found = [
        f"{path.parent.name}: {problem}"
        for path in sorted(models.glob("*/config.pbtxt"))
        for problem in problems(path, max_batch_size=max_batch_size, decoupled=decoupled)
    ]
    if found:
        raise IntegrityError(
            "The rendered model repository is invalid.",
            why="\n".join(found),
            hint="This is a bug in triton_templates/, or in a change that was made to them.",
        )


def problems(path: Path, *, max_batch_size: int, decoupled: bool) -> list[str]:
    """The problems of one config.pbtxt, in words; empty if there are none. Arguments as for `check`."""
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    text = path.read_text(encoding="utf-8")
    found = [f"it still contains {leftover}" for leftover in LEFTOVERS if leftover in text]
    config = model_config_pb2.ModelConfig()
    try:
        text_format.Parse(text, config)
    except text_format.ParseError as error:
        return [*found, f"it does not parse: {error}"]
    name = path.parent.name
    if config.name != name:
        found.append(f"its name is {config.name!r}")
    for kind, entries in (("input", config.input), ("output", config.output)):
        found += [f"{kind} {repeated} is declared twice" for repeated in _repeated(entry.name for entry in entries)]
    if any(group.count < 1 for group in config.instance_group):
        found.append("it has no instance")
    if config.max_batch_size != (expected := 1 if name in ONE_AT_A_TIME else max_batch_size):
        found.append(f"max_batch_size is {config.max_batch_size} instead of {expected}")
    streams = decoupled and name in ("tensorrt_llm", "tensorrt_llm_bls")
    if config.model_transaction_policy.decoupled != streams:
        found.append(f"decoupled is {config.model_transaction_policy.decoupled} instead of {streams}")
    return found


def _repeated(names: Iterable[str]) -> list[str]:
    seen: set[str] = set()
    return [name for name in names if name in seen or seen.add(name)]  # type: ignore[func-returns-value]
