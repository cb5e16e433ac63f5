"""Prints findings."""

from __future__ import annotations

from typing import Any

from builder.core.errors import IntegrityError
from builder.core.output import Output
from builder.triton.lint.run import Lint


def show(found: Lint, out: Output) -> None:
    """One line for each finding, as compilers print them, and its fix below. IntegrityError if any is an error."""
    out.result(facts(found))
    for one in found.findings:
        out.text(f"{one.place}: {one.severity}: {one.what} [{one.rule}]")
        out.text(f"    {one.fix}")
    if found.errors:
        raise IntegrityError(
            f"{found.root} has {found.errors} error{'s' * (found.errors > 1)} in {len(found.models)} models.",
            hint="Correct them, then run it again.",
        )
    warnings = len(found.findings)
    number = f"{warnings} warning{'s' * (warnings > 1)}" if warnings else "no problem"
    compared = f", compared with the engine in {found.engine}" if found.engine else ""
    out.info(f"{number} in {len(found.models)} models{compared}")


def facts(found: Lint) -> dict[str, Any]:
    """The same for --json."""
    return {
        "repository": str(found.root),
        "models": list(found.models),
        "engine": str(found.engine) if found.engine else None,
        "findings": [vars(one) for one in found.findings],
    }
