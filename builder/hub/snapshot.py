"""The snapshot stage: a Hub id or a local directory becomes a verified list of files. Copies nothing.

Hub files stay in the Hub's own cache and local files where they are. The artifact records size and sha256 of each.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from builder.core.errors import IntegrityError, UsageError
from builder.core.output import Output
from builder.core.safe_text import quoted
from builder.core.safetensors_io import TensorInfo, read_header
from builder.core.store import Artifact, Store, key_of
from builder.core.untrusted_text import read_regular
from builder.hub import stored_commits
from builder.hub.client import HUB_ID, endpoint, offline, resolve, run_hub_job
from builder.model import completeness, dtypes, quantization_signs
from builder.model import files as model_files
from builder.model.completeness import Header
from builder.model.hashed_files import SourceFiles, times
from builder.recipe.schema import Model
from builder.tokenizer import files as tokenizer_files

# Files to download at the same time where each is used once it is complete. All of them at once would also be complete
# at once; huggingface_hub's default is eight.
AT_ONCE = 2


@dataclass(frozen=True)
class Source:
    """A model before any weight is read: its config.json, always with a dtype, and {tensor: (dtype, shape)}.

    `directory`: where config.json and the tokenizer files are. `times`: of the model's files before any was read, for
    a local directory. `commit`: for a Hub model. `places`: of a Hub model that is not in the store, where each tensor
    is in its file, {file: {tensor: place}}. `documents`: of a quantized model, the parsed files that describe its
    quantization, by name; its `config` is config.json without that part.
    """

    model: Model
    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Header]
    times: Mapping[str, Sequence[int]] = field(default_factory=dict)
    commit: str | None = None
    places: Mapping[str, Mapping[str, TensorInfo]] = field(default_factory=dict, compare=False)
    documents: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        """Whether the model is quantized already, in a layout that can be served."""
        return bool(self.documents)


@dataclass(frozen=True)
class Snapshot:
    """A model's files. `path`: the directory with config.json, *.safetensors and the tokenizer.

    `revision`: the commit on the Hub, None for a local directory.
    """

    path: Path
    digest: str
    model_id: str
    revision: str | None
    config: Mapping[str, Any]
    artifact: Artifact

    @property
    def files(self) -> list[str]:
        """Names of the files that belong to the model; the directory may contain others."""
        return sorted(self.artifact.facts["external"]["files"])

    @property
    def source(self) -> SourceFiles:
        """The files with their hashes, for code that loads or reads them later and must notice a change."""
        facts = self.artifact.facts
        return SourceFiles(self.path, facts["external"]["files"], facts.get("times", {}))


def open_source(model: Model, *, store: Store) -> Source:
    """Reads config.json and the safetensors headers: from the directory, the snapshot in the store, or the Hub.

    From the Hub, headers are read with ranged requests, and no weight is downloaded. UsageError for a wrong id or
    directory, IntegrityError for a damaged model, UnsupportedError for one that can't be quantized, StageError if the
    Hub can't be reached.
    """
    directory = local_directory(model)
    if directory is not None:
        found, config, tensors = _read_directory(directory, trust_remote_code=model.trust_remote_code)
        return _source(model, directory, config, tensors, times=found)
    commit = _commit(model, store)
    if (known := _known_headers(model, commit, store)) is not None:
        config, tensors, root = known
        return _source(model, root, config, tensors, commit=commit)
    return _remote(model, commit, store)


def _source(
    model: Model, directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Header], **known: Any
) -> Source:
    """The source with the documents of a quantized model, which are taken out of its config."""
    names = [name for name in quantization_signs.DOCUMENTS if (directory / name).is_file()]
    documents: dict[str, Any] = {}
    if quantization_signs.is_described(names, config):
        documents = {name: model_files.json_object(directory / name, model.id) for name in names}
        config = {key: value for key, value in config.items() if key not in quantization_signs.KEYS}
    return Source(model, directory, dtypes.with_type(config, tensors), tensors, documents=documents, **known)


def fetch(
    model: Model,
    *,
    store: Store,
    source: Source | None = None,
    before: Callable[[], object] = lambda: None,
    arrived: Callable[[Path], object] | None = None,
) -> Snapshot:
    """Finds or downloads the model, checks that it is complete and can be quantized, and hashes each file once.

    `source`: what `open_source` returned for this model, so that nothing is read twice. `before`: called before any
    weight is downloaded or hashed, but not for a cached snapshot; it raises if the model must not be built.
    `arrived`: called, in another thread, with each file of weights that was downloaded and verified, while others are
    still being downloaded.
    Raises what `open_source` raises.
    """
    source = source or open_source(model, store=store)
    artifact = _fetch_directory(source, store, before) if source.times else _fetch_hub(source, store, before, arrived)
    path = Path(artifact.facts["external"]["root"])
    if source.commit and not artifact.cached:  # the headers in `source` came from the Hub; now check the files
        described = source.documents.get(model_files.CONFIG, source.config)
        check_tensors(path, sorted(artifact.facts["external"]["files"]), described, model.id)
    return Snapshot(path, artifact.digest, model.id, source.commit, source.config, artifact)


def local_directory(model: Model) -> Path | None:
    """The directory that the model's id names, or None for a Hub id. UsageError if it is neither."""
    try:
        path = Path(model.id).expanduser()
        if path.is_dir():
            if model.revision:
                raise UsageError(
                    f"{model.id} is a directory and has no revisions.", hint="Omit --revision, or give a Hub id."
                )
            return path.resolve(strict=True)
        present = os.path.lexists(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"{quoted(model.id)} can't be opened as a directory.",
            why=ascii(str(error))[1:200],
            hint="--model Qwen/Qwen3-8B, or --model ./a/directory",
        ) from None
    if present or model.id.startswith((".", "/", "~")):
        raise _no_directory(model.id, path, present)
    if not HUB_ID.fullmatch(model.id) or "--" in model.id or ".." in model.id or len(model.id) > 96:
        raise UsageError(
            f"{quoted(model.id)} is neither a directory nor a Hub id.",
            why="Ids are owner/name, made of letters, digits, '-', '_' and '.'.",
            hint="--model Qwen/Qwen3-8B, or --model ./a/directory",
        )
    return None


