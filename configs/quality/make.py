"""Writes texts.jsonl again: python3.11 configs/quality/make.py

18 texts of our own (own.txt), and the rows that configs/calibration/make.py would write after those that it does write:
docstrings of modules that python-docs.jsonl does not quote. The two kinds alternate, so that any number of the first
ones has both.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "calibration"))
import make as calibration  # noqa: E402


def own() -> Iterator[dict[str, Any]]:
    """TEXT begins a text; USER and ASSISTANT begin a dialogue's two turns."""
    blocks: list[tuple[str, list[str]]] = []
    for line in (HERE / "own.txt").read_text(encoding="utf-8").splitlines():
        if line in ("TEXT", "USER", "ASSISTANT"):
            blocks.append((line, []))
        else:
            blocks[-1][1].append(line)
    spoken = [(kind, "\n".join(lines)) for kind, lines in blocks]
    for (kind, text), (_, answer) in zip(spoken, [*spoken[1:], ("", "")], strict=True):
        if kind == "TEXT":
            yield {"text": text}
        elif kind == "USER":
            yield {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]}


def docstrings() -> list[dict[str, Any]]:
    """The rows after those of python-docs.jsonl."""
    library = Path(sysconfig.get_path("stdlib"))
    rows: list[dict[str, Any]] = []
    for module in calibration.MODULES:
        source = (library / f"{module}.py").read_text(encoding="utf-8")
        if "copyright" not in source.lower():
            rows += calibration.rows_of(module, source, len(rows) // 2)
    return rows[calibration.ROWS :]


def main() -> None:
    prose = list(own())
    chat = [row for row in prose if "messages" in row]
    text = [row for row in prose if "text" in row]
    mixed = [row for three in zip_longest(text, docstrings(), chat) for row in three if row]
    with open(HERE / "texts.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in mixed)


if __name__ == "__main__":
    main()
