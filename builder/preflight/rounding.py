"""What an algorithm that rounds weights with the calibration rows needs: of the model, of the rows, memory and time.

Pure. The work is that of quantize/streamed_solve.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from builder.architectures import catalog, names
from builder.architectures.attention import shared_kv_layers
from builder.core.errors import UnsupportedError, UsageError
from builder.formats import algorithms
from builder.formats.algorithms import Algorithm
from builder.model.config_values import routed_experts
from builder.preflight.model_facts import ModelFacts
from builder.recipe.schema import Recipe

ROUNDED_ROWS = 4096  # of a weight at a time (quantize/streamed_solve.py, _ROWS)
# Nanoseconds of a core: benchmarks/rounding.py for 1,024 to 4,096 inputs, processor time of one thread of an AMD EPYC
# with AVX-512, which other work shared. MOMENT_NS for each token and input (`hessian`) or token and pair of inputs
# (`gptq`), FACTOR_NS for each cubed input, WEIGHT_NS for each weight, CORRECTION_NS for each weight times its inputs.
MOMENT_NS = {"hessian": 1.5, "gptq": 0.017}
FACTOR_NS = 0.035
WEIGHT_NS = {"hessian": 130.0, "gptq": 110.0}
CORRECTION_NS = 0.016


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
    shared = len(shared_kv_layers(catalog.with_common_keys(model.config)))  # can't run one at a time
    if measured or shared:
        name_layers = " Or name the layers to keep: --keep-fp8 '*.down_proj'" * bool(measured)
        raise UnsupportedError(
            f"--algorithm {algorithm.name} can't be used here: it rounds one decoder layer at a time.",
            why=measured or f"Its last {shared} layers use keys of earlier ones.",
            hint=f"Use --algorithm {algorithms.fallback(recipe.quantization.number_format).name}.{name_layers}",
        )
    rows = recipe.calibration
    most, widest = rows.samples * rows.seq_len, _widest(recipe, model)
    least = algorithm.least_tokens(widest)
    if algorithm is algorithms.GPTQ and widest and most < least:
        raise UsageError(
            f"{most:,} calibration tokens are too few for --algorithm gptq.",
            why=f"The widest layer has {widest:,} inputs and needs {least:,} tokens. With fewer, GPTQ gains nothing.",
            hint="Name more or longer rows: --calib-samples 512 --calib-seq-len 2048. Or use "
            f"--algorithm {algorithms.with_few_tokens(recipe.quantization.number_format).name}",
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


def seconds(recipe: Recipe, model: ModelFacts, tokens: int) -> float:
    """Seconds of one core beside those of the passes: moments of each input that layers share, a factor of each for
    GPTQ, and the rounding. tokens: of all calibration rows; an expert sees its share of them."""
    algorithm = algorithm_of(recipe)
    if not algorithm.reads_rows:
        return 0.0
    layers, name, corrects = list(rounded(recipe, model)), algorithm.name, algorithm is algorithms.GPTQ
    shared = {(names.same_input(model.architecture, module), inputs) for module, inputs, _ in layers}
    took = 0.0
    for module, inputs in shared:
        seen = tokens * (expert_share(model) if names.experts_of(module) else 1.0)
        took += MOMENT_NS[name] * seen * inputs * (inputs if corrects else 1) + FACTOR_NS * inputs**3 * corrects
    for _, inputs, outputs in layers:
        took += inputs * outputs * (WEIGHT_NS[name] + CORRECTION_NS * inputs * corrects)
    return took / 1e9


def passes(recipe: Recipe, model: ModelFacts, available: int) -> dict[int, int]:
    """{decoder layer: how often all rows run through it}, because only so many moments fit into memory at once.
    available: bytes of memory."""
    algorithm, inputs_of = algorithm_of(recipe), dict[int, dict[str, int]]()
    for module, inputs, _ in rounded(recipe, model) if algorithm.reads_rows else ():
        layer = names.layer_of(model.architecture, f"{module}.weight")
        if layer is not None:
            inputs_of.setdefault(layer, {})[names.same_input(model.architecture, module)] = inputs
    return {
        layer: len(algorithms.in_passes([algorithm.moments(inputs) for inputs in found.values()], available))
        for layer, found in inputs_of.items()
    }


def expert_share(model: ModelFacts) -> float:
    """The share of a layer's experts that a token is routed to; 1 without experts."""
    experts = routed_experts(model.config) or 1
    return min(1.0, int(model.config.get("num_experts_per_tok") or experts) / experts)


def rounded(recipe: Recipe, model: ModelFacts) -> Iterator[tuple[str, int, int]]:
    """(module, inputs, outputs) of the linear layers that the algorithm rounds."""
    for name, (_, shape) in model.written.items():
        inside = names.layer_of(model.architecture, name) is not None and model.quantizes(name, shape)
        if inside and algorithm_of(recipe).treats(model.format_of(name)):
            yield name.removesuffix(".weight"), shape[1], shape[0]
