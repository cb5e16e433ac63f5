"""Parses untrusted JSON and YAML with limits on size, depth and time, so that hostile input ends in a ValueError.

Python's own parsers raise RecursionError for deep nesting, silently keep the last of two equal keys, and expand YAML
aliases without limit. The functions here raise only OSError, or ValueError (UnicodeDecodeError is one) whose text
says what is wrong.
"""

from __future__ import annotations

import json
import os
import select
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import yaml

LARGEST_JSON = 256_000_000  # bytes; the index of a model with a million tensors has about 100 MB
LARGEST_YAML = 1_000_000  # bytes
DEEPEST = 100  # levels of nesting; a config.json has about 6
MOST_NODES = 100_000  # in a YAML document, counting an alias each time it is used
PIPE_SECONDS = 10.0  # how long to wait for a pipe, such as `--recipe <(command)`


def parse_json(text: bytes | str, *, unique: bool = False) -> Any:
    """Parses JSON. Accepts NaN and Infinity: transformers writes them (`time_step_limit` of Mamba models).

    A duplicate key is an error if the values differ, or in any case with `unique`.
    """
    if len(text) > LARGEST_JSON:
        raise ValueError(f"it is larger than {LARGEST_JSON} bytes")
    try:
        value = json.loads(_decoded(text), object_pairs_hook=_unique if unique else _object)
        _check_depth(value)
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    return value


def parse_yaml(text: bytes | str, *, own: bool = False) -> Any:
    """Parses one YAML document with the safe loader. A duplicate key is an error.

    own: one of this project's files, which libyaml reads, where PyYAML has it: ten times as fast. It is no reader for
    others' files, because it has no limit on nesting.
    """
    import yaml

    try:
        return _yaml(text, construct=True, own=own)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def check_yaml(text: bytes | str) -> None:
    """Checks a YAML document without constructing values, for files with custom tags such as lm-eval's `!function`."""
    import yaml

    try:
        _yaml(text, construct=False)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def read_regular(path: Path, limit: int = LARGEST_JSON, *, pipe: bool = False) -> bytes:
    """Reads a regular file of at most `limit` bytes; with `pipe`, also a pipe that has a writer.

    Other files are rejected: open() on a named pipe without a writer blocks forever, and a device may be endless.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode):
        os.close(descriptor)
        raise ValueError("it is a directory, not a file")
    with open(descriptor, "rb", buffering=0) as file:
        if stat.S_ISFIFO(mode) and pipe:
            return _read_pipe(descriptor, limit)
        if not stat.S_ISREG(mode):
            raise ValueError("it is neither a regular file nor a pipe" if pipe else "it is not a regular file")
        pieces, size = [], 0
        while piece := file.read(1 << 20):
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise ValueError(f"it is larger than {limit} bytes")
    return b"".join(pieces)


def _read_pipe(descriptor: int, limit: int) -> bytes:
    ready, found, deadline = select.poll(), b"", time.monotonic() + PIPE_SECONDS
    ready.register(descriptor, select.POLLIN)
    while len(found) <= limit:
        if not ready.poll(max(0, int(1000 * (deadline - time.monotonic())))):
            raise ValueError(f"it is a pipe that sent nothing for {PIPE_SECONDS:.0f} s")
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            return found
        found += piece
    raise ValueError(f"it is larger than {limit} bytes")


def _decoded(text: bytes | str) -> str:
    if isinstance(text, str):
        return text
    if text.startswith(b"\xef\xbb\xbf"):
        raise ValueError("it begins with a byte order mark, which transformers can't read: save it without one")
    return text.decode("utf-8")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            if repr(found[key]) != repr(value):  # compared as text, because NaN does not equal itself
                raise ValueError(f"the key {key[:80]!r} occurs twice, with different values")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _check_depth(value: Any) -> None:
    """RecursionError below DEEPEST levels. Level by level, without recursion of its own."""
    level, depth = [value], 0
    while level:
        if depth > DEEPEST:
            raise RecursionError
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(child for child in item.values() if isinstance(child, (dict, list)))
            elif isinstance(item, list):
                below.extend(child for child in item if isinstance(child, (dict, list)))
        level, depth = below, depth + 1


def _yaml(text: bytes | str, *, construct: bool, own: bool = False) -> Any:
    import yaml

    if len(text) > LARGEST_YAML:
        raise ValueError(f"it is larger than {LARGEST_YAML} bytes")
    kind = getattr(yaml, "CSafeLoader", yaml.SafeLoader) if own else yaml.SafeLoader
    loader = kind(text if isinstance(text, str) else text.decode("utf-8-sig"))
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node)
        return loader.construct_document(node) if construct else None
    except RecursionError:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep") from None
    except (TypeError, AttributeError, OverflowError, KeyError, IndexError) as error:
        # PyYAML's constructors raise these for `!!timestamp x`, `!!float ""` and the like.
        raise ValueError(f"a value can't be read: {error}") from None
    finally:
        loader.dispose()


def _check_nodes(node: yaml.Node, path: tuple[yaml.Node, ...] = (), seen: list[int] | None = None) -> None:
    """Visits every node as often as it is used, up to a limit: a few lines of aliases can expand to billions."""
    import yaml

    seen = [0] if seen is None else seen
    seen[0] += 1
    line = f"line {node.start_mark.line + 1}"
    if seen[0] > MOST_NODES:
        raise ValueError(f"it has more than {MOST_NODES} values, aliases included ({line})")
    if len(path) > DEEPEST:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep ({line})")
    if any(node is parent for parent in path):
        raise ValueError(f"a value contains itself ({line})")
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _check_nodes(child, (*path, node), seen)
    elif isinstance(node, yaml.MappingNode):
        keys = set()
        for key, child in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in keys:
                    raise ValueError(f"the key {key.value[:80]!r} occurs twice (line {key.start_mark.line + 1})")
                keys.add((key.tag, key.value))
            _check_nodes(key, (*path, node), seen)
            _check_nodes(child, (*path, node), seen)
