"""The environment of child processes: a list of what they may have. Anything else, secrets above all, stays here.

Quantizing, evaluating, building and serving run code that comes with a model (--trust-remote-code) or a repository, so
their processes get neither the Hub's token nor an address that may hold a password. Only the processes that talk to
the Hub and run no such code get those.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Literal

# "work": quantize, evaluate, build an engine, serve. "hub": talk to the Hub with the user's credentials. "public": talk
# to the Hub without them. "docker": the docker command.
Kind = Literal["work", "hub", "public", "docker"]
NAMED = "BUILDER_CHILD_ENV"  # names of further variables for every child, separated by commas


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
    # Several ranks. Not SLURM_*: all ranks run on this machine, and SLURM_JWT is a secret.
    "OMPI_ PMIX_ PRTE_ UCX_ UCC_ GLOO_ "
    "HF_HOME HF_HUB_ HF_XET_ HF_DATASETS_ HF_MODULES_ HF_ASSETS_ HF_DEBUG TRANSFORMERS_ HUGGINGFACE_HUB_CACHE"
)
_NETWORK = _words(
    "HF_ENDPOINT HTTP_PROXY HTTPS_PROXY ALL_PROXY NO_PROXY SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE"
)
_TOKENS = _words("HF_TOKEN HF_TOKEN_PATH HUGGING_FACE_HUB_TOKEN HUGGINGFACE_TOKEN")
_DOCKER = _words("DOCKER_HOST DOCKER_CONFIG DOCKER_CONTEXT DOCKER_CERT_PATH DOCKER_TLS_VERIFY SSH_AUTH_SOCK")
# Names that a prefix above would let through.
_SECRET = re.compile(r"(^|_)(TOKENS?|SECRETS?|PASS|PASSWORD|PASSWD|CREDENTIALS?|AUTH|JWT|API_?KEY|KEY)(_|$)")
_USERINFO = re.compile(r"^([a-z][a-z0-9+.-]*://)?[^/]*@", re.IGNORECASE)


def child_environment(kind: Kind = "work", source: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a child of this kind gets of `source` (default: our own environment)."""
    source = os.environ if source is None else source
    named = {name.strip() for name in source.get(NAMED, "").split(",")}
    kept = {name: value for name, value in source.items() if name in named or _allowed(name, kind)}
    if kind == "public":
        kept = {name: _without_user(value) if name.upper() in _NETWORK else value for name, value in kept.items()}
    return kept


def _allowed(name: str, kind: Kind) -> bool:
    upper = name.upper()  # curl and Python read proxies in either case
    if kind in ("hub", "public") and upper in _NETWORK:
        return True
    if kind == "hub" and name in _TOKENS:
        return True
    if kind == "docker" and name in _DOCKER:
        return True
    return name in _NAMES or (name.startswith(_PREFIXES) and not _SECRET.search(upper))


def _without_user(address: str) -> str:
    """A URL, or HOST:PORT, without the user and password that may stand before the host."""
    return _USERINFO.sub(r"\1", address)
