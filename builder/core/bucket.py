"""Artifacts in an S3-compatible bucket, so that machines without a common disk share what each of them made.

    ADDRESS/<stage>/<key>/<digest>/<file>    the files of an artifact
    ADDRESS/<stage>/<key>.json               its manifest, written last: what has none does not exist

A push that is killed leaves files that nothing names; the next one writes them again. Who pushes a key first wins, and
everybody else takes what is there, so that all machines go on from the same bytes. Credentials and the endpoint come
from the usual variables (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_ENDPOINT_URL, ...), which only processes that run no code
of a model get (environment.py).
"""

from __future__ import annotations

import atexit
import errno
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder.core import atomic, interrupts, temporary
from builder.core import manifest as manifests
from builder.core.environment import STORE
from builder.core.errors import StageError, UsageError
from builder.core.manifest import LARGEST, MANIFEST, Damaged
from builder.core.safe_text import redact
from builder.core.untrusted_text import parse_json

FORMAT = 1
_ADDRESS = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/[\w.=-]+)*/?")
# Bytes. Files up to this size are all that a dry run takes: configurations, tables and scores, but no weights.
GLIMPSED = 1 << 20
# Seconds without an answer or a byte, and attempts: a server that hangs is given up after about three minutes, with
# the libraries' own settings after half an hour.
CONNECT_SECONDS, READ_SECONDS, ATTEMPTS = 10, 30, 3
MARKER = ".trtllm-builder-store"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a write, which name no file


def named() -> Bucket | None:
    """The bucket that BUILDER_STORE names, or None. UsageError for another kind of address, or without s3fs."""
    address = os.environ.get(STORE)
    return opened(address) if address else None


