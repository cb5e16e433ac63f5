"""Whether a model fits, in bytes, from config.json and safetensors headers alone. Pure, but for `machine`.

Weights and KV cache are exact. Workspace is the attention operator's own formula plus the largest layer's activations,
which is an estimate: no engine was measured here. CUDA's context and the driver's share are not counted.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from builder.architectures import names, written
from builder.architectures.attention import attention_layers, cached_values, head_size, kv_heads
from builder.checkpoint.sharding import Parallel
from builder.core.safetensors_io import byte_size
from builder.formats import kv_cache
from builder.formats.base import NumberFormat
from builder.formats.kv_cache import KvCacheFormat
from builder.llmapi.arguments import Argument
from builder.machine.cards import Card, find
from builder.machine.gpus import GpuProfile
from builder.machine.host_memory import host_memory
from builder.preflight.model_facts import ModelFacts
from builder.preflight.rank_shapes import rank_shape, stage_layer
from builder.recipe.schema import Recipe
from builder.recipe.target_facts import TargetFacts, target_facts
from builder.trtllm.rules import Flag

TOKENS_PER_BLOCK = 32  # of the paged KV cache: trtllm-build's default (plugin.py@c20322ff, tokens_per_block)
CUBLAS_WORKSPACE = 33_554_432  # cpp/tensorrt_llm/common: CUBLAS_WORKSPACE_SIZE, the first part of every workspace


@dataclass(frozen=True)
class Serving:
    """What determines memory use at run time. All sizes are in tokens or sequences.

    fixed_formats: the model is quantized already, so no other format can be suggested.
    adapter: bytes of the largest LoRA adapter; adapter_fraction: the share for adapters of the memory beside weights
    and workspace, before the KV cache.
    fraction: kv_cache_free_gpu_mem_fraction. most_kv_tokens: the recipe's own limit of the KV cache (llmapi), or None.
    """

    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_num_tokens: int
    cache: KvCacheFormat = kv_cache.FP8
    context_fmha: bool = True
    paged_fmha: bool = True
    tp: int = 1
    pp: int = 1
    fraction: Fraction = Fraction(9, 10)
    target: str = "engine"
    tensorrt_llm: str = "1.2.1"
    fixed_formats: bool = False
    most_kv_tokens: int | None = None
    adapter: int = 0
    adapter_fraction: Fraction = Fraction(0)

    @property
    def facts(self) -> TargetFacts:
        """The properties of the target."""
        return target_facts(self.target)


@dataclass(frozen=True)
class Sizes:
    """Sizes in bytes, except `parameters`, which is a count.

    download: the model's tensors. unified, checkpoint: the Hugging Face and the TensorRT-LLM layout. ranks: the file of
    each rank. disk: bytes kept in the output directory by stage. kv_bytes_per_token: of one rank.
    """

    parameters: int
    download: int
    unified: int
    checkpoint: int
    ranks: tuple[int, ...]
    disk: Mapping[str, int]
    artifacts: int
    calibration_memory: int
    kv_bytes_per_token: int

    def with_disk(self, stage: str, nbytes: int) -> Sizes:
        """With the bytes of another stage."""
        return replace(self, disk={**self.disk, stage: nbytes}, artifacts=self.artifacts + nbytes)

    def transformed(self, source: Sizes) -> Sizes:
        """These sizes are of a transformed model, which is kept; the other ones of the model that it is made from."""
        disk = {**self.disk, "snapshot": source.disk["snapshot"]}
        made = replace(self, parameters=source.parameters, download=source.download, disk=disk)
        return made.with_disk("transform", self.download)


@dataclass(frozen=True)
class Memory:
    """The memory estimate for one card (or this machine, for the reference executor), in bytes of the largest rank.

    sequence: the KV cache of one sequence of max_seq_len. needed: weights, workspace and a cache that holds it.
    lacking: how much the card is short of that. sequences: how many of max_seq_len the KV cache holds. largest_batch:
    the largest max_batch_size that fits.
    """

    card: str
    memory: int
    weights: int
    workspace: int
    kv_cache: int
    kv_tokens: int
    sequence: int
    sequences: int
    largest_batch: int
    needed: int
    lacking: int

    @property
    def fits(self) -> bool:
        """Whether at least one sequence of full length fits."""
        return self.lacking == 0


@dataclass(frozen=True)
class Machine:
    """This machine, in bytes: free disk at the output directory, total and available host memory."""

    disk: int
    memory: int
    available: int


def serving(recipe: Recipe, flags: Sequence[Flag] | Sequence[Argument]) -> Serving:
    """From the resolved flags or arguments, which already follow TensorRT-LLM's rules."""
    values: dict[str, Any] = {flag.name: flag.value for flag in flags}
    return Serving(
        max_batch_size=int(values["max_batch_size"]),
        max_input_len=int(values["max_input_len"]),
        max_seq_len=int(values["max_seq_len"]),
        max_num_tokens=int(values["max_num_tokens"]),
        cache=recipe.quantization.cache_format,
        context_fmha=values.get("context_fmha", "enable") == "enable",
        paged_fmha=values.get("use_paged_context_fmha", "enable") == "enable",
        tp=recipe.engine.tp,
        pp=recipe.engine.pp,
        fraction=Fraction(str(recipe.repository.kv_cache_free_gpu_mem_fraction)),
        target=recipe.target,
        tensorrt_llm=recipe.engine.tensorrt_llm,
        most_kv_tokens=values.get("kv_cache_config.max_tokens"),
    )


