"""`builder clean` removes exactly what was planned: only the store's own stages, only on request, completely."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import report_store

from builder.aiperf import environment
from builder.clean import removal
from builder.clean.reachability import Request
from builder.cli.main import main
from builder.core import manifest
from builder.core import store as stores
from builder.core.errors import BuilderError, UsageError
from builder.core.locks import serving_lock
from builder.core.output import Output
from builder.core.store import Artifact, Store

QUIET = Output("quiet")


def stage(root: Path, name: str, ingredients: Mapping[str, Any], content: str = "") -> Artifact:
    def make(directory: Path) -> dict[str, Any]:
        (directory / "file").write_text(content or f"{name} {json.dumps(ingredients)}")
        return {}

    return Store(root, QUIET).stage(name, ingredients, make)


def chain(root: Path, n: int, content: str = "") -> tuple[Artifact, Artifact, Artifact]:
    """A checkpoint, its engine and the repository."""
    checkpoint = stage(root, "checkpoint", {"n": n}, content)
    engine = stage(root, "engine", {"checkpoint": checkpoint.digest, "n": n})
    return checkpoint, engine, stage(root, "repository", {"engine": engine.digest})


def link(root: Path, name: str, repository: Artifact) -> Path:
    path = root / "models" / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(os.path.relpath(repository.path, path.parent))
    return path


def removed(root: Path, **request: Any) -> set[Path]:
    """Plans, carries out, checks that exactly the planned paths are gone, and returns them."""
    before = {path for path in root.rglob("*") if ".trtllm" not in path.name}
    made = removal.plan(root, Request(**request))
    assert removal.carry_out(made) == []
    gone = {entry.path for entry in made.remove}
    after = set(root.rglob("*"))
    assert {path for path in before if path not in after and path.parent in after} == gone - {root / "locks"}
    return {path for path in gone if path.parent.name not in ("logs", "locks")}


def run(*argv: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    argv = (sys.executable, "-m", "builder", "clean", *argv)
    return subprocess.run(argv, capture_output=True, text=True, cwd=cwd, env=environment)


def test_what_was_built_stays_until_it_is_named_or_old(tmp_path: Path) -> None:
    linked, other = chain(tmp_path, 1), chain(tmp_path, 2)
    alone = stage(tmp_path, "checkpoint", {"n": 3})
    name = link(tmp_path, "a", linked[2])
    assert removed(tmp_path) == set()
    assert removed(tmp_path, older_than=3600.0) == set()
    assert removed(tmp_path, names=(f"checkpoint/{alone.path.name}",)) == {alone.path}
    assert removed(tmp_path, older_than=0.0) == {artifact.path for artifact in other}
    assert removed(tmp_path, names=("a",)) == {name, *(artifact.path for artifact in linked)}


def test_old_is_what_no_build_used_lately(tmp_path: Path) -> None:
    old, used, linked = (stage(tmp_path, "checkpoint", {"n": n}) for n in range(3))
    link(tmp_path, "a", stage(tmp_path, "repository", {"of": linked.digest}))
    for artifact in (old, used, linked):
        content = {**artifact.manifest, "started": time.time() - 10 * 86400}
        content.pop(manifest.SEAL)
        (artifact.path / "manifest.json").write_text(json.dumps(manifest.seal(content)))
        os.utime(artifact.path, (time.time() - 10 * 86400,) * 2)
    assert Store(tmp_path, QUIET).stage("checkpoint", {"n": 1}, lambda _: {}).cached
    assert removed(tmp_path, older_than=removal.age("11d")) == set()
    assert removed(tmp_path, older_than=removal.age("7d")) == {old.path}


@pytest.mark.parametrize(("text", "seconds"), [("7d", 604800), ("12h", 43200), ("0", 0), ("1.5m", 90), ("2w", 1209600)])
def test_ages(text: str, seconds: float) -> None:
    assert removal.age(text) == seconds


@pytest.mark.parametrize("text", ["", "7 d", "-1d", "1e3", "d", "7y", "9" * 400, "٣d"])
def test_what_is_no_age_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError, match="not an age"):
        removal.age(text)


def test_a_link_removed_by_hand_takes_its_repository_along(tmp_path: Path) -> None:
    kept, gone = report_store.build(tmp_path, gpu="sm120"), report_store.build(tmp_path, gpu="cpu")
    record, target = tmp_path / "builds" / f"{gone.name}.json", gone.resolve()
    assert removed(tmp_path) == set()
    gone.unlink()
    went = removed(tmp_path)
    assert {record, target} <= went
    assert not went & {kept.resolve()}
    stages = {path.parent.name for path in went}
    assert stages == {"builds", "repository", "engine", "smoke"}, "the checkpoint is the other's too"


@pytest.mark.parametrize("newest", ["first", "second"])
def test_of_two_checkpoints_with_the_same_content_none_goes(tmp_path: Path, newest: str) -> None:
    """The code changed and its output did not: the digest does not tell which of them the next build will look for."""
    checkpoints = [stage(tmp_path, "checkpoint", {"code": code}, "same bytes") for code in ("old", "new")]
    assert checkpoints[0].digest == checkpoints[1].digest
    repository = stage(tmp_path, "repository", {"checkpoint": checkpoints[newest == "second"].digest})
    link(tmp_path, "a", repository)
    assert removed(tmp_path, older_than=0.0) == set()
    assert all(checkpoint.path.is_dir() for checkpoint in checkpoints)


def test_measurements_go_with_what_they_are_of(tmp_path: Path) -> None:
    """Scores of a kept checkpoint stay, with their texts and tables; those of a removed one don't."""
    kept, lost = (stage(tmp_path, "checkpoint", {"n": n}) for n in (1, 2))
    link(tmp_path, "a", stage(tmp_path, "repository", {"checkpoint": kept.digest}))
    texts = stage(tmp_path, "texts", {})
    scores = [stage(tmp_path, "scores", {"of": [one.digest], "texts": texts.digest}) for one in (kept, lost)]
    tables = [stage(tmp_path, "evaluation", {"of": [s.digest for s in of]}) for of in (scores[:1], scores)]
    assert removed(tmp_path) == set()
    assert removed(tmp_path, names=(f"checkpoint/{lost.path.name}",)) == {lost.path, scores[1].path, tables[1].path}
    assert removed(tmp_path, older_than=0.0) == set()


