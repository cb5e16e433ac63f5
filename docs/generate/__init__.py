"""Writes the reference pages, docs/reference/*.md, from the code and from configs/. They are not committed.

`make docs` runs it before the site is built, so that the pages can't be out of date:

    python -m docs.generate [DIRECTORY]     default: docs/reference
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from docs.generate import facts, families, usage

PAGES: Mapping[str, Callable[[], Iterator[str]]] = {
    "commands": usage.commands,
    "recipe": usage.recipe,
    "presets": usage.presets,
    "gpus": facts.gpu_profiles,
    "models": families.models,
    "formats": facts.formats,
    "engine-flags": facts.engine_flags,
    "rules": facts.rules,
    "llm-arguments": facts.llm_arguments,
    "versions": facts.versions,
    "packages": facts.packages,
    "exit-codes": usage.exit_codes,
    "environment": usage.environment,
    "known-errors": facts.known_errors,
}


def write(directory: Path) -> None:
    """Writes every page. A page whose text did not change keeps its time."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        file, made = directory / f"{name}.md", "\n".join(page()).rstrip() + "\n"
        if not file.is_file() or file.read_text(encoding="utf-8") != made:
            file.write_text(made, encoding="utf-8")
