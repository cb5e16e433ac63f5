"""The kinds of trials. Each is drawn with a seeded generator and written as words that repeat just it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.chaos import invariants, processes
from tests.chaos.invariants import ERRORS
from tests.chaos.running import Finished, Signal
from tests.chaos.world import COMMANDS, World

GRACE = 60.0  # seconds that processes have to end after their command: Triton drains for up to 30
SHM = Path("/dev/shm")
INTERRUPTED = 130
SERVING = ("serve", "smoke", "load", "build")  # they start Triton
WITH_CHILDREN = ("fetch", "quantize", "eval", "sensitivity", *SERVING)
# Where a disk gives out, and the commands that touch it there.
WRITERS = {
    "out": ("fetch", "quantize", "data-free", "rotated", "render", "render-again", "build", "eval", "report",
            "clean-all"),
    "tmp": ("smoke", "quantize", "fetch"),
    "hf": ("fetch",),
    "cache": ("smoke",),
}  # fmt: skip
READERS = ("plan", "verify", "smoke")  # of a store that nobody may write to: they write nothing there
# Commands that start at the same time, and the state that they find.
RACES = (
    ("quantized", ("render", "render", "clean")),
    ("built", ("render-again", "render-again", "clean-all")),
    ("built", ("smoke", "render-again", "clean")),
    ("rendered", ("build", "clean-all", "render")),
    ("empty", ("quantize", "quantize", "clean")),
)
_CHAIN = ("snapshot", "calibration", "checkpoint", "engine", "repository", "models")


class Skipped(Exception):
    """This machine does not allow a trial; the reason."""


@dataclass(frozen=True)
class Trial:
    """What is done: `kind`, and its options. As text: `kill command=render signal=KILL to=process moment=time:0.3`."""

    kind: str
    options: Mapping[str, str]

    def __str__(self) -> str:
        return " ".join([self.kind, *(f"{key}={value}" for key, value in self.options.items())])

    @classmethod
    def parse(cls, text: str) -> Trial:
        """The trial that `str` wrote."""
        kind, *words = text.split()
        options = dict(word.split("=", 1) for word in words)
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is not a kind of trial: {', '.join(KINDS)}")
        return cls(kind, options)


def all_kinds() -> list[tuple[str, str]]:
    """Kind and what it is about: all that a run must contain once."""
    disks = [("disk", fault) for fault in ("full", "inodes", "readonly")]
    return [*(("kill", command) for command in COMMANDS), *disks, ("race", "")]


# What takes a few seconds; any other kind takes half a minute or more.
_SHORT = ("fetch", "quantize", "data-free", "rotated", "render-again", "plan", "report", "verify", "clean", "clean-all")
SHORT = frozenset(("kill", name) for name in _SHORT)


def drawn_kinds(chance: random.Random, sample: int | None = None) -> list[tuple[str, str]]:
    """`all_kinds` in a drawn order. With `sample`: each short one, and that many of the long ones."""
    kinds = all_kinds()
    chance.shuffle(kinds)
    kept = [kind for kind in kinds if kind not in SHORT][:sample]
    return [kind for kind in kinds if kind in SHORT or kind in kept]


def draw(kind: str, about: str, world: World, chance: random.Random) -> Trial:
    """A trial of this kind."""
    return KINDS[kind].draw(about, world, chance)


def perform(trial: Trial, world: World) -> list[str]:
    """Runs a trial; what is wrong, each with the messages of the command that it is about."""
    before = {path.name for path in SHM.iterdir()}
    wrong = KINDS[trial.kind].perform(trial.options, world)
    # What was reported goes, so that the next trial begins without it.
    processes.kill(processes.left_after(0))
    processes.left_after(GRACE)
    for path in SHM.iterdir():
        if path.name not in before and world.owns(path):
            wrong.append(f"left in /dev/shm: {path.name}")
            path.unlink(missing_ok=True)
    return wrong


# --- signals ---------------------------------------------------------------------------------------------------------


def _draw_kill(command: str, world: World, chance: random.Random) -> Trial:
    reference = world.reference(command)
    to = "child" if command in WITH_CHILDREN and chance.random() < 0.2 else chance.choice(("process", "group"))
    name = "KILL" if to == "child" else chance.choice(("KILL", "KILL", "TERM", "INT", "HUP"))
    operations = reference.ended.operations
    if command in SERVING and chance.random() < 0.6:
        moment = f"stub:{chance.randint(1, 4)}+{chance.uniform(0, 1.5):.2f}"
    elif to == "child" or not operations or chance.random() < 0.4:
        moment = f"time:{chance.uniform(0, reference.ended.seconds):.2f}"
    else:
        renames = [n for n, operation in enumerate(operations, 1) if operation in ("os.rename", "os.remove")]
        near = chance.choice(renames) + chance.randint(0, 1) if renames else 1
        moment = f"operation:{chance.choice((near, chance.randint(1, len(operations))))}"
    return Trial("kill", {"command": command, "signal": name, "to": to, "moment": moment})


def _kill(options: Mapping[str, str], world: World) -> list[str]:
    command = options["command"]
    sent = Signal(options["signal"], options["to"], options["moment"])
    reference = world.reference(command)
    world.restore(COMMANDS[command].state)
    ended = world.run(command, sent)
    wrong = _after(world, ended)
    if ended.hit and sent.to == "child":
        allowed = {0, *ERRORS}
    elif ended.hit and sent.name == "KILL":
        allowed = {0, -sent.number}
    else:
        allowed = {0, INTERRUPTED} if ended.hit else {0}
    wrong += invariants.exit_code(ended, allowed, sent.number)
    wrong += _again(command, world, failed=ended.code in ERRORS)
    found = invariants.contents(world.output)
    wrong += invariants.same(found, reference.contents) + _extra(world, reference.listing)
    return _told(wrong, ended)


# --- disks -----------------------------------------------------------------------------------------------------------


def _draw_disk(fault: str, world: World, chance: random.Random) -> Trial:
    place = chance.choice(("out", "out", "out", "tmp", "hf", "cache"))
    writers = WRITERS[place]
    command = chance.choice((*writers, *READERS) if (fault, place) == ("readonly", "out") else writers)
    used, files = world.reference(command).used[place] if world.isolated else (0, 0)
    room = {
        "full": chance.randint(0, max(used, 64 << 10)) >> 12 << 12,
        "inodes": chance.randint(0, max(files, 4)),
        "readonly": 0,
    }
    return Trial("disk", {"fault": fault, "place": place, "command": command, "room": str(room[fault])})


def _disk(options: Mapping[str, str], world: World) -> list[str]:
    if not world.isolated:
        raise Skipped("this machine allows no mounts of our own (unshare -m)")
    place, command, room = options["place"], options["command"], int(options["room"])
    reference = world.reference(command)
    world.restore(COMMANDS[command].state)
    world.mount(place)
    size, files = world.occupied(place)
    world.remount(
        place,
        {"full": f"size={max(size + room, 4096)}", "inodes": f"nr_inodes={files + room}", "readonly": "ro"}[
            options["fault"]
        ],
    )
    ended = world.run(command)
    wrong = _after(world, ended)
    reads_only = options["fault"] == "readonly" and place == "out" and command in READERS
    frees = options["fault"] == "full" and command.startswith("clean")
    wrong += invariants.exit_code(ended, {0} if reads_only or frees else {0, *ERRORS})
    if ended.code:
        wrong += invariants.names_the_disk(ended, world.places[place])
    wrong += invariants.half_made(world.output) + invariants.half_made_backends(world.cache)
    world.remount(place, "rw,size=8g,nr_inodes=1000000")
    wrong += _again(command, world, failed=ended.code != 0)
    found = invariants.contents(world.output)
    wrong += invariants.same(found, reference.contents) + _extra(world, reference.listing)
    world.unmount()
    return _told(wrong, ended)


# --- several commands at once ----------------------------------------------------------------------------------------


def _draw_race(_: str, world: World, chance: random.Random) -> Trial:
    state, commands = chance.choice(RACES)
    at = [0.0, *(chance.uniform(0, world.reference(commands[0]).ended.seconds) for _ in commands[1:])]
    chance.shuffle(at)
    return Trial("race", {"state": state, "commands": ",".join(commands), "at": ",".join(f"{t:.2f}" for t in at)})


def _race(options: Mapping[str, str], world: World) -> list[str]:
    commands = options["commands"].split(",")
    references = {command: world.reference(command) for command in commands if not command.startswith("clean")}
    world.restore(options["state"])
    begin = time.monotonic()
    starts = sorted(zip(map(float, options["at"].split(",")), commands, strict=True))
    runs = []
    for at, command in starts:
        time.sleep(max(0.0, begin + at - time.monotonic()))
        runs.append((command, world.start(command)))
    ended = [(command, run.wait()) for command, run in runs]
    wrong = []
    for command, one in ended:
        busy = {2} if command.startswith("clean") else {5, 6} if command == "smoke" else set()
        found = _after(world, one) + invariants.exit_code(one, {0, *busy})
        wrong += _told([f"{command}: {what}" for what in found], one)
    for command, reference in references.items():
        if command != "smoke":
            wrong += [f"{command}: {what}" for what in _again(command, world)]
            found = invariants.contents(world.output)
            wrong += invariants.same_where_both(found, reference.contents)
            needed = {name for name in reference.contents if name.partition("/")[0] in _CHAIN}
            wrong += [f"{name} is missing" for name in sorted(needed - found.keys())]
    return wrong


# --- what all kinds check --------------------------------------------------------------------------------------------


def _after(world: World, ended: Finished) -> list[str]:
    """After a disturbed command: its message, its processes, the public links, the user's files."""
    left = processes.left_after(GRACE) if ended.hit or ended.code else []
    wrong = [f"process {process.pid} is left: {process.command[:200]}" for process in left]
    processes.kill(left)
    wrong += invariants.no_traceback(ended) + invariants.links_are_whole(world.output)
    return wrong + invariants.unchanged(world.planted)


