"""Any content of a manifest, a record or an engine's files is rejected as damaged or read; never a traceback."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_store

from builder.clean import removal
from builder.clean.reachability import Request
from builder.core import atomic, manifest
from builder.core import store as stores
from builder.core.errors import BuilderError, IntegrityError, UsageError
from builder.core.output import Output
from builder.core.store import Store
from builder.publish import build_record
from builder.report import gather
from builder.triton import repository
from builder.trtllm import compatibility, probe_store

QUIET = Output("quiet")
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1.5, 1e308, 10**400, "", "x", "../../../etc/passwd", "/etc/passwd", "\0", "\ud800",
    [], ["x"], {}, {"": {}}, [[[[[[]]]]]], {"files": {"..": {"size": 1, "sha256": "0" * 64}}},
)  # fmt: skip
RAW = ("", "{", "null", "[]", '"x"', "NaN", "{}" * 2, "[" * 100_000, '{"a":' * 100_000, "\x00", "1" * 5000)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every node of a JSON value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def mutations(value: Any, count: int, seed: int) -> Iterator[str]:
    """Mutated texts of a JSON file: with each node deleted, and `count` times with another value or key."""
    generator = random.Random(seed)
    nodes = [path for path in places(value) if path]

    def changed(path: tuple[Any, ...], *new: Any, key: str | None = None) -> str:
        made = copy.deepcopy(value)
        inner = made
        for step in path[:-1]:
            inner = inner[step]
        if new:
            inner[path[-1]] = new[0]
        else:
            held = inner.pop(path[-1])
            if key is not None and isinstance(inner, dict):
                inner[key] = held
        return json.dumps(made)

    yield from RAW
    yield from (changed(path) for path in nodes)
    for _ in range(count):
        yield changed(generator.choice(nodes), generator.choice(VALUES))
        yield changed(generator.choice(nodes), key=generator.choice(("x", "..", "/etc/passwd", "a/../b", "\0")))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with every kind of artifact that a report reads, with a small model so that opening it is fast."""
    root = tmp_path_factory.mktemp("built")
    link = report_store.build(root, link="a")
    report_store.evaluate(link)
    report_store.ask(link)
    report_store.put_benchmark(link, concurrency=(1, 4))
    return root


STAGE_NAMES = (
    "snapshot",
    "calibration",
    "checkpoint",
    "engine",
    "repository",
    "smoke",
    "scores",
    "evaluation",
    "benchmark",
)


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_changed_manifest_is_damaged_everywhere(built: Path, stage: str) -> None:
    [directory, *_] = sorted((built / stage).iterdir())
    file = directory / "manifest.json"
    before = file.read_text()
    whole, tried = json.loads(before), 0
    try:
        for text in mutations(whole, 60, seed=len(stage)):
            file.write_text(text, errors="surrogatepass")
            if text == json.dumps(whole) or _is_equal(text, whole):
                continue
            tried += 1
            assert stores.read(directory) is None, text[:300]
            if tried % 40 == 0:
                _open_all(built, directory, stage)
    finally:
        file.write_text(before)
    assert tried > 60
    assert stores.read(directory)


def _is_equal(text: str, whole: Any) -> bool:
    """Compares as JSON text, because 1, 1.0 and True are equal in Python."""
    try:
        return json.dumps(json.loads(text), sort_keys=True) == json.dumps(whole, sort_keys=True)
    except (ValueError, RecursionError):
        return False


def _open_all(root: Path, directory: Path, stage: str) -> None:
    """Calls everything that reads a store, on a store with a damaged manifest."""
    name = f"{stage}/{directory.name}"
    assert stores.verify(root, QUIET)[name][0].startswith("manifest.json is damaged")
    assert Store(root, QUIET).find(stage, directory.name) is None
    assert directory not in {artifact.path for artifact in stores.artifacts(root)}
    planned = removal.plan(root, Request(older_than=0.0))
    assert directory not in {entry.path for entry in planned.remove}
    assert directory in {entry.path for entry in planned.alone}
    build_record.find(root, directory)
    if stage == "repository":
        with pytest.raises(BuilderError):
            repository.open_repository(root / "models" / "a")
        with pytest.raises(BuilderError):
            gather.gather(root / "models" / "a")
    else:
        gather.gather(root / "models" / "a")


def test_a_changed_build_record_does_not_count(built: Path) -> None:
    file = built / "builds" / "a.json"
    before = file.read_text()
    link = built / "models" / "a"
    try:
        for number, text in enumerate(mutations(json.loads(before), 100, seed=1)):
            file.write_text(text, errors="surrogatepass")
            if _is_equal(text, json.loads(before)):
                continue
            assert build_record.find(built, link.resolve()) is None, text[:300]
            if number % 25 == 0:
                assert {entry.path.parent.name for entry in removal.plan(built, Request()).remove} <= {"locks"}
                assert gather.gather(link).command is None
    finally:
        file.write_text(before)


