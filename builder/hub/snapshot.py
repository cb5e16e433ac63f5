"""Model -> Snapshot: a Hub id or a local directory becomes a verified list of files. Nothing is copied.

Hub files stay in the Hub's own cache, local files where they are; the artifact names each with size and sha256.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.core import process, workers
from builder.core.errors import IntegrityError, StageError, UsageError
from builder.core.output import Output, Progress
from builder.core.safetensors_io import read_header
from builder.core.store import Artifact, Store, key_of
from builder.core.untrusted_text import read_regular
from builder.hub import stored_commits
from builder.model import completeness, dtypes
from builder.model import files as model_files
from builder.model.completeness import Header
from builder.model.hashed_files import SourceFiles, times
from builder.recipe.schema import Model
from builder.tokenizer import files as tokenizer_files

COMMIT = re.compile(r"[0-9a-f]{40}")
# The Hub's rule for names (huggingface_hub/utils/_validators.py): owner/name of letters, digits, "-", "_" and ".".
HUB_ID = re.compile(r"(?:[A-Za-z0-9_][\w.-]*/)?[A-Za-z0-9_][\w.-]*", re.ASCII)
# Seconds before each repetition in a row, while the Hub is down or the connection breaks.
RETRY_DELAYS: tuple[float, ...] = (1, 2, 4, 8, 15)
# Seconds without one byte after which a transfer counts as stuck; plain HTTP gives up by itself after 10.
STALL_SECONDS = 300.0
# Seconds for all that is asked of the Hub before the download: listings, config.json, headers.
TIME_LIMIT = 600.0


@dataclass(frozen=True)
class Source:
    """A model before any weight is read: its config.json, always with a dtype, and {tensor: (dtype, shape)}.

    directory: where config.json and the tokenizer files are. files: the model's files in a local directory; commit:
    that of a Hub model.
    """

    model: Model
    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Header]
    files: tuple[str, ...] = ()
    commit: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """A model's files: `path` holds config.json, *.safetensors and the tokenizer. `revision` is a commit of the Hub."""

    path: Path
    digest: str
    model_id: str
    revision: str | None
    config: Mapping[str, Any]
    artifact: Artifact

    @property
    def files(self) -> list[str]:
        """The names that belong to the model; the directory may hold others."""
        return sorted(self.artifact.facts["external"]["files"])

    @property
    def source(self) -> SourceFiles:
        """The files as they were hashed, for everyone who loads them or reads them again."""
        facts = self.artifact.facts
        return SourceFiles(self.path, facts["external"]["files"], facts.get("times", {}))


def open_source(model: Model, *, store: Store) -> Source:
    """Reads config.json and the safetensors headers: from the directory, the snapshot in the store, or the Hub.

    From the Hub, headers are read by ranged requests and no weight is downloaded. Raises what is wrong with the model.
    """
    directory = local_directory(model)
    if directory is not None:
        files, config, tensors = _read_directory(directory, trust_remote_code=model.trust_remote_code)
        return Source(model, directory, dtypes.with_type(config, tensors), tensors, files=tuple(files))
    commit = _commit(model, store)
    config, tensors, root = _known_headers(model, commit, store) or _headers(model, commit, store)
    return Source(model, root, dtypes.with_type(config, tensors), tensors, commit=commit)


def fetch(
    model: Model, *, store: Store, source: Source | None = None, before: Callable[[], object] = lambda: None
) -> Snapshot:
    """Finds or downloads the model, checks that it is complete and can be quantized, and hashes each file once.

    source: what open_source returned for this model, so that nothing is read twice. before: called before the first
    weight is downloaded or hashed, not for a snapshot in the store; it raises what speaks against the model.
    """
    source = source or open_source(model, store=store)
    artifact = _fetch_directory(source, store, before) if source.files else _fetch_hub(source, store, before)
    path = Path(artifact.facts["external"]["root"])
    if source.commit and not artifact.cached:  # the headers were the Hub's; these are of the files
        check_tensors(path, sorted(artifact.facts["external"]["files"]), source.config, model.id)
    return Snapshot(path, artifact.digest, model.id, source.commit, source.config, artifact)


def local_directory(model: Model) -> Path | None:
    """The directory that the model's id means, or None for a Hub id. UsageError if it is neither."""
    try:
        path = Path(model.id).expanduser()
        if path.is_dir():
            if model.revision:
                raise UsageError(
                    f"{model.id} is a directory and has no revisions.", hint="Leave --revision away, or give a Hub id."
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
            f"{quoted(model.id)} is neither a directory nor an id of the Hub.",
            why="Ids are owner/name, of letters, digits, '-', '_' and '.'.",
            hint="--model Qwen/Qwen3-8B, or --model ./a/directory",
        )
    return None