def sizes(model: ModelFacts, asked: Serving, *, calibration_tokens: int = 2048, local: bool = False) -> Sizes:
    """The bytes to download, to keep on disk, and to hold in memory while calibrating.

    calibration_tokens: tokens of one batch. local: the model is a directory, which is not copied.
    """
    unified = _unified(model, asked.cache)
    layout = asked.facts.has_engine or model.architecture.engine is not None  # llmapi needs none of TensorRT-LLM's own
    served = not model.compressed_only
    layout = layout and served
    whole = sum(rank_bytes(model, replace(asked, tp=1, pp=1, target="engine"))) if layout else 0
    ranks = rank_bytes(model, asked)
    split = len(ranks) > 1 and asked.facts.has_engine
    download = sum(byte_size(dtype, shape) for dtype, shape in model.tensors.values())
    disk = {
        "snapshot": 0 if local else download,
        "checkpoint": unified + whole,
        "ranks": sum(ranks) if split and served else 0,
        # The reference engine is hard links.
        "engine": sum(ranks) if asked.facts.builds_tensorrt and served else 0,
    }
    return Sizes(
        parameters=sum(math.prod(shape) for _, shape in model.tensors.values()),
        download=download,
        unified=unified,
        checkpoint=whole,
        ranks=tuple(ranks),
        disk=disk,
        artifacts=sum(disk.values()) - disk["snapshot"],
        calibration_memory=calibration_memory(model, calibration_tokens),
        kv_bytes_per_token=kv_bytes_per_token(model.config, asked),
    )


def _unified(model: ModelFacts, cache: KvCacheFormat) -> int:
    """ModelOpt's Hugging Face layout: each projection is a layer with all tensors of its format."""
    total = cache.scale_bytes(unified=True) * attention_layers(model.config)
    for name, (dtype, shape) in model.written.items():
        if model.quantizes(name, shape):
            number_format = model.format_of(name)
            role = names.role(model.architecture, name.removesuffix(".weight"))
            total += number_format.own_bytes(shape) + number_format.shared_bytes(shape, role, unified=True)
        elif sizes := written.stacked(model.architecture, name, shape):
            total += _stacked(model.number_format, sizes)
        else:
            total += byte_size(dtype, shape)
    return total


def _stacked(number_format: NumberFormat, sizes: tuple[int, int, int]) -> int:
    """Bytes of (experts, outputs, inputs) that are stacked in one parameter: they have one scale for all of them."""
    experts, outputs, inputs = sizes
    return experts * number_format.own_bytes((outputs, inputs)) + number_format.shared_bytes((outputs, inputs))


