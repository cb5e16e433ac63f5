"""How the build installs the C extension (hatch_build.py)."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

MEMORY = Path("/dev/shm")  # a file system of its own on Linux


@pytest.fixture
def hatch_build(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module. hatchling and setuptools are there only while something is built."""
    for name, attribute in (("hatchling.builders.hooks.plugin.interface", "BuildHookInterface"), ("setuptools", "")):
        stand_in = ModuleType(name)
        for one in (attribute,) if attribute else ("Distribution", "Extension"):
            setattr(stand_in, one, object)
        monkeypatch.setitem(sys.modules, name, stand_in)
    spec = importlib.util.spec_from_file_location("hatch_build", "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_temporary_files_may_lie_on_another_file_system(hatch_build: Any, tmp_path: Path) -> None:
    if not MEMORY.is_dir() or MEMORY.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two file systems")
    place = tmp_path / "_native.abi3.so"
    place.write_bytes(b"old")
    with tempfile.TemporaryDirectory(dir=MEMORY) as scratch, place.open("rb") as running:
        built = Path(scratch, "_native.abi3.so")
        built.write_bytes(b"new")
        hatch_build.install(built, place)
        assert running.read() == b"old", "a process may have it mapped"
    assert place.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [place]
