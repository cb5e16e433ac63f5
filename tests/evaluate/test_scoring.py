"""Logits to numbers of tokens: the right token, the bound of the KL, batches that fit, files that need no memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.core.errors import IntegrityError, UnsupportedError
from builder.evaluate.datasets import Ids
from builder.evaluate.runners import language, local, scoring, worker
from builder.evaluate.runners.scoring import ColumnFiles

TINY = "tests/data/tiny-qwen3"
VOCAB = 50


def ids_of(*tokens: int) -> Ids:
    return np.array(tokens, np.int32)


def test_the_likelihood_is_of_the_token_in_the_text_not_of_the_likeliest() -> None:
    """A model that is sure and wrong: its own confidence would read as perplexity 1.0, the text's is enormous."""
    ids = ids_of(3, 7, 9, 11)
    logits = torch.zeros(4, VOCAB)
    logits[torch.arange(4), torch.tensor([40, 41, 42, 43])] = 20.0
    found = scoring.score(logits, ids)
    confidence = -logits.log_softmax(-1).max(-1).values[:-1]
    assert float(confidence.mean().exp()) < 1.001
    assert float(np.exp(found["nll"].mean())) > 1e8
    assert not found["right"].any()
    assert found["best"].tolist() == [40, 41, 42]


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.floats(0.1, 30), st.integers(2, 700))
def test_nll_is_the_cross_entropy_shifted_by_one(seed: int, scale: float, tokens: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(tokens, VOCAB, generator=generator)
    ids = torch.randint(0, VOCAB, (tokens,), generator=generator)
    found = scoring.score(logits, ids.int().numpy())
    wanted = F.cross_entropy(logits[:-1].double(), ids[1:], reduction="none").numpy()
    assert np.allclose(found["nll"], wanted, rtol=1e-5, atol=1e-5 * scale)
    assert np.array_equal(found["right"], (logits[:-1].argmax(-1) == ids[1:]).numpy())


def kl(p: torch.Tensor, q: torch.Tensor, top: int) -> np.ndarray:
    """As two runners do it: P keeps its likeliest tokens, Q is compared with these."""
    ids = np.zeros(len(p) + 1, np.int32)
    pad = torch.zeros(1, p.shape[1])
    kept = scoring.score(torch.cat((p, pad)), ids, top=top)
    reference = {name: kept[name] for name in scoring.REFERENCE}
    return scoring.score(torch.cat((q, pad)), ids, reference=reference)["kl"]


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.floats(0, 8), st.floats(0, 8))
def test_kl_of_the_likeliest_tokens_is_a_lower_bound_and_exact_with_all(seed: int, peak: float, noise: float) -> None:
    """Never above the truth, never less with more tokens, and the truth itself with the whole vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    p = peak * torch.randn(6, VOCAB, generator=generator)
    q = p + noise * torch.randn(6, VOCAB, generator=generator)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    truth = (log_p.exp() * (log_p - log_q)).sum(-1).numpy()
    bounds = [kl(p, q, top) for top in (1, 5, 20, VOCAB)]
    slack = 1e-5 * (1 + truth)  # log-probabilities are float32
    for smaller, larger in pairwise(bounds):
        assert (smaller <= larger + slack).all()
    assert (bounds[0] >= 0).all()
    assert np.allclose(bounds[-1], truth, rtol=1e-5, atol=1e-5)


def test_a_model_diverges_from_itself_by_nothing() -> None:
    p = torch.randn(8, VOCAB, generator=torch.Generator().manual_seed(1)) * 4
    for top in (1, 8, VOCAB):
        assert kl(p, p, top).max() < 1e-6


@given(st.lists(st.integers(2, 300), min_size=1, max_size=60), st.integers(1, 2000))
def test_every_text_is_in_one_batch_of_texts_of_like_length(lengths: list[int], tokens: int) -> None:
    found = list(scoring.batches(lengths, tokens))
    assert sorted(index for batch in found for index in batch) == list(range(len(lengths)))
    for batch in found:
        longest = max(lengths[index] for index in batch)
        assert len(batch) == 1 or len(batch) * longest <= tokens
    assert [lengths[i] for b in found for i in b] == sorted(lengths, reverse=True)


class Small:
    """A runner with room for some tokens at once, padding included; more is out of memory, as torch says it."""

    vocab_size, batch_tokens = VOCAB, 1000

    def __init__(self, room: int) -> None:
        self.room, self.seen = room, 0

    def logits(self, batch: Sequence[Ids]) -> Iterator[torch.Tensor]:
        if len(batch) * len(batch[0]) > self.room:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.seen += len(batch)
        for ids in batch:
            yield F.one_hot(torch.from_numpy(ids).long(), VOCAB).float()


def test_a_batch_that_does_not_fit_is_halved_and_every_text_is_scored() -> None:
    texts = [np.full(n, n % VOCAB, np.int32) for n in (40, 40, 39, 30, 20, 10, 9, 8)]
    runner, found = Small(room=90), {}
    scoring.run(runner, texts, lambda index, logits: found.update({index: len(logits)}))
    assert found == dict(enumerate(map(len, texts)))
    assert runner.batch_tokens <= 90
    with pytest.raises(UnsupportedError, match="A text of 40 tokens") as caught:
        scoring.run(Small(room=39), texts, lambda index, logits: None)
    assert "evaluation.max_tokens=20" in caught.value.hint


def test_scoring_that_runs_out_of_memory_halves_too_and_other_errors_pass() -> None:
    runner, asked = Small(room=10_000), []

    def tight(index: int, logits: torch.Tensor) -> None:
        asked.append(index)
        if len(asked) == 2:
            raise MemoryError

    scoring.run(runner, [ids_of(1, 2, 3)] * 4, tight)
    assert asked == [0, 1, 0, 1, 2, 3]

    def broken(index: int, logits: torch.Tensor) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        scoring.run(runner, [ids_of(1, 2)], broken)


@settings(max_examples=30)
@given(st.permutations(range(6)), st.lists(st.integers(1, 9), min_size=6, max_size=6))
def test_columns_come_back_whatever_the_order_they_were_written_in(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], lengths: list[int]
) -> None:
    directory = tmp_path_factory.mktemp("columns")
    starts = np.cumsum([0, *lengths])
    whole = {"nll": np.random.rand(starts[-1]).astype(np.float32), "top_ids": np.random.randint(0, 99, (starts[-1], 3))}
    files = ColumnFiles(directory, int(starts[-1]))
    for index in order:
        rows = slice(starts[index], starts[index + 1])
        files.write(int(starts[index]), {name: column[rows] for name, column in whole.items()})
    files.close()
    again = ColumnFiles(directory)
    for name, column in whole.items():
        assert np.array_equal(np.load(directory / f"{name}.npy"), column)
        assert np.array_equal(again.read(int(starts[2]), lengths[2], name)[name], column[starts[2] : starts[3]])
    again.close()


# ---- the real model


@pytest.fixture(scope="module")
def tiny() -> Iterator[local.Causal]:
    job = {"model": TINY, "dtype": "float32", "trust_remote_code": False, "batch_tokens": 4096}
    with torch.inference_mode(), local.bf16(job) as runner:
        yield runner


@pytest.fixture(scope="module")
def prose() -> list[Ids]:
    from transformers import AutoTokenizer

    from builder.evaluate.datasets import sequences

    tokenizer = AutoTokenizer.from_pretrained(TINY)
    path = Path("tests/data/eval/prose.jsonl")
    return sequences(path, tokenizer, name="prose", min_tokens=16, max_tokens=256).ids[:24]


def test_a_text_scores_the_same_alone_and_padded(tiny: local.Causal, prose: list[Ids]) -> None:
    """In float32, to the order of its rounding: 1e-4 of logits of up to 32."""
    batch = sorted(prose[:5], key=lambda ids: -len(ids))
    for together, ids in zip(tiny.logits(batch), batch, strict=True):
        [alone] = tiny.logits([ids])
        assert torch.allclose(together, alone, atol=2e-4)


def test_perplexity_is_what_transformers_says(tiny: local.Causal, prose: list[Ids]) -> None:
    """Its own loss for the same tokens, one text at a time."""
    for ids in prose[:3]:
        row = torch.from_numpy(ids).long()[None]
        theirs = float(tiny.model(row, labels=row).loss)
        [logits] = tiny.logits([ids])
        assert float(scoring.score(logits, ids)["nll"].mean()) == pytest.approx(theirs, abs=1e-5)


def test_shuffled_text_is_less_likely_for_a_model_of_the_language(tiny: local.Causal, prose: list[Ids]) -> None:
    checked = worker.check_language(tiny, prose, seed=0)
    assert language.knows(checked)
    assert checked["shuffled_nll"] > checked["checked_nll"] + 1
    language.check_known_language(checked, "prose", tiny.vocab_size)


@pytest.mark.parametrize("seed", range(4))
def test_a_foreign_tokenizer_is_found(tiny: local.Causal, prose: list[Ids], seed: int) -> None:
    """Another vocabulary of the same size: every token means something else, and the text is noise to the model."""
    other = np.random.default_rng(seed).permutation(4087).astype(np.int32)
    foreign = [other[ids] for ids in prose]
    with pytest.raises(IntegrityError, match="its tokenizer belongs to another model") as caught:
        language.check_known_language(worker.check_language(tiny, foreign, seed=0), "prose", tiny.vocab_size)
    assert "guessing (one of 4096 tokens) 8.32" in caught.value.why


def test_tokens_that_the_model_does_not_have_are_found() -> None:
    with pytest.raises(IntegrityError, match="does not belong to this model"):
        language.check_vocabulary(4096, 4096)
    language.check_vocabulary(4095, 4096)
