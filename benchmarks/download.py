"""Measures data-free quantization of a model that is still being downloaded, against its goal:

    python benchmarks/download.py [--rounds 2] [--json]

A server on this machine sends a random model, in eight files, at the rate of a line of 1 Gbit/s.
Three commands in turns: the download alone (`builder fetch`), quantization alone from a directory, and
`builder quantize --data-free` of the model on the server. The bytes must be those of quantization alone.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import comparison
from comparison import Asked, Result, Way, builder, figure, main, take_turns, unified
from data_free import ours
from random_model import make
from same_tensors import require_same

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from hub_server import Hub

NAME, SHARDS, RATE, GOAL = "bench/random", 8, 125e6, 1.1


def environment(hub: Hub, home: Path) -> Mapping[str, str]:
    """Of commands that download from the server; `home` is where huggingface_hub keeps its files."""
    known = {name: value for name, value in comparison.ENVIRONMENT.items() if name != "HF_HUB_OFFLINE"}
    return known | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home)}


def measure(asked: Asked) -> Result:
    """The three commands."""
    work = asked.work
    model = make(work / "model", asked.config, SHARDS)
    with Hub(RATE) as hub:
        hub.add(NAME, model)
        remote = environment(hub, work / "remote" / "home")  # below the output, which is removed before each run
        fetched = environment(hub, work / "fetched" / "home")
        fetch = builder("fetch", NAME, work / "fetched", "--gpu", "cpu")
        ways = [
            Way("download alone", fetch, work / "fetched", environment=fetched),
            Way("quantization alone", ours(model, work / "local"), work / "local"),
            Way("both at once", ours(NAME, work / "remote"), work / "remote", environment=remote),
        ]
        result = Result(f"Download at {RATE / 1e6:.0f} MB/s and data-free NVFP4", take_turns(ways, asked.rounds))
    download, quantization, both = result.costs.values()
    pairs = list(zip(download, quantization, both, strict=True))
    longer = [together.seconds / max(one.seconds, other.seconds) for one, other, together in pairs]
    summed = [together.seconds / (one.seconds + other.seconds) for one, other, together in pairs]
    result.figures.append(figure("both at once / the longer of the two", longer, GOAL))
    result.notes.append(f"both at once / one after the other: {sum(summed) / len(summed):.2f}")
    result.notes.append(require_same(unified(work / "remote"), unified(work / "local"), what="quantization alone"))
    return result


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, "download alone"))
