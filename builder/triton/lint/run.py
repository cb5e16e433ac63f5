"""Repository -> findings: reads every model's files and applies all rules."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from builder.core.errors import UsageError
from builder.triton.lint import (
    engine_rules,
    ensemble_rules,
    llmapi_rules,
    model_files,
    model_rules,
    parameter_rules,
    several_rules,
    streaming_rules,
)
from builder.triton.lint.findings import Finding
from builder.triton.lint.model_files import CONFIG
from builder.trtllm.compatibility import ENGINE_MODEL


@dataclass(frozen=True)
class Lint:
    """models: their names. engine: the directory that values were compared with, the last of several; None if none
    could be read."""

    root: Path
    models: tuple[str, ...]
    findings: tuple[Finding, ...]
    engine: Path | None

    @property
    def errors(self) -> int:
        """How many findings are errors."""
        return sum(one.severity == "error" for one in self.findings)


def lint(path: Path, *, engine: Path | None = None) -> Lint:
    """Every finding, by file and line. path: the directory of the models, or one that holds it as `models`.

    engine: the directory of the engine, where it has another path here than in the repository. UsageError for a
    directory without models, and for an engine without config.json.
    """
    root = _root(path)
    if engine is not None and not (engine / "config.json").is_file():
        raise UsageError(
            f"{engine} holds no engine.", hint="Name the directory that trtllm-build wrote: config.json is there."
        )
    models, found = {}, list[Finding]()
    for directory in sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if (directory / CONFIG).is_file():
            models[directory.name], problems = model_files.read(directory, root)
            found += problems
        else:
            found += _without_config(directory, root)
    place = None
    for model in models.values():
        found += llmapi_rules.check(model)
        if model.message is None:
            continue
        found += [*model_rules.check(model), *parameter_rules.check(model)]
        if model.message.platform == "ensemble":
            found += ensemble_rules.check(model, models)
        if parameter_rules.role(model) == ENGINE_MODEL and (own := engine_rules.directory(model, engine)):
            place = own
            found += engine_rules.check(model, own)
    found += ensemble_rules.cycles(models)
    found += [*streaming_rules.check(models), *several_rules.check(models)]
    found += parameter_rules.tokenizers([model for model in models.values() if model.message is not None])
    ordered = sorted(set(found), key=lambda one: (one.file, one.line, one.rule, one.what))
    return Lint(root, tuple(models), tuple(ordered), place)


def _root(path: Path) -> Path:
    for root in (path / "models", path):
        if root.is_dir() and any(root.glob(f"*/{CONFIG}")):
            return root
    raise UsageError(
        f"{path} is no Triton model repository.",
        why=f"No directory in it has a {CONFIG}.",
        hint="Name what tritonserver gets with --model-repository, or models/ of a repository of this builder.",
    )


def _without_config(directory: Path, root: Path) -> Iterator[Finding]:
    """A directory that looks like a model and has no config.pbtxt."""
    like = [path.name for path in directory.iterdir() if path.is_file() and "pbt" in path.name.lower()]
    if like or any(path.is_dir() and path.name.isdecimal() for path in directory.iterdir()):
        fix = (
            f"Rename {like[0]} to {CONFIG}." if like else f"Add {CONFIG}, or move the directory out of the repository."
        )
        file = str((directory / (like[0] if like else CONFIG)).relative_to(root))
        yield Finding("config", file, 0, f"{directory.name}: it has no {CONFIG}", fix)
