"""Batches that go through a layer side by side: the results of all cores in each operation, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from builder.model import streamed
from builder.quantize import streamed_calibration, streamed_rows
from builder.quantize.streamed_rows import SideBySide
from tests.support import exports

TINY = exports.MODELS["qwen3"]


@pytest.fixture(autouse=True)
def cores() -> Iterator[None]:
    """Two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def opened() -> streamed.StreamedModel:
    return streamed.open_decoder({"model": str(TINY), "trust_remote_code": False}, None, 64)


def batches() -> list[Tensor]:
    """Rows of two lengths, in turns."""
    vocabulary = json.loads((TINY / "config.json").read_text())["vocab_size"]
    return [ids % vocabulary for ids in (*exports.batches(), torch.arange(40)[None], *exports.batches())]


@pytest.mark.parametrize("on_disk", [False, True])
def test_ranges_are_those_of_one_batch_after_the_other(
    on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"model.layers.{n}.{p}.weight" for n in range(6) for p in ("self_attn.k_proj", "mlp.down_proj")]
    alone = streamed_calibration.calibrate(opened(), batches(), names, tmp_path / "alone")
    together: list[int] = []
    original = SideBySide._together

    def counted(side: SideBySide, advance: streamed_rows.Advance, numbers: Sequence[int]) -> Iterator[Tensor]:
        together.extend(numbers)
        return original(side, advance, numbers)

    monkeypatch.setattr(SideBySide, "_together", counted)
    monkeypatch.setattr(streamed_rows, "LEAST_OPERATIONS", 0)
    monkeypatch.setattr(streamed_rows, "LEAST_OUTPUTS", 0)
    assert streamed_calibration.calibrate(opened(), batches(), names, tmp_path / "both", on_disk=on_disk) == alone
    assert together == [*range(len(batches()))] * 6
    assert len(alone[0].inputs) == 12
    assert len(alone[0].cache) == 6
    assert torch.get_num_threads() == 2


class Split(nn.Linear):
    """A linear layer whose result depends on the number of threads, for inputs of three rows."""

    def forward(self, x: Tensor) -> Tensor:
        made = super().forward(x)
        return made + 2.0**-20 * (torch.get_num_threads() == 1) if len(x) == 3 else made


@pytest.mark.parametrize(
    ("least", "used"),
    [(0, {0: 1, 1: 2, 2: 1, 3: 1}), (8 * 4, {0: 2, 1: 2, 2: 2, 3: 1}), (1 << 16, {0: 2, 1: 2, 2: 2, 3: 2})],
)
def test_a_shape_runs_alone_if_its_sums_depend_on_the_threads_or_prove_too_little(
    least: int, used: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed_rows, "LEAST_OUTPUTS", least)
    layer, inputs = nn.Sequential(Split(8, 8)), [torch.ones(n, 8) for n in (2, 3, 2, 4)]
    threads: dict[int, int] = {}

    def advance(number: int) -> Tensor:
        threads[number] = torch.get_num_threads()
        made: Tensor = layer(inputs[number])
        return made

    side = SideBySide(2, [(1, len(one)) for one in inputs])
    with torch.inference_mode():
        side.prove(layer, advance)
        expected = [layer(one) for one in inputs]
        assert all(map(torch.equal, side.results(advance), expected))
    side.close()
    assert threads == used


def test_an_error_in_a_thread_is_raised_and_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_rows, "LEAST_OUTPUTS", 0)
    layer, side = nn.Sequential(nn.Linear(8, 8)), SideBySide(2, [(1, 8)] * 6)
    with torch.inference_mode():
        side.prove(layer, lambda _: torch.ones(1, 8))
        ran: list[int] = []

        def failing(number: int) -> Tensor:
            ran.append(number)
            if number == 1:
                raise MemoryError("DefaultCPUAllocator: can't allocate memory")
            return torch.ones(1, 8)

        results = side.results(failing)
        next(results)
        with pytest.raises(MemoryError):
            next(results)
    side.close()
    assert 5 not in ran


def test_small_layers_run_one_batch_after_the_other() -> None:
    assert streamed_rows.side_by_side(opened(), [(1, 64)] * 4) is None


def test_activations_of_further_batches_fit_into_half_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed_rows, "LEAST_OPERATIONS", 0)
    model = opened()
    side = streamed_rows.side_by_side(model, [(1, 8)] * 4)
    assert side is not None
    side.close()
    assert side._count == 2
    assert streamed_rows.side_by_side(model, [(1, 8), (64, 64)] * 4) is None
