"""Links to models in another directory, such that no path in their configuration is misread by a shell or by Triton.

The Python in Triton's backend decodes file names as ASCII, and Triton escapes a `"` twice in a configuration's JSON.
Where a model's configuration contains such a path, the copy of the configuration contains a link to it instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from builder.core.untrusted_text import parse_yaml
from builder.trtllm import compatibility, references

ALLOWED = "ASCII letters, digits and _ . / + -"
_SAFE = re.compile(r"[A-Za-z0-9_./+-]+")
_COMPILED = "__pycache__"
_MODEL_YAML = "1/model.yaml"  # of the llmapi target


def is_safe(path: str) -> bool:
    """Whether a path consists of ALLOWED characters."""
    return _SAFE.fullmatch(path) is not None


def link_model(model: Path, target: Path, links: Path) -> None:
    """Creates `target` as a directory of links to the model's files, with a copy of its configuration.

    Links that stand for unsafe paths are created in `links`. Triton loads a model again when its files change. So what
    could change is copied, and Python can't write its compiled files, because a file is in the place of its directory.
    """
    config = {"config.pbtxt": (model / "config.pbtxt").read_text(encoding="utf-8")}
    _mirror(model, target, config | _rewritten(model, lambda path: _link(path, links)))


def _link(path: str, links: Path) -> str:
    """The path itself if it is safe or does not exist; otherwise a new link to it."""
    if is_safe(path) or not path.startswith("/") or not Path(path).exists():
        return path
    links.mkdir(exist_ok=True)
    link = links / str(len(list(links.iterdir())))
    link.symlink_to(path)
    return str(link)


def _rewritten(model: Path, linked: Callable[[str], str]) -> dict[str, str]:
    """The rewritten text of each configuration file that has an unsafe or relative path, by name in the model."""
    found = {}
    config = compatibility.parse(model / "config.pbtxt")
    if config is not None:
        from google.protobuf import text_format

        before = config.SerializeToString(deterministic=True)
        for name, parameter in config.parameters.items():
            path = parameter.string_value
            if name in references.PARAMETERS and path:
                path = str(references.resolved(path, model))
            parameter.string_value = linked(path)
        if config.SerializeToString(deterministic=True) != before:
            found["config.pbtxt"] = text_format.MessageToString(config)
    if (model / _MODEL_YAML).is_file():
        arguments: Any = parse_yaml((model / _MODEL_YAML).read_bytes())
        safe = {
            key: linked(_absolute(key, value, model)) if isinstance(value, str) else value
            for key, value in arguments.items()
        }
        if safe != arguments:
            found[_MODEL_YAML] = yaml.safe_dump(safe, sort_keys=False)
    return found


def _absolute(key: str, value: str, model: Path) -> str:
    """A reference as an absolute path; any other value, such as a model's name on the Hub, as it is."""
    found = references.resolved(value, model) if key in references.ARGUMENTS else None
    return str(found) if found is not None and found.exists() else value


def _mirror(source: Path, target: Path, files: Mapping[str, str]) -> None:
    """Creates `target` with links to everything in `source`, except `files`, which are written."""
    target.mkdir()
    (target / _COMPILED).touch()
    for path in source.iterdir():
        if path.name == _COMPILED:
            continue
        below = {name.partition("/")[2]: text for name, text in files.items() if name.startswith(f"{path.name}/")}
        if path.name in files:
            (target / path.name).write_text(files[path.name], encoding="utf-8")
        elif below or (path.is_dir() and path.name.isdigit()):
            _mirror(path, target / path.name, below)
        else:
            (target / path.name).symlink_to(path.resolve())
