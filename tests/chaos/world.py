"""Where trials happen: one private place, prepared states, and what each command does when nothing disturbs it.

Every trial runs in the same directory, because paths are ingredients of the store's keys: only so can a disturbed and
an undisturbed run be compared key by key. A state is a copy of that directory; it is made when a trial first needs it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.chaos import invariants
from tests.chaos.running import Finished, Run, Signal
from tests.support.hub_server import Hub

DATA = Path(__file__).resolve().parents[1] / "data"
HUB_MODEL = "chaos/tiny"
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000  # linux/sched.h


@dataclass(frozen=True)
class Command:
    """A command line of `builder`, and the state that it starts from.

    `until` as for `Run`. `again`: a shorter command that shows as well that all works after a disturbance.
    """

    state: str
    argv: Callable[[World], Sequence[str]]
    until: str = ""
    again: str = ""


class BrokenReference(Exception):
    """A command fails although nothing disturbs it."""


@dataclass(frozen=True)
class Reference:
    """An undisturbed run: how long it takes, what it changes, what is there afterwards."""

    ended: Finished
    contents: dict[str, Any]
    listing: set[str]
    used: dict[str, tuple[int, int]]  # bytes and files more than before, by the names of `World.places`


def _recipe(world: World, *more: str) -> list[str]:
    return ["--model", str(world.model), "--gpu", "cpu", "--calib-samples", "6", "--calib-seq-len", "64", *more]


_FORCED = [word for stage in ("fetch", "calibrate", "engine", "render") for word in ("--force", stage)]
_LOAD = ["--concurrency", "2", "--requests", "2", "--input-tokens", "8", "--output-tokens", "2"]
COMMANDS = {
    "fetch": Command("empty", lambda w: ["fetch", "--model", HUB_MODEL, "--gpu", "cpu"]),
    "quantize": Command("empty", lambda w: ["quantize", *_recipe(w)]),
    "data-free": Command("empty", lambda w: ["quantize", "--model", str(w.model), "--gpu", "cpu", "--data-free"]),
    "rotated": Command("empty", lambda w: [*COMMANDS["data-free"].argv(w), "--transform", "spinquant"]),
    "render": Command("quantized", lambda w: ["render", *_recipe(w)]),
    "render-again": Command("built", lambda w: ["render", *_recipe(w), *_FORCED]),
    "build": Command("rendered", lambda w: ["build", *_recipe(w)]),
    "plan": Command("built", lambda w: ["plan", *_recipe(w, "--max-batch-size", "2")]),
    "eval": Command(
        "built",
        lambda w: ["eval", *_recipe(w), "--data", str(w.texts), "--runner", "bf16", "--runner", "checkpoint"],
    ),
    "sensitivity": Command("built", lambda w: ["sensitivity", *_recipe(w), "--proxy"]),
    "serve": Command("built", lambda w: ["serve", str(w.link)], until="try "),
    "smoke": Command("built", lambda w: ["smoke", str(w.link)], again="serve"),
    "load": Command("built", lambda w: ["load", str(w.link), *_LOAD]),
    "report": Command("built", lambda w: ["report", str(w.link)]),
    "verify": Command("built", lambda w: ["verify"]),
    "clean": Command("littered", lambda w: ["clean"]),
    "clean-all": Command("littered", lambda w: ["clean", "--all"]),
}
# How each state is made of another: by the last command, undisturbed.
STATES = {"quantized": "quantize", "rendered": "render", "built": "build"}


class World:
    """A directory with everything that trials touch, and a Hub on this machine. `isolated`: it can mount disks."""

    def __init__(self, hub: Hub, *, isolated: bool) -> None:
        self.isolated = isolated
        self.root = Path(tempfile.mkdtemp(prefix="chaos-"))
        self.trial, self.states = self.root / "trial", self.root / "states"
        self.output, self.tmp, self.hf, self.cache, self.home = (
            self.trial / name for name in ("out", "tmp", "hf", "cache", "home")
        )
        self.places = {"out": self.output, "tmp": self.tmp, "hf": self.hf, "cache": self.cache}
        self.model, self.texts, self.logs = self.root / "model", self.root / "texts.jsonl", self.root / "logs"
        shutil.copytree(DATA / "tiny-qwen3", self.model)
        self.texts.write_text("".join((DATA / "eval" / "prose.jsonl").read_text().splitlines(keepends=True)[:4]))
        self.logs.mkdir()
        self.states.mkdir()
        hub.add(HUB_MODEL, self.model)
        self._hub = hub
        self._pids: set[int] = set()
        self._references: dict[str, Reference] = {}
        self._make_empty()

    def close(self) -> None:
        """Removes all of it."""
        self.unmount()
        shutil.rmtree(self.root, ignore_errors=True)

    @property
    def env(self) -> dict[str, str]:
        """For a command: its own home, temporary directory and caches."""
        return {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(self.home),
            "TMPDIR": str(self.tmp),
            "XDG_CACHE_HOME": str(self.cache),
            "HF_HOME": str(self.hf),
            "HF_ENDPOINT": self._hub.endpoint,
            "NO_PROXY": "*",
            "BUILDER_OUTPUT": str(self.output),
            "OMP_WAIT_POLICY": "PASSIVE",
        }

    @property
    def link(self) -> Path:
        """The public link of the only model that was built."""
        links = [path for path in sorted((self.output / "models").glob("*")) if path.is_symlink()]
        return links[0] if links else self.output / "models" / "none"

    def start(self, command: str, sent: Signal | None = None) -> Run:
        """Starts a command in the trial's directory."""
        told = COMMANDS[command]
        run = Run(told.argv(self), env=self.env, logs=self.logs, sent=sent, until=told.until)
        self._pids.add(run.process.pid)
        return run

    def owns(self, path: Path) -> bool:
        """Whether a file of /dev/shm comes from a trial: all in ours; in the machine's those named by a pid of ours."""
        return self.isolated or any(f"-{pid}-" in path.name for pid in self._pids)

    def run(self, command: str, sent: Signal | None = None) -> Finished:
        """Runs a command to its end."""
        return self.start(command, sent).wait()

    def restore(self, state: str) -> None:
        """Makes the trial's directory a copy of a state."""
        source = self._state(state)
        self.unmount()
        shutil.rmtree(self.trial, ignore_errors=True)
        _copy(source, self.trial)

    def reference(self, command: str) -> Reference:
        """The undisturbed run of a command, once."""
        if command not in self._references:
            self.restore(COMMANDS[command].state)
            before = {name: usage(path) for name, path in self.places.items()}
            ended = self.run(command)
            if ended.code != 0:
                raise BrokenReference(f"`builder {command}` fails without any disturbance:\n{ended.stderr}")
            used = {}
            for name, path in self.places.items():
                size, files = usage(path)
                used[name] = (size - before[name][0], files - before[name][1])
            self._references[command] = Reference(
                ended, invariants.contents(self.output), invariants.listing(self.output), used
            )
            for state, last in STATES.items():
                if last == command and not (self.states / state).exists():
                    _copy(self.trial, self.states / state)
        return self._references[command]

    @property
    def planted(self) -> dict[Path, str | None]:
        """The user's own files, as `invariants.unchanged` takes them."""
        names = ["notes.txt", "my results/a.bin", "models/readme.txt", "texts/mine.txt", "builds/mine.json"]
        files = [self.output / name for name in names] + [self.trial / "foreign" / "file.txt"]
        return {**{path: _PLANTED for path in files}, self.output / "scores" / "elsewhere": None}

    def mount(self, place: str) -> None:
        """Puts a small disk of its own under one of `places`, with what is there now."""
        path = self.places[place]
        aside = path.with_name(f"{path.name}.aside")
        path.rename(aside)
        path.mkdir()
        _command("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(path))
        for entry in aside.iterdir():
            _copy(entry, path / entry.name)
        shutil.rmtree(aside)

    def occupied(self, place: str) -> tuple[int, int]:
        """Bytes and files on that disk."""
        found = os.statvfs(self.places[place])
        return (found.f_blocks - found.f_bfree) * found.f_frsize, found.f_files - found.f_ffree

    def remount(self, place: str, options: str) -> None:
        """Changes that disk: size=BYTES, nr_inodes=N, ro, rw. Without a limit (0) it would report 0 bytes free."""
        _command("mount", "-o", f"remount,{options}", str(self.places[place]))

    def unmount(self) -> None:
        """Takes such disks away, with what is on them."""
        if not self.isolated:
            return
        for path in self.places.values():
            while os.path.ismount(path):
                _command("umount", "-l", str(path))

    def _state(self, state: str) -> Path:
        path = self.states / state
        if not path.exists():
            if state == "littered":
                self._litter()
            else:
                self.reference(STATES[state])
        return path

    def _litter(self) -> None:
        """A second repository, so that there may be something to clean."""
        self.restore("built")
        argv = ["render", *_recipe(self, "--max-batch-size", "2")]
        if Run(argv, env=self.env, logs=self.logs).wait().code != 0:
            raise BrokenReference("a second repository can't be rendered")
        _copy(self.trial, self.states / "littered")

    def _make_empty(self) -> None:
        """No artifact at all, but files of the user's everywhere."""
        self.trial.mkdir()
        for path in (*self.places.values(), self.home):
            path.mkdir()
        for path, digest in self.planted.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if digest:
                path.write_bytes(_PLANT)
            else:
                path.symlink_to(self.trial / "foreign")
        _copy(self.trial, self.states / "empty")


_PLANT = b'{"mine": "and nobody else\'s"}\n'
_PLANTED = hashlib.sha256(_PLANT).hexdigest()


def usage(path: Path) -> tuple[int, int]:
    """Bytes on disk and number of files below a directory."""
    found = [entry.lstat() for entry in path.rglob("*")]
    return sum(-(-entry.st_size // 4096) * 4096 for entry in found), len(found)


def _copy(source: Path, target: Path) -> None:
    _command("cp", "-a", "--reflink=auto", str(source), str(target))


def _command(*argv: str) -> None:
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: {done.stderr.strip()}")


def isolate() -> bool:
    """Gives this process mounts of its own, with an empty /dev/shm; False where the system does not allow it.

    As root at once, else as root of a user namespace of our own. Call it before any thread starts.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWNS if user == 0 else _CLONE_NEWNS | _CLONE_NEWUSER) != 0:
        return False
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    try:
        _command("mount", "--make-rprivate", "/")
        _command("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/dev/shm")
    except RuntimeError:
        return False
    return True
