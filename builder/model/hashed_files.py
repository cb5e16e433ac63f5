"""The files of a source model after they were hashed: loaded are these and no others, and none that changed since.

Standard library only: parents hand it to their children in the job.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.core.errors import IntegrityError, StageError
from builder.core.store import sha256

PREFIX = "builder-model-"


def times(root: Path, names: Sequence[str]) -> dict[str, list[int]]:
    """Size, time of the content and time of the inode: the last one can't be set back by `cp -p` or `touch`."""
    stats = {name: (root / name).stat() for name in names}
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()}


@dataclass(frozen=True)
class SourceFiles:
    """A model's directory, and of each file that belongs to it {"size", "sha256"} and, where known, its times."""

    root: Path
    files: Mapping[str, Mapping[str, Any]]
    times: Mapping[str, Sequence[int]]

    @classmethod
    def of_job(cls, job: Mapping[str, Any]) -> SourceFiles:
        """What `as_job` put into a child's job. A job without `source` takes the directory as it is now."""
        root = Path(job["model"])
        if "source" in job:
            return cls(root, job["source"]["files"], job["source"]["times"])
        now = times(root, [path.name for path in root.iterdir() if path.is_file()])
        return cls(root, {name: {"size": size, "sha256": ""} for name, (size, *_) in now.items()}, now)

    def as_job(self) -> dict[str, Any]:
        """{"model": directory, "source": ...} for a child's job."""
        source = {"files": {name: dict(entry) for name, entry in self.files.items()}, "times": dict(self.times)}
        return {"model": str(self.root.absolute()), "source": source}

    def check_unchanged(self) -> None:
        """IntegrityError if a file has another content than when it was hashed. One whose times are the same has not;
        any other is hashed again, so that a touched or copied file of the same content passes."""
        changed = [name for name in self.files if self._changed(name)]
        if changed:
            raise IntegrityError(
                f"{self.root} changed after its files were hashed: {', '.join(sorted(changed)[:10])}.",
                why="What was made of them would be stored under the key of the files that were there before.",
                hint="Wait until nothing writes to the model any more (a copy, a download, a training run), then run "
                "the same command again.",
            )

    def _changed(self, name: str) -> bool:
        path, entry = self.root / name, self.files[name]
        try:
            if times(self.root, [name])[name] == list(self.times.get(name, ())):
                return False
            return bool(path.stat().st_size != entry["size"] or sha256(path) != entry["sha256"])
        except OSError:  # removed, or no longer readable
            return True

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Where a child fails in the block because a file changed, says that: one that is mapped and gets shorter ends
        its reader by SIGBUS."""
        try:
            yield
        except StageError:
            self.check_unchanged()
            raise

    @contextmanager
    def alone(self, without: Sequence[str] = ()) -> Iterator[Path]:
        """A directory with links to exactly these files, but for those in `without`. Whatever else lies beside them, an
        adapter or a second set of weights, is not loaded by accident. It has the model's name, which code that comes
        with a model is cached under."""
        with private_directory() as parent:
            directory = parent / (self.root.name or "model")
            directory.mkdir()
            for name in self.files.keys() - without:
                (directory / name).symlink_to(self.root.absolute() / name)
            yield directory


@contextmanager
def private_directory() -> Iterator[Path]:
    """A temporary directory of this process; it takes away those that killed processes of this user left."""
    # A number of ours means nothing in another container that shares /tmp.
    prefix = f"{PREFIX}{''.join(filter(str.isdecimal, os.readlink('/proc/self/ns/pid')))}-"
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*-*"):
        pid = path.name.removeprefix(prefix).partition("-")[0]
        with suppress(OSError):
            if pid.isdecimal() and not Path("/proc", pid).exists() and path.stat().st_uid == os.getuid():
                shutil.rmtree(path)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-") as made:
        yield Path(made)
