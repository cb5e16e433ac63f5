"""python -m chaos [--minutes 3.5] [--seed N] [--trial 'kill command=...']"""

from __future__ import annotations

import argparse
import random
import shlex
import signal
import sys
import time
from collections.abc import Iterator

from hub_server import Hub

from chaos import processes, trials
from chaos.trials import Skipped, Trial
from chaos.world import World, isolate


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
            wanted = _given(arguments.trial) if arguments.trial else _drawn(world, seed, arguments.minutes * 60)
            return _perform_all(wanted, world)
        finally:
            processes.kill(processes.left_after(0))
            world.close()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="chaos", description="Disturb real commands and check what is left.")
    parser.add_argument("--minutes", type=float, default=3.5, help="no trial starts later (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="draw the same trials again (default: a new one, printed)")
    parser.add_argument("--trial", action="append", default=[], help="run just this one, as printed (repeatable)")
    return parser


def _given(texts: list[str]) -> Iterator[Trial]:
    return map(Trial.parse, texts)


def _drawn(world: World, seed: int, budget: float) -> Iterator[Trial]:
    """Each kind once, in an order by the seed, and then more until the time is over."""
    chance = random.Random(seed)
    kinds = trials.all_kinds()
    chance.shuffle(kinds)
    deadline = time.monotonic() + budget
    for kind, about in kinds:
        yield trials.draw(kind, about, world, chance)
    while time.monotonic() < deadline:
        kind, about = chance.choice(kinds)
        yield trials.draw(kind, about, world, chance)


def _perform_all(wanted: Iterator[Trial], world: World) -> int:
    count = {"ok": 0, "FAILED": 0, "skipped": 0}
    for trial in wanted:
        start = time.monotonic()
        try:
            wrong = trials.perform(trial, world)
            verdict = "FAILED" if wrong else "ok"
        except Skipped as reason:
            verdict, wrong = "skipped", []
            trial = Trial(trial.kind, {**trial.options, "because": f"({reason})"})
        count[verdict] += 1
        print(f"{verdict:<8} {time.monotonic() - start:5.1f} s  {trial}", flush=True)
        for what in wrong:
            print(f"  {what}", flush=True)
        if wrong:
            print(f"  repeat it: make chaos TRIAL={shlex.quote(str(trial))}", flush=True)
    print(f"chaos: {count['ok']} trials held, {count['FAILED']} failed, {count['skipped']} skipped", flush=True)
    return 1 if count["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
