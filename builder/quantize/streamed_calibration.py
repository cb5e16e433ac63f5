"""Max calibration with one decoder layer in memory at a time, which a killed run continues. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from builder.core.store import library_versions
from builder.core.worker import emit
from builder.model.streamed import State, StreamedModel
from builder.quantize import streamed_ranges, streamed_rows, streamed_solve, streamed_states
from builder.quantize.algorithms.moments import Moments
from builder.quantize.experts import RoutedTokens
from builder.quantize.ranges import Ranges
from builder.quantize.streamed_ranges import Seen
from builder.quantize.streamed_rows import SideBySide
from builder.quantize.streamed_solve import Group, LayerSolver, Solved
from builder.quantize.streamed_states import PRELUDE, CarriedStates, Result


def calibrate(
    model: StreamedModel,
    batches: Sequence[Tensor],
    tensors: Sequence[str],
    partial: Path,
    *,
    on_disk: bool | None = None,
    solver: LayerSolver | None = None,
) -> tuple[Ranges, dict[str, Any]]:
    """The ranges of inputs, keys and values over all batches of token ids, and facts: the tokens of each expert and,
    under `solved`, the files of the weights that `solver` rounded on the way.

    tensors: the names of the checkpoint's tensors, to report ranges by. partial: where to keep results of finished
    layers, a path without suffix. on_disk: whether to keep hidden states in a file; None decides by their size.
    FloatingPointError if a layer's inputs, keys or values contain NaN or Inf.
    """
    with torch.inference_mode():
        results = _Run(model, batches, partial, on_disk, solver).results()
    numbers: dict[str, dict[str, float]] = {"inputs": {}, "keys": {}, "values": {}}
    routed = RoutedTokens()
    for one in results:
        for kind, found in numbers.items():
            found.update(one[kind])
        routed.layers.update(one["experts"])
        routed.see_all |= one["see_all"]
    few = streamed_ranges.widen(numbers["inputs"], routed, all_alike=_joins_experts())
    facts = {**routed.facts(), **({"rare_experts": few} if few else {})}
    if solver is not None:
        facts |= {**solver.facts(results), "solved": solver.solved(results)}
    return streamed_ranges.by_checkpoint_names(numbers, model.model, tensors), facts


def _joins_experts() -> bool:
    """Whether ModelOpt 0.47 would calibrate: it runs with transformers 5, and 0.37 with 4."""
    return not library_versions("transformers")["transformers"].startswith("4.")


class _Run:
    """One calibration on its way through the layers."""

    def __init__(
        self,
        model: StreamedModel,
        batches: Sequence[Tensor],
        partial: Path,
        on_disk: bool | None,
        solver: LayerSolver | None,
    ) -> None:
        self.model, self.batches, self.solver = model, batches, solver
        self._states: list[State] = []
        self._headers: list[tuple[str, tuple[int, ...]]] = []
        self._partial, self._on_disk = partial, on_disk
        self._nbytes = [model.nbytes(index) for index in range(model.depth)]
        self._carried: CarriedStates
        shapes = [(len(batch), batch.shape[1]) for batch in batches]
        # Second moments are sums over batches, whose order counts.
        self._side: SideBySide | None = None if solver else streamed_rows.side_by_side(model, shapes)

    def results(self) -> list[Result]:
        """What was found in each layer, before the first one (PRELUDE) first."""
        seen = Seen()
        with self.model.prelude() as begin, streamed_ranges.observed_outside(self.model, seen):
            first = begin(self.batches[0]).hidden
            shapes = [(*batch.shape, *first.shape[2:]) for batch in self.batches]
            self._headers = [(streamed_states.header(first)[0], shape) for shape in shapes]
            self._carried = self._new_states(shapes, first)
            found = self._carried.resume(shapes, first.dtype, self.solver.holds if self.solver else lambda _: True)
            self._prelude(begin, resumed=bool(found))
        if not found:
            found = [self._recorded(PRELUDE, _found(seen, RoutedTokens()))]
        else:
            emit(info=f"continuing a killed run after layer {len(found) - 1} of {self.model.depth}")
        with closing(self._side) if self._side else nullcontext():
            for index in range(len(found) - 1, self.model.depth):
                found.append(self._layer(index))
        return found

    def _new_states(self, shapes: Sequence[tuple[int, ...]], first: Tensor) -> CarriedStates:
        on_disk = streamed_states.on_disk(shapes, first.dtype) if self._on_disk is None else self._on_disk
        home = self.model.device
        if home.type == "cuda":
            nbytes = sum(len(batch) * batch.shape[1] for batch in self.batches) * first[0, 0].nbytes
            home = home if nbytes <= torch.cuda.mem_get_info(home)[0] // 8 else torch.device("cpu")
        return CarriedStates(self._partial, home, on_disk=on_disk)

    def _prelude(self, begin: Callable[[Tensor], State], *, resumed: bool) -> None:
        """Makes the states before the first layer; of a resumed run only what layers are called with."""

        def make(number: int) -> Tensor:
            state = begin(self.batches[number])
            hidden, state.hidden = state.hidden, state.hidden.new_empty(0)
            self._states.append(state)
            return hidden

        if resumed:
            for number in range(len(self.batches)):
                make(number)
        else:
            self._carried.step(PRELUDE, self._headers, make)

    def _layer(self, index: int) -> Result:
        with self.model.layer(index) as layer:
            parts = self.solver.passes(index) if self.solver else []
            solved = []
            for number, (groups, moments) in enumerate(parts[:-1]):
                seen = Seen(moments)
                with streamed_ranges.observed(layer, f"{self.model.path}.{index}", seen):
                    for batch in range(len(self.batches)):
                        self._advance(index, batch)
                _check_finite(seen.numbers())
                solved.append(self._solved(index, number, groups, moments))
            groups, last = parts[-1] if parts else ((), None)
            found = self._last_pass(index, layer, Seen(last))
            if last is not None:
                solved.append(self._solved(index, len(parts) - 1, groups, last))
        return self._recorded(index, {**found, **({"solved": streamed_solve.joined(solved)} if solved else {})})

    def _last_pass(self, index: int, layer: nn.Module, seen: Seen) -> dict[str, Any]:
        """Takes the states through a layer. Returns what was found in it."""
        prefix = f"{self.model.path}.{index}"
        if self._side:
            self._side.prove(layer, lambda number: self._compute(index, number))
        with streamed_ranges.observed(layer, prefix, seen) as routed:
            if self._side:
                results = self._side.results(lambda number: self._compute(index, number))
                self._carried.step(index, self._headers, lambda number: self._finished(index, number, next(results)))
            else:
                self._carried.step(index, self._headers, lambda number: self._advance(index, number))
        routed.layers = {f"{prefix}.{place}": tokens for place, tokens in routed.layers.items()}
        return _found(seen, routed)

    def _solved(self, index: int, number: int, groups: Sequence[Group], moments: Moments) -> Solved:
        assert self.solver is not None
        done = sum(self._nbytes[: index + 1])
        label = f"rounding layer {index + 1} of {self.model.depth}"
        emit(progress={"label": label, "done": done, "total": sum(self._nbytes)})
        return self.solver.solve(index, number, groups, moments)

    def _advance(self, index: int, number: int) -> Tensor:
        """One batch through a layer. If the device runs out of memory, its share of hidden states moves to the host,
        which changes no result."""
        self._tell(index, number)
        try:
            return self._compute(index, number)
        except torch.OutOfMemoryError:
            if not self._carried.to_host():
                raise
        emit(info="the device is out of memory: the calibration rows' hidden states are now in the host's memory")
        torch.cuda.empty_cache()
        return self._compute(index, number)

    def _compute(self, index: int, number: int) -> Tensor:
        return self.model.advance(index, self._states[number], self._carried.get(number).to(self.model.device))

    def _finished(self, index: int, number: int, made: Tensor) -> Tensor:
        self._tell(index, number + 1)
        return made

    def _tell(self, index: int, batches: int) -> None:
        """Reports the progress of a layer that this many batches went through."""
        done = sum(self._nbytes[:index]) + self._nbytes[index] * batches // len(self.batches)
        label = f"calibrating layer {index + 1} of {self.model.depth}"
        emit(progress={"label": label, "done": done, "total": sum(self._nbytes)})

    def _recorded(self, layer: int, result: Result) -> Result:
        self._carried.record(layer, result)
        return result


def _found(seen: Seen, routed: RoutedTokens) -> dict[str, Any]:
    numbers = seen.numbers()
    _check_finite(numbers)
    return {**numbers, "experts": routed.layers, "see_all": routed.see_all}


def _check_finite(numbers: Mapping[str, Mapping[str, float]]) -> None:
    for kind, ranges in numbers.items():
        for name, amax in ranges.items():
            if not amax < float("inf"):  # NaN or Inf
                raise FloatingPointError(f"{name} has {amax} in its {kind}")
