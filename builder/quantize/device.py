"""In worker processes: checks that PyTorch computes on the device that the stage's key names."""

from __future__ import annotations

from collections.abc import Sequence

from builder.core.errors import UnsupportedError


def check_device(expected: Sequence[str]) -> str:
    """The name of the device that is used. UnsupportedError if GPUs are expected and PyTorch sees none, because a CPU's
    results would be stored under a GPU's key."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    if expected:
        raise UnsupportedError(
            f"The driver lists {expected[0]}, and PyTorch sees no GPU.",
            why=f"PyTorch {torch.__version__} is built for CUDA {torch.version.cuda}; an older driver can't run it.",
            hint="Update the driver, or compute on the CPU: put CUDA_VISIBLE_DEVICES= before the same command",
        )
    return "cpu"