def _again(command: str, world: World, *, failed: bool = False) -> list[str]:
    """The same command without a disturbance: it ends well, and cleans up what the disturbed one left."""
    if COMMANDS[command].argv(world)[-1] == str(world.output / "models" / "none"):
        return []
    ended = world.run(COMMANDS[command].again or command)
    wrong = [f"process {process.pid} is left: {process.command[:200]}" for process in processes.left_after(GRACE)]
    wrong += invariants.exit_code(ended, {0}) + invariants.no_traceback(ended)
    wrong = _told([f"when it ran again: {what}" for what in wrong], ended)
    wrong += invariants.half_made(world.output) + invariants.half_made_backends(world.cache)
    wrong += invariants.temporary_files(world.tmp, failed=failed) + invariants.unchanged(world.planted)
    wrong += invariants.links_are_whole(world.output)
    verified = world.run("verify")
    return wrong + _told([f"verify: {what}" for what in invariants.exit_code(verified, {0})], verified)


def _extra(world: World, expected: set[str]) -> list[str]:
    """Names in the store that an undisturbed run does not leave, and the other way round."""
    found = invariants.listing(world.output)
    return [f"{name} is there only after a disturbance" for name in sorted(found - expected)] + [
        f"{name} is there only without a disturbance" for name in sorted(expected - found)
    ]


def _told(wrong: list[str], ended: Finished) -> list[str]:
    """With the last lines of stderr, where something is wrong."""
    tail = "\n".join(f"    | {line}" for line in ended.stderr.splitlines()[-25:])
    return [*wrong, f"exit code {ended.code}, hit while {ended.hit or 'never'}; stderr:\n{tail}"] if wrong else []


@dataclass(frozen=True)
class Kind:
    """How a kind of trial is drawn and performed."""

    draw: Callable[[str, World, random.Random], Trial]
    perform: Callable[[Mapping[str, str], World], list[str]]


KINDS = {"kill": Kind(_draw_kill, _kill), "disk": Kind(_draw_disk, _disk), "race": Kind(_draw_race, _race)}
