"""GPU profiles: an architecture's facts and the engine flags that suit it, from configs/gpus/*.yaml."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from builder.core import paths
from builder.core.errors import UnsupportedError, UsageError
from builder.core.untrusted_text import parse_yaml
from builder.machine import cards
from builder.machine.cards import Card

TARGETS = ("engine", "llmapi")  # those that need a GPU


@dataclass(frozen=True)
class ProfileFlag:
    """The value of a trtllm-build flag on this architecture, with its reason and source."""

    value: str
    reason: str
    source: str


@dataclass(frozen=True)
class Support:
    """The first TensorRT-LLM version that runs a number format on the architecture."""

    since: str
    source: str


@dataclass(frozen=True)
class Choice:
    """A number format that suits the architecture, and why."""

    format: str
    reason: str


@dataclass(frozen=True)
class GpuProfile:
    """What is known about a GPU architecture, and the settings that suit it.

    `sm` is ten times the compute capability (120 = 12.0), None for the CPU. `recipe` overrides defaults of the recipe.
    `best` are the number formats to choose from where the user names none, the best first. `formats` are those that it
    runs, by target (targets that need a GPU).
    `fmha_head_sizes` are the head sizes with context FMHA kernels; empty if no limit is known. `card` is the card that
    the user named, None if a profile was named or detected.
    """

    name: str
    title: str
    sm: int | None
    target: str
    flags: Mapping[str, ProfileFlag]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    cards: Sequence[Card] = ()
    best: Sequence[Choice] = ()
    formats: Mapping[str, Mapping[str, Support]] = field(default_factory=dict)
    fmha_head_sizes: Sequence[int] = ()
    notes: Sequence[str] = ()
    card: Card | None = None

    def support(self, entry: str, target: str) -> Support | None:
        """Since when a target runs an entry of `formats` on it; None if it doesn't."""
        return self.formats.get(entry, {}).get(target)


@dataclass(frozen=True)
class Seen:
    """A GPU of this machine: its name, compute capability, driver, and bytes of memory (0 if it is not known)."""

    name: str
    major: int
    minor: int
    driver: str
    memory: int = field(default=0, compare=False)

    @property
    def sm(self) -> int:
        """Ten times the compute capability: 120 for 12.0."""
        return self.major * 10 + self.minor


def names() -> list[str]:
    """The names of all profiles."""
    return sorted(path.stem for path in paths.data("configs", "gpus").glob("*.yaml"))


@functools.cache
def load(name: str) -> GpuProfile:
    """The profile with exactly this name. UnsupportedError, with the nearest names, for an unknown one."""
    if name not in names():
        raise _unknown(name)
    raw = _read(name)
    # A second profile for the same GPUs, with other flags: cards, formats, kernels and notes are the same.
    card_facts = _read(raw["card_facts_of"]) if "card_facts_of" in raw else raw
    inherited = load(raw["flags_of"]).flags if "flags_of" in raw else {}
    own = {key: ProfileFlag(**value) for key, value in raw.get("flags", {}).items()}
    return GpuProfile(
        name=name,
        title=raw["title"],
        sm=raw["sm"],
        target=raw["target"],
        flags={**inherited, **own},
        recipe=raw.get("recipe", {}),
        cards=[Card(**{**card, "also": tuple(card.get("also", ()))}) for card in card_facts.get("cards", [])],
        best=[Choice(**choice) for choice in card_facts.get("best", [])],
        formats={key: _by_target(value) for key, value in card_facts.get("formats", {}).items()},
        fmha_head_sizes=card_facts.get("fmha_head_sizes", []),
        notes=card_facts.get("notes", []),
    )


def _by_target(entry: Mapping[str, Any]) -> dict[str, Support]:
    """{target: its support} of {since, source}, which is that of both targets, or of the same by target."""
    if "since" in entry:
        return dict.fromkeys(TARGETS, Support(**entry))
    return {target: Support(**said) for target, said in entry.items()}


def named(text: str) -> GpuProfile:
    """The profile of a profile or card name in any spelling: sm120, "RTX 5090", rtx5090, 5090.

    If a card is named, it becomes the profile's `card`, and a plan is judged by its memory. A card that two profiles
    list (sm120 and sm120-fmha) selects the one that defines it. UsageError for a name that fits several cards,
    UnsupportedError for an unknown one.
    """
    by_name = {cards.plain(name): name for name in names()}
    if cards.plain(text) in by_name:
        return load(by_name[cards.plain(text)])
    owners = card_owners()
    found = cards.find(text, list(owners))
    if not found:
        raise _unknown(text)
    if len(found) > 1:
        raise UsageError(
            f"{text!r} fits {len(found)} cards: {' and '.join(card.name for card in found)}.",
            why="They differ in memory, so a model may fit on only one of them.",
            hint=f"Name one of them: --gpu {found[-1].name!r}",
        )
    return replace(load(owners[found[0]]), card=found[0])


