"""The store: artifacts are complete or absent, and survive kills, full disks and concurrent builds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import imports
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.calibration import rows as calibration_rows
from builder.checkpoint import requested_layouts
from builder.core import store as stores
from builder.core.errors import IntegrityError, StageError, UsageError
from builder.core.output import Output
from builder.core.store import Store, WouldRun
from builder.evaluate import stage as evaluate_stage
from builder.evaluate import tasks, variants
from builder.evaluate.mixtures import stage as mixtures_stage
from builder.evaluate.parts import stage as parts_stage
from builder.evaluate.sensitivity import stage as sensitivity_stage
from builder.quantize import imported, modelopt, pseudo_stage, scales, streamed, unquantized
from builder.serving import smoke
from builder.transform import learned
from builder.transform import stage as transform_stage

QUIET = Output("quiet")


def write(directory: Path, text: str = "weights") -> dict[str, object]:
    (directory / "sub").mkdir()
    (directory / "sub" / "file.bin").write_text(text)
    return {"answer": 42}


def refuse(directory: Path) -> dict[str, object]:
    raise AssertionError("this stage was to be found, not made")


def leftovers(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.name.endswith(".tmp")]


def test_made_once_then_found(tmp_path: Path) -> None:
    first = Store(tmp_path, QUIET).stage("engine", {"a": 1}, write)
    second = Store(tmp_path, QUIET).stage("engine", {"a": 1}, refuse)
    assert (first.cached, second.cached) == (False, True)
    assert first.digest == second.digest
    assert second.facts == {"answer": 42}
    assert second.manifest["files"]["sub/file.bin"]["size"] == 7


def test_equal_bytes_have_equal_digests_under_other_keys(tmp_path: Path) -> None:
    store = Store(tmp_path, QUIET)
    assert store.stage("engine", {"a": 1}, write).digest == store.stage("engine", {"a": 2}, write).digest
    other = store.stage("engine", {"a": 3}, lambda d: write(d, "other"))
    assert other.digest != store.stage("engine", {"a": 1}, refuse).digest


@given(st.dictionaries(st.text(), st.integers() | st.text() | st.none(), min_size=1), st.text())
def test_a_changed_ingredient_is_another_key(ingredients: dict[str, object], name: str) -> None:
    key = stores.digest_of(ingredients)
    assert stores.digest_of(dict(reversed(ingredients.items()))) == key
    for changed in ({**ingredients, name: object.__repr__(ingredients)}, {"nested": ingredients}):
        assert stores.digest_of(changed) != key


@pytest.mark.parametrize("failure", [ValueError("bug"), KeyboardInterrupt(), StageError("child died")])
def test_a_stage_that_raises_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    def half(directory: Path) -> dict[str, object]:
        write(directory)
        raise failure

    with pytest.raises(type(failure)):
        Store(tmp_path, QUIET).stage("engine", {}, half)
    assert not leftovers(tmp_path)
    assert stores.artifacts(tmp_path) == []


def test_a_full_disk_is_one_clear_message(tmp_path: Path) -> None:
    def fill(directory: Path) -> dict[str, object]:
        (directory / "big").symlink_to("/dev/full")
        (directory / "big").write_bytes(b"x" * 100_000)
        return {}

    with pytest.raises(StageError, match="is full") as caught:
        Store(tmp_path, QUIET).stage("engine", {}, fill)
    assert "builder clean" in caught.value.hint
    assert not leftovers(tmp_path)


def test_an_output_that_is_a_file_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="Can't write"):
        Store(tmp_path / "file", QUIET).stage("engine", {}, write)


KILLED = """
import sys, time
from pathlib import Path
from builder.core.output import Output
from builder.quantize import modelopt, scales
from builder.core.store import Store
def slow(directory):
    (directory / "half").write_text("half-made")
    print("working", flush=True)
    time.sleep(60)
Store(Path(sys.argv[1]), Output("quiet")).stage("engine", {"a": 1}, slow)
"""


def test_a_killed_build_is_not_trusted_and_blocks_nobody(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"working\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert leftovers(tmp_path)
    assert stores.artifacts(tmp_path) == []
    made = Store(tmp_path, QUIET).stage("engine", {"a": 1}, write)
    assert not made.cached
    assert not (made.path / "half").exists()
    assert not leftovers(tmp_path)


SECOND = """
import sys, time
from pathlib import Path
from builder.core.output import Output
from builder.quantize import modelopt, scales
from builder.core.store import Store
def make(directory):
    print("made", flush=True)
    time.sleep(1)
    (directory / "file").write_text("whole")
    return {}