def rank_bytes(model: ModelFacts, asked: Serving) -> list[int]:
    """Tensor bytes of each rank's file in the TensorRT-LLM layout (checkpoint/sharding.py). An engine is as large.

    q, k and v are one layer with one pair of scalars; each layer has three KV scales. Tied embeddings are held twice,
    except by the LLM API where one rank has both ends of the model: its lm_head is the embedding's own tensor
    (_torch/models/modeling_utils.py, DecoderModelForCausalLM).
    """
    parallel, layers = Parallel(asked.tp, asked.pp), _layers(model.config)
    spans = [parallel.layers(stage, layers) for stage in range(asked.pp)]
    stage_of = {layer: stage for stage, span in enumerate(spans) for layer in span}
    stages = [asked.cache.scale_bytes(unified=False) * len(span) for span in spans]
    tensors = dict(model.written)
    shared = not asked.facts.has_engine and asked.pp == 1
    if model.config.get("tie_word_embeddings") and not shared:
        tensors |= {model.head: model.embedding} if model.embedding else {}
    for name, (dtype, shape) in tensors.items():
        stage = stage_of.get(stage_layer(model.architecture, name), asked.pp - 1)
        part = rank_shape(name, shape, model, asked.tp)
        if sizes := written.stacked(model.architecture, name, shape):
            stages[stage] += _stacked(model.number_format, sizes) // asked.tp
        elif model.quantizes(name, shape):
            number_format = model.format_of(name)
            role = names.role(model.architecture, name.removesuffix(".weight"))
            fused = role in ("k", "v")
            stages[stage] += number_format.own_bytes(part) + (0 if fused else number_format.shared_bytes(part, role))
        else:
            stages[stage] += byte_size(dtype, part)
    return [n for n in stages for _ in range(asked.tp)]


def price(model: ModelFacts, asked: Serving, number_format: NumberFormat) -> int:
    """Bytes that the single layers in a format add to the TensorRT-LLM layout, summed over all ranks."""
    without = {name: modules for name, modules in model.layers.items() if name != number_format.name}
    return sum(rank_bytes(model, asked)) - sum(rank_bytes(replace(model, layers=without), asked))


def calibration_memory(model: ModelFacts, tokens: int) -> int:
    """Bytes while calibrating `tokens` tokens at a time, on the GPUs if there are any, else in host memory.

    The sum of the weights in 16 bits, the largest quantized tensor in float32 (while it is scaled and packed), and the
    largest activations of a forward pass; there are no gradients (inference_mode). An estimate: ModelOpt was measured
    on small models only.
    """
    weights = sum(byte_size(dtype, shape) for dtype, shape in model.written.values())
    largest = max((math.prod(s) for n, (_, s) in model.written.items() if model.quantizes(n, s)), default=0)
    return weights + 4 * largest + tokens * activation_width(model.config, 1) * 2


def streamed_memory(model: ModelFacts, tokens: int) -> int:
    """Bytes while calibrating one decoder layer at a time: one and a half times the largest layer (the next one is read
    ahead), what lies before the first, and the activations of `tokens` tokens.

    The hidden states of all rows are not counted: they are kept in files.
    """
    layers: dict[int | None, int] = {}
    for name, (dtype, shape) in model.written.items():
        layer = names.layer_of(model.architecture, name)
        if layer is not None or not names.is_head(model.architecture, name.removesuffix(".weight")):
            layers[layer] = layers.get(layer, 0) + byte_size(dtype, shape)
    outside = layers.pop(None, 0)
    return outside + 3 * max(layers.values(), default=0) // 2 + tokens * activation_width(model.config, 1) * 2