@functools.cache
def opened(address: str) -> Bucket:
    """A bucket by its address, s3://BUCKET/PREFIX."""
    if not _ADDRESS.fullmatch(address):
        raise UsageError(
            f"The store {re.sub('//.*@', '//', address)[:200]!r} is not the address of a bucket.",
            why="It has the form s3://BUCKET/PREFIX and no key in it: credentials are read from the environment.",
            hint="--store s3://my-bucket/builds, with AWS_ACCESS_KEY_ID or AWS_PROFILE set",
        )
    try:
        import s3fs
    except ImportError:
        raise UsageError(
            f"A store in a bucket ({address}) needs s3fs, which is not installed.",
            hint="pip install 'trtllm-builder[cluster]'",
        ) from None
    patience = {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
    attempts = {} if "AWS_MAX_ATTEMPTS" in os.environ else {"retries": {"total_max_attempts": ATTEMPTS}}
    files = s3fs.S3FileSystem(
        use_listings_cache=False, skip_instance_cache=True, config_kwargs={**patience, **attempts}
    )
    files.retries = 2  # of its own, around those
    return Bucket(files, address.rstrip("/").removeprefix("s3://"))


@dataclass(frozen=True)
class Pushed:
    """An artifact in a bucket. text: its manifest.json. directories: those without any file."""

    text: str
    manifest: Mapping[str, Any]
    directories: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Of its content."""
        return str(self.manifest["digest"])


@dataclass(frozen=True)
class Bucket:
    """A prefix of a bucket. files: an fsspec file system, whose objects appear whole or not at all."""

    files: Any
    prefix: str
    _known: dict[tuple[str, str], Pushed] = field(default_factory=dict, repr=False, compare=False)
    _damaged: set[tuple[str, str]] = field(default_factory=set, repr=False, compare=False)

    @property
    def address(self) -> str:
        """As it was given."""
        return f"s3://{self.prefix}"

    def check(self) -> None:
        """UsageError that says why the bucket can't be written or read; StageError if it can't be reached."""
        with self._reached():
            self.files.pipe_file(f"{self.prefix}/{MARKER}", b"Artifacts of trtllm-builder.\n")
            self.files.cat_file(f"{self.prefix}/{MARKER}")
        self.find("no-stage", "0" * 16)  # without ListBucket, what does not exist is forbidden

    def find(self, stage: str, key: str) -> Pushed | None:
        """The artifact with this key. None if there is none, or if its manifest is damaged."""
        if (stage, key) not in self._known:
            with self._reached():
                try:
                    text = self.files.cat_file(self._commit(stage, key), start=0, end=LARGEST)
                except FileNotFoundError:
                    return None
                except OSError as error:
                    if _code(error) != "InvalidRange":  # an object without a byte has no first one
                        raise
                    text = b""
            try:
                self._known[stage, key] = _parsed(text, stage, key)
            except Damaged:
                self._damaged.add((stage, key))
                return None
        return self._known[stage, key]

    def push(self, directory: Path, manifest: Mapping[str, Any], *, replace: bool = False) -> Pushed:
        """Puts an artifact into the bucket, its manifest last. Returns what the bucket has now: of another machine,
        if that one was first, unless this one is to replace it."""
        stage, key = manifest["stage"], manifest["key"]
        replace = replace or (stage, key) in self._damaged
        held = None if replace else self.find(stage, key)
        if held is not None:
            return held
        parents = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_dir()}
        filled = {str(parent) for name in (*manifest["files"], *parents) for parent in Path(name).parents}
        text = (directory / MANIFEST).read_text(encoding="utf-8")
        commit = {"format": FORMAT, "manifest": text, "directories": sorted(parents - filled - {"__pycache__"})}
        with self._reached(directory):
            for name in manifest["files"]:
                self.files.put_file(str(directory / name), f"{self._content(manifest)}/{name}")
            try:
                mode = "overwrite" if replace else "create"
                self.files.pipe_file(self._commit(stage, key), json.dumps(commit).encode(), mode=mode)
            except FileExistsError:
                pass
        self._known.pop((stage, key), None)
        self._damaged.discard((stage, key))
        found = self.find(stage, key)
        if found is None and replace:
            raise StageError(
                f"The store {self.address} does not return what was written to it.",
                why=f"The manifest of {stage}/{key} was written and then read with another content.",
                hint="Check the bucket with another client, or work without it: unset BUILDER_STORE",
            )
        if found is None:  # what another one wrote is damaged
            return self.push(directory, manifest, replace=True)
        return found

    def pull(self, stage: str, key: str, root: Path) -> Path | None:
        """Downloads an artifact into its place in the store under this root. None if the bucket has none that is
        intact, or if files of it that lie outside of it (the Hub's cache) are not on this machine.

        The caller holds the artifact's lock (Store.locked)."""
        found, final = self.find(stage, key), root / stage / key
        if found is None:
            return None
        with _unpublished(root) as place:
            directory = place / stage / key  # so named as the manifest wants it
            whole = self._download(found, directory, list(found.manifest["files"]))
            if not whole or next(manifests.file_problems(directory, found.manifest), None):
                self._damaged.add((stage, key))
                return None
            for path in [*directory.rglob("*"), directory]:
                atomic.fsync(path)
            atomic.make_directory(final.parent)
            interrupts.check()
            atomic.replace_directory(directory, final)
        return final

    def glimpse(self, stage: str, key: str) -> Path | None:
        """An artifact without its large files, in a temporary directory of this process, for dry runs."""
        found = self.find(stage, key)
        if found is None:
            return None
        directory = _glimpses() / found.digest / stage / key
        if not (directory / MANIFEST).exists():
            entries = found.manifest["files"]
            small = [name for name, entry in entries.items() if entry["size"] <= GLIMPSED]
            whole = self._download(found, directory, small, manifest=False)
            if not whole or any(manifests.sha256(directory / name) != entries[name]["sha256"] for name in small):
                return None
            atomic.replace_file(directory / MANIFEST, found.text)
        return directory

    def _download(self, found: Pushed, directory: Path, names: list[str], *, manifest: bool = True) -> bool:
        """False as soon as a file is missing or has another size, so that a false one can't fill the disk."""
        for name in (*found.directories, *(str(Path(name).parent) for name in names)):
            atomic.make_directory(directory / name)
        with self._reached(directory):
            for name in names:
                size, path = found.manifest["files"][name]["size"], directory / name
                try:
                    self.files.get_file(f"{self._content(found.manifest)}/{name}", str(path), callback=_sized(size))
                except (FileNotFoundError, Damaged):
                    return False
                if not path.is_file() or path.stat().st_size != size:
                    return False
        if manifest:
            atomic.replace_file(directory / MANIFEST, found.text)
        return True

    def _commit(self, stage: str, key: str) -> str:
        return f"{self.prefix}/{stage}/{key}.json"

    def _content(self, manifest: Mapping[str, Any]) -> str:
        return f"{self.prefix}/{manifest['stage']}/{manifest['key']}/{manifest['digest']}"

    @contextmanager
    def _reached(self, place: Path | None = None) -> Iterator[None]:
        """Translates what S3 answers. place: what is read or written on this machine's disk meanwhile."""
        try:
            yield
        except Damaged:
            raise
        except OSError as error:
            if place and (error.filename is not None or error.errno in _FULL) and _code(error) is None:
                raise atomic.disk_error(error, place) from error
            raise self._failed(error) from None
        except Exception as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> Exception:
        """What an error of S3 or of the network means; any other one as it is."""
        if isinstance(error, PermissionError):
            return self._refused("does not allow this", error)
        if isinstance(error, FileNotFoundError):
            return self._refused("does not exist", error)
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"):
            return self._refused("needs credentials", error)
        module = type(error).__module__.partition(".")[0]
        if module not in ("botocore", "aiobotocore", "aiohttp") and not isinstance(error, OSError):
            return error
        return StageError(
            f"The store {self.address} can't be reached.",
            why=redact(str(error)),
            hint="Check AWS_ENDPOINT_URL and the network, and run it again: what is finished is kept.",
        )

    def _refused(self, what: str, error: Exception) -> UsageError:
        return UsageError(
            f"The store {self.address} {what}.",
            why=redact(str(error)),
            hint="Check its name and the credentials, which must allow ListBucket, GetObject and PutObject.",
        )


def _parsed(text: bytes, stage: str, key: str) -> Pushed:
    """Damaged if it is not a manifest of ours for this key."""
    try:
        commit = parse_json(text)
        if commit["format"] != FORMAT:
            raise Damaged(f"it has format {commit['format']}")
        manifest, directories = manifests.parsed(commit["manifest"]), tuple(commit["directories"])
        if (manifest["stage"], manifest["key"]) != (stage, key):
            raise Damaged(f"it belongs to {manifest['stage']}/{manifest['key']}")
        for name in directories:
            if "\0" in name or any(part in ("", ".", "..") for part in name.split("/")):
                raise Damaged(f"it has a directory {name!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(str(error)) from None
    return Pushed(commit["manifest"], manifest, directories)


def _code(error: Exception) -> str | None:
    """S3's name of an error that s3fs translated. None for any other error."""
    found = getattr(error.__cause__, "response", None)
    return str(found["Error"]["Code"]) if found else None


def _sized(size: int) -> Any:
    """A callback that ends a download before its first byte if its size is another one."""
    from fsspec.callbacks import Callback  # type: ignore[import-untyped]

    class Sized(Callback):  # type: ignore[misc]
        def set_size(self, found: int | None) -> None:
            if found is not None and found != size:
                raise Damaged(f"it has {found} bytes instead of {size}")

    return Sized()


@contextmanager
def _unpublished(root: Path) -> Iterator[Path]:
    """A directory on the store's disk, which is removed when the block ends or after a kill by the next one."""
    place = root / "pulled"
    atomic.make_directory(place)
    temporary.sweep(place)
    made = None
    try:
        with interrupts.deferred():
            made = temporary.create(place)
        yield made.path
    except OSError as error:
        raise atomic.disk_error(error, root) from error
    finally:
        if made:
            made.remove()


def place_of(path: Path, root: Path) -> Path:
    """Where a file that was glimpsed is in the store under this root once its artifact is pulled; other paths as they
    are."""
    if not path.is_relative_to(_glimpses()):
        return path
    _, *inside = path.relative_to(_glimpses()).parts
    return root.joinpath(*inside)


@functools.cache
def _glimpses() -> Path:
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(temporary.directory())
