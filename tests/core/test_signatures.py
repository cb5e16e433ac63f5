"""Parameter lists stay short: what belongs together is a named value."""

from __future__ import annotations

import ast

import imports

MOST = 6
# ModelOpt calls it, with a signature of its own (quantize/simulation.py).
THEIRS = {"_dynamic_block"}


def test_no_function_has_more_than_six_parameters() -> None:
    found = []
    for name, path in imports.modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in THEIRS:
                taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                own = [parameter.arg for parameter in taken if parameter.arg not in ("self", "cls")]
                found += [f"{name}:{node.lineno} {node.name}({', '.join(own)})"] if len(own) > MOST else []
    assert not found
