"""The environment of worker processes: an allowlist, so that secrets don't leak into them.

Quantizing, evaluating, building and serving may run code that ships with a model (--trust-remote-code) or a
repository. Those processes get neither the Hub token nor a proxy address, which may contain a password. Only
processes that talk to the Hub and run no such code get them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Literal

# "work": quantizes, evaluates, builds an engine or serves. "hub": talks to the Hub with the user's credentials.
# "public": talks to the Hub without them. "docker": the docker command. "gateway": sends traces, and runs no such code.
# "step": a command of ours, which talks to the Hub and to the store's bucket.
Kind = Literal["work", "hub", "public", "docker", "gateway", "step"]
STORE = "BUILDER_STORE"  # the address of a bucket that artifacts are shared through (bucket.py)
NAMED = "BUILDER_CHILD_ENV"  # the user's additions to the allowlist: variable names, separated by commas


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_NAMES = _words(
    "PATH HOME USER LOGNAME SHELL TMPDIR TZ TERM LANG LANGUAGE LD_LIBRARY_PATH LD_PRELOAD LIBRARY_PATH CPATH "
    "CC CXX OPAL_PREFIX TOKENIZERS_PARALLELISM MALLOC_ARENA_MAX"
)
_PREFIXES = _words(
    "LC_ XDG_ PYTHON BUILDER_ "
    "OMP_ KMP_ GOMP_ MKL_ OPENBLAS_ BLIS_ NUMEXPR_ "  # threads
    "CUDA CUBLAS CUDNN NVIDIA_ NVCC_ NCCL_ NVSHMEM_ TORCH PYTORCH_ TRITON_ MODELOPT_ "
    "TLLM_ TRTLLM_ TRT_ TENSORRT_ FLASHINFER_ "
    # MPI, for several ranks. SLURM_* is left out: all ranks run on this machine, and SLURM_JWT is a secret.
    "OMPI_ PMIX_ PRTE_ UCX_ UCC_ GLOO_ "
    "HF_HOME HF_HUB_ HF_XET_ HF_DATASETS_ HF_MODULES_ HF_ASSETS_ HF_DEBUG TRANSFORMERS_ HUGGINGFACE_HUB_CACHE"
)
_NETWORK = _words(
    "HF_ENDPOINT HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE"
)
_TOKENS = _words("HF_TOKEN HF_TOKEN_PATH HUGGING_FACE_HUB_TOKEN HUGGINGFACE_TOKEN")
_DOCKER = _words("DOCKER_HOST DOCKER_CONFIG DOCKER_CONTEXT DOCKER_CERT_PATH DOCKER_TLS_VERIFY SSH_AUTH_SOCK")
_BUCKET = _words("AWS_ FSSPEC_S3_")  # keys and endpoint of a bucket
# Rejects secrets that match an allowed prefix, such as TRITON_API_KEY.
_SECRET = re.compile(r"(^|_)(TOKENS?|SECRETS?|PASS|PASSWORD|PASSWD|CREDENTIALS?|AUTH|JWT|API_?KEY|KEY)(_|$)")
_USERINFO = re.compile(r"^([a-z][a-z0-9+.-]*://)?[^/]*@", re.IGNORECASE)


def child_environment(kind: Kind = "work", source: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of `source` (default: os.environ) that a process of this kind may have.

    For "public", user names and passwords are removed from proxy and endpoint addresses.
    """
    source = os.environ if source is None else source
    named = {name.strip() for name in source.get(NAMED, "").split(",")}
    kept = {name: value for name, value in source.items() if name in named or _allowed(name, kind)}
    if kind == "public":
        kept = {name: _without_user(value) if name.upper() in _NETWORK else value for name, value in kept.items()}
    return kept


def _allowed(name: str, kind: Kind) -> bool:
    upper = name.upper()  # curl and Python accept the proxy variables in either case
    if name == STORE or name.startswith(_BUCKET):
        return kind == "step"
    if kind in ("hub", "public", "step") and upper in _NETWORK:
        return True
    if kind in ("hub", "step") and name in _TOKENS:
        return True
    if kind == "docker" and name in _DOCKER:
        return True
    if kind == "gateway" and name.startswith("OTEL_"):  # OTEL_EXPORTER_OTLP_HEADERS has the collector's key
        return True
    return name in _NAMES or (name.startswith(_PREFIXES) and not _SECRET.search(upper))


def _without_user(address: str) -> str:
    """A URL or HOST:PORT without user name and password."""
    return _USERINFO.sub(r"\1", address)