def _no_directory(name: str, path: Path, present: bool) -> UsageError:
    if present:
        what = "is a broken link" if path.is_symlink() else "is not a directory"
        return UsageError(f"{quoted(name)} {what}.", hint="Give the directory that contains config.json.")
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"Did you mean {path.parent / near[0]}?" if near else "Give the directory that contains config.json."
    return UsageError(f"There is no directory {quoted(name)}.", hint=hint)


def _fetch_directory(source: Source, store: Store, before: Callable[[], object]) -> Artifact:
    """The snapshot of a local directory. Its key is made of names, sizes and times, so that it is hashed only once.

    The times are those from before config.json and the headers were read, so a change since then is noticed too.
    """
    directory, found, model = source.directory, source.times, source.model
    names = list(found)
    ingredients = {"directory": str(directory), "files": found, "trust_remote_code": model.trust_remote_code}

    def make(_: Path) -> dict[str, Any]:
        before()
        files = _hash(directory, names, store.out)
        if times(directory, names) != found:
            raise IntegrityError(f"{directory} changed while it was read.", hint="Run the same command again.")
        external = {"root": str(directory), "files": files}
        return {"model_id": model.id, "revision": None, "external": external, "times": found}

    return store.stage("snapshot", ingredients, make)


def _read_directory(
    directory: Path, *, trust_remote_code: bool
) -> tuple[dict[str, list[int]], Mapping[str, Any], dict[str, Header]]:
    """The times of the model's files, its config.json and its tensors. Of weights, only the headers are read.

    UsageError if the directory can't be read; otherwise what model.files, model.completeness and tokenizer.files raise.
    """
    try:
        entries = sorted(directory.iterdir())
        before = times(directory, [path.name for path in entries if path.is_file()])
    except OSError as error:
        raise UsageError(f"Can't read {directory}.", why=str(error)) from None
    names = list(before)
    is_split = bool(model_files.split_ranks(names))
    broken = [path.name for path in entries if path.is_symlink() and not path.exists()]
    where = str(directory)
    if model_files.CONFIG in broken:
        raise UsageError(f"{where}/config.json is a broken link.", hint="Copy or download the model again.")
    if model_files.CONFIG not in names and (directory / "unified" / model_files.CONFIG).is_file():
        raise UsageError(
            f"{where} holds a checkpoint in several layouts, each in a directory of its own.",
            hint=f"Give the Hugging Face layout: --model {directory / 'unified'}",
        )
    model_files.check_names(names, where)
    config = model_files.parse_config(_read(directory / model_files.CONFIG), where)
    model_files.check_config(config, where, trust_remote_code=trust_remote_code)
    shards = None
    if model_files.INDEX in names:
        shards = model_files.shards_of(_read(directory / model_files.INDEX), names, where)
    wanted = model_files.wanted(names, shards, remote_code=trust_remote_code)
    try:
        for name in wanted:
            model_files.check_no_pointer(directory / name)
        tensors = check_tensors(directory, wanted, config, where)
    except OSError as error:
        raise UsageError(f"Can't read the model in {directory}.", why=str(error)) from None
    if not is_split:
        tokenizer_files.check(directory, config, where)
    return {name: before[name] for name in wanted}, config, tensors


