"""For the benchmarks of quantization: ways to do one thing, run in turns as whole processes, and what they cost.

Peers run in environments of their own (make bench-peers).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import process_tree
import random_model
from process_tree import Cost

ROOT = Path(__file__).parents[1]
PEERS = {"modelopt": ROOT / ".venv-modelopt", "llm-compressor": ROOT / ".venv-llmcompressor"}
# Not make's, and not that of a shell that keeps Python from storing compiled modules: pip compiles those of the peers.
OTHERS = ("OMP_WAIT_POLICY", "PYTHONDONTWRITEBYTECODE")
# No network, and the defaults of the tools.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in OTHERS} | {"HF_HUB_OFFLINE": "1"}
COPY = """
import pathlib, sys
source, target = map(pathlib.Path, sys.argv[1:])
for file in source.glob("*.safetensors"):
    with open(file, "rb", buffering=0) as a, open(target / file.name, "wb", buffering=0) as b:
        while chunk := a.read(1 << 24):
            b.write(chunk)
"""


@dataclass(frozen=True)
class Way:
    """One way to do it. output: what it writes, which is removed before each run. peer: whose way it is; "" is ours."""

    name: str
    argv: Sequence[str]
    output: Path
    peer: str = ""
    environment: Mapping[str, str] = field(default_factory=lambda: ENVIRONMENT)

    def run(self) -> Cost:
        """Runs it once."""
        clear(self.output)
        return process_tree.run(self.argv, self.environment)


@dataclass(frozen=True)
class Figure:
    """A measured figure beside its goal."""

    title: str
    found: float
    goal: float
    at_least: bool = False
    spread: tuple[float, float] | None = None

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.found >= self.goal if self.at_least else self.found <= self.goal

    def __str__(self) -> str:
        between = "" if self.spread is None else f"({self.spread[0]:.3g} to {self.spread[1]:.3g})"
        goal = f"at {'least' if self.at_least else 'most'} {self.goal:.4g}"
        return f"{self.title:<62} {self.found:8.4g} {between:<18} goal: {goal:<14} {'met' if self.met else 'MISSED'}"


@dataclass
class Result:
    """What one benchmark found."""

    title: str
    costs: dict[str, list[Cost]] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        costs = {name: [one._asdict() for one in runs] for name, runs in self.costs.items()}
        figures = [one.__dict__ | {"met": one.met} for one in self.figures]
        return {"title": self.title, "costs": costs, "figures": figures, "notes": self.notes}


@dataclass(frozen=True)
class Asked:
    """What the command line asked for. layers: None for as many as the shape has."""

    rounds: int
    peers: tuple[str, ...]
    shape: str
    layers: int | None
    work: Path

    @property
    def config(self) -> dict[str, Any]:
        """The config.json of the model that all ways quantize."""
        return random_model.shape(self.shape, self.layers)


def take_turns(ways: Iterable[Way], rounds: int) -> dict[str, list[Cost]]:
    """What each run of each way cost. One round runs each of them once, so that all see the same machine."""
    given = list(ways)
    costs: dict[str, list[Cost]] = {way.name: [] for way in given}
    for number in range(rounds):
        for way in given:
            cost = way.run()
            costs[way.name].append(cost)
            print(f"round {number + 1}: {way.name} {cost.seconds:.2f} s", file=sys.stderr)
    return costs


def figure(title: str, values: Sequence[float], goal: float, *, at_least: bool = False) -> Figure:
    """The median of some values, with their extremes, beside a goal."""
    spread = (min(values), max(values)) if len(values) > 1 else None
    return Figure(title, statistics.median(values), goal, at_least, spread)


def ratios(costs: Iterable[Cost], base: Iterable[Cost]) -> list[float]:
    """Wall seconds over those of another way in the same round."""
    return [one.seconds / other.seconds for one, other in zip(costs, base, strict=True)]


def fastest(costs: Mapping[str, Sequence[Cost]], names: Iterable[str]) -> list[Cost]:
    """The cheapest of some ways in each round."""
    return [min(one) for one in zip(*(costs[name] for name in names), strict=True)]


def show(result: Result, base: str) -> None:
    """Prints what each way cost, its ratio to `base` where both ran in the same rounds, and the figures."""
    print(f"\n{result.title}")
    if result.costs:
        print(f"  {'':<34} {'wall s':<24} {'CPU s':>7} {'peak MB':>8} {'anonymous':>9}  x {base}")
    for name, runs in result.costs.items():
        walls = [one.seconds for one in runs]
        wall = f"{statistics.median(walls):.2f} ({min(walls):.2f} to {max(walls):.2f})"
        cpu = statistics.median(one.cpu for one in runs)
        peak, anonymous = max(one.resident for one in runs), max(one.anonymous for one in runs)
        same_rounds = len(runs) == len(result.costs.get(base, ()))
        ratio = f"{statistics.median(ratios(runs, result.costs[base])):8.2f}" if same_rounds else ""
        print(f"  {name:<34} {wall:<24} {cpu:7.2f} {peak / 1e6:8.0f} {anonymous / 1e6:9.0f} {ratio}")
    for line in [*map(str, result.figures), *result.notes]:
        print(f"  {line}")


def builder(command: str, model: str, output: Path, *options: str) -> list[str]:
    """The command line of this checkout's builder, for a CPU."""
    return [
        sys.executable, "-m", "builder", command, "--model", model, "--output", str(output), *options, "-q"
    ]  # fmt: skip


def peer(name: str, script: str, *argv: str) -> list[str]:
    """The command line of a peer's script in the peer's environment."""
    return [str(PEERS[name] / "bin" / "python"), "-P", str(ROOT / "benchmarks" / script), *argv]


def plain_copy(model: Path, output: Path) -> list[str]:
    """The command line that copies the weights of a model: the start of Python, a read and a write."""
    return [sys.executable, "-c", COPY, str(model), str(output)]


def clear(output: Path) -> None:
    """Makes sure that a directory exists and is empty."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)


def unified(output: Path) -> Path:
    """The unified layout of the only checkpoint in a builder's output."""
    (found,) = (path for path in output.glob("checkpoint/*/unified") if path.is_dir())
    return found


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all of these benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=2)
    made.add_argument("--peers", default=",".join(PEERS), help="to compare with: %(default)s, or none")
    made.add_argument("--shape", choices=random_model.SHAPES, default="qwen3-0.6b", help="of the model")
    made.add_argument("--layers", type=int, help="another number than the model has; few to try a benchmark")
    made.add_argument("--directory", type=Path, help="where to work (default: the temporary directory)")
    made.add_argument("--json", action="store_true", help="print one JSON object on stdout")
    return made


@contextmanager
def started(arguments: argparse.Namespace) -> Iterator[Asked]:
    """The command line, checked, with a directory to work in."""
    peers = tuple(name for name in arguments.peers.split(",") if name and name != "none")
    for name in peers:
        if name not in PEERS:
            raise SystemExit(f"{name} is no peer; there are {', '.join(PEERS)}.")
        if not (PEERS[name] / "ready").exists():
            raise SystemExit(f"{name} is not installed. Type `make bench-peers` first, or use --peers none.")
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        yield Asked(arguments.rounds, peers, arguments.shape, arguments.layers, Path(directory))


def main(description: str | None, measure: Callable[[Asked], Result], base: str) -> int:
    """Runs one benchmark by its command line. Returns 1 if a goal is missed."""
    arguments = parser(description).parse_args()
    with started(arguments) as asked:
        result = measure(asked)
    if arguments.json:
        print(json.dumps(result.as_json()))
    else:
        show(result, base)
    return 0 if all(one.met for one in result.figures) else 1
