"""Repositories at any path: no path of a repository, home or cache reaches a shell, and no file is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from builder.core import interrupts
from builder.core.errors import IntegrityError, ServingError
from builder.core.temporary import PREFIX
from builder.serving import installation as serving_installation
from builder.serving import private_directory, safe_links
from builder.serving.private_directory import ServingDirectory, check_names
from builder.serving.private_directory import serving_directory as directory
from builder.serving.server import ServerOptions, serve
from tests.serving.test_server import CONFIG, MODEL, QUIET, one_model

ODD = ["a$(touch reached)", "`touch reached`", "two words", "it's", 'a "quote"', "a;touch reached", "a&touch reached",
       "a|touch reached", "grüße", "a\\b", "new\nline", "*", "~", "-rf", "#x", "{a,b}", "<x>"]  # fmt: skip

# A model that reads a file named in its configuration, as the reference executor reads its engine.
READS = "import json; open(json.loads(args['model_config'])['parameters']['data']['string_value']).read()"
DATA = 'parameters {{ key: "data" value: {{ string_value: "{path}" }} }}\n'


def quoted(path: Path) -> str:
    return str(path).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def test_a_repository_at_an_odd_path_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All odd names at once, in the output, HOME, XDG_CACHE_HOME and TMPDIR. Each once hung Triton or ran a command."""
    odd = tmp_path.joinpath(*ODD)
    odd.mkdir(parents=True)
    (odd / "data").touch()
    models = odd / "models"
    (models / "lonely" / "1").mkdir(parents=True)
    config = CONFIG.format(name="lonely", backend="python") + DATA.format(path=quoted(odd / "data"))
    (models / "lonely" / "config.pbtxt").write_text(config)
    (models / "lonely" / "1" / "model.py").write_text(MODEL.format(initialize=READS))
    for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(odd))
    monkeypatch.chdir(odd)
    start = time.monotonic()
    with serve(models, out=QUIET, log=odd / "log", options=ServerOptions(timeout=120)) as server:
        argv = Path(f"/proc/{server.pid}/cmdline").read_bytes()
        assert b"touch" not in argv
        assert b"--model-repository=/tmp/" + PREFIX.encode() in argv
    assert time.monotonic() - start < 120
    assert not list(tmp_path.rglob("reached"))
    assert not [path for path in odd.iterdir() if path.name.startswith(PREFIX)]


@pytest.mark.parametrize("name", ["a$(touch b)", "a b", "a'b", "a;b", "ü", "a/../b"])
def test_names_that_are_unsafe_in_a_shell_are_rejected(tmp_path: Path, name: str) -> None:
    """Names of models, and names in a configuration that become part of the command line."""
    if "/" not in name:
        with pytest.raises(IntegrityError, match="can't be served") as caught:
            check_names(one_model(tmp_path / "named", name=name))
        assert "Allowed are ASCII letters" in caught.value.hint
    for number, line in enumerate(
        (
            f'default_model_filename: "{name} "\n',
            f'instance_group [ {{ name: "{name} " count: 1 kind: KIND_CPU }} ]\n',
            f'parameters {{ key: "EXECUTION_ENV_PATH" value: {{ string_value: "{name} " }} }}\n',
        )
    ):
        models = one_model(tmp_path / str(number), name="fine")
        check_names(models)
        with open(models / "fine" / "config.pbtxt", "a") as config:
            config.write(line)
        with pytest.raises(IntegrityError, match="can't be served"):
            check_names(models)


def test_a_model_is_a_directory_of_links_and_odd_paths_are_replaced(tmp_path: Path) -> None:
    odd = tmp_path / "two words"
    odd.mkdir()
    models = one_model(tmp_path / "models", name="plain")
    one_model(models, name="odd")
    with open(models / "odd" / "config.pbtxt", "a") as config:
        config.write(DATA.format(path=odd) + 'parameters { key: "prose" value: { string_value: "/not a path" } }\n')
    (models / "odd" / "1" / "model.yaml").write_text(f"model: '{odd}'\nmax_seq_len: 8\n")
    place = ServingDirectory(tmp_path / "place")
    place.path.mkdir()
    place.link(models)
    for name in ("plain", "odd"):
        assert (place.models / name / "1" / "model.py").resolve() == models.resolve() / name / "1" / "model.py"
        assert (place.models / name / "1" / "__pycache__").is_file()  # Python writes no compiled files there
        assert not (place.models / name / "config.pbtxt").is_symlink()
    config = (place.models / "odd" / "config.pbtxt").read_text()
    assert str(odd) not in config
    assert '"/not a path"' in config
    served = safe_links.compatibility.parse(place.models / "odd" / "config.pbtxt").parameters["data"].string_value
    assert Path(served).resolve() == odd
    assert "max_seq_len: 8" in (place.models / "odd" / "1" / "model.yaml").read_text()
    assert str(odd) not in (place.models / "odd" / "1" / "model.yaml").read_text()


