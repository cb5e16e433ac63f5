"""The reference executor without Triton: sampling, reading requests, scheduling, responses."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from builder.reference.backend import arrays
from builder.reference.request import Limits, is_stop, read, words
from builder.reference.sampling import RequestError, Sampling, adjust, choose, ends_with
from builder.reference.scheduler import Scheduler, Sequence

VOCAB = 32
LIMITS = Limits(vocab_size=VOCAB, max_batch_size=3, max_input_len=12, max_seq_len=16)


class PrefixModel:
    """Logits that depend on every token of the sequence and on nothing else, so that a mixed-up cache is visible."""

    def __init__(self, broken_token: int | None = None, pause: float = 0.0) -> None:
        self.broken_token, self.pause = broken_token, pause
        self.order: list[int] = []  # the first token of the sequence that each step was for

    def new_cache(self) -> list[int]:
        return []

    def forward(self, ids: torch.Tensor, cache: list[int], adapter: object = None) -> torch.Tensor:
        time.sleep(self.pause)
        rows = []
        for token in ids.tolist():
            cache.append(token)
            rows.append(torch.rand(VOCAB, generator=torch.Generator().manual_seed(hash(tuple(cache)))))
        self.order.append(cache[0])
        if self.broken_token in cache:
            raise IndexError("a bug in the model")
        return torch.stack(rows) * 10


class Recorder:
    """A listener that records its calls."""

    def __init__(self) -> None:
        self.pieces: list[list[int]] = []
        self.error: Exception | None = None
        self.left = False
        self.done = threading.Event()

    def advanced(self, sequence: Sequence) -> None:
        self.pieces.append(list(sequence.generated))
        if sequence.finish_reason:
            self.done.set()

    def failed(self, sequence: Sequence, error: Exception) -> None:
        self.error = error
        self.done.set()

    def cancelled(self) -> bool:
        return self.left


def sequence(prompt: list[int], max_tokens: int = 6, **more: Any) -> Sequence:
    return Sequence(prompt, max_tokens, more.pop("sampling", Sampling()), Recorder(), **more)


def run(scheduler: Scheduler, *sequences: Sequence) -> None:
    scheduler.submit(sequences)
    for one in sequences:
        assert one.listener.done.wait(20), "the scheduler stalled"


@pytest.fixture
def scheduler() -> Any:
    made = Scheduler(PrefixModel(), max_active=3)
    yield made
    made.close()


def alone(one: Sequence) -> list[int]:
    """The result of the same sequence without a scheduler."""
    twin = Sequence(one.prompt, one.max_tokens, one.sampling, Recorder(), one.end_id, one.stop_words)
    with torch.inference_mode():
        while not twin.finish_reason:
            twin.step(PrefixModel())
    return twin.generated


# ---- sampling


def test_greedy_is_the_default_and_temperature_zero() -> None:
    logits = torch.tensor([0.0, 3.0, 2.0, 3.0])
    for how in (Sampling(), Sampling(temperature=0.0, top_p=0.9), Sampling(top_k=1, temperature=2.0)):
        assert choose(logits, how, torch.Generator()).token == 1


@given(
    logits=st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=40),
    top_k=st.integers(0, 50),
    top_p=st.floats(0, 1, width=32),
    seed=st.integers(0, 2**64 - 1),
)
@settings(max_examples=200)
def test_a_sampled_token_is_within_top_k_and_top_p(logits: list[float], top_k: int, top_p: float, seed: int) -> None:
    values = torch.tensor(logits)
    how = Sampling(top_k=top_k, top_p=top_p, seed=seed)
    token = choose(values, how, torch.Generator().manual_seed(seed)).token
    if how.greedy:
        assert not (values > values[token]).any()
        return
    shares = torch.log_softmax(values, dim=-1)  # logits that differ by less than a rounding are a tie here
    better = shares > shares[token]
    if top_k:
        assert int(better.sum()) < top_k
    kept = torch.sort(values, descending=True).values[: top_k or len(logits)]
    share = float(values[better].exp().sum() / kept.exp().sum())
    assert share <= (top_p or 1.0) + 1e-5, "the tokens above it already have the whole of top_p"


def test_sampling_follows_the_distribution() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.log(torch.tensor([0.6, 0.3, 0.1]))
    drawn = [choose(logits, Sampling(top_p=1.0), generator).token for _ in range(3000)]
    assert np.allclose(np.bincount(drawn) / 3000, [0.6, 0.3, 0.1], atol=0.03)
    drawn = [choose(logits, Sampling(top_k=2), generator).token for _ in range(3000)]
    assert np.allclose(np.bincount(drawn, minlength=3) / 3000, [2 / 3, 1 / 3, 0], atol=0.03)


def test_log_probs_are_normalized_over_top_k_as_tensorrt_llm_does() -> None:
    logits = torch.log(torch.tensor([0.6, 0.3, 0.1]))
    assert choose(logits, Sampling(), torch.Generator()).reported_log_prob == 0.0
    plain = choose(logits, Sampling(normalize_log_probs=False), torch.Generator())
    assert plain.reported_log_prob == plain.log_prob == pytest.approx(np.log(0.6))
    drawn = choose(logits, Sampling(top_k=2, seed=3), torch.Generator().manual_seed(3))
    assert drawn.reported_log_prob == pytest.approx(drawn.log_prob - np.log(0.9), abs=1e-5)


def test_bias_then_temperature_then_penalties() -> None:
    logits = torch.tensor([1.0, -1.0, 2.0])
    how = Sampling(
        temperature=0.5,
        repetition_penalty=2.0,
        presence_penalty=0.25,
        frequency_penalty=0.5,
        bias=torch.tensor([0.0, 0.0, 1.0]),
    )
    adjusted = adjust(logits, [0, 1, 0], 0, None, how)
    expected = [1 / 0.5 / 2 - 0.25 - 1.0, -1 / 0.5 * 2 - 0.25 - 0.5, 3 / 0.5]
    assert adjusted.tolist() == pytest.approx(expected, rel=1e-4)
    assert logits.tolist() == [1.0, -1.0, 2.0], "the model's logits stay as they are"


def test_bad_words_and_min_tokens_mask() -> None:
    how = Sampling(bad_words=((3,), (5, 6), (7, 8)), min_tokens=2)
    adjusted = adjust(torch.zeros(10), [1, 5], generated=1, end_id=9, how=how)
    assert [token for token in range(10) if adjusted[token] == -torch.inf] == [3, 6, 9]
    assert adjust(torch.zeros(10), [1, 5, 0], generated=2, end_id=9, how=how)[9] == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"top_k": -1},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
        {"min_tokens": -1},
        {"temperature": float("nan")},
    ],
)
def test_invalid_sampling_parameters_are_rejected(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="must be"):
        Sampling(**wrong)


# ---- reading requests


def tensors(**more: Any) -> dict[str, np.ndarray[Any, Any]]:
    """A request as Triton passes it: batch dimension first, one value per row for the others."""
    given: dict[str, Any] = {"input_ids": [[1, 2, 3]], "input_lengths": [3], "request_output_len": [4], **more}
    return {name: np.asarray(value) for name, value in given.items() if value is not None}


def row(**more: Any) -> Any:
    return read(tensors(**more), LIMITS, exclude_input=True, normalize_log_probs=True)[0]


def test_a_request_is_read_with_tensorrt_llms_defaults() -> None:
    request = row()
    assert (request.prompt, request.max_tokens, request.end_id, request.streaming) == ([1, 2, 3], 4, None, False)
    assert request.sampling.greedy
    assert request.exclude_input
    assert not request.log_probs
    request = row(
        end_id=[[7]],
        runtime_top_k=[5],
        runtime_top_p=[0.0],
        seed=np.array([2**63], np.uint64),
        streaming=[True],
        exclude_input_in_output=[False],
        stop_words_list=[[[4, 5, 6], [2, 3, -1]]],
        bad_words_list=[[[0], [-1]]],
        embedding_bias=np.zeros((1, 0), np.float32),
    )
    assert (request.end_id, request.sampling.top_k, request.sampling.seed) == (7, 5, 2**63)
    assert request.streaming
    assert not request.exclude_input
    assert request.stop_words == ((4, 5), (6,))
    assert request.sampling.bad_words == ()
    assert request.sampling.bias is None


def test_max_tokens_is_limited_by_max_seq_len() -> None:
    assert row(request_output_len=[[1000]]).max_tokens == 13


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"input_ids": None}, "input_ids is missing"),
        ({"request_output_len": None}, "request_output_len is missing"),
        ({"request_output_len": [0]}, "at least 1 .got 0"),
        ({"request_output_len": [-3]}, "at least 1 .got -3"),
        ({"input_ids": [[1] * 13]}, r"Prompt length \(13\) exceeds maximum input length \(12\)"),
        ({"input_ids": [[1, VOCAB]]}, r"within \[0, 32\)"),
        ({"input_ids": [[1, -1]]}, r"within \[0, 32\)"),
        ({"end_id": [VOCAB]}, "end_id"),
        ({"beam_width": [2]}, "does not support beam search"),
        ({"num_return_sequences": [2]}, "does not support beam search"),
        ({"prompt_embedding_table": [[[1.0]]]}, "prompt embedding tables"),
        ({"draft_input_ids": [[1]]}, "speculative decoding"),
        ({"guided_decoding_guide": np.array([[b"{}"]], object)}, "guided_decoding_guide_type must be one of json, "),
        ({"guided_decoding_guide_type": np.array([[b"regex"]], object)}, "guided_decoding_guide is missing"),
        ({"guided_decoding_guide_type": np.array([[b"json"]], object), "min_tokens": [1]}, "min_tokens can't be used"),
        ({"guided_decoding_guide_type": np.array([[b"\xff"]], object)}, "not valid UTF-8"),
        ({"embedding_bias": [[0.0] * 5]}, "must have 32 values"),
        ({"stop_words_list": [[[1, 2], [2, 1]]]}, "increasing offsets"),
        ({"stop_words_list": [[[1, 2], [3, -1]]]}, "increasing offsets"),
        ({"stop_words_list": [[[1, 2], [-1, 2]]]}, "increasing offsets"),
        ({"bad_words_list": [[[99], [1]]]}, "token ids"),
        ({"temperature": [-1.0]}, "temperature"),
        ({"return_perf_metrics": [True]}, "performance metrics"),
    ],
)
def test_an_invalid_request_is_rejected_with_a_reason(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        row(**wrong)


def test_context_logits_need_an_engine_built_for_them() -> None:
    limits = Limits(VOCAB, 1, 12, 16, context_logits=False)
    with pytest.raises(RequestError, match="gather_context_logits"):
        read(tensors(return_context_logits=[True]), limits, exclude_input=True, normalize_log_probs=True)


def test_rows_of_a_batch_lose_their_padding() -> None:
    rows = read(
        tensors(input_ids=[[1, 2, 3], [4, 0, 0]], input_lengths=[[3], [1]], request_output_len=[[4], [2]]),
        LIMITS,
        exclude_input=True,
        normalize_log_probs=True,
    )
    assert [(row.prompt, row.max_tokens) for row in rows] == [([1, 2, 3], 4), ([4], 2)]


@given(st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=4), max_size=5), st.integers(0, 3))
def test_word_lists_are_decoded(wanted: list[list[int]], padding: int) -> None:
    ids = [token for word in wanted for token in word] + [0] * padding
    ends = np.cumsum([len(word) for word in wanted]).tolist()
    matrix = np.array([ids, ends + [-1] * (len(ids) - len(ends))], np.int32)
    assert words(matrix, "stop_words_list", VOCAB) == tuple(tuple(word) for word in wanted)


def test_a_stop_request_is_recognized() -> None:
    assert is_stop({"stop": np.array([True])})
    assert not is_stop({"stop": np.array([False])})
    assert not is_stop({})


def test_limits_follow_the_engine() -> None:
    pretrained = {"vocab_size": 100, "max_position_embeddings": 64}
    assert Limits.read(pretrained) == Limits(100, 8, 63, 64)
    build = {"max_batch_size": 4, "max_input_len": 20, "max_seq_len": 32, "max_num_tokens": 24}
    config = {"pretrained_config": pretrained, "build_config": build}
    assert Limits.read(config) == Limits(100, 4, 20, 32, context_logits=False)
    assert Limits.read(config, chunked_context=True).max_input_len == 31
    build["plugin_config"] = {"context_fmha": True, "remove_input_padding": True}
    assert Limits.read(config).max_input_len == 24


# ---- scheduling


def test_one_sequence(scheduler: Scheduler) -> None:
    one = sequence([1, 2, 3])
    run(scheduler, one)
    assert one.finish_reason == "length"
    assert len(one.generated) == 6
    assert [len(piece) for piece in one.listener.pieces] == [1, 2, 3, 4, 5, 6]
    assert one.generated == alone(one)


def test_the_end_token_is_left_out_of_the_output_and_a_stop_word_is_not(scheduler: Scheduler) -> None:
    free = alone(sequence([5]))
    ended = sequence([5], end_id=free[3])
    stopped = sequence([5], stop_words=((free[2], free[3]), (99,)))
    run(scheduler, ended, stopped)
    assert (ended.generated, ended.finish_reason) == (free[:3], "end_id")
    assert (stopped.generated, stopped.finish_reason) == (free[:4], "stop_word")


def test_a_stop_word_may_begin_in_the_prompt(scheduler: Scheduler) -> None:
    first = alone(sequence([5, 6]))[0]
    one = sequence([5, 6], stop_words=((6, first),))
    run(scheduler, one)
    assert (one.generated, one.finish_reason) == ([first], "stop_word")
    assert not ends_with([5], ((4, 5),))


@settings(max_examples=20)
@given(st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5), min_size=1, max_size=8))
def test_the_output_does_not_depend_on_other_sequences(prompts: list[list[int]]) -> None:
    scheduler = Scheduler(PrefixModel(), max_active=3)
    together = [
        sequence(prompt, 1 + index % 5, sampling=Sampling(top_k=index % 3, seed=index))
        for index, prompt in enumerate(prompts)
    ]
    run(scheduler, *together)
    scheduler.close()
    assert [one.generated for one in together] == [alone(one) for one in together]


def test_sequences_take_turns_and_no_more_than_max_active() -> None:
    model = PrefixModel()
    scheduler = Scheduler(model, max_active=2)
    run(scheduler, sequence([1], 4), sequence([2], 4), sequence([3], 2))
    scheduler.close()
    assert model.order == [1, 2, 1, 2, 1, 2, 1, 2, 3, 3]


def test_an_error_in_one_step_ends_only_that_sequence() -> None:
    scheduler = Scheduler(PrefixModel(broken_token=9), max_active=3)
    good, bad, other = sequence([1]), sequence([9]), sequence([2])
    run(scheduler, good, bad, other)
    assert isinstance(bad.listener.error, IndexError)
    assert good.generated == alone(good)
    assert other.generated == alone(other)
    later = sequence([4])
    run(scheduler, later)
    assert later.generated == alone(later), "the worker lives"
    scheduler.close()


def test_an_error_in_a_listener_does_not_affect_other_sequences() -> None:
    said: list[str] = []
    scheduler = Scheduler(PrefixModel(), 3, said.append)
    bad, good = sequence([1]), sequence([2])
    bad.listener.advanced = bad.listener.failed = None
    scheduler.submit([bad])
    run(scheduler, good)
    scheduler.close()
    assert good.generated == alone(good)
    assert "so did its error response" in said[0]


def test_stop_cancels_active_and_waiting_sequences_of_a_request() -> None:
    scheduler = Scheduler(PrefixModel(pause=0.01), max_active=1)
    running, waiting = sequence([1], 10_000, request_id="a"), sequence([2], 10_000, request_id="a")
    other = sequence([3], 2, request_id="b")
    scheduler.submit([running, waiting, other])
    while len(running.generated) < 2:
        time.sleep(0.01)
    scheduler.stop("unknown")
    scheduler.stop("a")
    for one in (running, waiting, other):
        assert one.listener.done.wait(10)
    scheduler.close()
    assert (running.finish_reason, waiting.finish_reason, other.finish_reason) == ("cancelled", "cancelled", "length")
    assert 2 <= len(running.generated) < 10_000
    assert not waiting.generated


def test_a_cancelled_sequence_is_not_stepped_again() -> None:
    scheduler = Scheduler(PrefixModel(pause=0.01), max_active=1)
    left = sequence([1], 10_000)
    scheduler.submit([left])
    left.listener.left = True
    assert left.listener.done.wait(10)
    scheduler.close()
    assert left.finish_reason == "cancelled"


def test_close_cancels_waiting_sequences() -> None:
    scheduler = Scheduler(PrefixModel(pause=0.01), max_active=1)
    running, waiting = sequence([1], 10_000), sequence([2])
    scheduler.submit([running, waiting])
    scheduler.close()
    assert (running.finish_reason, waiting.finish_reason) == ("cancelled", "cancelled")
    with pytest.raises(RuntimeError, match="shutting down"):
        scheduler.submit([waiting])


# ---- responses


def finished(**more: Any) -> tuple[Any, Sequence]:
    request = row(**more)
    one = Sequence(
        request.prompt,
        request.max_tokens,
        request.sampling,
        Recorder(),
        request.end_id,
        keep_context_logits=request.context_logits,
        keep_generation_logits=request.generation_logits,
    )
    with torch.inference_mode():
        while not one.finish_reason:
            one.step(PrefixModel())
    return request, one


def test_a_complete_response_has_the_shapes_of_the_c_backend() -> None:
    request, one = finished(
        return_log_probs=[True],
        return_context_logits=[True],
        return_generation_logits=[True],
        return_num_input_tokens=[True],
        return_num_output_tokens=[True],
    )
    out = arrays(request, one, rows=1)
    assert out["output_ids"].tolist() == [[one.generated]]
    assert out["sequence_length"].tolist() == [[4]]
    assert out["cum_log_probs"].shape == (1, 1)
    assert out["output_log_probs"].shape == (1, 1, 4)
    assert out["context_logits"].shape == (1, 3, VOCAB)
    assert out["generation_logits"].shape == (1, 1, 4, VOCAB)
    assert out["num_input_tokens"].tolist() == [[3]]
    assert out["num_output_tokens"].tolist() == [[4]]
    assert "batch_index" not in out
    assert "batch_index" in arrays(request, one, rows=2)
    assert out["generation_logits"][0, 0].argmax(-1).tolist() == one.generated


def test_the_prompt_is_returned_only_if_requested_and_not_streamed() -> None:
    request, one = finished(exclude_input_in_output=[False])
    assert arrays(request, one, rows=1)["output_ids"].tolist() == [[[1, 2, 3, *one.generated]]]
    request, one = finished(exclude_input_in_output=[False], streaming=[True])
    assert arrays(request, one, rows=1)["output_ids"].tolist() == [[one.generated[-1:]]]


def test_outputs_that_were_not_requested_are_left_out() -> None:
    assert set(arrays(*finished(), rows=1)) == {"output_ids", "sequence_length"}


def test_the_last_response_of_a_stream_is_empty_at_the_end_token() -> None:
    free = finished()[1].generated
    request, one = finished(end_id=[free[2]], streaming=[True], return_generation_logits=[True])
    out = arrays(request, one, rows=1)
    assert out["output_ids"].shape == (1, 1, 0)
    assert out["sequence_length"].tolist() == [[0]]
    assert out["generation_logits"].shape == (1, 0, 1, VOCAB)
