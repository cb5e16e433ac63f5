"""Recipes: precedence, unknown keys, every YAML file in configs/, and the committed schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from builder.core import paths
from builder.core.errors import UnsupportedError, UsageError
from builder.formats import schemes
from builder.recipe import schema, sources

MODEL = {"model.id": "tests/data/tiny-qwen3"}
SCHEMA = json.loads(paths.data("configs", "recipe.schema.json").read_text())
RECIPES = sorted(paths.data("configs", "recipes").glob("*.yaml"))
PRESETS = sorted(paths.data("configs", "presets").glob("*.yaml"))


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    return file


def test_precedence_from_default_to_flag(tmp_path: Path) -> None:
    """Each source is overridden by the next one, and the origin names the one that won."""

    def batch(**sources: object) -> tuple[int, str]:
        flags = {**MODEL, "gpu": "cpu", **sources.pop("flags", {})}  # type: ignore[dict-item]
        found = schema.resolve(flags, **sources)  # type: ignore[arg-type]
        return found.recipe.engine.max_batch_size, found.origins["engine.max_batch_size"]

    file = write(tmp_path, "engine: {max_batch_size: 3}")
    sets = ["engine.max_batch_size=4"]
    assert schema.Engine().max_batch_size == 64
    assert batch() == (8, "GPU profile cpu")
    assert batch(preset="throughput") == (256, "preset throughput")
    assert batch(preset="throughput", recipe_file=file) == (3, str(file))
    assert batch(preset="throughput", recipe_file=file, sets=sets) == (4, "--set engine.max_batch_size=4")
    flags = {"engine.max_batch_size": 5}
    assert batch(preset="throughput", recipe_file=file, sets=sets, flags=flags) == (5, "command line")


def test_every_value_has_its_source() -> None:
    explained = {key: origin for key, _, origin in schema.resolve({**MODEL, "gpu": "cpu"}).explained()}
    assert explained["model.id"] == "command line"
    assert explained["calibration.data"] == "GPU profile cpu"
    assert explained["repository.decoupled"] == "default"
    assert set(schema.known_keys()) == set(explained)


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_shipped_recipe_resolves_and_fits_the_schema(file: Path) -> None:
    flags = {} if "model" in sources.load_yaml(file) else {**MODEL, "gpu": "sm120"}
    found = schema.resolve(flags, recipe_file=file)
    assert found.recipe.quantization.format == "nvfp4"
    jsonschema.validate(yaml.safe_load(file.read_text()), SCHEMA)


@pytest.mark.parametrize("file", PRESETS, ids=lambda file: file.stem)
def test_a_shipped_preset_resolves(file: Path) -> None:
    assert schema.resolve({**MODEL, "gpu": "sm120"}, preset=file.stem).recipe
    jsonschema.validate(yaml.safe_load(file.read_text()), SCHEMA)


def test_every_format_has_a_preset() -> None:
    for name in schemes.names():
        resolved = schema.resolve({**MODEL, "gpu": "sm120"}, preset=name)
        assert resolved.recipe.quantization.format == name
        assert resolved.origins["quantization.format"] == f"preset {name}"


def test_the_committed_schema_is_the_generated_one() -> None:
    assert schema.schema() == SCHEMA, "run: builder schema > configs/recipe.schema.json"
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"engine": {"max_batchsize": 8}}, SCHEMA)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("engine: {max_batchsize: 8}", "Did you mean 'engine.max_batch_size'"),
        ("quantisation: {format: nvfp4}", "no key 'quantisation'"),
        ("max_batch_size: 8", "Did you mean 'engine.max_batch_size'"),
        ("engine: {max_batch_size: 0}", "greater than or equal to 1"),
        ("engine: {max_batch_size: many}", "valid integer"),
        ("engine: {max_input_len: 100, max_seq_len: 100}", "no room for an answer"),
        ("quantization: {format: int3}", "nvfp4"),
        ("engine: 8", "is a value"),
        ("- a list", "is not a mapping"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_an_invalid_recipe_is_rejected_with_a_hint(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        schema.resolve({**MODEL, "gpu": "cpu"}, sets=["engine.max_num_tokens=9"], recipe_file=write(tmp_path, text))
    assert message in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("text", ["engine.max_batch_size", "=8", "Engine.X=1", "a..b=1", "engine.max_batch_size=[", ""])
def test_an_invalid_set_is_rejected(text: str) -> None:
    with pytest.raises(UsageError, match="--set"):
        schema.resolve({**MODEL, "gpu": "cpu"}, sets=[text])


def test_no_model_says_what_to_type() -> None:
    with pytest.raises(UsageError, match="no model is named") as caught:
        schema.resolve({"gpu": "cpu"})
    assert "--model" in caught.value.hint


def test_the_default_dataset_comes_with_its_configuration_and_another_does_not() -> None:
    """Without one, `datasets` fails and asks for a configuration."""
    default = schema.resolve({**MODEL, "gpu": "sm120"}).recipe.calibration
    assert (default.data, default.config, default.column) == ("abisee/cnn_dailymail", "3.0.0", "article")
    other = schema.resolve({**MODEL, "gpu": "sm120", "calibration.data": "owner/other"}).recipe.calibration
    assert (other.config, other.column) == (None, None)
    assert schema.resolve({**MODEL, "gpu": "cpu"}).recipe.calibration.config is None


def test_unknown_gpu_and_preset_name_the_nearest() -> None:
    with pytest.raises(UnsupportedError, match="Did you mean 'sm120'"):
        schema.resolve({**MODEL, "gpu": "SM12"})
    with pytest.raises(UsageError, match="no preset"):
        schema.resolve({**MODEL, "gpu": "cpu"}, preset="fast")


def test_no_gpu_here_is_an_error_and_never_a_default() -> None:
    """Without an NVIDIA driver it is an error; a machine with one gets the profile of its GPU."""
    if Path("/proc/driver/nvidia/version").exists():
        assert schema.resolve(MODEL).gpu.sm is not None
        return
    with pytest.raises(UnsupportedError, match="No GPU was named") as caught:
        schema.resolve(MODEL)
    assert "--gpu" in caught.value.hint


@given(st.text())
def test_set_either_parses_or_is_rejected(text: str) -> None:
    try:
        parsed = sources.parse_set(text)
    except UsageError:
        return
    assert "=" in text
    assert isinstance(parsed, dict)


@given(st.integers(1, 10_000), st.integers(1, 10_000))
def test_engine_sizes_leave_room_for_an_answer(longest_input: int, longest: int) -> None:
    sets = [f"engine.max_input_len={longest_input}", f"engine.max_seq_len={longest}"]
    if longest_input < longest:
        assert schema.resolve({**MODEL, "gpu": "cpu"}, sets=sets).recipe.engine.max_seq_len == longest
    else:
        with pytest.raises(UsageError):
            schema.resolve({**MODEL, "gpu": "cpu"}, sets=sets)


@pytest.mark.parametrize("key", ["quality.min_score", "evaluation.min_score"])
@pytest.mark.parametrize("value", ["0.95", "-1", "1000", "nan"])
def test_a_score_is_out_of_a_hundred(key: str, value: str) -> None:
    with pytest.raises(UsageError, match=rf"{key}.*(greater|less) than or equal"):
        schema.resolve({"model.id": "a/b", "gpu": "cpu"}, sets=[f"{key}={value}"])
