"""Imports between modules run downwards only, and modules that run as processes are named in one place."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import imports
import pytest

import builder
from builder.core import workers

MODULES = imports.modules()
LAYERS = re.findall(r"^    (\w+) ", builder.__doc__ or "", re.MULTILINE)  # lowest first
WORKERS = {name: value for name, value in vars(workers).items() if name.isupper()}


def package_of(module: str) -> str:
    """builder.evaluate.runners.local -> evaluate; builder.plan -> plan."""
    return module.split(".")[1]


def modules_in_layers() -> list[str]:
    return sorted(module for module in MODULES if module not in ("builder", "builder.__main__"))


def test_every_module_belongs_to_a_layer() -> None:
    assert {package_of(module) for module in modules_in_layers()} <= set(LAYERS)
    top = {path.stem for path in Path(builder.__file__).parent.glob("*.py")}
    assert top == {"__init__", "__main__", "pipeline", "plan"}, "everything else lives in a package"


@pytest.mark.parametrize("module", modules_in_layers())
def test_imports_go_to_the_same_or_a_lower_layer(module: str) -> None:
    """Imports inside functions and under TYPE_CHECKING count too."""
    own = LAYERS.index(package_of(module))
    above = [name for name in imports.imported(MODULES[module]) - {"builder"} if LAYERS.index(package_of(name)) > own]
    assert not above, f"{module} imports {', '.join(sorted(above))}, which is in a higher layer"


def test_no_import_cycles() -> None:
    """Depth first: a module that is met again while its own imports are followed closes a cycle."""
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(imports.imported(MODULES[module])):
                follow(name, (*path, module))
            done.add(module)

    for module in modules_in_layers():
        follow(module, ())


def test_every_package_says_what_it_is_for() -> None:
    for folder in {path.parent for path in MODULES.values()}:
        assert (folder / "__init__.py").is_file(), folder
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), folder


@pytest.mark.parametrize("name", WORKERS)
def test_every_worker_can_be_started(name: str) -> None:
    """It is a module file with a `__main__` block."""
    assert re.search(r"^if __name__ == .__main__.:$", MODULES[WORKERS[name]].read_text(), re.MULTILINE)


def test_no_other_string_names_a_module_to_start() -> None:
    for module, path in MODULES.items():
        if path.name != "workers.py":
            texts = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
            assert not texts & MODULES.keys() - {"builder"}, f"{module}: take the name from builder.core.workers"