def activation_width(config: Mapping[str, Any], tp: int) -> int:
    """Activation values that exist at once for one token: residual, normalized input, and the larger of two sets.

    Attention: q, k, v and the output of all heads. MLP: gate, up and their product, for each expert of the token.
    """
    heads, size = int(config["num_attention_heads"]), head_size(config)
    attention = (2 * heads // tp + 2 * max(kv_heads(config) // tp, 1)) * size
    mlp = 3 * int(config.get("intermediate_size") or 0) // tp
    if config.get("moe_intermediate_size"):
        each = config["moe_intermediate_size"]  # Hunyuan: one for each layer
        width = max(each) if isinstance(each, list) else int(each)
        mlp = 3 * width * int(config.get("num_experts_per_tok") or 1) // tp
    return 2 * int(config["hidden_size"]) + max(attention, mlp)


def kv_bytes_per_token(config: Mapping[str, Any], asked: Serving) -> int:
    """Bytes of keys and values for one token, on the rank with the most layers.

    Qwen3-8B in FP8: 36 x 2 x 8 x 128 = 72 KiB. KV heads are repeated if there are fewer than ranks.
    """
    if asked.facts.float32:  # the executor computes and caches in float32 (reference/model.py, `load`)
        return 4 * cached_values(config)
    layers = _layers(config)
    share = math.ceil(cached_values(config, asked.tp) * math.ceil(layers / asked.pp) / layers)
    return asked.cache.nbytes(share)


def workspace(config: Mapping[str, Any], asked: Serving) -> int:
    """Bytes for activations of max_num_tokens, logits in float32, and the attention operator's workspace."""
    width, one_by_one = activation_width(config, asked.tp), asked.facts.float32
    tokens = min(asked.max_num_tokens, asked.max_batch_size * asked.max_seq_len)
    logits = 4 * asked.max_batch_size * int(config.get("vocab_size") or 0)
    if one_by_one:  # one sequence after the other, in float32, with the scores of all heads
        return tokens * width * 4 + logits + 4 * int(config["num_attention_heads"]) * asked.max_input_len**2
    return tokens * width * 2 + logits + attention_workspace(config, asked, tokens)


def attention_workspace(config: Mapping[str, Any], asked: Serving, tokens: int) -> int:
    """Bytes as in attentionOp.cpp@00dbe288 (1.2), getWorkspaceSizeForContext.

    B = max_batch_size, L = max_input_len, T = tokens in an iteration.

    Without context FMHA (all but the last two in the model's 16-bit type): q_buf_2 B x L x q width, k and v
    B x L x kv width each, qk_buf and qk_buf_float (float32) B x heads x L x L, the mask T x L, qkv_buf_2 T x q width,
    two padding offsets 4 x T. With it: q once more (T x q width) if paged, else the packed FP8 q, k and v. Both:
    8 x T for the tokens' places. B is the plugin's max_num_seq (gptAttentionPlugin.cpp, getWorkspaceSize).
    """
    heads, size = int(config["num_attention_heads"]) // asked.tp, head_size(config)
    q, kv = heads * size, max(kv_heads(config) // asked.tp, 1) * size
    batch, length = asked.max_batch_size, asked.max_input_len
    common = CUBLAS_WORKSPACE + 8 * tokens
    if asked.context_fmha:
        paged = tokens * q * (1 if asked.cache.fp8_attention else 2)
        return common + (paged if asked.paged_fmha else tokens * (q + 2 * kv))
    quadratic = 6 * batch * heads * length**2
    linear = 2 * batch * length * (q + 2 * kv) + 2 * tokens * (length + q) + 8 * tokens
    return common + quadratic + linear


def weights(model: ModelFacts, asked: Serving) -> int:
    """Bytes of weights on the largest rank. The reference executor unpacks all weights to float32."""
    if not asked.facts.float32:
        return max(rank_bytes(model, asked))
    tied = model.config.get("tie_word_embeddings") and model.head not in model.tensors and model.embedding
    embedding = math.prod(model.embedding[1]) if tied and model.embedding else 0
    return 4 * (sum(math.prod(shape) for _, shape in model.tensors.values()) + embedding)


def needed(model: ModelFacts, asked: Serving, *, held: int | None = None) -> int:
    """The least memory, in bytes: weights, workspace, and KV cache for one sequence of max_seq_len.

    The KV cache gets only `fraction` of what is left. held: the weights' bytes, if known.
    """
    held = weights(model, asked) if held is None else held
    sequence = _blocks(asked.max_seq_len) * kv_bytes_per_token(model.config, asked)
    return held + workspace(model.config, asked) + math.ceil(sequence / _fraction(asked))


def memory(model: ModelFacts, asked: Serving, card: str, available: int) -> Memory:
    """The estimate for a card of `available` bytes. The KV cache gets `fraction` of what is left."""
    held, work = weights(model, asked), workspace(model.config, asked)
    per_token = kv_bytes_per_token(model.config, asked)
    pool = max(0, math.floor((available - held - work) * _fraction(asked)))
    pool = pool if asked.most_kv_tokens is None else min(pool, asked.most_kv_tokens * per_token)
    tokens = pool // (per_token * TOKENS_PER_BLOCK) * TOKENS_PER_BLOCK
    least = needed(model, asked, held=held)
    return Memory(
        card=card,
        memory=available,
        weights=held,
        workspace=work,
        kv_cache=tokens * per_token,
        kv_tokens=tokens,
        sequence=_blocks(asked.max_seq_len) * per_token,
        sequences=tokens // _blocks(asked.max_seq_len),
        largest_batch=largest_batch(model, asked, available),
        needed=least,
        lacking=max(0, least - available),
    )


def largest_batch(model: ModelFacts, asked: Serving, available: int) -> int:
    """The largest max_batch_size whose workspace fits with the KV cache of as many sequences of max_seq_len."""
    held = weights(model, asked)
    sequence = _blocks(asked.max_seq_len) * kv_bytes_per_token(model.config, asked)

    def fits(batch: int) -> bool:
        work = workspace(model.config, replace(asked, max_batch_size=batch))
        return held + work + math.ceil(batch * sequence / _fraction(asked)) <= available

    most = max(0, available - held) // sequence
    if asked.most_kv_tokens is not None:
        most = min(most, asked.most_kv_tokens // _blocks(asked.max_seq_len))
    return largest(fits, 0, most)


def largest(fits: Any, low: int, high: int) -> int:
    """The largest n in low..high for which fits(n) is true, or `low` if there is none. fits must be monotone."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def machine(output: Path) -> Machine:
    """Free disk at the output directory, or its nearest existing parent, and memory within a container's limits."""
    existing = next(parent for parent in (output.absolute(), *output.absolute().parents) if parent.exists())
    found = host_memory()
    return Machine(shutil.disk_usage(existing).free, found.total, found.available)


def cards(
    asked: Serving, gpu: GpuProfile, host: Machine, here: Iterable[str] = ()
) -> tuple[list[tuple[str, int]], str]:
    """[(card, bytes)] by memory, smallest first, and the name of the card that decides whether the build fits.

    If the user named a card: only that. Otherwise one card for each memory size in the profile, and the card in this
    machine decides (`here`: its GPUs' names), or else the largest. For the reference target it is the host.
    """
    if not asked.facts.needs_gpu:
        return [("this machine", host.memory)], "this machine"
    if gpu.card and gpu.card.memory_gb:
        return [(gpu.card.name, _card_bytes(gpu.card))], gpu.card.name
    known = sorted((card for card in gpu.cards if card.memory_gb), key=_card_bytes)
    present = [card for name in here for card in find(name, known)][:1]  # of an ambiguous name the smaller card
    sizes = {_card_bytes(card): card for card in [*reversed(known), *present]}
    found = [(sizes[memory].name, memory) for memory in sorted(sizes)]
    return found, present[0].name if present else found[-1][0] if found else ""


def _card_bytes(card: Card) -> int:
    return int(Fraction(str(card.memory_gb)) * 10**9)


def _blocks(tokens: int) -> int:
    return math.ceil(tokens / TOKENS_PER_BLOCK) * TOKENS_PER_BLOCK


def _fraction(asked: Serving) -> Fraction:
    """The KV cache's share of the memory beside weights and workspace."""
    return asked.fraction * (1 - asked.adapter_fraction) if asked.facts.needs_gpu else Fraction(1)


def _layers(config: Mapping[str, Any]) -> int:
    return int(config["num_hidden_layers"])
