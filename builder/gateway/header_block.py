"""The headers of an HTTP/2 stream as bytes (HPACK, RFC 7541), as far as a gRPC client needs them.

Neither side's dynamic table is used: ours by never indexing a field, the server's by a table of size 0 (http2.py). So
each block can be read by itself. Huffman-coded strings are not decoded: gRPC's servers do not write any.
"""

from __future__ import annotations

METHOD_POST, SCHEME_HTTP = 0x83, 0x86  # indexed fields of the static table (RFC 7541, appendix A)
AUTHORITY, PATH, CONTENT_TYPE = 1, 4, 31  # names in the static table


def request_block(authority: str, path: str) -> bytes:
    """The headers of a gRPC request."""
    fields = (
        _field(AUTHORITY, authority.encode()),
        _field(PATH, path.encode()),
        _field(CONTENT_TYPE, b"application/grpc"),
        b"\x00" + _string(b"te") + _string(b"trailers"),
    )
    return bytes([METHOD_POST, SCHEME_HTTP]) + b"".join(fields)


def named_fields(block: bytes) -> dict[bytes, bytes]:
    """The fields whose names are not in the static table, such as grpc-status. ValueError if the block is damaged."""
    fields: dict[bytes, bytes] = {}
    at = 0
    try:
        while at < len(block):
            first = block[at]
            if first & 0x80:  # an indexed field
                _, at = _read_integer(block, at, 7)
            elif first & 0xE0 == 0x20:  # a new size of the dynamic table
                _, at = _read_integer(block, at, 5)
            else:
                index, at = _read_integer(block, at, 6 if first & 0x40 else 4)
                name, at = (b"", at) if index else _read_string(block, at)
                value, at = _read_string(block, at)
                fields[name] = value
    except IndexError:
        raise ValueError("the header block is cut off") from None
    fields.pop(b"", None)
    return fields


def _field(name: int, value: bytes) -> bytes:
    """A field with a name of the static table, without indexing."""
    return _integer(name, 4) + _string(value)


def _string(value: bytes) -> bytes:
    return _integer(len(value), 7) + value


def _integer(value: int, bits: int) -> bytes:
    """An integer whose first byte has so many bits for it; the others are 0."""
    limit = (1 << bits) - 1
    if value < limit:
        return bytes([value])
    written = [limit]
    value -= limit
    while value >= 128:
        written.append(value % 128 + 128)
        value //= 128
    return bytes([*written, value])


def _read_integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """An integer, and the place behind it."""
    limit = (1 << bits) - 1
    value = block[at] & limit
    at += 1
    if value < limit:
        return value, at
    for shift in range(0, 35, 7):
        value += (block[at] & 127) << shift
        at += 1
        if block[at - 1] < 128:
            return value, at
    raise ValueError("an integer of the header block is too large")


def _read_string(block: bytes, at: int) -> tuple[bytes, int]:
    """A string, and the place behind it; b"" if it is Huffman-coded."""
    coded = block[at] & 0x80
    length, at = _read_integer(block, at, 7)
    if at + length > len(block):
        raise IndexError
    return (b"" if coded else block[at : at + length]), at + length
