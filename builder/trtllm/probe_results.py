"""Probes and their answers, and how answers take precedence over the tables. Pure.

Probes are data in configs/trtllm/<version>/probes.yaml; builder/trtllm/probe.py runs them and stores the answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from builder.core.errors import UnsupportedError
from builder.formats import kv_cache
from builder.trtllm.rules import Flag, Note, Settings, Subject
from builder.trtllm.versions import Version

WORKS, FAILS, UNKNOWN = "works", "fails", "unknown"
KV_CACHE_ALGO = {name: one.quant_algo for name, one in kv_cache.FORMATS.items()}


@dataclass(frozen=True)
class Probe:
    """One probe of probes.yaml. about: the models it applies to, by head_size, kv_cache_dtype and architecture."""

    name: str
    question: str
    flags: Mapping[str, str]
    sms: Sequence[int]
    instead: Mapping[str, str]
    source: str
    about: Mapping[str, Any] = field(default_factory=dict)
    built_with: Mapping[str, str] = field(default_factory=dict)
    falls_back: str | None = None
    upgrades: bool = False
    control: bool = False

    def asked(self) -> dict[str, Any]:
        """What the answer depends on. Stored with it, so that a changed probe runs again."""
        return {key: asdict(self)[key] for key in ("flags", "about", "built_with", "falls_back")}


@dataclass(frozen=True)
class Answer:
    """The answer to a probe. reason: why it failed. built: on which card and when. source: the file."""

    probe: Probe
    sm: int
    outcome: str
    reason: str
    built: str
    source: str


def probes(version: Version, sm: int | None) -> list[Probe]:
    """The probes for a GPU architecture, in the order in which to run them."""
    found = []
    for raw in version.probes.get("probes", []):
        sizes = raw.get("head_sizes") or [None]
        plain = {key: value for key, value in raw.items() if key != "head_sizes"}
        for size in sizes:
            about = {**raw.get("about", {}), **({"head_size": size} if size else {})}
            name = f"{raw['name']}-{size}" if size else raw["name"]
            found.append(Probe(**{**plain, "name": name, "about": about}))
    return [probe for probe in found if sm in probe.sms]


def about(subject: Subject, answers: Sequence[Answer]) -> list[Answer]:
    """The answers that apply to this card and model. Probe engines compute in bfloat16."""
    found: list[Answer] = []
    if subject.dtype == "float16":
        return found
    for answer in answers:
        said = answer.probe.about
        wanted = {
            "head_size": subject.head_size,
            "architecture": subject.architecture,
            "kv_cache_dtype": next((k for k, algo in KV_CACHE_ALGO.items() if algo == subject.kv_cache_algo), None),
        }
        if answer.sm == subject.sm and all(said.get(key, value) == value for key, value in wanted.items()):
            found.append(answer)
    return found


def head_sizes(subject: Subject, answers: Sequence[Answer]) -> tuple[int, ...]:
    """The head sizes with FMHA kernels: the profile's, and the model's if a probe built context FMHA for it."""
    built = any(a.outcome == WORKS and a.probe.flags.get("context_fmha") == "enable" for a in about(subject, answers))
    more = (subject.head_size,) if built and subject.head_size not in (None, *subject.fmha_head_sizes) else ()
    return (*subject.fmha_head_sizes, *(size for size in more if size)) if subject.fmha_head_sizes else ()


def without_fmha(subject: Subject, answers: Sequence[Answer]) -> bool:
    """Whether any form of context FMHA failed for this model, so that it must not be recommended."""
    found = about(subject, answers)
    return any(a.outcome == FAILS and a.probe.flags.get("context_fmha") == "enable" for a in found)


def upgrade(
    profile: Mapping[str, Flag], asked: Mapping[str, Flag], subject: Subject, answers: Sequence[Answer]
) -> dict[str, Flag]:
    """Enables the profile's flags that a probe has proved on this card. Later probes take precedence.

    Flags of the recipe are not changed, and no flag that the profile enables is disabled.
    """
    found = dict(profile)
    for answer in about(subject, answers):
        flags = answer.probe.flags
        against = any(name in asked and asked[name].value != value for name, value in flags.items())
        off = any(name in found and found[name].value == "enable" != value for name, value in flags.items())
        if answer.outcome == WORKS and answer.probe.upgrades and not against and not off:
            for name, value in flags.items():
                if name in found and found[name].value != value:
                    found[name] = Flag(name, value, f"probe: built on {answer.built}; built, not run", answer.source)
    return found


def refuse(subject: Subject, flags: Mapping[str, Flag], answers: Sequence[Answer]) -> None:
    """UnsupportedError for flags that failed on this card, wherever they come from. Called before any work."""
    settings = Settings(subject, flags)
    for answer in about(subject, answers):
        probe = answer.probe
        if answer.outcome == FAILS and all(settings.value(name) == value for name, value in probe.flags.items()):
            said = ", ".join(f"{name}={value}" for name, value in probe.flags.items())
            sets = " ".join(f"--set engine.flags.{name}={value}" for name, value in probe.instead.items())
            raise UnsupportedError(
                f"{said} failed on this kind of card: probe {probe.name}, {answer.built}.",
                why=f"{answer.reason}\nKept in {answer.source}",
                hint=f"{sets}. Or repeat the probe: builder probe --only {probe.name} --force",
            )


def notes(subject: Subject, flags: Sequence[Flag], answers: Sequence[Answer]) -> list[Note]:
    """Notes on the answers for a plan: what they changed, and what they do not prove."""
    found = []
    sources = {answer.source for answer in answers}
    changed = [flag for flag in flags if flag.source in sources]
    if changed:
        on = ", ".join(f"{flag.name}={flag.value}" for flag in changed)
        back = " ".join(f"--set engine.flags.{flag.name}=disable" for flag in changed if flag.value == "enable")
        text = "a two-layer engine with this was built on this kind of card, but its output was not checked"
        found.append(Note("probe", f"{on}: {text}. To restore the profile's value: {back}"))
    for answer in about(subject, answers):
        if answer.outcome == FAILS:
            said = (answer.reason.splitlines() or ["-"])[-1]
            found.append(Note("probe", f"{answer.probe.name} failed ({answer.built}): {said}"))
    return found