def test_young_measurements_keep_an_old_model(tmp_path: Path) -> None:
    checkpoint = stage(tmp_path, "checkpoint", {})
    content = {**checkpoint.manifest, "started": 1.0}
    content.pop(manifest.SEAL)
    (checkpoint.path / "manifest.json").write_text(json.dumps(manifest.seal(content)))
    os.utime(checkpoint.path, (1, 1))
    stage(tmp_path, "scores", {"of": [checkpoint.digest]})
    assert removed(tmp_path, older_than=3600.0) == set()


def test_a_damaged_stage_in_the_middle_protects_what_it_was_made_from(tmp_path: Path) -> None:
    """The engine's manifest can't be read, so no digest leads to the checkpoint; the build record does."""
    made = report_store.build(tmp_path)
    [engine] = (tmp_path / "engine").iterdir()
    (engine / "manifest.json").write_text("{")
    assert removed(tmp_path, older_than=0.0) == set()
    assert any((tmp_path / "checkpoint").iterdir())
    assert made.exists()


def test_a_link_that_became_a_directory_keeps_itself_and_what_it_was_made_from(tmp_path: Path) -> None:
    first = chain(tmp_path, 1)
    name = link(tmp_path, "a", first[2])
    name.unlink()
    shutil.copytree(first[2].path, name)
    made = removal.plan(tmp_path, Request(everything=True))
    assert [entry.path for entry in made.alone] == [name]
    removal.carry_out(made)
    assert name.is_dir()
    assert all(artifact.path.is_dir() for artifact in first[:2])