def quoted(text: str) -> str:
    """Quoted, with control characters escaped, cut: fit for a message whatever it holds."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")


def _no_directory(name: str, path: Path, present: bool) -> UsageError:
    if present:
        what = "is a link that leads nowhere" if path.is_symlink() else "is no directory"
        return UsageError(f"{quoted(name)} {what}.", hint="Give the directory that holds config.json.")
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, n=1)
    hint = f"Did you mean {path.parent / near[0]}?" if near else "Give the directory that holds config.json."
    return UsageError(f"There is no directory {quoted(name)}.", hint=hint)


def _fetch_directory(source: Source, store: Store, before: Callable[[], object]) -> Artifact:
    """The key is made of names, sizes and times: an unchanged directory is not hashed again."""
    directory, names, model = source.directory, source.files, source.model
    found = times(directory, names)
    ingredients = {"directory": str(directory), "files": found, "trust_remote_code": model.trust_remote_code}

    def make(_: Path) -> dict[str, Any]:
        before()
        files = _hash(directory, names, store.out)
        if times(directory, names) != found:
            raise IntegrityError(f"{directory} changed while it was read.", hint="Run the same command again.")
        external = {"root": str(directory), "files": files}
        return {"model_id": model.id, "revision": None, "external": external, "times": found}

    return store.stage("snapshot", ingredients, make)


def check_directory(directory: Path, *, trust_remote_code: bool) -> list[str]:
    """The names of the model's files in a local directory. Raises what is wrong with it; reads headers only."""
    return _read_directory(directory, trust_remote_code=trust_remote_code)[0]


def _read_directory(
    directory: Path, *, trust_remote_code: bool
) -> tuple[list[str], Mapping[str, Any], dict[str, Header]]:
    """The names of the model's files, its config.json and its tensors."""
    try:
        entries = sorted(directory.iterdir())
    except OSError as error:
        raise UsageError(f"Can't read {directory}.", why=str(error)) from None
    names = [path.name for path in entries if path.is_file()]
    broken = [path.name for path in entries if path.is_symlink() and not path.exists()]
    where = str(directory)
    if model_files.CONFIG in broken:
        raise UsageError(f"{where}/config.json is a link that leads nowhere.", hint="Copy or fetch the model again.")
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
    tokenizer_files.check(directory, config, where)
    return wanted, config, tensors


def check_tensors(directory: Path, names: Sequence[str], config: Mapping[str, Any], where: str) -> dict[str, Header]:
    """The tensors of a model's files, by their headers alone. Raises as source_model.check does."""
    shards = [name for name in names if name.endswith(".safetensors")]
    files = {name: {t: (i.dtype, i.shape) for t, i in read_header(directory / name).items()} for name in shards}
    index = None
    if model_files.INDEX in names:
        index = model_files.index_of(_read(directory / model_files.INDEX), where)
    return completeness.check(config, files, index, where)


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


def resolve(
    repo: str,
    revision: str | None,
    *,
    store: Store,
    kind: str = "model",
    planned: tuple[str, Mapping[str, Any]] | None = None,
) -> str:
    """The commit of a branch or tag of the Hub. No process and no network for what is a commit already.

    planned: the stage that the commit is for, with its ingredients so far. A dry store takes the newest commit among
    its artifacts with them if the Hub can't be reached.
    """
    if revision and COMMIT.fullmatch(revision):
        return revision
    if revision is not None and (not re.fullmatch(r"\w[\w./+-]{0,200}", revision) or ".." in revision):
        raise UsageError(f"{quoted(revision)} is no revision.", hint="Give a branch, a tag or a commit.")
    known, waits = None, list(RETRY_DELAYS)
    if store.dry and planned:
        known = stored_commits.newest_artifact(store, *planned) if revision is None else None
        waits = [] if known or planned[0] != "snapshot" else waits
    try:
        answer = run_hub_job(store, job="resolve", repo=repo, revision=revision, kind=kind, waits=waits)
    except (StageError, UsageError) as error:
        unreachable = isinstance(error, StageError) or offline()
        if not (store.dry and planned and unreachable):
            raise
        return stored_commits.fallback_commit(error, known, repo, store=store, stage=planned[0])
    commit = str(answer["commit"])
    if not COMMIT.fullmatch(commit):
        raise IntegrityError(
            f"{quoted(commit)} is no commit, but what {repo} at {revision or 'main'} is said to be.",
            why="It comes from the Hub (HF_ENDPOINT), or offline from refs/ in its cache.",
            hint="Check HF_ENDPOINT, or remove that file from the cache.",
        )
    store.out.info(f"{repo} at {revision or 'main'} is commit {commit}")
    return commit


