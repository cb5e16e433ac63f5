"""Measures what rounding a weight with the calibration rows costs: python benchmarks/rounding.py [--tokens 1024]

CPU seconds of one thread, on random inputs and square weights of several sizes, by what each part grows with:

- moments: of the inputs, in nanoseconds for each product of two columns of a token (`hessian`: for each column)
- factor: of a Hessian, in nanoseconds for each cubed column
- round: a weight, in nanoseconds for each of its elements

builder/preflight/rounding.py has the rates that follow, for `builder plan`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from builder.formats.arithmetic import nvfp4
from builder.quantize.algorithms import gptq, hessian
from builder.quantize.algorithms.grids import Nvfp4Blocks
from builder.quantize.algorithms.moments import Moments

Result = TypeVar("Result")
SIZES = (1024, 2048, 4096, 8192)
ROWS = 4096  # of each weight, as the product rounds at a time
OPTIONS = gptq.Options(scales="hessian", damping=0.05, order="activation", block_size=128)


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=2, help="of which the fastest counts")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print("| inputs | algorithm | moments | factor | round |\n| --- | --- | --- | --- | --- |")
    for inputs in SIZES:
        for name, cells in (("hessian", of_hessian(inputs, asked)), ("gptq", of_gptq(inputs, asked))):
            print(f"| {inputs} | {name} | {' | '.join(f'{cell:.3g}' if cell else '' for cell in cells)} |", flush=True)


def of_hessian(inputs: int, asked: argparse.Namespace) -> tuple[float, float, float]:
    """The three costs in nanoseconds."""
    values, weight, scale = tensors(inputs, asked.tokens)
    moments, found = seconds(lambda: seen(values, blocks=True), asked.rounds)
    rounds, _ = seconds(lambda: hessian.round_rows(weight, found, scale), asked.rounds)
    return moments * 1e9 / values.numel(), 0.0, rounds * 1e9 / weight.numel()


def of_gptq(inputs: int, asked: argparse.Namespace) -> tuple[float, float, float]:
    """The three costs in nanoseconds."""
    values, weight, scale = tensors(inputs, asked.tokens)
    moments, found = seconds(lambda: seen(values, blocks=False), asked.rounds)
    factors, factored = seconds(lambda: gptq.factor(found.clone(), OPTIONS), asked.rounds)
    rounds, _ = seconds(lambda: gptq.round_rows(weight, factored, Nvfp4Blocks(scale), OPTIONS), asked.rounds)
    return moments * 1e9 / (values.numel() * inputs), factors * 1e9 / inputs**3, rounds * 1e9 / weight.numel()


def tensors(inputs: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, a weight and its global scale."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(ROWS, inputs, generator=random)
    return torch.randn(tokens, inputs, generator=random), weight, nvfp4.scale_of(weight.abs().amax())


def seen(values: torch.Tensor, *, blocks: bool) -> torch.Tensor:
    """The moments of inputs [tokens, inputs]."""
    found = Moments({"input": values.shape[1]}, blocks=blocks)
    found.add("input", values)
    taken = found.take("input")
    assert taken is not None
    return taken


def seconds(run: Callable[[], Result], rounds: int) -> tuple[float, Result]:
    """The least CPU seconds of some runs, and the last result."""
    found = []
    for _ in range(rounds):
        start = time.process_time()
        result = run()
        found.append(time.process_time() - start)
    return min(found), result


if __name__ == "__main__":
    main()