def test_a_served_repository_stays_with_all_that_it_needs(tmp_path: Path) -> None:
    first = chain(tmp_path, 1)
    link(tmp_path, "a", first[2])
    with serving_lock(first[2].path):
        for request in (Request(everything=True), Request(names=("a",)), Request(older_than=0.0)):
            made = removal.plan(tmp_path, request)
            assert not {entry.path for entry in made.remove} & {artifact.path for artifact in first}
            assert {entry.why for entry in made.keep} & {f"repository/{first[2].path.name} is being served"} or (
                not request.everything
            )
        late = removal.Plan(tmp_path, remove=[removal.Entry(first[2].path, "planned before it was served")])
        late.remove.append(removal.Entry(first[1].path, "its engine"))
        failed = removal.carry_out(late)
        assert [entry.path for entry in failed] == [first[2].path, first[1].path]
        assert failed[0].why == "it is being served"
    assert first[2].path.is_dir()
    assert first[2].path in removed(tmp_path, everything=True)


def test_what_is_not_the_stores_is_left_alone_and_named(tmp_path: Path) -> None:
    """Stray files, links, the user's own directories with names of stages, files added to a stage."""
    mine = stage(tmp_path, "engine", {"mine": 1})
    (mine.path / "notes.txt").write_text("of the user's")
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "file").write_text("precious")
    (tmp_path / "tasks" / "my_task").mkdir(parents=True)
    (tmp_path / "tasks" / "my_task" / "task.yaml").write_text("")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "book.txt").write_text("")
    (tmp_path / "scores").symlink_to(elsewhere)
    (tmp_path / "engine" / "0123456789abcdef").symlink_to(elsewhere)
    (tmp_path / "builds").mkdir()
    (tmp_path / "builds" / "mine.json").write_text('{"repository": "mine"}')
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "server.log").write_text("")
    (tmp_path / "logs" / "20260101-000000-quantize-1.log").write_text("")
    made = removal.plan(tmp_path, Request(everything=True))
    assert {entry.path.name for entry in made.remove if entry.path.parent.name != "locks"} == {
        "20260101-000000-quantize-1.log"
    }
    removal.carry_out(made)
    named = {entry.path.relative_to(tmp_path).as_posix(): entry.why for entry in made.alone}
    assert set(named) == {
        "engine/0123456789abcdef", f"engine/{mine.path.name}", "scores", "tasks/my_task", "texts/book.txt"
    }  # fmt: skip
    assert "notes.txt" in named[f"engine/{mine.path.name}"]
    assert (elsewhere / "deep" / "file").read_text() == "precious"
    assert (tmp_path / "builds" / "mine.json").exists()


def test_what_can_not_go_keeps_what_it_was_made_from(tmp_path: Path) -> None:
    """The user's file keeps the repository, which would be useless without its engine."""
    first = chain(tmp_path, 1)
    (first[2].path / "notes.txt").write_text("of the user's")
    for request in (Request(everything=True), Request(older_than=0.0), Request(names=(first[2].path.name,))):
        assert not {entry.path for entry in removal.plan(tmp_path, request).remove} & {one.path for one in first}


def mounted(source: Path, target: Path) -> bool:
    return subprocess.run(["mount", "--bind", str(source), str(target)], capture_output=True).returncode == 0


@pytest.mark.parametrize("where", ["stage", "inside", "leftover"])
def test_what_is_mounted_is_never_emptied(tmp_path: Path, where: str) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("precious")
    root = tmp_path / "store"
    made = stage(root, "engine", {})
    target = {"stage": made.path, "inside": made.path / "sub", "leftover": root / "engine" / ".0123456789abcdef.1.tmp"}
    target[where].mkdir(exist_ok=True)
    if not mounted(precious, target[where]):
        pytest.skip("mounting needs root")
    try:
        plan = removal.plan(root, Request(everything=True))
        removal.carry_out(plan)
        assert (precious / "file").read_text() == "precious"
        assert [entry for entry in plan.alone if "mounted" in entry.why]
    finally:
        subprocess.run(["umount", str(target[where])], check=True)


