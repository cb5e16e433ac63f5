"""Measures packing and unpacking against a plain copy: python benchmarks/kernels.py [--mib 64] [--rounds 5]

Every operation on each instruction set that this CPU has and with torch, with one thread and with all, on a random BF16
matrix in memory, in one process. Each measurement alternates with a plain copy of the same bytes by one thread, and the
median of the ratios counts: `time / copy`, and how many times faster than torch with as many threads. `GB/s` counts
BF16 bytes.

Other techniques were measured once for packing NVFP4 (one thread, CPU seconds, because the machine was busy; a CPU with
AVX-512; in brackets, GB/s of BF16). All gave the same bytes.

- C as it is, GCC 12: 4.2 with AVX-512, 2.7 with AVX2, 1.5 with SSE2. It needs numpy alone, 0.1 s.
- numba 0.68: 1.2 from one plain loop over blocks, after 0.25 s of imports and 0.8 s of compiling in every process. A
  writer takes half a second for a small model, and numba's cache on disk would be one more thing to go stale.
- torch.compile, 2.13: 0.03, after 1.2 s of imports and 20 s of compiling, and it needs a C++ compiler where it runs.
- plain torch: 0.08 as in formats/arithmetic, 0.09 with sums of comparisons.
- C, a loop over the 16 weights of a block inside a loop over blocks: 0.7. GCC unrolls it and then vectorizes nothing.
- C, a product with 1 / x corrected by fused multiply-adds in place of the division: 3.6, when the division took 3.8.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from builder.formats.kernels import native, packing

INPUTS = 4096
SCALE = 2e-3


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=64, help="size of the matrix in BF16 (default: 64)")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    rows = asked.mib * 2**20 // 2 // INPUTS
    random = np.random.default_rng(0).standard_normal((rows, INPUTS), np.float32)
    weights = (random.view(np.uint32) >> 16).astype(np.uint16)
    del random
    threads = sorted({1, len(os.sched_getaffinity(0))})
    print(f"{'operation':<14} {'path':<9} {'threads':>7} {'GB/s':>7} {'time / copy':>12} {'torch / this':>13}")
    for name, run in operations(weights).items():
        for count in threads:
            slow = 0.0
            for path in ["torch", *native.paths()]:
                os.environ[packing.VARIABLE] = path
                torch.set_num_threads(count)
                ratio, seconds = measured(lambda run=run, count=count: run(count), weights, asked.rounds)
                slow = ratio if path == "torch" else slow
                speed = weights.nbytes / seconds / 1e9
                print(f"{name:<14} {path:<9} {count:>7} {speed:>7.2f} {ratio:>12.2f} {slow / ratio:>13.1f}")


def operations(weights: np.ndarray) -> dict[str, Callable[[int], object]]:
    """Each writes to arrays that exist already, with a number of threads."""
    rows, inputs = weights.shape
    codes, scales = np.empty((rows, inputs // 2), np.uint8), np.empty((rows, inputs // 16), np.uint8)
    eight, back = np.empty((rows, inputs), np.uint8), np.empty_like(weights)
    packing.pack_nvfp4(weights, "BF16", SCALE, out=(codes, scales))
    packing.pack_fp8(weights, "BF16", SCALE, out=eight)
    return {
        "largest": lambda n: packing.largest(weights, "BF16", threads=n),
        "pack NVFP4": lambda n: packing.pack_nvfp4(weights, "BF16", SCALE, threads=n, out=(codes, scales)),
        "search NVFP4": lambda n: packing.search_nvfp4(weights, "BF16", SCALE, threads=n),
        "pack FP8": lambda n: packing.pack_fp8(weights, "BF16", SCALE, threads=n, out=eight),
        "unpack NVFP4": lambda n: packing.unpack_nvfp4(codes, scales, SCALE, "BF16", threads=n, out=back),
        "unpack FP8": lambda n: packing.unpack_fp8(eight, SCALE, "BF16", threads=n, out=back),
    }


def measured(run: Callable[[], object], source: np.ndarray, rounds: int) -> tuple[float, float]:
    """The median of (time / time of a copy), and the shortest time in seconds."""
    target = np.empty_like(source)
    pairs = []
    for _ in range(rounds + 1):  # the first touches the memory
        start = time.perf_counter()
        np.copyto(target, source)
        middle = time.perf_counter()
        run()
        pairs.append((middle - start, time.perf_counter() - middle))
    return statistics.median(ours / copy for copy, ours in pairs[1:]), min(ours for _, ours in pairs[1:])


if __name__ == "__main__":
    main()
