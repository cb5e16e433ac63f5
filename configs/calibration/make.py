"""Writes python-docs.jsonl and python-docs-text.jsonl again: python3.11 configs/calibration/make.py [FILE]

64 rows for the demo, half {"text"}, half {"messages"}: docstrings of CPython's standard library, two rows for each of
32 modules. The second file has the texts alone, for models without a chat template. Needs nothing but that library;
another patch release of it changes a word here and there.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# None of them is quoted by the evaluation texts in tests/data/eval, and none has a copyright notice of its own.
MODULES = (  # noqa: SIM905 - a line for many modules, not for each one
    "argparse ast asyncio/base_events asyncio/streams bdb cmd code codecs collections/__init__ "
    "concurrent/futures/_base contextlib copy dataclasses dis email/message email/policy enum filecmp fileinput "
    "functools gettext gzip hashlib html/parser http/client http/cookies importlib/resources/abc inspect io ipaddress "
    "json/__init__ locale mailbox numbers os pathlib pdb pickle pickletools pprint random reprlib runpy selectors "
    "shlex smtplib socket socketserver ssl tabnanny threading tokenize traceback typing unittest/case unittest/mock "
    "urllib/parse urllib/request uuid weakref webbrowser"
).split()
ROWS = 64
SMALLEST, LARGEST = 700, 1600  # characters of a row
QUESTIONS = (
    "What does `{0}` do in Python?",
    "Explain {0} to me.",
    "How is {0} used?",
    "I keep seeing {0} in code. What is it for?",
)


def docstrings(source: str) -> Iterator[tuple[str, str]]:
    """(name, docstring) of the module ("") and of its public classes, methods and functions, in the file's order."""
    tree = ast.parse(source)
    stack: list[tuple[str, ast.AST]] = [("", tree)]
    while stack:
        name, node = stack.pop(0)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield name, inspect.cleandoc(text)
        if isinstance(node, ast.Module | ast.ClassDef):
            stack[:0] = [
                (f"{name}.{child.name}".lstrip("."), child)
                for child in node.body
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and not child.name.startswith("_")
            ]


def shortened(text: str) -> str:
    """Whole paragraphs from the beginning, LARGEST characters at most."""
    return text if len(text) <= LARGEST else text[:LARGEST].rpartition("\n\n")[0]


def rows_of(module: str, source: str, number: int) -> Iterator[dict[str, object]]:
    """A text of several docstrings, and a dialogue about the longest one that is left."""
    found = [(name, shortened(text)) for name, text in docstrings(source)]
    found = [(name, text) for name, text in found if len(text) >= 60]
    name = module.removesuffix("/__init__").replace("/", ".")
    answers = [(member, text) for member, text in found if member and len(text) >= SMALLEST // 2]
    if not answers:
        return
    member, answer = max(answers, key=lambda pair: len(pair[1]))
    text = f"The module {name}\n"
    for other, doc in found:
        if other != member and len(text) + len(doc) <= LARGEST:
            text += f"\n{f'{name}.{other}' if other else name}\n{doc}\n"
    if len(text) < SMALLEST:
        return
    question = QUESTIONS[number % len(QUESTIONS)].format(f"{name}.{member}")
    yield {"text": text.strip()}
    yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def main(target: Path) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    rows: list[dict[str, object]] = []
    for module in MODULES:
        if len(rows) == ROWS:
            break
        source = (library / f"{module}.py").read_text(encoding="utf-8")
        if "copyright" not in source.lower():
            rows += rows_of(module, source, len(rows) // 2)
    if len(rows) != ROWS:
        raise SystemExit(f"only {len(rows)} rows found")
    write(target, rows)
    write(target.with_name(f"{target.stem}-text.jsonl"), [row for row in rows if "text" in row])


def write(target: Path, rows: list[dict[str, object]]) -> None:
    with open(target, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("python-docs.jsonl"))