def test_the_directory_is_private_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with directory() as place:
        assert place.path.parent == tmp_path
        assert place.path.stat().st_mode & 0o777 == 0o700
        place.log.write_text("fine")
    assert not list(tmp_path.iterdir())


def test_only_the_logs_of_a_failed_server_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(private_directory, "LOG_BYTES", 1000)

    def fail(error: BaseException, log: str) -> ServingDirectory:
        with suppress(type(error)), directory() as place:
            place.link(models)
            place.log.write_text(log)
            (place.path / "gateway.log").write_text(log)
            (place.path / "empty.log").touch()
            (place.path / "routes.json.state").touch()
            raise error
        return place

    models = one_model(tmp_path / "models")
    place = fail(ServingError("it failed"), "x" * 5000 + "the end")
    assert sorted(path.name for path in place.path.iterdir()) == ["failed", "gateway.log", "lock", "server.log"]
    for log in place.path.glob("*.log"):
        assert log.read_text() == "x" * 993 + "the end"
    assert not fail(KeyboardInterrupt(), "interrupted").path.exists()


def test_directories_of_killed_builders_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tests/core/test_temporary.py has the rule."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    killed = tmp_path / f"{PREFIX}a1b2c3d4"
    (killed / "backends").mkdir(parents=True)
    killed.chmod(0o700)
    (killed / "lock").touch()
    with directory() as used, directory():
        assert used.path.exists()
        assert not killed.exists()


def test_an_interrupted_server_leaves_no_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if the interrupt ends it with an error of its own, which nobody is shown."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(interrupts, "_received", [2])

    def end(place: ServingDirectory) -> None:
        place.log.write_text("the server ended")
        raise ServingError("Triton was killed by SIGTERM before it was ready.")

    with pytest.raises(ServingError), directory() as place:
        end(place)
    assert not list(tmp_path.iterdir())


def test_the_error_for_unsuitable_directories_lists_the_allowed_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "two words"
    monkeypatch.setattr(private_directory, "_bases", lambda: [odd])
    for attempt in (private_directory.check_place, lambda: directory().__enter__()):
        with pytest.raises(ServingError, match="no suitable directory") as caught:
            attempt()
        assert "ASCII letters, digits and _ . / + -" in caught.value.why
        assert str(odd) in caught.value.why
        assert "TMPDIR=DIR" in caught.value.hint


FULL = """
import os, sys
from pathlib import Path
from builder.serving import private_directory as serving_directory
serving_directory._bases = lambda: [Path(sys.argv[1]), Path(sys.argv[2])]
with serving_directory.serving_directory() as place:
    print(place.path.parent)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="mounts a file system")
def test_a_full_disk_is_skipped_and_left_unchanged(tmp_path: Path) -> None:
    """Earlier, each attempt left a directory there."""
    full, other = tmp_path / "full", tmp_path / "other"
    full.mkdir()
    other.mkdir()
    script = f'mount -t tmpfs -o size=1m none {full} && {sys.executable} -c "$1" {full} {other} && ls {full}'
    done = subprocess.run(["unshare", "-m", "sh", "-c", script, "sh", FULL], capture_output=True, text=True)
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(done.stderr)
    assert (done.stdout, done.stderr) == (f"{other}\n", "")


def test_an_installation_at_an_unusable_path_is_rejected(tmp_path: Path) -> None:
    serving_installation.check_paths()
    for name in ("a:b", "a;b", "ü"):
        with pytest.raises(ServingError, match="can't be started"):
            serving_installation._check_paths([tmp_path / name], tmp_path)


def test_backends_at_an_unsafe_path_are_rejected(tmp_path: Path) -> None:
    installation = serving_installation.Installation(tmp_path / "b", tmp_path / "two words", (), {})
    with pytest.raises(ServingError, match="can't be used from") as caught:
        private_directory.prepare_backends(installation, None, tmp_path)
    assert "Allowed are ASCII letters" in caught.value.why
    fine = serving_installation.Installation(tmp_path / "b", tmp_path / "backends", (), {})
    assert private_directory.prepare_backends(fine, None, tmp_path) == tmp_path / "backends"
