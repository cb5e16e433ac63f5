"""README.md, CONTRIBUTING.md and docs/, with their shell blocks and commands. Generated pages are left out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GENERATED = ROOT / "docs" / "reference"
SHELLS = ("bash", "sh", "shell", "console")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, where it begins (for messages), and its title (a file's path)."""

    language: str
    text: str
    place: str
    title: str = ""


def documents() -> list[Path]:
    """README.md, CONTRIBUTING.md and every hand-written page of docs/."""
    pages = [page for page in sorted((ROOT / "docs").rglob("*.md")) if GENERATED not in page.parents]
    top = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
    return [page for page in (*top, *pages) if page.is_file()]


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, also those inside of a list or an admonition."""
    found = []
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^( *)```([\w-]*)([^\n]*)\n(.*?)^\1```$", text, re.M | re.S):
        indent, language, rest, body = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        plain = "\n".join(row.removeprefix(indent) for row in body.splitlines())
        title = re.search(r'title="([^"]+)"', rest)
        found.append(Block(language, plain, f"{page.relative_to(ROOT)}:{line}", title[1] if title else ""))
    return found


def commands(program: str = "") -> Iterator[tuple[str, str]]:
    """(place, command line) of every line of a shell block that starts with `program`. Lines are joined at a backslash;
    comments, redirections and leading VARIABLE=value words are removed."""
    for page in documents():
        for block in blocks(page):
            if block.language not in SHELLS:
                continue
            for line in block.text.replace("\\\n", " ").splitlines():
                command = re.sub(r"(^|\s)#.*", "", line).strip()
                command = re.sub(r"^([A-Z_]+=\S*\s+)+", "", command).partition(" > ")[0]
                if command and (not program or command.split()[: len(program.split())] == program.split()):
                    yield block.place, command
