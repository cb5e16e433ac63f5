"""In a child: whether PyTorch computes where the key of the stage says."""

from __future__ import annotations

from collections.abc import Sequence

from builder.core.errors import UnsupportedError


def check_device(expected: Sequence[str]) -> str:
    """The device that is used. UnsupportedError where GPUs are expected and PyTorch sees none: what a CPU calculates
    would be kept under a GPU's key."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    if expected:
        raise UnsupportedError(
            f"The driver lists {expected[0]}, and PyTorch sees no GPU.",
            why=f"PyTorch {torch.__version__} is built for CUDA {torch.version.cuda}; an older driver can't run it.",
            hint="Update the driver, or do it on the CPU: the same command with CUDA_VISIBLE_DEVICES= before it",
        )
    return "cpu"