def test_no_store_is_refused(tmp_path: Path) -> None:
    for name in ("tasks", "texts", "engine", "builds", "models"):
        (tmp_path / name / "mine").mkdir(parents=True)
        (tmp_path / name / "mine" / "manifest.json").write_text('{"stage": "engine"}')
    for argv, cwd in (
        (("--output", str(tmp_path), "--all"), None),
        (("--output", "."), tmp_path),
        (("--output", ""), tmp_path),
        (("--output", "/", "--all"), None),
        (("--output", str(Path.home()), "--all"), None),
    ):
        done = run(*argv, cwd=cwd)
        assert (done.returncode, done.stdout) == (2, ""), argv
        assert "Traceback" not in done.stderr
    assert len(list(tmp_path.rglob("manifest.json"))) == 5


def test_an_empty_variable_means_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUILDER_OUTPUT", "")
    chain(tmp_path, 1)
    done = run(cwd=tmp_path)
    assert done.returncode == 2
    assert "no directory artifacts" in done.stderr


def test_the_dry_run_says_what_the_run_does_and_why(tmp_path: Path) -> None:
    first, second = chain(tmp_path, 1), chain(tmp_path, 2)
    link(tmp_path, "a", first[2])
    (tmp_path / "engine" / ".0123456789abcdef.7.tmp").mkdir()
    argv = ("--older-than", "0", "--output", str(tmp_path), "--json")
    dry, wet = run("--dry-run", *argv), run(*argv)
    assert dry.returncode == wet.returncode == 0, dry.stderr + wet.stderr
    assert json.loads(dry.stdout) == json.loads(wet.stdout)
    told = json.loads(wet.stdout)
    assert {str(artifact.path) for artifact in second} <= set(told["removed"])
    assert {one["why"] for one in told["kept"]} == {"models/a needs it"}
    assert told["bytes"] > 0
    words = run("--output", str(tmp_path))
    assert "models/a needs it" in words.stderr


def test_an_unknown_name_removes_nothing(tmp_path: Path) -> None:
    chain(tmp_path, 1)
    with pytest.raises(UsageError, match="no link or stage 'b'"):
        removal.plan(tmp_path, Request(names=("b",)))


def test_leftovers_of_kills_and_old_logs_go(tmp_path: Path) -> None:
    made = stage(tmp_path, "engine", {})
    half = [tmp_path / "engine" / f".{made.path.name}.{end}" for end in ("77.tmp", "77.trash", "old")]
    for path in half:
        shutil.copytree(made.path, path)
    files = [tmp_path / "models" / ".a.77.tmp", tmp_path / "builds" / ".a.json.77.tmp"]
    for path in files:
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    logs = [tmp_path / "logs" / f"20260101-0000{n:02}-quantize-1.log" for n in range(60)]
    logs[0].parent.mkdir(exist_ok=True)
    for n, log in enumerate(logs):
        log.write_text("")
        os.utime(log, (time.time() - 30 * 86400 + n,) * 2)
    went = {entry.path for entry in removal.plan(tmp_path, Request()).remove}
    assert {*half, *files, *logs[:10]} <= went
    assert not went & {*logs[10:], made.path}
    removed(tmp_path)
    assert made.path.is_dir()


# The results of layers, their states, and what an algorithm rounded in one layer.
PARTIAL = (".jsonl", ".safetensors", "-0003-0000.safetensors")


def test_partial_results_of_a_calibration_stay_until_they_are_old_or_no_longer_needed(tmp_path: Path) -> None:
    made, partial = stage(tmp_path, "checkpoint", {}), tmp_path / "partial"
    partial.mkdir()
    old, fresh, done = (f"checkpoint-{key}" for key in ("0" * 16, "1" * 16, made.path.name))
    for name in (old, fresh, done):
        for suffix in PARTIAL:
            (partial / f"{name}{suffix}").write_bytes(b"states")
            os.utime(partial / f"{name}{suffix}", (time.time() - 31 * 86400 * (name == old),) * 2)
    half = partial / f".{fresh}.safetensors.77.tmp"
    half.write_bytes(b"half")
    plan = removal.plan(tmp_path, Request())
    went = {entry.path: entry.nbytes for entry in plan.remove}
    assert {path.name: went.get(path) for path in partial.iterdir()} == {
        **{f"{name}{end}": 6 for name in (old, done) for end in PARTIAL},
        **{f"{fresh}{end}": None for end in PARTIAL},
        half.name: 4,
    }
    assert sum(entry.nbytes for entry in plan.keep if entry.path.parent == partial) == 18


