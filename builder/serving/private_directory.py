"""The directory that Triton is given instead of a repository's own: private, and of a path that no shell can misread.

Until 25.08 Triton's Python backend starts its processes by `bash -c`, with paths that it does not quote
(python_backend src/stub_launcher.cc before 8b5a055): a path with a space hangs, one with $(...) runs it. So the server
sees links to the models, below a directory of ours. It also holds what a server needs for itself, and its log.
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

from builder.core.errors import BuilderError, IntegrityError, ServingError
from builder.serving.installation import Installation
from builder.serving.safe_links import ALLOWED, is_safe, link_model
from builder.trtllm import compatibility

PREFIX = "trtllm-builder-"
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
LOG = "server.log"
LOG_BYTES = 4 << 20  # of a failed server's log: its end
KEPT_LOGS = 5  # of servers that failed: the newest
YOUNG_SECONDS = 60.0  # a directory may not be locked yet


@dataclass(frozen=True)
class ServingDirectory:
    """`models` is the repository that the server loads; `backends` is for copies of backends, empty at first."""

    path: Path

    @property
    def models(self) -> Path:
        return self.path / "models"

    @property
    def backends(self) -> Path:
        return self.path / "backends"

    @property
    def log(self) -> Path:
        return self.path / LOG

    def link(self, models: Path) -> None:
        """Links to a repository's models. IntegrityError for names that Triton would hand to a shell."""
        check_names(models)
        self.models.mkdir()
        for model in _models(models):
            link_model(model, self.models / model.name, self.path / "paths")

    def only(self, model: str) -> Path:
        """A repository of this one of the models."""
        directory = self.path / f"only-{model}"
        directory.mkdir(exist_ok=True)
        link = directory / model
        if not link.is_symlink():
            link.symlink_to(self.models / model)
        return directory


@contextmanager
def serving_directory(*, executable: bool = True) -> Iterator[ServingDirectory]:
    """A new directory, removed at the end; its log stays if the block fails. Locked meanwhile.

    `executable`: programs in it must run. ServingError where no place for it is found.
    """
    directory, lock = _make(executable)
    try:
        yield ServingDirectory(directory)
    except BuilderError:
        _keep_log(directory)
        raise
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    else:
        shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(lock)


def check_place() -> None:
    """Before any work: that there is a place for a server's directory."""
    if not any(_usable(base, executable=True) for base in _bases()):
        raise _no_place([])


def check_names(models: Path) -> None:
    """That the names in a repository are such as Triton's Python backend can hand to a shell."""
    for model in _models(models):
        names = [model.name, *_configured(model / "config.pbtxt")]
        for name in names:
            if not is_safe(name) or (name == model.name and not _NAME.fullmatch(name)):
                raise IntegrityError(
                    f"{model} names {name!r}, which is not served.",
                    why="Triton hands names of models, files and environments to a shell without quoting them.",
                    hint=f"Rename it. Allowed: {ALLOWED}",
                )


def _configured(config: Path) -> Iterator[str]:
    """What a config.pbtxt adds to the command that starts a model."""
    parsed = compatibility.parse(config)
    if parsed is None:
        return
    yield from filter(None, [parsed.name, parsed.default_model_filename])
    yield from (group.name for group in parsed.instance_group if group.name)
    environment = (
        parsed.parameters["EXECUTION_ENV_PATH"].string_value if "EXECUTION_ENV_PATH" in parsed.parameters else ""
    )
    if not Path(environment).exists():  # one that is there is linked to
        yield environment.removeprefix("$$TRITON_MODEL_DIRECTORY")


def _models(models: Path) -> list[Path]:
    return [path for path in sorted(models.iterdir()) if path.is_dir()]


def prepare_backends(installation: Installation, code: str | None, directory: Path) -> Path:
    """Where the server finds its backends: the installation's own, or with `code`, a stand-in's model.py, copies."""
    return _own_backends(installation) if code is None else _copied_backends(installation, code, directory)


def _own_backends(installation: Installation) -> Path:
    """The installation's own backends, which start programs by their path. ServingError if a shell misreads it."""
    if not is_safe(str(installation.backends)):
        raise ServingError(
            f"Triton's backends can't be used from {installation.backends}.",
            why=f"Triton hands that path to a shell without quoting it. Allowed: {ALLOWED}",
            hint="Install Triton in another directory, as NVIDIA's image does: /opt/tritonserver",
        )
    return installation.backends


def _copied_backends(installation: Installation, code: str, directory: Path) -> Path:
    """The Python backend's files, and a stand-in for the C++ backend: copies, for the server refuses symbolic links."""
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
            hint="Name a directory with room: TMPDIR=DIR",
        ) from error
    return directory


def _bases() -> list[Path]:
    """Where a server's directory may be, the best first."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    runtime = os.environ.get("XDG_RUNTIME_DIR") or "/tmp"
    named = (os.environ.get("TMPDIR") or "/tmp", str(cache), runtime, "/tmp", "/var/tmp", "/dev/shm")
    return [Path(base).absolute() for base in dict.fromkeys(named)]


def _usable(base: Path, *, executable: bool) -> bool:
    """Whether a directory can be made there, as far as can be seen without making one."""
    try:
        there = next(path for path in (base, *base.parents) if path.exists())
        runs = not executable or not os.statvfs(there).f_flag & os.ST_NOEXEC
        return runs and is_safe(str(base)) and os.access(there, os.W_OK | os.X_OK)
    except OSError:
        return False


def _make(executable: bool) -> tuple[Path, int]:
    """The directory and the descriptor that locks it, in the first place that takes it."""
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
            (directory / "room").write_bytes(b"\0" * (4 << 20))  # about what the backends take
            (directory / "room").unlink()
            (directory / "backends").mkdir()
            return directory, lock
        except OSError as error:
            failed.append(f"{base}: {error.strerror}")
            if directory:
                shutil.rmtree(directory, ignore_errors=True)
    raise _no_place(failed)


def _no_place(failed: list[str]) -> ServingError:
    return ServingError(
        "There is no place for Triton's own directory.",
        why="It needs 4 MB, write access, a file system that runs programs, and a path of nothing but "
        + "\n".join([f"{ALLOWED}. Looked at: {', '.join(map(str, _bases()))}", *failed]),
        hint="Name one: TMPDIR=DIR",
    )


def sweep(base: Path) -> None:
    """Removes what servers left whose builder is gone; of those that failed, all but the newest logs."""
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
    """Ours, no longer new, and not locked: nobody but us writes in it, and we hold the lock while we do."""
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
    """Of a server that failed only the end of its log, which the error names; nothing where it has none here."""
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
