"""A private directory for a Triton server, with links to the repository's models, under a path that is safe in a shell.

Until 25.08, Triton's Python backend starts its processes with `bash -c` and does not quote paths (python_backend
src/stub_launcher.cc before 8b5a055): a path with a space makes it hang, and $(...) in a path is executed. So the server
gets a repository of links instead of the real one. The directory also contains the server's backends and its log.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from builder.core import interrupts
from builder.core.errors import BuilderError, IntegrityError, ServingError
from builder.serving.installation import Installation
from builder.serving.safe_links import ALLOWED, is_safe, link_model
from builder.trtllm import compatibility

PREFIX = "trtllm-builder-"
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
LOG = "server.log"
LOG_BYTES = 4 << 20  # the end of a failed server's log that is kept
KEPT_LOGS = 5  # the newest logs of failed servers that are kept
YOUNG_SECONDS = 60.0  # a directory that is younger may not be locked yet


@dataclass(frozen=True)
class ServingDirectory:
    """The server's directory. `models` is the repository that it loads; `backends` holds copies of backends, if any."""

    path: Path

    @property
    def models(self) -> Path:
        """The repository of links that the server loads."""
        return self.path / "models"

    @property
    def backends(self) -> Path:
        """The directory for copies of backends; empty at first."""
        return self.path / "backends"

    @property
    def log(self) -> Path:
        """The server's log."""
        return self.path / LOG

    def link(self, models: Path) -> None:
        """Creates links to a repository's models. IntegrityError for names that are not safe in a shell."""
        check_names(models)
        self.models.mkdir()
        for model in _models(models):
            link_model(model, self.models / model.name, self.path / "paths")

    def only(self, model: str) -> Path:
        """A repository with only this model."""
        directory = self.path / f"only-{model}"
        directory.mkdir(exist_ok=True)
        link = directory / model
        if not link.is_symlink():
            link.symlink_to(self.models / model)
        return directory


@contextmanager
def serving_directory(*, executable: bool = True) -> Iterator[ServingDirectory]:
    """A new, locked directory that is removed when the block ends. If the block raises a BuilderError, its log stays.

    `executable` requires a file system that can run programs. ServingError if no place is suitable.
    """
    directory, lock = _make(executable)
    try:
        yield ServingDirectory(directory)
    except BuilderError:
        _keep_log(directory)
        raise
    except BaseException:
        _remove(directory)
        raise
    else:
        _remove(directory)
    finally:
        os.close(lock)


def _remove(directory: Path) -> None:
    """Removes it whole: a second interrupt waits until the end."""
    with interrupts.deferred():
        shutil.rmtree(directory, ignore_errors=True)


def check_place() -> None:
    """Checks, before any work, that a server's directory can be created. ServingError if not."""
    if not any(_usable(base, executable=True) for base in _bases()):
        raise _no_place([])


def check_names(models: Path) -> None:
    """IntegrityError if a name in the repository is not safe in the shell that Triton's Python backend starts."""
    for model in _models(models):
        names = [model.name, *_configured(model / "config.pbtxt")]
        for name in names:
            if not is_safe(name) or (name == model.name and not _NAME.fullmatch(name)):
                raise IntegrityError(
                    f"{model} has the name {name!r}, which can't be served.",
                    why="Triton passes names of models, files and environments to a shell without quoting them.",
                    hint=f"Rename it. Allowed are {ALLOWED}",
                )


def _configured(config: Path) -> Iterator[str]:
    """The names in a config.pbtxt that become part of the command that starts the model."""
    parsed = compatibility.parse(config)
    if parsed is None:
        return
    yield from filter(None, [parsed.name, parsed.default_model_filename])
    yield from (group.name for group in parsed.instance_group if group.name)
    environment = (
        parsed.parameters["EXECUTION_ENV_PATH"].string_value if "EXECUTION_ENV_PATH" in parsed.parameters else ""
    )
    if not Path(environment).exists():  # an existing one is replaced by a link
        yield environment.removeprefix("$$TRITON_MODEL_DIRECTORY")


def _models(models: Path) -> list[Path]:
    return [path for path in sorted(models.iterdir()) if path.is_dir()]


def prepare_backends(installation: Installation, code: str | None, directory: Path) -> Path:
    """The directory of backends for the server: the installation's own if `code` is None.

    `code` is the model.py that replaces the C++ backend. With it, the Python backend is copied into `directory`, next
    to the replacement. ServingError if a path is not safe in a shell, or the copy fails.
    """
    return _own_backends(installation) if code is None else _copied_backends(installation, code, directory)


