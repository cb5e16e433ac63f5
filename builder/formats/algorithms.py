"""How the codes and scales of a weight are chosen, within one number format. Pure facts; quantize/ computes.

Whatever the algorithm, the tensors, their dtypes and NVFP4's global scale stay those of the format, so every server
loads the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from builder.formats.base import NumberFormat
from builder.formats.nvfp4 import BLOCK

# GPTQ fits its corrections to the rows. With fewer tokens than half of a layer's inputs, or than FEWEST_TOKENS, it
# gains nothing over `mse`: bundled model, 256 and 768 inputs, KL to BF16 on prose against `max`: 128 tokens .87, 256
# .83, 512 .78, 2,048 .70, 16,427 .69; `mse` .85. Blocks of 16 inputs need few tokens (64: .85, 16,427: .80), but with
# a single one the scale that suits it leaves more error on others than that of `max`.
TOKENS_OF_INPUTS, FEWEST_TOKENS = 0.5, 256
# Second moments of at most this share of the memory that is available are held at once; a layer that needs more
# (experts, for GPTQ) runs its rows several times.
MOMENTS_SHARE = 0.25
Needs = Literal["weights", "block_hessians", "hessians"]


@dataclass(frozen=True)
class Algorithm:
    """One way to choose them.

    needs: what it reads beside the ranges of activations: nothing but the weights, the second moments of a layer's
        inputs within each block of 16, or those of all its inputs.
    integers: whether it rounds INT8 with a scale for each output too, and not only NVFP4, which has block scales.
    """

    name: str
    title: str
    needs: Needs
    source: str
    integers: bool = False

    @property
    def reads_rows(self) -> bool:
        """Whether it needs calibration rows."""
        return self.needs != "weights"

    def treats(self, one: NumberFormat) -> bool:
        """Whether it has something to choose in a format. Layers in others are left to `max`."""
        blocks = any(tensor.name == "block_scale" for tensor in one.tensors)
        return self is not MAX and one.packs and (blocks or (self.integers and one.weight.content == "integers"))

    def moments(self, inputs: int) -> int:
        """Bytes of the second moments of one input with so many columns, in float32."""
        columns = {"weights": 0, "block_hessians": min(BLOCK, inputs), "hessians": inputs}
        return 4 * inputs * columns[self.needs]

    def least_tokens(self, inputs: int) -> int:
        """The tokens that a layer with so many inputs must see. One that saw fewer is left to `fallback`."""
        enough = math.ceil(max(FEWEST_TOKENS, TOKENS_OF_INPUTS * inputs))
        return {"weights": 0, "block_hessians": BLOCK, "hessians": enough}[self.needs]


MAX = Algorithm(
    name="max",
    title="block scales by the largest magnitude",
    needs="weights",
    source="ModelOpt, NVFP4_DEFAULT_CFG with max calibration (0.37 to 0.47)",
)
MSE = Algorithm(
    name="mse",
    title="block scales searched for the least squared error of the weights",
    needs="weights",
    source="ModelOpt 0.47, quantization/calib/mse.py, NVFP4MSECalibrator",
)
HESSIAN = Algorithm(
    name="hessian",
    title="block scales searched for the least squared error of the layers' outputs, block by block",
    needs="block_hessians",
    source="ModelOpt 0.47, quantization/model_calib.py, local_hessian_calibrate",
)
GPTQ = Algorithm(
    name="gptq",
    title="codes chosen column by column, each rounding error corrected in the columns that follow",
    needs="hessians",
    source="Frantar et al., GPTQ, 2022 (arXiv 2210.17323)",
    integers=True,
)
ALGORITHMS: Mapping[str, Algorithm] = {one.name: one for one in (MAX, MSE, HESSIAN, GPTQ)}


def of_job(job: Mapping[str, Any]) -> Algorithm:
    """From the entry `algorithm` of a worker's job, by default `max`."""
    return ALGORITHMS[job.get("algorithm", MAX.name)]


def in_passes(sizes: Sequence[int], available: float) -> list[list[int]]:
    """The numbers of moments of these sizes in bytes, in parts that are held together, at least one part. Each part
    takes a pass of all rows through the layer. available: bytes of memory."""
    parts, used = [list[int]()], 0
    for number, size in enumerate(sizes):
        if parts[-1] and used + size > MOMENTS_SHARE * available:
            parts.append([])
            used = 0
        parts[-1].append(number)
        used += size
    return parts


def treated(one: NumberFormat) -> tuple[Algorithm, ...]:
    """The algorithms beside `max` that a format takes."""
    return tuple(algorithm for algorithm in ALGORITHMS.values() if algorithm.treats(one))


def fallback(one: NumberFormat) -> Algorithm:
    """What rounds a layer that an algorithm can't: without rows, and as well as the format allows."""
    return MSE if MSE.treats(one) else MAX


def with_few_tokens(one: NumberFormat) -> Algorithm:
    """What to use instead of GPTQ for a format, with rows that are too few for it."""
    return HESSIAN if HESSIAN.treats(one) else MAX
