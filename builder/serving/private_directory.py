"""A private directory for a Triton server, with links to the repository's models, under a path that is safe in a shell.

Until 25.08, Triton's Python backend starts its processes with `bash -c` and does not quote paths (python_backend
src/stub_launcher.cc before 8b5a055): a path with a space makes it hang, and $(...) in a path is executed. So the server
gets a repository of links instead of the real one. The directory also contains the server's backends and its log.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from builder.core import interrupts, paths, supervisor, temporary
from builder.core.errors import BuilderError, IntegrityError, ServingError
from builder.core.temporary import LockedDirectory
from builder.serving.installation import Installation
from builder.serving.safe_links import ALLOWED, is_safe, link_model
from builder.trtllm import compatibility

_NAME = re.compile(r"[A-Za-z0-9_.-]+")
LOG = "server.log"
REQUESTS = "BUILDER_REQUESTS"  # a directory in which tensorrt_llm_bls writes how many requests it has (its model.py)
LOG_BYTES = 4 << 20  # the end of a failed server's log that is kept


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
    def tmp(self) -> Path:
        """The directory for temporary files of the server and of the libraries that its models import."""
        return self.path / "tmp"

    @property
    def requests(self) -> Path:
        """Where the server's models write how many requests they have (draining.py)."""
        return self.path / "requests"

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which the server's processes find these directories."""
        return {"TMPDIR": str(self.tmp), REQUESTS: str(self.requests)}

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
    made, failed = None, False
    try:
        with interrupts.deferred():
            made = _make(executable)
        yield ServingDirectory(made.path)
    except BuilderError:
        failed = not interrupts.received()  # after an interrupt no message refers to the log
        raise
    finally:
        if made and failed:
            with interrupts.deferred():
                _keep_logs(made.path)
                made.release()
        elif made:
            made.remove()


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


def prepare_backends(installation: Installation, code: str | Path | None, directory: Path) -> Path:
    """The directory of backends for the server: the installation's own if `code` is None.

    `code` is the model.py or the library that replaces the C++ backend. With it, the Python backend is copied into
    `directory`, next to the replacement. ServingError if a path is not safe in a shell, or the copy fails.
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


def _copied_backends(installation: Installation, code: str | Path, directory: Path) -> Path:
    """Copies the Python backend and writes the replacement of the C++ backend. Triton rejects symbolic links here."""
    try:
        for name in ("python", "tensorrtllm"):
            (directory / name).mkdir(parents=True)
        for file in installation.python_backend:
            if file.is_file():
                shutil.copy(file, directory / "python" / file.name)
        (directory / "python" / "triton_python_backend_stub").chmod(0o755)
        if isinstance(code, Path):
            shutil.copy(code, directory / "tensorrtllm" / "libtriton_tensorrtllm.so")
        else:
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
    runtime = os.environ.get("XDG_RUNTIME_DIR") or "/tmp"
    named = (os.environ.get("TMPDIR") or "/tmp", str(paths.user_cache()), runtime, "/tmp", "/var/tmp", supervisor.SHM)
    return [Path(base).absolute() for base in dict.fromkeys(named)]


def _usable(base: Path, *, executable: bool) -> bool:
    """Whether a directory can probably be created there, without trying."""
    try:
        existing = next(path for path in (base, *base.parents) if path.exists())
        runs = not executable or not os.statvfs(existing).f_flag & os.ST_NOEXEC
        return runs and is_safe(str(base)) and os.access(existing, os.W_OK | os.X_OK)
    except OSError:
        return False


def _make(executable: bool) -> LockedDirectory:
    """Creates the directory in the first suitable place."""
    refused: list[str] = []
    for base in _bases():
        if not _usable(base, executable=executable):
            continue
        made = None
        try:
            base.mkdir(parents=True, exist_ok=True)
            temporary.sweep(base)
            made = temporary.create(base)
            (made.path / "space").write_bytes(b"\0" * (4 << 20))  # about the size of the copied backends
            (made.path / "space").unlink()
            for name in ("backends", "tmp", "requests"):
                (made.path / name).mkdir()
            return made
        except OSError as error:
            refused.append(f"{base}: {error.strerror}")
            if made:
                made.remove()
    raise _no_place(refused)


def _no_place(refused: list[str]) -> ServingError:
    return ServingError(
        "There is no suitable directory for Triton's private files.",
        why="It needs 4 MB, write access, a file system that can run programs, and a path that consists of "
        + "\n".join([f"{ALLOWED}. Tried: {', '.join(map(str, _bases()))}", *refused]),
        hint="Choose a directory: TMPDIR=DIR",
    )


def _keep_logs(directory: Path) -> None:
    """Keeps only the ends of the logs, which the error message refers to; removes the directory if there is no log."""
    logs = [path for path in directory.glob("*.log") if path.stat().st_size]
    if not logs:
        supervisor.remove_directory(str(directory))
        return
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path not in logs and path.name != supervisor.LOCK:
            path.unlink(missing_ok=True)
    with suppress(OSError):
        for log in logs:
            _cut(log)
        (directory / temporary.FAILED).touch()


def _cut(log: Path) -> None:
    if log.stat().st_size > LOG_BYTES:
        with open(log, "rb+") as file:
            file.seek(-LOG_BYTES, os.SEEK_END)
            end = file.read()
            file.seek(0)
            file.write(end)
            file.truncate()