def test_a_store_keeps_its_logs_within_bounds(tmp_path: Path) -> None:
    store = Store(tmp_path, QUIET)
    for n in range(stores.LOGS_KEPT + 20):
        path = tmp_path / "logs" / f"20260101-000000-quantize-{n}.log"
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
        os.utime(path, (time.time() - 5 * 86400 + n,) * 2)
    fresh = store.log("quantize")
    fresh.write_text("")
    assert len(list((tmp_path / "logs").iterdir())) == stores.LOGS_KEPT + 1
    assert not (tmp_path / "logs" / "20260101-000000-quantize-19.log").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from builder.core import atomic
from builder.clean import removal as clean
from builder.clean.reachability import Request
root, number = Path(sys.argv[1]), int(sys.argv[2])
count = 0
def hook(event, arguments):
    global count
    if event in ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
made = clean.plan(root, Request(names=("a",)))
sys.addaudithook(hook)
clean.carry_out(made)
"""


def test_a_kill_at_any_moment_leaves_no_half_stage_and_the_next_clean_goes_on(tmp_path: Path) -> None:
    template = tmp_path / "template"
    report_store.build(template, link="a")
    report_store.build(template, gpu="cpu", link="b")
    kept = {path.parent for path in (template / "repository").glob("*/manifest.json")}
    assert len(kept) == 2
    killed = 0
    for number in (1, 2, 3, 4, *range(5, 100, 4)):
        root = tmp_path / "store"
        shutil.copytree(template, root, symlinks=True)
        for name in ("a", "b"):
            target = (template / "models" / name).resolve().name
            (root / "models" / name).unlink()
            (root / "models" / name).symlink_to(f"../repository/{target}")
        done = subprocess.run([sys.executable, "-c", KILLED, str(root), str(number)], capture_output=True, text=True)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        assert not any(stores.verify(root, QUIET).values()), number
        for path in (root / "repository").glob("[0-9a-f]*"):
            assert stores.read(path), number
        assert removal.carry_out(removal.plan(root, Request())) == []
        assert not list(root.glob("*/.*")), number
        left = {path.name for path in (root / "models").iterdir()}
        assert left == ({"a", "b"} if number == 1 else {"b"}), "killed before its first step it did nothing"
        assert {path.stem for path in (root / "builds").iterdir()} == left
        assert len(list((root / "repository").iterdir())) == len(left)
        killed += done.returncode != 0
        shutil.rmtree(root)
        if done.returncode == 0:
            break
    assert killed > 5


def test_what_can_not_be_removed_is_one_error(tmp_path: Path) -> None:
    made = removal.Plan(tmp_path, remove=[removal.Entry(tmp_path / "repository" / "gone", "was there")])
    failed = removal.carry_out(made)
    with pytest.raises(BuilderError, match="could not be removed"):
        removal.check_failed(failed, tmp_path)


def test_old_environments_of_aiperf_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the current one, nor what was used a moment ago: another Python may share the cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache = environment.cache()
    old, young, current = cache / "aiperf-0.1.0-0123456789ab", cache / "aiperf-0.2.0-0123456789ab", environment.place()
    half = cache / ".aiperf-0.1.0-ba9876543210.77.tmp"  # of a clean that was killed
    for path in (old, half, young, current, cache / "other"):
        path.mkdir(parents=True)
        (path / "file").write_bytes(bytes(2048))
        os.utime(path, (0, 0))
    os.utime(young)
    root = tmp_path / "store"
    stage(root, "engine", {})
    assert main(["clean", "--output", str(root), "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [name for name in found["removed"] if "/locks/" not in name] == [str(half), str(old)]
    assert found["bytes"] == 4096
    assert old.is_dir()
    assert main(["clean", "--output", str(root), "--all"]) == 0
    assert "AIPerf's environment of another version, unused for" in capsys.readouterr().out
    assert {*cache.iterdir()} == {young, current, cache / "other"}