def listing(model: Model, *, store: Store) -> dict[str, Any]:
    """What fetching a Hub model would mean, before it is done: {"commit", "config", "files": {name: bytes}, "missing":
    bytes to download, "free": bytes, "cache": directory}."""
    commit = resolve(model.id, model.revision, store=store)
    return {"commit": commit, **run_hub_job(store, **_job("listing", model, commit))}


def _known_headers(model: Model, commit: str, store: Store) -> tuple[dict[str, Any], dict[str, Header], Path] | None:
    """Config, tensors and directory of this commit's snapshot in the store; None where it is not there."""
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
    """What a snapshot's key has beside its commit."""
    return {"repository": model.id, "endpoint": endpoint(), "trust_remote_code": model.trust_remote_code}


def _headers(model: Model, commit: str, store: Store) -> tuple[dict[str, Any], dict[str, Header], Path]:
    found = run_hub_job(store, **_job("headers", model, commit))
    files = {
        file: {name: (dtype, tuple(shape)) for name, (dtype, shape) in header.items()}
        for file, header in found["tensors"].items()
    }
    tensors = completeness.check(found["config"], files, found["index"], model.id)
    return found["config"], tensors, Path(found["root"])


def _fetch_hub(source: Source, store: Store, before: Callable[[], object]) -> Artifact:
    model, commit = source.model, str(source.commit)
    ingredients: dict[str, Any] = {**_repository(model), "commit": commit}
    if offline() and _stored(ingredients, store) is None:
        # The cache may lack files that the Hub has, as generation_config.json: a key of its own, by what is there.
        ingredients["offline"] = run_hub_job(store, **_job("listing", model, commit))["files"]

    def make(_: Path) -> dict[str, Any]:
        before()
        found = run_hub_job(store, **_job("download", model, commit))
        external = {"root": found["root"], "files": found["files"]}
        return {"model_id": model.id, "revision": commit, "external": external, "times": found["times"]}

    return store.stage("snapshot", ingredients, make)


def offline() -> bool:
    """Whether huggingface_hub asks its cache alone (huggingface_hub/constants.py, HF_HUB_OFFLINE)."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in ("1", "ON", "YES", "TRUE")


def endpoint() -> str:
    """HF_ENDPOINT without the user and password that a mirror's address may hold; "" is the Hub itself."""
    return re.sub(r"//[^/]*@", "//", os.environ.get("HF_ENDPOINT", "")).rstrip("/")


def _job(job: str, model: Model, commit: str) -> dict[str, Any]:
    return {
        "job": job,
        "repo": model.id,
        "revision": model.revision,
        "commit": commit,
        "trust_remote_code": model.trust_remote_code,
    }


def run_hub_job(store: Store, *, module: str = workers.HUB_DOWNLOAD, unit: str = "MB", **job: Any) -> dict[str, Any]:
    """Runs one job in a child process. Its errors are raised here as they were there; a stuck one is begun again once,
    without Xet, over plain HTTP."""
    job = {"waits": list(RETRY_DELAYS), "stall": STALL_SECONDS, "limit": TIME_LIMIT, **job}
    for environment in ({}, {"HF_HUB_DISABLE_XET": "1"}):
        answer = _ask(store, module, unit, job, environment)
        if "stalled" not in answer:
            result: dict[str, Any] = answer["result"]
            return result
        store.out.warn(f"no byte came for {STALL_SECONDS:.0f} s; the transfer is begun again over plain HTTP")
    raise StageError(
        f"The transfer of {job['repo']} is stuck.",
        why=f"No byte came for {STALL_SECONDS:.0f} s, twice.",
        hint="Check the network and HF_ENDPOINT, then run the same command: whole files are kept.",
    )


def _ask(
    store: Store, module: str, unit: str, job: Mapping[str, Any], environment: Mapping[str, str]
) -> dict[str, Any]:
    """All events of one child but the talk, by their names: "result" or "stalled". Raises its "error"."""
    answer: dict[str, Any] = {}
    argv = [process.python(), "-m", module, json.dumps(job)]
    log = store.log(str(job["job"]))
    with ExitStack() as bars:
        bar: Progress | None = None
        label = ""

        def hear(event: dict[str, Any]) -> None:
            nonlocal bar, label
            if "progress" in event:
                now, scale = event["progress"], 1e6 if unit == "MB" else 1
                if bar is None or label != now["label"]:
                    bars.close()
                    label = now["label"]
                    bar = bars.enter_context(store.out.progress(label, now["total"] / scale, unit))
                bar.update(now["done"] / scale)
            elif "info" in event:
                store.out.info(event["info"])
            else:
                answer.update(event)

        try:
            environment = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
            process.run(process.Command(argv, env=environment, kind="hub"), log=log, on_event=hear)
        except StageError:
            if "stalled" not in answer:
                raise
    log.unlink(missing_ok=True)
    return answer