def test_a_changed_evaluation_is_none(built: Path) -> None:
    [file, *_] = sorted((built / "evaluation").glob("*/evaluation.json"))
    before = file.read_text()
    try:
        for number, text in enumerate(mutations(json.loads(before), 20, seed=2)):
            if number % 5 == 0 and not _is_equal(text, json.loads(before)):
                file.write_text(text, errors="surrogatepass")
                gather.gather(built / "models" / "a")
                assert stores.read(file.parent) is None
    finally:
        file.write_text(before)


@pytest.mark.parametrize("name", ["config.json", compatibility.BUILT_WITH])
def test_an_engines_files_can_hold_anything(tmp_path: Path, name: str) -> None:
    """In a copy outside of a store, where no manifest protects them."""
    config = {
        "version": "1.2.1",
        "pretrained_config": {"logits_dtype": "float32", "mapping": {"world_size": 1}},
        "build_config": {"max_batch_size": 4, "max_beam_width": 1, "plugin_config": {"use_paged_context_fmha": True}},
    }
    built_with = {
        "target": "engine",
        "tensorrt_llm": "1.2.1",
        "tensorrt": "10",
        "sm": 120,
        "gpu": "RTX",
        "driver": "590",
    }
    for file, content in (("config.json", config), (compatibility.BUILT_WITH, built_with)):
        (tmp_path / file).write_text(json.dumps(content))
    served = compatibility.Served(
        tmp_path / "config.pbtxt",
        tmp_path,
        8,
        2,
        frozenset(compatibility.NEED_PAGED_FMHA),
        {"context_logits": "x"},
        "",
        True,
        True,
        {},
    )
    refused = 0
    for text in mutations(config if name == "config.json" else built_with, 300, seed=3):
        (tmp_path / name).write_text(text, errors="surrogatepass")
        try:
            compatibility.missing(served)
            compatibility.mismatches(
                served, compatibility.read_engine(tmp_path), compatibility.Runtime([], "1.2.1", "10")
            )
        except IntegrityError:
            refused += 1
    assert refused > 50


def test_answers_of_probes_can_hold_anything(tmp_path: Path) -> None:
    answer = {"outcome": "built", "reason": "it did", "card": "RTX", "date": "2026-01-01", "asked": {"a": 1}}
    refused = 0
    for text in mutations({"sm": 120, "answers": {"one": answer}}, 300, seed=4):
        file = tmp_path / "answers.json"
        file.write_text(text, errors="surrogatepass")
        try:
            probe_store.read(file)
        except IntegrityError:
            refused += 1
    assert refused > 50


def other_content(file: Path) -> None:
    """Changes a file, but neither its size nor its time."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_file_of_equal_size_and_other_content_is_refused(tmp_path: Path) -> None:
    link = report_store.build(tmp_path, link="a")
    [file] = [path for path in link.resolve().iterdir() if path.name != "manifest.json"]
    other_content(file)
    for argv in (
        ["serve", str(link)],
        ["smoke", str(link)],
        ["bench", str(link)],
        ["load", str(link)],
        ["report", str(link)],
    ):
        done = subprocess.run([sys.executable, "-m", "builder", *argv], capture_output=True, text=True, timeout=120)
        assert done.returncode == 6, (argv, done.stderr)
        assert f"{file} has changed since the stage was made" in done.stderr
    store = Store(tmp_path, QUIET)
    assert store.find("repository", link.resolve().name) is None, "a build makes it again"


@pytest.mark.parametrize("young", [0.0, manifest.YOUNG])
def test_a_process_hashes_a_file_once_and_again_when_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, young: float
) -> None:
    """A file that was written just now is hashed each time: its times may not show the next change."""
    hashed: list[Path] = []

    def counted(path: Path) -> str:
        hashed.append(path)
        return real(path)

    real = manifest.sha256
    monkeypatch.setattr(manifest, "sha256", counted)
    monkeypatch.setattr(manifest, "YOUNG", young)
    place = report_store.build(tmp_path, link="a").resolve()
    [file] = [path for path in place.iterdir() if path.name != "manifest.json"]
    found = manifest.load(place)
    for _ in range(3):
        assert not list(manifest.file_problems(place, found, hashed_up_to=manifest.SMALL))
    assert len(hashed) == (3 if young else 1)
    assert not list(manifest.file_problems(place, found))
    assert len(hashed) == (4 if young else 2), "`builder verify` reads what is on the disk now"
    other_content(file)
    [problem] = manifest.file_problems(place, found, hashed_up_to=manifest.SMALL)
    assert "has changed" in problem


def test_an_added_file_is_refused_and_bytecode_is_not(tmp_path: Path) -> None:
    """Triton would load an added model and run its Python code."""
    link = report_store.build(tmp_path, link="a")
    added = link.resolve() / "models" / "mine" / "1" / "model.py"
    (link.resolve() / "__pycache__").mkdir()
    (link.resolve() / "__pycache__" / "model.cpython-311.pyc").write_bytes(b"")
    repository.open_repository(link)
    added.parent.mkdir(parents=True)
    added.write_text("")
    with pytest.raises(IntegrityError) as caught:
        repository.open_repository(link)
    assert f"{added} was added" in caught.value.why


@pytest.mark.parametrize("name", ["engine", "checkpoint"])
def test_a_changed_engine_or_checkpoint_is_not_served(tmp_path: Path, name: str) -> None:
    made = report_store.build(tmp_path, link="a")
    [directory] = (tmp_path / name).iterdir()
    facts = {**repository.open_repository(made).facts}
    facts[name] = str(directory if name == "engine" else directory / "unified")
    opened = repository.Repository(made.resolve(), "", facts)
    repository.check_served(opened)
    other_content(next(path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json"))
    with pytest.raises(IntegrityError, match="changed, added or removed after the build"):
        repository.check_served(opened)


def test_a_copy_outside_of_its_store_opens(tmp_path: Path) -> None:
    made = report_store.build(tmp_path / "store", link="a")
    shutil.copytree(made.resolve(), tmp_path / "copy")
    assert repository.open_repository(tmp_path / "copy").path == tmp_path / "copy"
    shutil.copytree(made.resolve(), tmp_path / "repository" / "0123456789abcdef")
    with pytest.raises(IntegrityError, match="changed, added or removed after the build"):
        repository.open_repository(tmp_path / "repository" / "0123456789abcdef")


def test_verify_names_a_stage_without_a_manifest(tmp_path: Path) -> None:
    made = report_store.build(tmp_path)
    (made.resolve() / "manifest.json").unlink()
    [problem] = [problems[0] for problems in stores.verify(tmp_path, QUIET).values() if problems]
    assert "manifest.json is damaged" in problem


def test_what_json_makes_of_a_value_is_what_is_sealed() -> None:
    value = {"b": {1: "one", "two": (1, 2)}, "a": float("nan")}
    manifest.check_seal(json.loads(json.dumps(manifest.seal(value))))
    with pytest.raises(manifest.Damaged):
        manifest.check_seal({**manifest.seal(value), "a": 1})


# Replacing a directory.


def fill(path: Path, content: str) -> Path:
    path.mkdir()
    (path / "file").write_text(content)
    return path


EXCHANGED = """
import os, signal, sys
from pathlib import Path
from builder.core import atomic
new, final, number, exchange = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "exchange"
if not exchange:
    atomic._exchange = lambda *names: False
