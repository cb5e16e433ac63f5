"""python -m chaos [--minutes 3.5 | --sample N] [--seed N] [--trial 'kill command=...']"""

from __future__ import annotations

import argparse
import itertools
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from tests.chaos import processes, trials
from tests.chaos.trials import Skipped, Trial
from tests.chaos.world import BrokenReference, World, isolate
from tests.support.hub_server import Hub


def main() -> int:
    """0 when every trial held, else 1."""
    arguments = _parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the finally blocks clean up
    processes.become_subreaper()
    isolated = isolate()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1_000_000)
    print(f"chaos: seed {seed}", flush=True)
    with Hub() as hub:
        world = World(hub, isolated=isolated)
        try:
            if arguments.trial:
                return _perform_all([(text, partial(Trial.parse, text)) for text in arguments.trial], world)
            return _perform_all(_drawn(world, seed, arguments), world)
        finally:
            while left := processes.left_after(0):  # a killed one's children may only now become ours
                processes.kill(left)
            world.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chaos", description="Disturb real commands and check what is left.")
    parser.add_argument("--minutes", type=float, default=3.5, help="no trial starts later (default: %(default)s)")
    parser.add_argument("--sample", type=int, help="the short kinds of trials, N of the long ones, and no second round")
    parser.add_argument("--seed", type=int, help="draw the same trials again (default: a new one, printed)")
    parser.add_argument("--trial", action="append", default=[], help="run just this one, as printed (repeatable)")
    return parser


def _drawn(world: World, seed: int, asked: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Trial]]]:
    """Each kind once, in an order by the seed, then more until the time is over: a name, and the trial on request."""
    kinds = trials.drawn_kinds(random.Random(seed), asked.sample)
    deadline = time.monotonic() + (asked.minutes * 60 if asked.sample is None else 0)
    for number in itertools.count():
        if number >= len(kinds) and time.monotonic() > deadline:
            return
        # Its own generator: how many numbers one trial draws must not change the next.
        chance = random.Random(f"{seed} {number}")
        kind, about = kinds[number] if number < len(kinds) else chance.choice(kinds)
        yield f"{kind} {about}", partial(trials.draw, kind, about, world, chance)


def _perform_all(wanted: Iterable[tuple[str, Callable[[], Trial]]], world: World) -> int:
    count = {"ok": 0, "FAILED": 0, "skipped": 0}
    for name, draw in wanted:
        start = time.monotonic()
        wrong: list[str] = []
        try:
            trial = draw()
            name = str(trial)
            wrong = trials.perform(trial, world)
            verdict = "FAILED" if wrong else "ok"
            wrong += [f"repeat it: make chaos TRIAL={shlex.quote(name)}"] if wrong else []
        except Skipped as reason:
            verdict, wrong = "skipped", [str(reason)]
        except BrokenReference as broken:
            verdict, wrong = "FAILED", [str(broken)]
        count[verdict] += 1
        print(f"{verdict:<8} {time.monotonic() - start:5.1f} s  {name}", flush=True)
        for what in wrong:
            print(f"  {what}", flush=True)
    print(f"chaos: {count['ok']} trials held, {count['FAILED']} failed, {count['skipped']} skipped", flush=True)
    return 1 if count["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
