"""The reference pages say what the code says, and the site builds from them without a network."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import documents
import pytest

from builder.architectures import catalog
from builder.core import errors
from builder.machine import gpus
from builder.recipe.schema import known_keys
from builder.trtllm import versions
from docs import generate
from docs.generate import markdown, usage


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("reference")
    generate.write(directory)
    return {page.stem: page.read_text() for page in directory.iterdir()}


def test_every_command_and_option_has_a_row(pages: dict[str, str]) -> None:
    for name, line in usage.summaries().items():
        assert f"## builder {name}\n" in pages["commands"]
        assert line
    for option in ("--model", "--keep-fp8", "--json", "--older-than"):
        assert re.search(rf"`[^`]*{option}\b", pages["commands"])


def test_every_key_of_a_recipe_has_a_row(pages: dict[str, str]) -> None:
    for key in known_keys():
        assert f"| `{key}` |" in pages["recipe"] or f"\n## {key}\n" in pages["recipe"]


def test_every_profile_card_flag_and_rule_has_its_place(pages: dict[str, str]) -> None:
    for name in gpus.names():
        assert f"## {name}\n" in pages["gpus"]
        for card in gpus.load(name).cards:
            assert card.name in pages["gpus"]
    for version in versions.versions():
        known = versions.load(version)
        assert all(f"| `--{flag}` |" in pages["engine-flags"] for flag in (*known.flags, *known.removed))
    assert all(f"## {rule}\n" in pages["rules"] for rule in known.rules)


def test_experts_that_stay_stacked_are_an_exception(pages: dict[str, str]) -> None:
    (said,) = re.findall(r"layers of their own.*?those of (.*?) stay stacked", pages["models"])
    titles = [one.title for one in catalog.every() if one.experts and not one.experts.apart]
    assert sorted(said.split(" and ")) == sorted(titles)


def test_exit_codes_are_those_of_the_code(pages: dict[str, str]) -> None:
    named = {int(n) for n in re.findall(r"^\| (\d+) \|", pages["exit-codes"], re.M)}
    assert named == {0, 130} | {kind.exit_code for kind in errors.BuilderError.__subclasses__()}


def _read_variables() -> Iterator[str]:
    """Names that the builder reads by os.environ, as literals or as constants of the same file."""
    for file in sorted(Path("builder").rglob("*.py")):
        text = file.read_text()
        constants = dict(re.findall(r'^([A-Z_]+)(?:: \w+)? = "([A-Z_]+)"', text, re.M))
        for node in ast.walk(ast.parse(text)):
            named = None
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("os.environ.get", "os.getenv"):
                named = node.args[0]
            elif isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
                named = node.slice
            if isinstance(named, ast.Constant):
                yield str(named.value)
            elif isinstance(named, ast.Name) and named.id in constants:
                yield constants[named.id]


# Set by the builder, the image or compose for its own processes; not for users.
INTERNAL = {"BUILDER_PROGRESS_FD", "BUILDER_CONTAINER", "BUILDER_LLMAPI_OVERLAY", "BUILDER_LOGS"}


def test_every_variable_that_the_code_reads_is_documented() -> None:
    assert set(_read_variables()) - INTERNAL <= set(usage.ENVIRONMENT)


def test_cells_are_escaped() -> None:
    assert markdown.text("a | *b* `c|d` <e>") == r"a \| \*b\* `c\|d` \<e\>"
    assert markdown.text("one ` tick") == "one ' tick"
    assert markdown.code("a|b") == r"`a\|b`"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does it, from a copy."""
    copy = tmp_path_factory.mktemp("project")
    shutil.copytree(documents.ROOT / "docs", copy / "docs", ignore=shutil.ignore_patterns("reference", "generate"))
    shutil.copy(documents.ROOT / "zensical.toml", copy)
    generate.write(copy / "docs" / "reference")
    zensical = Path(sys.executable).parent / "zensical"
    if not zensical.is_file():
        pytest.skip("zensical is not installed (make test-trtllm's environment has none)")
    done = subprocess.run([str(zensical), "build", "--strict"], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy / "site"


def test_the_site_has_a_page_for_each_document(site: Path) -> None:
    pages = [page.relative_to(documents.ROOT / "docs") for page in documents.documents() if "docs" in page.parts]
    assert all((site / page.with_suffix(".html")).is_file() for page in pages)
    assert (site / "reference" / "commands.html").is_file()


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r'"([\w/-]+)\.md"', (documents.ROOT / "zensical.toml").read_text()))
    docs = documents.ROOT / "docs"
    pages = {str(p.relative_to(docs).with_suffix("")) for p in documents.documents() if docs in p.parents}
    assert named == pages | {f"reference/{name}" for name in generate.PAGES}


def test_the_site_loads_nothing_from_other_hosts(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//|<link[^>]+href="(?:https?:)?//', page.read_text()
        )
        assert not loaded, page
