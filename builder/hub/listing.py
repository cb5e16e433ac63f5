"""Which files of a Hub repository make up the model, checked before any weight is downloaded.

Only config.json, the index and the tokenizer are downloaded for that. Imported only in the process that talks to the
Hub.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import HfApi, constants, hf_hub_download

from builder.core.errors import IntegrityError, UsageError
from builder.core.output import size as readable
from builder.hub import guard
from builder.hub.cache import MOST_FILES, HubFile, Job, cached_files, drop_damaged, is_plain
from builder.hub.errors import with_retries
from builder.model import files as model_files
from builder.model import quantization_signs
from builder.tokenizer import files as tokenizer_files

LARGEST_CONFIG = 256_000_000  # bytes of a file that is parsed before the download; the largest known index has 30 MB


@dataclass(frozen=True)
class Selection:
    """The model's files by name, its parsed config.json, and the directory of the snapshot in the cache."""

    files: Mapping[str, HubFile]
    config: dict[str, Any]
    root: Path


def select(job: Job) -> Selection:
    """Selects the model's files from what the Hub lists, or offline from the cache, and checks the model.

    Raises what model.files and tokenizer.files raise for a model that is incomplete or not supported.
    """
    listed = cached_files(job) if constants.HF_HUB_OFFLINE else _hub_files(job)
    if job.adapter:
        return _select_adapter(job, listed)
    model_files.check_names(listed, job.repo)
    config_path = _download_small(job, model_files.CONFIG, listed)
    config = model_files.parse_config(config_path.read_bytes(), job.repo)
    model_files.check_config(config, job.repo, trust_remote_code=job.trust_remote_code)
    shards = None
    if model_files.INDEX in listed:
        shards = model_files.shards_of(_download_small(job, model_files.INDEX, listed).read_bytes(), listed, job.repo)
    names = model_files.wanted(listed, shards, remote_code=job.trust_remote_code)
    files = {name: listed[name] for name in names}
    for name in quantization_signs.DOCUMENTS:
        if name in files:
            _download_small(job, name, files)
    if not model_files.split_ranks(listed):
        _check_tokenizer(job, config_path.parent, files, config)
    return Selection(files, config, config_path.parent)


def _select_adapter(job: Job, listed: Mapping[str, HubFile]) -> Selection:
    """The two files of a LoRA adapter, as PEFT names them."""
    missing = [name for name in model_files.ADAPTER if name not in listed]
    if missing:
        raise UsageError(
            f"{job.repo} is no LoRA adapter that can be served: it has no {' and no '.join(missing)}.",
            hint="Name a repository that PEFT's save_pretrained wrote, with safetensors.",
        )
    config_path = _download_small(job, model_files.ADAPTER[0], listed)
    config = model_files.json_object(config_path, job.repo)
    return Selection({name: listed[name] for name in model_files.ADAPTER}, config, config_path.parent)


def _check_tokenizer(job: Job, root: Path, files: Mapping[str, HubFile], config: Mapping[str, Any]) -> None:
    """Downloads the tokenizer's files, which are small, and checks that they load and fit the model."""
    names = model_files.tokenizer_names(files)
    small = {name: files[name] for name in (*names, model_files.GENERATION) if name in files}
    if not constants.HF_HUB_OFFLINE:
        for name in small:
            _download_small(job, name, files)
    tokenizer_files.check(root, config, job.repo)


def _hub_files(job: Job) -> dict[str, HubFile]:
    """The files at the top level of the repository. Names that are not plain can't belong to a model: left out."""

    def entries() -> list[Any]:
        listed = HfApi().list_repo_tree(job.repo, recursive=False, revision=job.commit)
        return list(itertools.islice(listed, MOST_FILES + 1))

    found = with_retries(entries, job.waits)
    if len(found) > MOST_FILES:
        raise IntegrityError(f"The Hub lists more than {MOST_FILES} files of {job.repo}.", hint=guard.HINT)
    return {
        entry.path: _hub_file(entry)
        for entry in found
        if isinstance(entry, huggingface_hub.hf_api.RepoFile) and is_plain(entry.path)
    }


def _hub_file(entry: Any) -> HubFile:
    """An entry of a listing. Its hashes are checked since they become file names; its size since it is summed up."""
    sha256 = entry.lfs.sha256 if entry.lfs else None
    for found in (sha256, entry.blob_id):
        if found is not None:
            guard.check_hash(found, "the hash")
    if type(entry.size) is not int or not 0 <= entry.size < 1 << 60:
        raise IntegrityError(f"The Hub lists a size of {str(entry.size)[:40]} for a file.", hint=guard.HINT)
    return HubFile(entry.size, sha256, entry.blob_id)


def _download_small(job: Job, name: str, listed: Mapping[str, HubFile]) -> Path:
    """Downloads a file that is parsed before the model's download, and verifies it; once more if it is damaged."""
    files = {name: listed[name]}
    if listed[name].size > LARGEST_CONFIG:
        raise IntegrityError(
            f"{name} of {job.repo} has {readable(listed[name].size)}; the limit is {readable(LARGEST_CONFIG)}.",
            hint="Do not use this model.",
        )
    for repairable in (not constants.HF_HUB_OFFLINE, False):
        path = Path(with_retries(lambda: hf_hub_download(job.repo, name, revision=job.commit), job.waits))
        hashes = model_files.hash_files(path.parent, [name], lambda _: None)
        if not drop_damaged(job, path.parent, files, hashes, repairable=repairable):
            break
    return path
