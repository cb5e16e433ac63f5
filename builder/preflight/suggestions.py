"""If a build does not fit: the smallest change that would, and the error that suggests it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from builder.checkpoint import sharding
from builder.core.errors import UnsupportedError
from builder.core.output import size
from builder.formats import kv_cache
from builder.formats.base import NumberFormat
from builder.formats.kv_cache import KvCacheFormat
from builder.machine.gpus import GpuProfile
from builder.preflight import adapter_memory
from builder.preflight import memory as preflight_memory
from builder.preflight.memory import Machine, Memory, Serving
from builder.preflight.model_facts import ModelFacts
from builder.recipe import card_formats
from builder.recipe.schema import Calibration

SHORTEST = 256  # tokens: a shorter max_seq_len is not useful
MOST_GPUS = 16  # on one machine


@dataclass(frozen=True)
class Change:
    """Settings that fit, the model in its format with them, and the command-line flags for them."""

    model: ModelFacts
    serving: Serving
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Smaller:
    """Formats of the KV cache and of the weights that the card runs, the most accurate first.

    cache_of: the KV cache that a recipe gets with such a format of the weights, by its name.
    """

    caches: Sequence[KvCacheFormat] = (kv_cache.FP8,)
    formats: Sequence[NumberFormat] = ()
    cache_of: Mapping[str, KvCacheFormat] = field(default_factory=dict)


def smallest(model: ModelFacts, asked: Serving, available: int, runs: Smaller = Smaller()) -> Change | None:
    """The first change that fits, in this order: fewer tokens in an iteration, a smaller batch, shorter sequences, a
    smaller KV cache, a smaller format of the weights, more GPUs. Each is reduced as little as possible. None if no
    change fits.
    """
    for changed_model, changed in _candidates(model, asked, available, runs):
        if preflight_memory.needed(changed_model, changed) <= available:
            flags = [f"--format {changed_model.number_format.name}"] if changed_model is not model else []
            return Change(changed_model, changed, (*flags, *_flags(asked, changed)))
    return None


def _candidates(
    model: ModelFacts, asked: Serving, available: int, runs: Smaller
) -> Iterator[tuple[ModelFacts, Serving]]:
    on_gpu = asked.facts.needs_gpu
    caches = [cache for cache in runs.caches if cache.bits < asked.cache.bits] if on_gpu else []
    with_caches = [asked, *(replace(asked, cache=cache) for cache in caches)]
    for serving in with_caches:
        if serving is not asked:
            yield model, serving
        yield from ((model, one) for one in _smaller(model, serving, available))
    for one in runs.formats if on_gpu else ():
        less = replace(model, number_format=one)
        if one.bits < model.number_format.bits and _divides(less, asked.tp, asked.pp):
            serving = replace(asked, cache=runs.cache_of.get(one.name, asked.cache))
            yield less, serving
            yield from ((less, smaller) for smaller in _smaller(less, serving, available))
    if on_gpu:
        parallel = _more_gpus(model, asked)
        yield from ((model, more) for more in parallel)
        for more in parallel:
            cached = replace(more, cache=caches[0] if caches else asked.cache)
            yield from ((model, serving) for serving in _smaller(model, cached, available))


def _more_gpus(model: ModelFacts, asked: Serving) -> list[Serving]:
    """Fewest GPUs first; tensor parallelism before pipeline parallelism, which does not reduce latency."""
    sizes = [
        (tp, pp)
        for tp in range(asked.tp, MOST_GPUS + 1)
        for pp in range(asked.pp, MOST_GPUS // tp + 1)
        if (tp, pp) != (asked.tp, asked.pp) and _divides(model, tp, pp)
    ]
    return [replace(asked, tp=tp, pp=pp) for tp, pp in sorted(sizes, key=lambda size: (size[0] * size[1], size[1]))]


def _smaller(model: ModelFacts, asked: Serving, available: int) -> Iterator[Serving]:
    """Reduces one size at a time, as little as possible; then the batch and the length together."""

    held = preflight_memory.weights(model, asked)

    def best(make: Callable[[int], Serving], low: int, high: int) -> Serving:
        return make(
            preflight_memory.largest(
                lambda n: preflight_memory.needed(model, make(n), held=held) <= available, low, high
            )
        )

    least_tokens = min(asked.max_input_len, asked.max_num_tokens)  # so that a prompt still fits in one iteration
    yield best(lambda n: replace(asked, max_num_tokens=n), least_tokens, asked.max_num_tokens)
    yield best(lambda n: replace(asked, max_batch_size=n), 1, asked.max_batch_size)
    if asked.max_seq_len > SHORTEST:
        yield best(lambda n: _shorter(asked, n), SHORTEST, asked.max_seq_len)
        yield best(lambda n: _shorter(replace(asked, max_batch_size=1), n), SHORTEST, asked.max_seq_len)


def _shorter(asked: Serving, length: int) -> Serving:
    """Shorter sequences: the prompt may be at most three quarters of max_seq_len."""
    prompt = min(asked.max_input_len, length - length // 4)
    return replace(asked, max_seq_len=length, max_input_len=prompt)


def _divides(model: ModelFacts, tp: int, pp: int) -> bool:
    try:
        sharding.check(model.config, tp, pp, number_format=model.number_format, gemm=True)
    except UnsupportedError:
        return False
    return True


def _flags(asked: Serving, changed: Serving) -> tuple[str, ...]:
    names = ("max_num_tokens", "max_batch_size", "max_input_len", "max_seq_len", "tp", "pp")
    flags = [
        f"--{name.replace('_', '-')} {getattr(changed, name)}"
        for name in names
        if getattr(changed, name) != getattr(asked, name)
    ]
    return (*flags, *([f"--kv-cache-dtype {changed.cache.name}"] if changed.cache != asked.cache else []))


def refusal(
    model: ModelFacts, asked: Serving, found: Memory, runs: Smaller = Smaller()
) -> tuple[UnsupportedError, Change | None]:
    """The error for a model that does not fit on a card, and the change that would make it fit, if there is one."""
    change = smallest(model, asked, found.memory, runs)
    where = "each of the GPUs" if asked.tp * asked.pp > 1 else "it"
    needs = found.needed - found.weights - found.workspace
    hint = f"The smallest change that fits: {' '.join(change.flags)}" if change else "Use a smaller model."
    error = UnsupportedError(
        f"It does not fit on {found.card}: {size(found.needed)} are needed, {size(found.lacking)} more than "
        f"{where} has ({size(found.memory)}).",
        why=f"weights {size(found.weights)} + workspace {size(found.workspace)} + KV cache {size(needs)} for one "
        f"sequence of {asked.max_seq_len} tokens (kv_cache_free_gpu_mem_fraction counted).",
        hint=hint,
    )
    return error, change


def disk_refusal(disk: Mapping[str, int], host: Machine, missing: int) -> UnsupportedError | None:
    """The error if `missing` bytes of artifacts do not fit on the disk, else None. disk: what each stage or model keeps
    there."""
    if missing <= host.disk:
        return None
    parts = ", ".join(f"{name} {size(n)}" for name, n in disk.items() if n and name != "snapshot")
    return UnsupportedError(
        f"The disk of the output directory has {size(host.disk)} free, and the artifacts need {size(missing)}.",
        why=f"Each keeps: {parts}.",
        hint=f"Free {size(missing - host.disk)} (`builder clean` removes what no repository needs), or choose another "
        "--output.",
    )


def calibration_refusal(
    model: ModelFacts, rows: Calibration, available: int, *, layers: bool = False, where: str = "this machine"
) -> UnsupportedError | None:
    """The error if calibrating needs more memory than is available, else None. layers: one decoder layer at a time.
    where: what has that memory."""
    needs = preflight_memory.streamed_memory if layers else preflight_memory.calibration_memory
    needed = needs(model, rows.batch_size * rows.seq_len)
    if needed <= available:
        return None
    batch = preflight_memory.largest(lambda n: needs(model, n * rows.seq_len) <= available, 0, rows.batch_size)
    length = preflight_memory.largest(lambda n: needs(model, n) <= available, 0, rows.seq_len)
    elsewhere = f"Calibrate on a machine with {size(needed)} of memory, or with GPUs"
    hint = f"{elsewhere}; or use a smaller model."
    if batch:
        hint = f"Use smaller batches: --set calibration.batch_size={batch}. Or: {elsewhere}."
    elif length >= SHORTEST:
        hint = f"Use shorter rows: --calib-seq-len {length} --set calibration.batch_size=1. Or: {elsewhere}."
    return UnsupportedError(
        f"Calibrating takes about {size(needed)} of memory, and {where} has {size(available)} for it.",
        why=f"{'A layer and a half' if layers else 'The weights'} in their own type, activations of "
        f"{rows.batch_size} x {rows.seq_len} tokens: an estimate.",
        hint=hint,
    )


@dataclass(frozen=True)
class MemoryCheck:
    """The memory estimate of each card, the card that counts, and if it is too small the refusal and the change that
    fits."""

    cards: tuple[Memory, ...]
    card: str
    refusal: UnsupportedError | None
    change: Change | None


def judge(model: ModelFacts, asked: Serving, gpu: GpuProfile, host: Machine, here: Sequence[str] = ()) -> MemoryCheck:
    """Checks the memory of the card that decides (memory.cards). Nothing is rejected if no card's memory is known."""
    known, name = preflight_memory.cards(asked, gpu, host, here)
    found = tuple(preflight_memory.memory(model, asked, card, available) for card, available in known)
    about = next((m for m in found if m.card == name), None)
    if about is not None and about.fits:
        return MemoryCheck(found, name, adapter_memory.refusal(asked, about), None)
    if about is None:
        return MemoryCheck(found, name, None, None)
    return MemoryCheck(found, name, *refusal(model, asked, about, smaller(asked, gpu)))


def smaller(asked: Serving, gpu: GpuProfile) -> Smaller:
    """What the card runs of the formats that could replace the recipe's; nothing for a model that is quantized."""
    if asked.fixed_formats:
        return Smaller(caches=())
    formats = card_formats.running(gpu, asked.target, asked.tensorrt_llm)
    return Smaller(
        [cache for cache in card_formats.running_caches(gpu, asked.target, asked.tensorrt_llm) if cache.quantized],
        sorted(formats, key=lambda one: -one.bits),
        {one.name: kv_cache.get(card_formats.default_cache(gpu, asked.target, one.name)[0]) for one in formats},
    )
