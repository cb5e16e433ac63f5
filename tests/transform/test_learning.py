"""Learned rotations: what the loss is of, that it falls, that the matrices stay orthogonal, and what a kill leaves."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rotated_models import NO_R2, ROTATED, model_of

from builder.architectures import catalog
from builder.core.output import Output
from builder.formats import registry
from builder.formats.assignment import ModelFormats
from builder.recipe.transform import Transform
from builder.transform import rotation, writing
from builder.transform.rotations import learned_rotations

torch = pytest.importorskip("torch")

from builder.transform import cayley, learning_worker  # noqa: E402
from builder.transform.learning import Learner  # noqa: E402
from builder.transform.learning_state import State, write_matrices  # noqa: E402
from builder.transform.rounded_inputs import RoundedInputs  # noqa: E402

DENSE = [one for one in ROTATED if not any("*" in name for name in one.rotation.writes)]
STEPS, PER_STEP = 6, 2
SIZES = {"hidden_size": 64, "head_dim": 16}  # NVFP4 has blocks of 16


def rows(count: int = 4) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 4096, (1, 24 + at), generator=generator) for at in range(count)]


def learner(model: Any, kind: str, number_format: str = "nvfp4") -> tuple[Learner, RoundedInputs]:
    family = catalog.of(model.config.to_dict()).rotation
    assert family is not None
    layers = model.config.num_hidden_layers
    inputs = RoundedInputs(model, family, ModelFormats(registry.get(number_format)), layers)
    made = Learner(model, inputs, rows(), per_step=PER_STEP)
    made.recompute([model.get_submodule(f"{family.layers}.{layer}") for layer in range(layers)])
    return made, inputs


def start_of(model: Any, *, r2: bool = True, seed: int = 0) -> dict[str, Any]:
    hidden, layers = model.config.hidden_size, model.config.num_hidden_layers
    names = {"r1": hidden} | ({f"r2.{layer}": 16 for layer in range(layers)} if r2 else {})
    return {name: rotation.random(size, "hadamard", seed, name).matrix() for name, size in names.items()}


def tensors(matrices: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(one).float() for name, one in matrices.items()}


def after_first_layer(model: Any) -> Any:
    """The residual stream after the first decoder layer."""
    with torch.no_grad():
        return model(rows()[0], output_hidden_states=True).hidden_states[1]


def loss_of(model: Any, ids: list[Any]) -> float:
    """The mean loss of the next token, by transformers' own forward pass."""
    with torch.no_grad():
        total = sum(
            torch.nn.functional.cross_entropy(model(row).logits[0, :-1].float(), row[0, 1:], reduction="sum")
            for row in ids
        )
    return float(total) / sum(row.shape[1] - 1 for row in ids)


@pytest.mark.parametrize("architecture", DENSE, ids=lambda one: one.model_types[0])
def test_without_rounding_the_loss_is_the_models_own_in_every_family(architecture: Any, tmp_path: Path) -> None:
    [kind, *_] = architecture.model_types
    model = model_of(kind, tmp_path, **SIZES)
    expected = loss_of(model, rows())
    made, inputs = learner(model, kind)
    inputs.on = False
    matrices = tensors(start_of(model, r2=kind not in NO_R2))
    assert made.loss(matrices, rows()) == pytest.approx(expected, rel=1e-5)
    inputs.on = True
    assert abs(made.loss(matrices, rows()) / expected - 1) > 1e-5


@pytest.mark.parametrize("number_format", ["nvfp4", "int8_dynamic", "int8_static", "fp8"])
def test_what_is_computed_is_the_rotated_model_with_rounded_inputs(number_format: str, tmp_path: Path) -> None:
    """The rotated model is written, loaded and rounded by hooks of its own on each linear layer."""
    from transformers import AutoModelForCausalLM

    model = model_of("qwen2", tmp_path / "model", **SIZES)
    matrices, part = start_of(model), Transform(name="spinquant", kind="learned")
    (tmp_path / "rotated").mkdir()
    names = [path.name for path in (tmp_path / "model").iterdir()]
    writing.write(tmp_path / "model", names, learned_rotations(matrices, part), tmp_path / "rotated", Output("quiet"))
    rotated = AutoModelForCausalLM.from_pretrained(tmp_path / "rotated", dtype=torch.float32).eval()
    one = registry.get(number_format)

    def rounded(_: Any, inputs: tuple[Any]) -> tuple[Any]:
        largest = inputs[0].abs().max()
        stored = {"input_scale": largest / one.input_range} if one.input_range else {}
        return (one.round_input(inputs[0], stored),)

    for name, module in rotated.named_modules():
        if name.endswith("_proj"):
            module.register_forward_pre_hook(rounded)
    r1 = torch.from_numpy(matrices["r1"]).float()
    plain, expected = after_first_layer(model) @ r1, after_first_layer(rotated)
    _, inputs = learner(model, "qwen2", number_format)
    inputs.matrices = tensors(matrices)
    effect = (plain - expected).norm()
    # Where a value near the border between two codes falls to the other side, what follows differs by that.
    assert (after_first_layer(model) @ r1 - expected).norm() < 0.3 * effect
    inputs.matrices = tensors(start_of(model, seed=1))
    assert (after_first_layer(model) @ r1 - expected).norm() > 0.9 * effect, "other rotations round other values"