@functools.cache
def card_owners() -> dict[Card, str]:
    """The profile that defines each card."""
    return {card: name for name in names() if "card_facts_of" not in _read(name) for card in load(name).cards}


def _unknown(text: str) -> UnsupportedError:
    near = cards.nearest(text, [*names(), *(card.name for card in card_owners())])
    return UnsupportedError(
        f"There is no GPU profile or card named {text!r}.",
        why=f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Profiles: {', '.join(names())}.",
        hint="`builder gpus` lists the profiles and the cards behind each.",
    )


def _read(name: str) -> dict[str, Any]:
    raw: dict[str, Any] = parse_yaml(paths.data("configs", "gpus", f"{name}.yaml").read_text(encoding="utf-8"))
    return raw


def detect() -> GpuProfile:
    """The profile of the first visible GPU. UnsupportedError if no GPU is visible or its architecture is unknown."""
    try:
        found = first()
    except UnsupportedError as error:
        hint = "Name a profile: --gpu sm120, or --gpu cpu to quantize and serve without a GPU."
        raise UnsupportedError(
            "No GPU was named, and none was found on this machine.", why=error.why, hint=hint
        ) from error
    return for_capability(found.major, found.minor, found.name)


def first() -> Seen:
    """The first visible GPU. UnsupportedError if there is none, or if NVML can't tell."""
    found = visible()
    if not found:
        why = "NVML finds no NVIDIA driver." if found == [] else "NVML can't tell which GPUs are visible here."
        raise UnsupportedError("No GPU was found on this machine.", why=why, hint="Run this on a machine with a GPU.")
    return found[0]


def for_capability(major: int, minor: int, card: str) -> GpuProfile:
    """The profile of a compute capability. UnsupportedError, with the nearest profiles, for an unknown one."""
    name = f"sm{major}{minor}"
    if name in names():
        return load(name)
    raise UnsupportedError(
        f"This machine's {card} is {name}, and there is no profile for it.",
        why=f"The nearest: {'; '.join(f'{p.name} ({p.title})' for p in nearest(major * 10 + minor))}.",
        hint="An engine runs only on the architecture it was built for. To quantize and serve without a GPU: "
        "--gpu cpu.",
    )


def nearest(sm: int) -> list[GpuProfile]:
    """The profiles just below and just above an architecture without a profile. `sm`: ten times its capability."""
    known = [p for p in map(load, names()) if p.sm is not None]
    below = [p for p in known if p.sm is not None and p.sm < sm]
    above = [p for p in known if p.sm is not None and p.sm > sm]
    found = []
    if below:
        found += [p for p in below if p.sm == max(q.sm or 0 for q in below)]
    if above:
        found += [p for p in above if p.sm == min(q.sm or 0 for q in above)]
    return found


def cuda_order() -> dict[str, str]:
    """The environment that makes CUDA number GPUs as NVML does. By default CUDA puts the fastest first."""
    return {"CUDA_DEVICE_ORDER": os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")}


def visible() -> list[Seen] | None:
    """The GPUs that a process with `cuda_order()` sees, in its order. Respects CUDA_VISIBLE_DEVICES.

    Empty without a driver. None if it can't be determined: NVML fails, CUDA_VISIBLE_DEVICES names parts of a GPU (MIG),
    or the GPUs differ and CUDA_DEVICE_ORDER numbers them in another way.
    """
    import pynvml

    absent = (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [] if error.value in absent else None
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        found = []
        for handle in map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount())):
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            seen = Seen(pynvml.nvmlDeviceGetName(handle), major, minor, driver, _memory(handle))
            found.append((pynvml.nvmlDeviceGetUUID(handle), seen))
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    alike = len({seen for _, seen in found}) < 2
    if not alike and cuda_order()["CUDA_DEVICE_ORDER"] != "PCI_BUS_ID":
        return None
    return _chosen(found, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _memory(handle: Any) -> int:
    """Bytes of a GPU's memory; 0 if NVML does not tell, as of a GB10, which shares the host's."""
    import pynvml

    try:
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
    except pynvml.NVMLError:
        return 0


def _chosen(found: Sequence[tuple[str, Seen]], devices: str | None) -> list[Seen] | None:
    """Applies CUDA_VISIBLE_DEVICES: indices or UUID prefixes, up to the first invalid one (CUDA Programming Guide)."""
    if devices is None:
        return [seen for _, seen in found]
    chosen: list[Seen] = []
    for word in (word.strip() for word in devices.split(",")):
        if word.startswith("MIG-"):
            return None
        by_uuid = [seen for uuid, seen in found if word.startswith("GPU-") and uuid.startswith(word)]
        by_index = [found[int(word)][1]] if word.isdecimal() and int(word) < len(found) else []
        if not (by_uuid or by_index):
            break
        chosen += (by_uuid or by_index)[:1]
    return chosen
