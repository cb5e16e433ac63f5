"""Numbers and layouts of HTTP/2's frames (RFC 9113, section 6 and 7) and of gRPC's messages in them."""

from __future__ import annotations

import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
HEADER_TABLE_SIZE, ENABLE_PUSH, INITIAL_WINDOW_SIZE = 1, 2, 4  # settings
FRAME = struct.Struct(">HBBBI")  # length in 24 bits, kind, flags, stream
MESSAGE = struct.Struct(">BI")  # compressed or not, length
SETTING = struct.Struct(">HI")
WORD = struct.Struct(">I")
LARGEST_FRAME = 16384  # that every peer accepts
DEFAULT_WINDOW, LARGEST_WINDOW = 65535, (1 << 31) - 1
LAST_STREAM = (1 << 31) - 1
CANCEL = 8  # an error code: the stream is no longer needed


def unpadded(flags: int, payload: bytes) -> bytes:
    """The payload of a DATA or HEADERS frame without its padding. IndexError if it is damaged."""
    return payload[1 : len(payload) - payload[0]] if flags & PADDED else payload
