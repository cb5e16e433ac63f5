"""The chaos test can fail: every leftover, wrong exit code and damaged byte that is planted here is reported."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos import invariants, processes, trials
from tests.chaos.running import Finished, Run, Signal
from tests.chaos.trials import Trial
from tests.chaos.world import World
from tests.support.hub_server import Hub

TRACEBACK = "Traceback (most recent call last):\n  File ...\nKeyboardInterrupt\n"


def finished(code: int = 0, stderr: str = "", hit: str = "running", *, hung: bool = False) -> Finished:
    return Finished(code, "", stderr, 1.0, (), hit, hung)


@pytest.fixture
def world() -> Iterator[World]:
    with Hub() as hub:
        made = World(hub, isolated=False)
        try:
            yield made
        finally:
            made.close()


def artifact(root: Path, stage: str, key: str, **files: str) -> Path:
    directory = root / stage / key
    directory.mkdir(parents=True)
    for name, text in files.items():
        (directory / name).write_text(text)
    entries = {name: {"size": len(text), "sha256": invariants.sha256(directory / name)} for name, text in files.items()}
    (directory / "manifest.json").write_text(json.dumps({"files": entries, "facts": {}}))
    return directory


def test_a_traceback_is_reported_unless_python_itself_was_starting_or_ending() -> None:
    assert invariants.no_traceback(finished(1, TRACEBACK)) == ["Traceback (most recent call last) on stderr"]
    assert invariants.no_traceback(finished(0, "warning\nException ignored in: <x>\n"))
    assert not invariants.no_traceback(finished(1, TRACEBACK, hit="starting"))
    assert not invariants.no_traceback(finished(1, "error: it failed\n  " + TRACEBACK.replace("\n", "\n  ")))


def test_exit_codes_and_hanging_are_reported() -> None:
    assert not invariants.exit_code(finished(130), {0, 130}, 15)
    assert invariants.exit_code(finished(-15), {0, 130}, 15) == ["exit code -15, expected one of [0, 130]"]
    assert not invariants.exit_code(finished(-15, hit="starting"), {0, 130}, 15)
    assert invariants.exit_code(finished(0, hung=True), {0}) == ["hung for 1 s"]


def test_contents_differ_by_a_byte_a_file_an_artifact_and_a_link(tmp_path: Path) -> None:
    artifact(tmp_path, "engine", "a1", weights="w", table='{"a": 1, "seconds": 1}')
    repository = artifact(tmp_path, "repository", "b2", config="c")
    (tmp_path / "models").mkdir()
    link = tmp_path / "models" / "m"
    link.symlink_to("../repository/b2")
    before = invariants.contents(tmp_path)
    assert not invariants.same(invariants.contents(tmp_path), before)
    (repository / "config").write_text("d")
    link.unlink()
    link.symlink_to("../repository/a1")
    artifact(tmp_path, "engine", "c3")
    assert invariants.same(invariants.contents(tmp_path), before) == [
        "engine/c3 was not there in the undisturbed run",
        "models/m differs from the undisturbed run",
        "repository/b2 differs from the undisturbed run",
    ]
    assert invariants.same({}, {"engine/a1": 1}) == ["engine/a1 is missing"]


def test_times_do_not_count_as_content(tmp_path: Path) -> None:
    table = artifact(tmp_path, "evaluation", "a1") / "evaluation.json"
    table.write_text('{"score": 97, "seconds": 1}')
    before = invariants.contents(tmp_path)
    table.write_text('{"score": 97, "seconds": 2}')
    assert not invariants.same(invariants.contents(tmp_path), before)
    table.write_text('{"score": 96, "seconds": 2}')
    assert invariants.same(invariants.contents(tmp_path), before)


def test_a_link_must_lead_to_a_whole_repository(tmp_path: Path) -> None:
    repository = artifact(tmp_path, "repository", "b2", config="c")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m").symlink_to("../repository/b2")
    assert not invariants.links_are_whole(tmp_path)
    engine = artifact(tmp_path, "engine", "a1")
    config = repository / "models" / "tensorrt_llm" / "config.pbtxt"
    config.parent.mkdir(parents=True)
    path = "../../../../engine/a1"  # from the model's directory
    config.write_text(f'parameters {{ key: "gpt_model_path" value: {{ string_value: "{path}" }} }}\n')
    assert not invariants.links_are_whole(tmp_path)
    engine.rename(engine.with_name("gone"))
    assert invariants.links_are_whole(tmp_path) == [f"models/m: its engine {path} is missing"]
    config.unlink()
    (repository / "config").write_text("d")
    assert invariants.links_are_whole(tmp_path) == ["models/m: config is missing or damaged"]
    repository.rename(repository.with_name("gone"))
    assert "models/m: no readable manifest" in invariants.links_are_whole(tmp_path)[0]


def test_what_is_left_in_the_store_the_cache_and_tmpdir_is_reported(tmp_path: Path) -> None:
    for name in ("engine/.a1.12.tmp", "engine/a1", "trtllm-builder/triton-backends/.x1", "tmp/triton-1", "tmp/kept"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "tmp" / "kept" / "server.log").touch()
    assert invariants.half_made(tmp_path) == [f"left in {tmp_path.name}: engine/.a1.12.tmp"]
    assert invariants.half_made_backends(tmp_path) == ["left in the cache: trtllm-builder/triton-backends/.x1"]
    assert invariants.temporary_files(tmp_path / "tmp", failed=True) == ["left in TMPDIR: triton-1 (empty)"]
    assert len(invariants.temporary_files(tmp_path / "tmp", failed=False)) == 2


def test_a_message_must_name_the_disk(tmp_path: Path) -> None:
    assert not invariants.names_the_disk(finished(1, f"error: The disk that holds {tmp_path}/x is full"), tmp_path)
    assert len(invariants.names_the_disk(finished(1, "error: something failed"), tmp_path)) == 2


def test_the_users_own_files_are_missed(tmp_path: Path) -> None:
    mine, link = tmp_path / "mine", tmp_path / "link"
    mine.write_text("mine")
    link.symlink_to(tmp_path)
    planted = {mine: invariants.sha256(mine), link: None}
    assert not invariants.unchanged(planted)
    mine.write_text("")
    link.unlink()
    assert len(invariants.unchanged(planted)) == 2


DAEMON = """
import os, sys
from tests.chaos import processes
processes.become_subreaper()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execvp("sleep", ["sleep", "60"])
    os._exit(0)
