"""JSON and YAML that others wrote: bounded in size, depth and time, so that hostile input ends in a ValueError.

Python's own parsers raise RecursionError for deep nesting, let the last of two equal keys win, and follow aliases of
YAML without end. What is raised is OSError, or ValueError (as UnicodeDecodeError is) whose text says what is wrong.
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

LARGEST_JSON = 256_000_000  # bytes; the index of a model with a million tensors has some 100 MB
LARGEST_YAML = 1_000_000  # bytes
DEEPEST = 100  # levels; a config.json has some 6
MOST_NODES = 100_000  # of YAML, aliases counted as often as they are used
PIPE_SECONDS = 10.0  # to wait for a pipe, as `--recipe <(command)` is one


def parse_json(text: bytes | str, *, unique: bool = False) -> Any:
    """A JSON value. NaN and Infinity are let through: transformers writes them (`time_step_limit` of Mamba models).

    A key given twice is an error where the values differ; with `unique` always.
    """
    if len(text) > LARGEST_JSON:
        raise ValueError(f"larger than {LARGEST_JSON} bytes")
    try:
        value = json.loads(_decoded(text), object_pairs_hook=_unique if unique else _object)
        _check_depth(value)
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} levels deep") from None
    return value


def parse_yaml(text: bytes | str) -> Any:
    """The value of one YAML document, by the safe loader. A key given twice is an error."""
    import yaml

    try:
        return _yaml(text, construct=True)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def check_yaml(text: bytes | str) -> None:
    """The same checks without a value: for files with tags of another program, like lm-eval's `!function`."""
    import yaml

    try:
        _yaml(text, construct=False)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def read_regular(path: Path, limit: int = LARGEST_JSON, *, pipe: bool = False) -> bytes:
    """The bytes of a regular file of at most `limit` bytes, or with `pipe` of a pipe that somebody writes to.

    A named pipe that nobody writes to would block open() for ever, and a device may have no end.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISDIR(mode):
        os.close(descriptor)
        raise ValueError("a directory, not a file")
    with open(descriptor, "rb", buffering=0) as file:
        if stat.S_ISFIFO(mode) and pipe:
            return _read_pipe(descriptor, limit)
        if not stat.S_ISREG(mode):
            raise ValueError("neither a regular file nor a pipe" if pipe else "not a regular file")
        pieces, size = [], 0
        while piece := file.read(1 << 20):
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise ValueError(f"larger than {limit} bytes")
    return b"".join(pieces)


def _read_pipe(descriptor: int, limit: int) -> bytes:
    ready, found, deadline = select.poll(), b"", time.monotonic() + PIPE_SECONDS
    ready.register(descriptor, select.POLLIN)
    while len(found) <= limit:
        if not ready.poll(max(0, int(1000 * (deadline - time.monotonic())))):
            raise ValueError(f"a pipe from which nothing came for {PIPE_SECONDS:.0f} s")
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            return found
        found += piece
    raise ValueError(f"larger than {limit} bytes")


def _decoded(text: bytes | str) -> str:
    if isinstance(text, str):
        return text
    if text.startswith(b"\xef\xbb\xbf"):
        raise ValueError("a byte order mark at its beginning, which transformers can't read: save it without one")
    return text.decode("utf-8")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, value in pairs:
            if repr(found[key]) != repr(value):  # by text, for NaN is not equal to itself
                raise ValueError(f"the key {key[:80]!r} occurs twice, with different values")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _check_depth(value: Any) -> None:
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


def _yaml(text: bytes | str, *, construct: bool) -> Any:
    import yaml

    if len(text) > LARGEST_YAML:
        raise ValueError(f"larger than {LARGEST_YAML} bytes")
    loader = yaml.SafeLoader(text if isinstance(text, str) else text.decode("utf-8-sig"))
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node)
        return loader.construct_document(node) if construct else None
    except RecursionError:
        raise ValueError(f"nested more than {DEEPEST} levels deep") from None
    except (TypeError, AttributeError, OverflowError, KeyError, IndexError) as error:
        # What PyYAML's constructors raise for `!!timestamp x`, `!!float ""` and the like.
        raise ValueError(f"a value that can't be read: {error}") from None
    finally:
        loader.dispose()


def _check_nodes(node: yaml.Node, path: tuple[yaml.Node, ...] = (), seen: list[int] | None = None) -> None:
    """Visits every node as often as it is used, up to a limit: a few lines of aliases can stand for billions."""
    import yaml

    seen = [0] if seen is None else seen
    seen[0] += 1
    line = f"line {node.start_mark.line + 1}"
    if seen[0] > MOST_NODES:
        raise ValueError(f"more than {MOST_NODES} values, aliases included ({line})")
    if len(path) > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} levels deep ({line})")
    if any(node is parent for parent in path):
        raise ValueError(f"a value that contains itself ({line})")
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