def check_tensors(directory: Path, names: Sequence[str], config: Mapping[str, Any], where: str) -> dict[str, Header]:
    """{tensor: (dtype, shape)} of a model's files, from their headers: in TensorRT-LLM's layout, of the first rank.
    Raises what completeness.check raises."""
    shards = model_files.split_ranks(names)[:1] or [name for name in names if name.endswith(".safetensors")]
    files = {name: {t: (i.dtype, i.shape) for t, i in read_header(directory / name).items()} for name in shards}
    index = None
    if model_files.INDEX in names:
        index = model_files.index_of(_read(directory / model_files.INDEX), where)
    return completeness.check(config, files, index, where, quantized=quantization_signs.is_described(names, config))


def _read(path: Path) -> bytes:
    try:
        return read_regular(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"Can't read {path}.", why=str(error)) from None


def _hash(directory: Path, names: Sequence[str], out: Output) -> dict[str, dict[str, Any]]:
    total = sum((directory / name).stat().st_size for name in names)
    with out.progress("hash", total / 1e6, "MB") as bar:
        hashes = model_files.hash_files(directory, names, lambda done: bar.update(done / 1e6))
    return {name: {"size": found.size, "sha256": found.sha256} for name, found in hashes.items()}


def listing(model: Model, *, store: Store) -> dict[str, Any]:
    """What downloading a Hub model would transfer: {"commit", "config", "files": {name: bytes}, "missing": bytes to
    download, "free": bytes on the disk, "cache": directory}."""
    commit = resolve(model.id, model.revision, store=store)
    return {"commit": commit, **run_hub_job(store, **_job("listing", model, commit))}


def _known_headers(model: Model, commit: str, store: Store) -> tuple[dict[str, Any], dict[str, Header], Path] | None:
    """Config, tensors and directory of this commit's snapshot in the store; None if there is none."""
    wanted = {**_repository(model), "commit": commit}
    known = stored_commits.newest_artifact(store, "snapshot", wanted) if store.dry else _stored(wanted, store)
    if known is None or not Path(known.facts["external"]["root"]).is_dir():
        return None
    root, files = Path(known.facts["external"]["root"]), sorted(known.facts["external"]["files"])
    config = model_files.parse_config(_read(root / model_files.CONFIG), str(root))
    return config, check_tensors(root, files, config, model.id), root


def _stored(ingredients: Mapping[str, Any], store: Store) -> Artifact | None:
    return None if "snapshot" in store.force else store.find("snapshot", key_of("snapshot", ingredients))


def _commit(model: Model, store: Store) -> str:
    return resolve(model.id, model.revision, store=store, planned=("snapshot", _repository(model)))


def _repository(model: Model) -> dict[str, Any]:
    """The ingredients of a snapshot except for its commit."""
    return {"repository": model.id, "endpoint": endpoint(), "trust_remote_code": model.trust_remote_code}


def _remote(model: Model, commit: str, store: Store) -> Source:
    """The source by the headers on the Hub."""
    found = run_hub_job(store, **_job("headers", model, commit))
    places = {
        file: {name: TensorInfo(dtype, tuple(shape), begin, end) for name, (dtype, shape, begin, end) in header.items()}
        for file, header in found["tensors"].items()
    }
    files = {file: {name: (info.dtype, info.shape) for name, info in t.items()} for file, t in places.items()}
    quantized = quantization_signs.is_described(found["files"], found["config"])
    tensors = completeness.check(found["config"], files, found["index"], model.id, quantized=quantized)
    return _source(model, Path(found["root"]), found["config"], tensors, commit=commit, places=places)


def _fetch_hub(
    source: Source, store: Store, before: Callable[[], object], arrived: Callable[[Path], object] | None
) -> Artifact:
    model, commit = source.model, str(source.commit)
    ingredients: dict[str, Any] = {**_repository(model), "commit": commit}
    if offline() and _stored(ingredients, store) is None:
        # The cache may lack files that the Hub has, such as generation_config.json. So the key includes the listing.
        ingredients["offline"] = run_hub_job(store, **_job("listing", model, commit))["files"]

    def make(_: Path) -> dict[str, Any]:
        before()
        job = _job("download", model, commit)
        if arrived is None:
            found = run_hub_job(store, **job)
        else:

            def on_complete(name: str) -> None:
                arrived(source.directory / name)

            found = run_hub_job(store, on_complete=on_complete, at_once=AT_ONCE, **job)
        external = {"root": found["root"], "files": found["files"]}
        return {"model_id": model.id, "revision": commit, "external": external, "times": found["times"]}

    return store.stage("snapshot", ingredients, make)


def _job(job: str, model: Model, commit: str) -> dict[str, Any]:
    return {
        "job": job,
        "repo": model.id,
        "revision": model.revision,
        "commit": commit,
        "trust_remote_code": model.trust_remote_code,
    }