while not any(process.command == "sleep 60" and process.parent == os.getpid() for process in processes._table()):
    pass
left = processes.left_after(0.2)
print([process.command for process in left])
processes.kill(left)
print(processes.left_after(20))
"""


def test_a_process_that_detached_itself_is_found_and_ended() -> None:
    done = subprocess.run(
        [sys.executable, "-c", DAEMON], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "['sleep 60']\n[]\n", done.stderr


def test_a_signal_comes_just_before_the_operation_that_is_named(world: World) -> None:
    argv = ["fetch", "--model", str(world.model), "--gpu", "cpu", "--quiet"]
    run = Run(argv, env=world.env, logs=world.logs)
    whole = run.wait()
    assert (whole.code, whole.hit) == (0, ""), whole.stderr
    assert run._began is not None  # from here `time:` counts
    world.restore("empty")
    rename = len(whole.operations) - whole.operations[::-1].index("os.rename")  # the last one publishes the stage
    killed = Run(argv, env=world.env, logs=world.logs, sent=Signal("KILL", "process", f"operation:{rename}")).wait()
    assert (killed.code, killed.hit) == (-9, "running"), (whole.operations, killed.operations)
    assert [path.parent.name[0] for path in world.output.glob("snapshot/*/manifest.json")] == ["."]


def test_a_trial_reports_what_is_left_and_repeats_by_its_words(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed `fetch` holds; with something planted in the state that it starts from it does not."""
    monkeypatch.setattr(trials, "GRACE", 5.0)
    monkeypatch.setattr(processes, "left_after", lambda patience: [])  # of this test's process, others start some too
    trial = Trial.parse("kill command=fetch signal=KILL to=process moment=operation:5")
    assert Trial.parse(str(trial)) == trial
    assert trials.perform(trial, world) == []
    (world.states / "empty" / "out" / ".stale.tmp").mkdir()
    assert any(".stale.tmp" in what for what in trials.perform(trial, world))


def test_an_unknown_kind_of_trial_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a kind of trial: kill, disk, race"):
        Trial.parse("burn command=render")


def test_every_command_is_disturbed() -> None:
    disturbed = {about for kind, about in trials.all_kinds() if kind == "kill"}
    assert disturbed >= {"fetch", "quantize", "render", "build", "eval", "sensitivity", "serve", "smoke", "load"}
    assert disturbed >= {"report", "verify", "clean", "plan"}


def test_a_sample_has_each_short_kind_and_every_long_one_in_some_order() -> None:
    every = set(trials.all_kinds())
    samples = [trials.drawn_kinds(random.Random(seed), 4) for seed in range(60)]
    assert {len(sample) for sample in samples} == {len(trials.SHORT) + 4}
    assert all(trials.SHORT < set(sample) < every for sample in samples)
    assert set().union(*samples) == every == set(trials.drawn_kinds(random.Random(1)))
