"""Advice that does not lead into the next refusal: what an error says to type is tried before it is printed.

A recipe may be refused for several reasons, and each check knows its own alone. So the settings that a hint names are
applied and checked; if that is refused too, the hint becomes the settings that are accepted together, or says that none
are. Of several alternatives, those that are refused are left out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from builder.core.errors import BuilderError, UnsupportedError, UsageError
from builder.recipe.schema import Resolved
from builder.targets.base import Inputs

WORDS = r"(?!(?:and|is|or|the|to)\b)"  # what follows a flag that a sentence only names
FLAG = re.compile(rf"--(gpu|target|format|kv-cache-dtype|tp|pp) {WORDS}([\w.-]*\w)")
SET = re.compile(r"--set ([\w.]+)=([\w.-]*\w)")
# Where a flag's recipe key has another name.
KEYS: Mapping[str, str] = {
    "format": "quantization.format",
    "kv-cache-dtype": "quantization.kv_cache_dtype",
    "tp": "engine.tp",
    "pp": "engine.pp",
}
ALTERNATIVES = re.compile(r"[,;]? or |\. Or |; ")
STOP = re.compile(r"`builder quantize([^`]*)`")  # the command that needs no target
DECIDED = re.compile(r"--(format|kv-cache-dtype|keep-)")  # what can't be chosen for a model that is quantized already
MOST = 6  # refusals after each other; each changes a setting
Check = Callable[[Inputs, bool], object]


def settings(hint: str) -> dict[str, str]:
    """{recipe key: value} of the flags that a hint says to type; of several alternatives, the first with any."""
    for part in ALTERNATIVES.split(STOP.sub("", hint)):
        found = {KEYS.get(name, name): value for name, value in FLAG.findall(part)}
        found |= dict(SET.findall(part))
        if found:
            return found
    return {}


def flags(changed: Mapping[str, str]) -> str:
    """Recipe keys and values as flags of the command line."""
    names = {key: name for name, key in KEYS.items()} | {"gpu": "gpu", "target": "target"}
    return " ".join(f"--{names[key]} {v}" if key in names else f"--set {key}={v}" for key, v in changed.items())


def possible(error: BuilderError, resolved: Resolved) -> BuilderError:
    """The error, for a model that is quantized already without the alternatives that would choose its formats."""
    if resolved.stored is None or not DECIDED.search(error.hint):
        return error
    parts = [part.strip(" .") for part in ALTERNATIVES.split(error.hint)]
    left = [part for part in parts if part and not DECIDED.search(part)]
    hint = "; or ".join([*left, "give the original model, which is quantized to what this GPU and target run"])
    why = f"{error.why} The checkpoint is in its formats already.".strip()
    return type(error)(error.what, why=why, hint=f"{hint[0].upper()}{hint[1:]}.")


def tried(error: BuilderError, inputs: Inputs, check: Check) -> BuilderError:
    """The error with advice that was tried.

    check: raises a BuilderError if the inputs are refused; its second argument is false where only a checkpoint is
    wanted.
    """
    error = possible(error, inputs.resolved)
    asked = settings(error.hint)
    if asked:
        accepted, last = _accepted(asked, inputs, check, layouts=True)
        if last is not None:
            why = "\n".join(part for part in (error.why, f"With {flags(accepted)}: {last.what}") if part)
            return type(error)(error.what, why=why, hint=_with_stop(last.hint, inputs, check, accepted))
        if accepted != asked:
            return type(error)(error.what, why=error.why, hint=f"All of these together: {flags(accepted)}")
    hint = _without_refused(error.hint, inputs, check)
    return type(error)(error.what, why=error.why, hint=_with_stop(hint, inputs, check, {}))


def _without_refused(hint: str, inputs: Inputs, check: Check) -> str:
    """The hint without those of its alternatives that would be refused."""
    first, *rest = re.split(f"({ALTERNATIVES.pattern})", hint)
    left = first
    for separator, part in zip(rest[::2], rest[1::2], strict=True):
        asked = settings(part)
        left += separator + part if not asked or _is_accepted(asked, inputs, check) else ""
    return left if left.endswith(".") or not hint.endswith(".") else f"{left}."


def _is_accepted(asked: Mapping[str, str], inputs: Inputs, check: Check) -> bool:
    try:
        check(replace(inputs, resolved=inputs.resolved.changed(asked)), True)
    except (UnsupportedError, UsageError):
        return False
    return True


def _accepted(
    asked: Mapping[str, str], inputs: Inputs, check: Check, *, layouts: bool
) -> tuple[dict[str, str], BuilderError | None]:
    """The settings with those that further advice adds, and the refusal that remains; None if they are accepted."""
    found = dict(asked)
    for _ in range(MOST):
        try:
            check(replace(inputs, resolved=inputs.resolved.changed(found)), layouts)
        except (UnsupportedError, UsageError) as refused:
            error = possible(refused, inputs.resolved)
            more = {key: value for key, value in settings(error.hint).items() if found.get(key) != value}
            if not more:
                return found, error
            found |= more
        else:
            return found, None
    return found, None


def _with_stop(hint: str, inputs: Inputs, check: Check, asked: Mapping[str, str]) -> str:
    """The hint, with the flags that `builder quantize` needs for this recipe if the hint names that command."""
    stop = STOP.search(hint)
    if stop is None:
        return hint
    wanted, refusal = _accepted({**asked, **settings(stop[1])}, inputs, check, layouts=False)
    if refusal is not None:
        return f"{refusal.what} {refusal.hint}"
    return STOP.sub(f"`{' '.join(['builder quantize', flags(wanted)]).strip()}`", hint)
