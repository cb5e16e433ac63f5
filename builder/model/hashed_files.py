"""The files of a source model once they are hashed: only these are loaded, and none that changed since.

Standard library only: the command passes them to its workers in the job.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.core import temporary
from builder.core.errors import IntegrityError, StageError
from builder.core.store import sha256


def times(root: Path, names: Sequence[str]) -> dict[str, list[int]]:
    """[size, mtime, ctime] of each file, times in nanoseconds. `cp -p` and `touch` can't set the ctime back."""
    stats = {name: (root / name).stat() for name in names}
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()}


@dataclass(frozen=True)
class SourceFiles:
    """A model's directory; {"size", "sha256"} of each of its files, and the `times` of those that are known."""

    root: Path
    files: Mapping[str, Mapping[str, Any]]
    times: Mapping[str, Sequence[int]]

    @classmethod
    def of_job(cls, job: Mapping[str, Any]) -> SourceFiles:
        """The files that `as_job` put into a worker's job; without `source` in it the directory as it is now."""
        root = Path(job["model"])
        if "source" in job:
            return cls(root, job["source"]["files"], job["source"]["times"])
        now = times(root, [path.name for path in root.iterdir() if path.is_file()])
        return cls(root, {name: {"size": size, "sha256": ""} for name, (size, *_) in now.items()}, now)

    def as_job(self) -> dict[str, Any]:
        """{"model": directory, "source": ...} for a worker's job."""
        source = {"files": {name: dict(entry) for name, entry in self.files.items()}, "times": dict(self.times)}
        return {"model": str(self.root.absolute()), "source": source}

    def check_unchanged(self) -> None:
        """IntegrityError if the content of a file changed since it was hashed.

        A file with the same times is unchanged. Any other is hashed again, so that a touched or copied file passes.
        """
        changed = [name for name in self.files if self._changed(name)]
        if changed:
            raise IntegrityError(
                f"{self.root} changed after its files were hashed: {', '.join(sorted(changed)[:10])}.",
                why="The result would be stored under the key of the old files.",
                hint="Wait until nothing writes to the model (a copy, a download, a training run), then run the same "
                "command again.",
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
    def explain_failures(self) -> Iterator[None]:
        """If the block fails and a file changed, raises that as the reason. Besides a file that is found damaged, that
        is a worker that failed: a mapped file that is truncated kills its reader with SIGBUS."""
        try:
            yield
        except (StageError, IntegrityError):
            self.check_unchanged()
            raise

    @contextmanager
    def linked(self, without: Sequence[str] = ()) -> Iterator[Path]:
        """A directory with links to exactly these files, except those in `without`, so that nothing else in the model's
        directory is loaded by accident: an adapter, a second set of weights. It has the name of the model's directory,
        under which transformers caches code that comes with a model."""
        with temporary.directory() as parent:
            directory = parent / "source" / (self.root.name or "model")
            directory.mkdir(parents=True)
            for name in self.files.keys() - without:
                (directory / name).symlink_to(self.root.absolute() / name)
            yield directory