artifact = Store(Path(sys.argv[1]), Output("human")).stage("engine", {"a": 1}, make)
print("cached" if artifact.cached else "new", flush=True)
"""


def test_of_two_builds_at_once_one_works_and_one_waits(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", SECOND, str(tmp_path)]
    pair = [subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [child.communicate(timeout=30) for child in pair]
    assert sorted(out for out, _ in said) == ["cached\n", "made\nnew\n"]
    assert sum("another build is making" in err for _, err in said) == 1


def test_a_damaged_artifact_is_made_again(tmp_path: Path) -> None:
    made = Store(tmp_path, QUIET).stage("engine", {}, write)
    (made.path / "sub" / "file.bin").write_text("short")
    again = Store(tmp_path, QUIET).stage("engine", {}, write)
    assert not again.cached
    assert (again.path / "sub" / "file.bin").read_text() == "weights"


def test_force_replaces_and_dry_makes_nothing(tmp_path: Path) -> None:
    Store(tmp_path, QUIET).stage("engine", {}, write)
    forced = Store(tmp_path, QUIET, force=["engine"]).stage("engine", {}, lambda d: write(d, "new"))
    assert (forced.path / "sub" / "file.bin").read_text() == "new"
    assert not leftovers(tmp_path)
    assert Store(tmp_path, QUIET, dry=True).stage("engine", {}, refuse).cached
    with pytest.raises(WouldRun, match="not in the store"):
        Store(tmp_path, QUIET, dry=True).stage("engine", {"other": 1}, refuse)


def test_verify_hashes_again_and_names_what_changed(tmp_path: Path) -> None:
    made = Store(tmp_path, QUIET).stage("engine", {}, write)
    stores.check_integrity(stores.verify(tmp_path, QUIET))
    (made.path / "sub" / "file.bin").write_text("WEIGHTS")
    with pytest.raises(IntegrityError, match="files of the store are damaged") as caught:
        stores.check_integrity(stores.verify(tmp_path, QUIET))
    assert "file.bin has changed" in caught.value.why


def test_verify_sees_a_manifest_that_was_changed(tmp_path: Path) -> None:
    made = Store(tmp_path, QUIET).stage("engine", {}, write)
    manifest = json.loads((made.path / "manifest.json").read_text())
    (made.path / "sub" / "file.bin").write_text("forged!")
    manifest["files"]["sub/file.bin"]["sha256"] = stores.sha256(made.path / "sub" / "file.bin")
    (made.path / "manifest.json").write_text(json.dumps(manifest))
    [problems] = stores.verify(tmp_path, QUIET).values()
    assert problems == ["manifest.json is damaged: it was changed"]


def test_files_elsewhere_belong_to_the_artifact(tmp_path: Path) -> None:
    outside = tmp_path / "cache"
    outside.mkdir()
    (outside / "model.safetensors").write_text("far away")
    entry = {"size": 8, "sha256": stores.sha256(outside / "model.safetensors")}
    facts = {"external": {"root": str(outside), "files": {"model.safetensors": entry}}}
    made = Store(tmp_path / "store", QUIET).stage("snapshot", {}, lambda _: facts)
    assert Store(tmp_path / "store", QUIET).stage("snapshot", {}, refuse).digest == made.digest
    (outside / "model.safetensors").unlink()
    assert (
        not Store(tmp_path / "store", QUIET)
        .stage("snapshot", {}, lambda _: facts | {"external": {"root": "", "files": {}}})
        .cached
    )


def test_clean_waits_for_no_running_build(tmp_path: Path) -> None:
    with (
        Store(tmp_path, QUIET).in_use(),
        pytest.raises(UsageError, match="is running"),
        Store(tmp_path, QUIET).in_use(exclusive=True),
    ):
        pass


def test_known_hashes_of_hard_links_are_not_computed_again(tmp_path: Path) -> None:
    def link(directory: Path) -> dict[str, object]:
        (directory / "file").write_text("x")
        return {"hashed": {"file": "1" * 64}}

    made = Store(tmp_path, QUIET).stage("engine", {}, link)
    assert made.manifest["files"]["file"]["sha256"] == "1" * 64
    assert made.facts == {}


def test_sources_digest_follows_an_edit(tmp_path: Path) -> None:
    file = tmp_path / "stage.py"
    file.write_text("a = 1")
    before = stores.sources_digest(file)
    file.write_text("a = 2")
    assert stores.sources_digest(file) != before
    assert stores.sources_digest("builder/core/store.py") == stores.sources_digest(Path(stores.__file__))
    with pytest.raises(FileNotFoundError):
        stores.sources_digest("builder/no_such_file.py")


def test_versions_come_from_metadata() -> None:
    found = stores.library_versions("pytest", "no-such-distribution")
    assert found == {"pytest": pytest.__version__, "no-such-distribution": "absent"}


# What any stage stands on, and the stages whose artifacts, not whose code, are another's input.
NO_INGREDIENTS = {"calibration.rows", "core.errors", "core.manifest", "core.output", "core.paths", "core.process"}
NO_INGREDIENTS |= {
    "core.locks",
    "core.worker",
    "core.partial_results",
    "core.store",
    "hub.download",
    "hub.errors",
    "hub.cache",
    "hub.client",
    "hub.listing",
    "hub.snapshot",
    "machine.gpus",
    "machine.host_memory",  # where hidden states are kept and how many at once, not what they are
    "recipe.evaluation",
}
NO_INGREDIENTS |= {"recipe.quantization", "recipe.schema", "recipe.transform", "triton.repository", "trtllm.engine"}
# What only rejects, names or protects: it changes whether something is made, not what.
NO_INGREDIENTS |= {
    "core.workers",
    "core.atomic",
    "core.early_worker",
    "core.environment",
    "core.exit_status",
    "core.file_names",
    "core.hashes",
    "core.interrupts",
    "core.temporary",
}
NO_INGREDIENTS |= {
    "core.release",
    "core.safe_text",
    "core.supervisor",
    "core.untrusted_text",
    "hub.guard",
    "llmapi.versions",
}
NO_INGREDIENTS |= {"model.completeness", "model.config_values", "model.kinds", "model.quantization_signs"}
NO_INGREDIENTS |= {"model.tensor_names", "serving.limits", "tokenizer.worker", "trtllm.build_log"}
# rows.py also makes tokens of the rows, but in the stage that quantizes; its own stage keeps text.
ANOTHERS = {"calibration/rows.py": {"tokenizer.chat_template", "tokenizer.special_tokens", "tokenizer.files"}}
# What takes a quantized model over makes checkpoints, in a stage with a key of its own; measurements read them.
TAKEN_OVER = {"checkpoint.conversion", "checkpoint.quantized_source", "checkpoint.unified_config"}
ANOTHERS |= {"evaluate/stage.py": TAKEN_OVER, "evaluate/tasks_worker.py": TAKEN_OVER}
NO_INGREDIENTS |= {"builder"}  # its version is an ingredient of its own where a file names it


@pytest.mark.parametrize(
    ("stage", "sources"),
    [
        ("quantize/modelopt.py", modelopt.SOURCES),
        ("quantize/scales.py", scales.SOURCES),
        ("quantize/imported.py", imported.SOURCES),
        ("transform/stage.py", transform_stage.SOURCES),
        ("transform/learned.py", learned.SOURCES),
        ("quantize/streamed.py", streamed.SOURCES),
        ("quantize/unquantized.py", unquantized.SOURCES),
        ("checkpoint/requested_layouts.py", requested_layouts.SOURCES),
        ("quantize/pseudo_stage.py", pseudo_stage.SOURCES),
        ("calibration/rows.py", calibration_rows.SOURCES),
        ("serving/smoke.py", smoke.SOURCES),
        ("evaluate/sensitivity/stage.py", sensitivity_stage.SOURCES),
        ("evaluate/parts/stage.py", parts_stage.SOURCES),
        ("evaluate/mixtures/stage.py", mixtures_stage.SOURCES),
        ("evaluate/stage.py", variants.SOURCES + evaluate_stage.TABLE_SOURCES),
        ("evaluate/tasks_worker.py", tasks.SOURCES),
    ],
)
def test_a_stages_key_holds_every_source_that_it_imports(stage: str, sources: tuple[str, ...]) -> None:
    """An edit that could change the output must change the key, so imports of listed files must be listed, too."""
    package = Path(stores.__file__).parents[1]
    listed = [package.parent / source for source in sources]
    assert package / stage in listed
    files = [f for path in listed for f in (path.rglob("*.py") if path.is_dir() else [path])]
    for file in files:
        names = {name.removeprefix("builder.") for name in imports.imported(file, inner=False)}
        for name in names - NO_INGREDIENTS - ANOTHERS.get(stage, set()):
            imported = package / f"{name.replace('.', '/')}.py"
            assert imported in files, f"{file.name} imports {name}, which is not in the key of {stage}"
