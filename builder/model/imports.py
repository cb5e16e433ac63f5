"""Keeps imports out of workers that transformers and ModelOpt do while they are imported, and that no worker uses.

Measured together: 1.8 of 12 CPU seconds of a worker, and 780 of 5,400 modules.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def only_needed() -> Iterator[None]:
    """For blocks that import transformers or ModelOpt.

    scikit-learn looks absent, unless it is loaded (generation/candidate_generator.py wants it for assisted generation).
    torch.compile compiles when the function is called: decorating one imports the compiler, and ModelOpt decorates
    functions of AutoQuantize and of its FP8 GEMM (quantization/algorithms.py, backends/fp8_per_tensor_gemm.py, 0.47).
    YAML is read by libyaml where PyYAML has it: ModelOpt 0.47 reads 200 files of configurations when it is imported.
    """
    import torch
    import yaml

    absent = [name for name in ("sklearn",) if name not in sys.modules]
    real = torch.compile
    sys.modules |= dict.fromkeys(absent)  # type: ignore[arg-type]  # None: find_spec and import find nothing
    torch.compile = _when_called(real)
    loader = yaml.SafeLoader
    yaml.SafeLoader = getattr(yaml, "CSafeLoader", loader)  # type: ignore[misc]
    try:
        yield
    finally:
        torch.compile, yaml.SafeLoader = real, loader  # type: ignore[misc]
        for name in absent:
            sys.modules.pop(name, None)


def _when_called(real: Any) -> Any:
    """torch.compile, as a function or a decorator with options, that does its work at the first call of the result."""

    def compile_later(model: Callable[..., Any] | None = None, **options: Any) -> Any:
        if model is None:
            return lambda decorated: compile_later(decorated, **options)
        made: list[Any] = []

        def call(*args: Any, **named: Any) -> Any:
            if not made:
                made.append(real(model, **options))
            return made[0](*args, **named)

        return call

    return compile_later