def _own_backends(installation: Installation) -> Path:
    """The installation's directory of backends. Its path becomes part of a shell command, so it must be safe."""
    if not is_safe(str(installation.backends)):
        raise ServingError(
            f"Triton's backends can't be used from {installation.backends}.",
            why=f"Triton passes that path to a shell without quoting it. Allowed are {ALLOWED}",
            hint="Install Triton in another directory, such as /opt/tritonserver in NVIDIA's image.",
        )
    return installation.backends


def _copied_backends(installation: Installation, code: str, directory: Path) -> Path:
    """Copies the Python backend and writes the replacement of the C++ backend. Triton rejects symbolic links here."""
    try:
        for name in ("python", "tensorrtllm"):
            (directory / name).mkdir(parents=True)
        for file in installation.python_backend:
            if file.is_file():
                shutil.copy(file, directory / "python" / file.name)
        (directory / "python" / "triton_python_backend_stub").chmod(0o755)
        (directory / "tensorrtllm" / "model.py").write_text(code, encoding="utf-8")
    except OSError as error:
        raise ServingError(
            f"Triton's backends can't be copied to {directory}.",
            why=str(error),
            hint="Choose a directory with free space: TMPDIR=DIR",
        ) from error
    return directory


def _bases() -> list[Path]:
    """Where a server's directory may be created, in order of preference."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    runtime = os.environ.get("XDG_RUNTIME_DIR") or "/tmp"
    named = (os.environ.get("TMPDIR") or "/tmp", str(cache), runtime, "/tmp", "/var/tmp", "/dev/shm")
    return [Path(base).absolute() for base in dict.fromkeys(named)]


def _usable(base: Path, *, executable: bool) -> bool:
    """Whether a directory can probably be created there, without trying."""
    try:
        existing = next(path for path in (base, *base.parents) if path.exists())
        runs = not executable or not os.statvfs(existing).f_flag & os.ST_NOEXEC
        return runs and is_safe(str(base)) and os.access(existing, os.W_OK | os.X_OK)
    except OSError:
        return False


def _make(executable: bool) -> tuple[Path, int]:
    """Creates the directory in the first suitable place; returns it and the file descriptor that holds its lock."""
    failed: list[str] = []
    for base in _bases():
        if not _usable(base, executable=executable):
            continue
        directory = None
        try:
            base.mkdir(parents=True, exist_ok=True)
            sweep(base)
            directory = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
            lock = os.open(directory / "lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            (directory / "space").write_bytes(b"\0" * (4 << 20))  # about the size of the copied backends
            (directory / "space").unlink()
            (directory / "backends").mkdir()
            return directory, lock
        except OSError as error:
            failed.append(f"{base}: {error.strerror}")
            if directory:
                shutil.rmtree(directory, ignore_errors=True)
    raise _no_place(failed)


def _no_place(failed: list[str]) -> ServingError:
    return ServingError(
        "There is no suitable directory for Triton's private files.",
        why="It needs 4 MB, write access, a file system that can run programs, and a path that consists of "
        + "\n".join([f"{ALLOWED}. Tried: {', '.join(map(str, _bases()))}", *failed]),
        hint="Choose a directory: TMPDIR=DIR",
    )


def sweep(base: Path) -> None:
    """Removes the directories of servers whose builder was killed, and all but the newest logs of failed servers."""
    logs = []
    for directory in base.glob(f"{PREFIX}*"):
        with suppress(OSError):
            if not _abandoned(directory):
                continue
            if (directory / "failed").exists():
                logs.append((directory.stat().st_mtime, directory))
            else:
                shutil.rmtree(directory, ignore_errors=True)
    for _, directory in sorted(logs)[:-KEPT_LOGS]:
        shutil.rmtree(directory, ignore_errors=True)


def _abandoned(directory: Path) -> bool:
    """Whether a directory is ours, older than YOUNG_SECONDS and not locked: every user of one holds its lock."""
    found = directory.lstat()
    if found.st_uid != os.getuid() or time.time() - found.st_mtime < YOUNG_SECONDS:
        return False
    try:
        lock = os.open(directory / "lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(lock)


def _keep_log(directory: Path) -> None:
    """Keeps only the end of the log, which the error message refers to; removes the directory if there is no log."""
    log = directory / LOG
    if not log.is_file() or not log.stat().st_size:
        shutil.rmtree(directory, ignore_errors=True)
        return
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        if log.stat().st_size > LOG_BYTES:
            with open(log, "rb+") as file:
                file.seek(-LOG_BYTES, os.SEEK_END)
                end = file.read()
                file.seek(0)
                file.write(end)
                file.truncate()
        (directory / "failed").touch()