count = 0
def hook(event, arguments):
    global count
    if event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "open", "ctypes.call_function"):
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
atomic.replace_directory(new, final)
"""


@pytest.mark.parametrize("how", ["exchange", "two renames"])
def test_a_kill_while_a_directory_is_replaced_loses_neither(tmp_path: Path, how: str) -> None:
    seen = set()
    for number in range(1, 30):
        root = tmp_path / str(number)
        root.mkdir()
        new, final = fill(root / ".k.1.tmp", "new"), fill(root / "k", "old")
        argv = [sys.executable, "-c", EXCHANGED, str(new), str(final), str(number), how]
        done = subprocess.run(argv, capture_output=True, text=True)
        assert done.returncode in (0, -9), done.stderr
        atomic.restore_backup(final)
        seen.add((final / "file").read_text())
        if done.returncode == 0:
            break
    assert done.returncode == 0
    assert seen == {"old", "new"} if how == "two renames" else seen >= {"new"}


def test_an_interrupt_while_a_directory_is_replaced_comes_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    new, final = fill(tmp_path / ".k.1.tmp", "new"), fill(tmp_path / "k", "old")
    monkeypatch.setattr(atomic, "_exchange", lambda *names: False)
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        made = rename(path, target)
        if path == final:
            signal.raise_signal(signal.SIGINT)
        return made

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        atomic.replace_directory(new, final)
    assert (final / "file").read_text() == "new"


def test_a_link_is_replaced_in_one_step(tmp_path: Path) -> None:
    link = tmp_path / "models" / "a"
    atomic.replace_link(link, "../one")
    atomic.replace_link(link, "../two")
    assert os.readlink(link) == "../two"
    assert list(link.parent.iterdir()) == [link]
    link.unlink()
    link.mkdir()
    with pytest.raises(BuilderError):
        atomic.replace_link(link, "../one")
    assert list(link.parent.iterdir()) == [link]


def test_the_file_system_under_the_tests_exchanges_names(tmp_path: Path) -> None:
    one, two = fill(tmp_path / "one", "1"), fill(tmp_path / "two", "2")
    if not atomic._exchange(one, two):
        pytest.skip("this file system can't")
    assert (one / "file").read_text() == "2"
    with pytest.raises(OSError, match="No such file"):
        atomic._exchange(one, tmp_path / "three")


def test_an_empty_path_is_refused_by_every_command() -> None:
    from builder.cli import main

    for argv in (["build", "--output", ""], ["clean", "--output", " "], ["report", "x", "--html", ""]):
        with pytest.raises(SystemExit) as ended:
            main.parser().parse_args(argv)
        assert ended.value.code == 2
    with pytest.raises(UsageError):
        removal.check_root(Path("/"))