def learn(directory: Path, state: Path, stop_at: int | None = None) -> Any:
    model = model_of("llama", directory, **SIZES)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] *= 20  # an outlier, which there is something to learn about
    made, _ = learner(model, "llama")

    def progress(done: int) -> None:
        if done == stop_at:
            raise KeyboardInterrupt

    return made.learn(start_of(model), steps=STEPS, rate=1.5, state=State(state), progress=progress)


def test_the_loss_falls_the_matrices_stay_orthogonal_and_a_killed_run_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builder.transform.learning_state.EVERY", 0.0)
    whole = learn(tmp_path / "one", tmp_path / "whole.safetensors")
    assert whole.fell
    assert whole.after < whole.before - 1e-4
    assert len(whole.losses) == STEPS
    for matrix in whole.matrices.values():
        assert matrix.dtype == torch.float64
        assert (matrix @ matrix.T - torch.eye(len(matrix), dtype=torch.float64)).abs().max() < 1e-12
    moved = {name: (whole.matrices[name] - torch.from_numpy(one)).abs().max() for name, one in start_of_llama().items()}
    assert min(moved.values()) > 1e-6, "every matrix is learned"
    state = tmp_path / "killed.safetensors"
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "two", state, stop_at=4)
    again = learn(tmp_path / "three", state)
    assert (again.before, again.after, again.losses) == (whole.before, whole.after, whole.losses)
    assert all(torch.equal(again.matrices[name], one) for name, one in whole.matrices.items())


def start_of_llama() -> dict[str, Any]:
    return {
        name: rotation.random(size, "hadamard", 0, name).matrix()
        for name, size in {"r1": 64, "r2.0": 16, "r2.1": 16}.items()
    }


def test_a_state_that_is_damaged_or_of_other_matrices_is_not_taken(tmp_path: Path) -> None:
    like = {"r1": torch.eye(4, dtype=torch.float64)}
    file = tmp_path / "state.safetensors"
    assert State(file).load(like) is None
    write_matrices(file, like, {"step": "3", "losses": json.dumps([1.5])})
    found = State(file).load(like)
    assert found is not None
    assert (found[0], found[2]) == (3, [1.5])
    assert torch.equal(found[1]["r1"], like["r1"])
    assert State(file).load({"r1": torch.eye(5, dtype=torch.float64)}) is None
    file.write_bytes(file.read_bytes()[:-8])
    assert State(file).load(like) is None


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 40), seed=st.integers(0, 10**6), rate=st.floats(1e-3, 100), scale=st.floats(1e-6, 1e6))
def test_a_step_of_any_length_ends_in_an_orthogonal_matrix(n: int, seed: int, rate: float, scale: float) -> None:
    x = torch.from_numpy(rotation.random(n, "orthogonal", seed, "r1").matrix())
    gradient = torch.from_numpy(np.random.default_rng(seed).standard_normal((n, n)) * scale)
    y = cayley.step(x, gradient, rate)
    assert (y @ y.T - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-12


def test_steps_find_the_rotation_that_is_nearest_to_a_matrix() -> None:
    """|X - A|^2 is least at the polar factor of A."""
    generator = torch.Generator().manual_seed(0)
    target = torch.eye(12, dtype=torch.float64) + 0.3 * torch.randn(12, 12, generator=generator, dtype=torch.float64)
    u, _, v = torch.linalg.svd(target)
    x = cayley.orthogonal(torch.eye(12, dtype=torch.float64))
    for _ in range(300):
        x = cayley.step(x, 2 * (x - target), 0.2)
    assert (x - u @ v).abs().max() < 1e-6


def test_the_rate_falls_as_a_cosine() -> None:
    assert [round(cayley.rate_of(step, 4, 2.0), 3) for step in range(4)] == [2.0, 1.707, 1.0, 0.293]


def test_memory_that_ran_out_has_a_message_and_a_full_disk_is_left_to_the_worker() -> None:
    """core/worker.py names the disk."""
    said = learning_worker.known(RuntimeError("DefaultCPUAllocator: can't allocate memory"), {})
    assert said is not None
    assert "does not fit into memory" in said.what
    assert learning_worker.known(OSError(errno.ENOSPC, "No space left on device"), {}) is None
