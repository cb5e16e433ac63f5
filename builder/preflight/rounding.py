"""What an algorithm that rounds weights with the calibration rows needs: of the model, of the rows, memory and time.

Pure. The work is that of quantize/streamed_solve.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from builder.architectures import names
from builder.core.errors import UnsupportedError, UsageError
from builder.formats import algorithms
from builder.formats.algorithms import Algorithm
from builder.preflight.model_facts import ModelFacts
from builder.recipe.schema import Recipe

# Keys of config.json of models that compute one layer with tensors of another, which can't run one at a time
# (model/streamed.py).
SHARED_LAYERS = "num_kv_shared_layers"  # Gemma 3n and 4
ROUNDED_ROWS = 4096  # of a weight at a time (quantize/streamed_solve.py, _ROWS)
# In operations of a forward pass in BF16 that take as long: one term of a moment, and the rounding of one weight. From
# the processor time of both for a weight of 4,096 x 1,024 and 2,048 tokens on 2 cores of a server without AMX.
MOMENT = {"hessian": 24.0, "gptq": 3.3}
PER_WEIGHT = {"hessian": 16_000.0, "gptq": 26_000.0}


def algorithm_of(recipe: Recipe) -> Algorithm:
    """The recipe's algorithm."""
    return algorithms.ALGORITHMS[recipe.quantization.algorithm]


def check(recipe: Recipe, model: ModelFacts, *, measured: str, exported: str) -> None:
    """UnsupportedError for a model whose layers can't be rounded one at a time or whose block scales can't be searched,
    UsageError for rows that hold too few tokens whatever their length.

    measured: why the whole model must be in memory, exported: why ModelOpt must write the weights, or "".
    """
    algorithm = algorithm_of(recipe)
    if algorithm is algorithms.MAX:
        return
    if exported:
        raise UnsupportedError(
            f"--algorithm {algorithm.name} can't be used here: ModelOpt must write this model, and it rounds by max.",
            why=exported,
            hint=f"Use --algorithm {algorithms.MAX.name}",
        )
    if not algorithm.reads_rows:
        return
    shared = model.config.get(SHARED_LAYERS)
    if measured or shared:
        name_layers = " Or name the layers to keep: --keep-fp8 '*.down_proj'" * bool(measured)
        raise UnsupportedError(
            f"--algorithm {algorithm.name} can't be used here: it rounds one decoder layer at a time.",
            why=measured or f"Its last {shared} layers use keys of earlier ones.",
            hint=f"Use --algorithm {algorithms.MSE.name}.{name_layers}",
        )
    rows = recipe.calibration
    most, widest = rows.samples * rows.seq_len, _widest(recipe, model)
    least = algorithm.least_tokens(widest)
    if algorithm is algorithms.GPTQ and widest and most < least:
        raise UsageError(
            f"{most:,} calibration tokens are too few for --algorithm gptq.",
            why=f"The widest layer has {widest:,} inputs and needs {least:,} tokens. With fewer, GPTQ gains nothing.",
            hint="Name more or longer rows: --calib-samples 512 --calib-seq-len 2048. Or use --algorithm hessian",
        )


def _widest(recipe: Recipe, model: ModelFacts) -> int:
    """The most inputs of a layer that sees all tokens."""
    return max((inputs for name, inputs, _ in rounded(recipe, model) if not names.experts_of(name)), default=0)


def memory(recipe: Recipe, model: ModelFacts) -> int:
    """Bytes beside those of calibration: the moments of the widest layer, for GPTQ four such matrices while they are
    factored, and rows of its weight. Other moments of a layer are held together where memory allows it."""
    algorithm = algorithm_of(recipe)
    if not algorithm.reads_rows:
        return 0
    inputs = max((inputs for _, inputs, _ in rounded(recipe, model)), default=0)
    held = algorithm.moments(inputs) * (4 if algorithm is algorithms.GPTQ else 1)
    return held + 4 * 3 * inputs * ROUNDED_ROWS


def operations(recipe: Recipe, model: ModelFacts, tokens: int) -> float:
    """Operations beside those of the passes, in units of what a forward pass in BF16 does in the same time."""
    algorithm = algorithm_of(recipe)
    if not algorithm.reads_rows:
        return 0.0
    layers = list(rounded(recipe, model))
    groups = {(names.same_input(model.architecture, name), inputs) for name, inputs, _ in layers}
    moments = sum(tokens * algorithm.moments(inputs) / 4 for _, inputs in groups)
    return MOMENT[algorithm.name] * moments + PER_WEIGHT[algorithm.name] * sum(
        inputs * outputs for _, inputs, outputs in layers
    )


def rounded(recipe: Recipe, model: ModelFacts) -> Iterator[tuple[str, int, int]]:
    """(module, inputs, outputs) of the linear layers that the algorithm rounds."""
    for name, (_, shape) in model.written.items():
        inside = names.layer_of(model.architecture, name) is not None and model.quantizes(name, shape)
        if inside and algorithms.treats(model.format_of(name)):
            yield name.removesuffix(".weight"), shape[1], shape[0]
