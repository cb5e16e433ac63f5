"""What workers do not import, and that nothing is lost by it."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import yaml

from builder.model.imports import only_needed


def test_scikit_learn_looks_absent_in_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    with only_needed(), pytest.raises(ImportError):
        import sklearn  # noqa: F401
    assert "sklearn" not in sys.modules
    loaded = types.ModuleType("sklearn")
    monkeypatch.setitem(sys.modules, "sklearn", loaded)
    with only_needed():
        assert sys.modules["sklearn"] is loaded
    assert sys.modules["sklearn"] is loaded


def test_yaml_is_read_by_libyaml_in_the_block_only() -> None:
    pure = yaml.SafeLoader
    with only_needed():
        assert yaml.SafeLoader is yaml.CSafeLoader
        assert yaml.safe_load("a: [1, 2.5, yes, ~, '1']") == {"a": [1, 2.5, True, None, "1"]}
    assert yaml.SafeLoader is pure


def test_a_function_is_compiled_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def stand_in(function: object, **options: object) -> object:
        compiled.append((function, options))
        return function

    monkeypatch.setattr(torch, "compile", stand_in)
    with only_needed():

        @torch.compile(dynamic=True)
        def double(x: int) -> int:
            return 2 * x

        @torch.compile
        def triple(x: int) -> int:
            return 3 * x

    assert torch.compile is stand_in
    assert not compiled
    assert [double(2), double(3), triple(2)] == [4, 6, 6]
    assert [options for _, options in compiled] == [{"dynamic": True}, {}]
