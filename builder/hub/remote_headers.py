"""Reads the headers of a Hub model's safetensors files, with the same checks as for local files.

huggingface_hub's own `get_safetensors_metadata` accepts headers that are impossible, and reads the index only if there
is not model.safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import hf_hub_url
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import get_session, hf_raise_for_status

from builder.core.safetensors_io import TensorInfo, header_length, parse_header, read_header
from builder.hub.errors import with_retries

FIRST = 100_000  # bytes of the first request; 97 % of headers fit (huggingface_hub, parse_safetensors_file_metadata)
TIMEOUT = 10.0  # seconds without a byte
CONCURRENCY = 8  # files read at the same time

Headers = dict[str, dict[str, TensorInfo]]


def cached(root: Path, shards: Mapping[str, int]) -> Headers:
    """{file: {tensor: TensorInfo}} of files in the cache directory `root`. IntegrityError for an invalid header."""
    return {name: read_header(root / name) for name in shards}


def remote(repo: str, commit: str, shards: Mapping[str, int], waits: Sequence[float]) -> Headers:
    """{file: {tensor: TensorInfo}} from ranged reads. IntegrityError for an invalid header.

    `shards`: {file: size in bytes as the Hub lists it}; `waits`: see with_retries.
    """

    def read(name: str) -> dict[str, TensorInfo]:
        return with_retries(lambda: _read(repo, commit, name, shards[name]), waits)

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        return dict(zip(shards, pool.map(read, shards), strict=True))


def _read(repo: str, commit: str, name: str, size: int) -> dict[str, TensorInfo]:
    url, where = hf_hub_url(repo, name, revision=commit), f"{repo}/{name}"
    start = _range(url, 0, min(FIRST, size))
    length = header_length(start, size, where)
    if 8 + length > len(start):
        start += _range(url, len(start), 8 + length)
    return parse_header(start[8 : 8 + length], size, where)


def _range(url: str, begin: int, end: int) -> bytes:
    """Bytes [begin, end) of a file; fewer if the server sends fewer."""
    if begin >= end:
        return b""
    headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    response = get_session().get(url, headers=headers, timeout=TIMEOUT)
    hf_raise_for_status(response)
    content = bytes(response.content)
    whole = response.status_code == 200  # a server without support for ranges sends the file from its beginning
    return content[begin:end] if whole else content[: end - begin]
