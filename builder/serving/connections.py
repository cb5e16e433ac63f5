"""The TCP connections to a port of this machine: which are idle, and how to close those of another process.

The kernel says when data last went each way (sock_diag(7), tcp(7) TCP_INFO); no privileges are needed for that.
"""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

_NETLINK_SOCK_DIAG, _BY_FAMILY, _DUMP, _DONE, _ERROR = 4, 20, 0x301, 3, 2  # linux/netlink.h, linux/sock_diag.h
_INFO, _ESTABLISHED = 2, 1 << 1  # linux/inet_diag.h INET_DIAG_INFO; linux/tcp_states.h
_MESSAGE = struct.Struct("=4x H H 44x 4x I I 4x I")  # inet_diag_msg; the ports are in network byte order
# linux/tcp.h tcp_info: last_data_sent, last_data_recv and last_ack_recv in milliseconds; bytes_received
_TIMES = struct.Struct("=8x 36x I 4x I I 68x Q")
_NAME = "socket:[{}]"  # what /proc/PID/fd/N links to, with the inode (proc_pid_fd(5))
_PIDFD_GETFD = 438  # the same number on each architecture
_libc = ctypes.CDLL(None, use_errno=True)


QUIET_SECONDS = 3.0  # a stream without a token for so long has ended
UNCLEAR_SECONDS = 10.0  # a request that came within the same clock tick as the last answer is answered by then


@dataclass(frozen=True)
class Connection:
    """An established connection to a port.

    waiting: bytes that the server has not read, or the client not received. sent, received, acknowledged: seconds since
    the server last sent data, received data, and received anything. unused: nothing was ever received.
    """

    client_port: int
    inode: int
    waiting: int
    sent: float
    received: float
    acknowledged: float
    unused: bool

    @property
    def is_idle(self) -> bool:
        """Whether no request is in progress: the last data was the server's, and it was a while ago."""
        if self.waiting or self.unused:
            return not self.waiting
        if self.sent != self.received:
            return QUIET_SECONDS <= self.sent < self.received
        # Both in one clock tick. If the client acknowledged later, it was the answer that it acknowledged.
        return self.sent >= (QUIET_SECONDS if self.acknowledged < self.received else UNCLEAR_SECONDS)


def established(port: int) -> list[Connection]:
    """The connections to a port. OSError if the kernel does not say."""
    found = []
    for server, client, waiting, inode, info in _sockets():
        if server == port:
            sent, received, acknowledged, size = _TIMES.unpack_from(info)
            times = (sent / 1000, received / 1000, acknowledged / 1000)
            found.append(Connection(client, inode, waiting, *times, unused=not size))
    return found


def ports_to(port: int, processes: Iterable[int]) -> set[int]:
    """The ports of this machine from which these processes are connected to a port. OSError as above."""
    names = {target for pid in processes for target in _descriptors(pid).values()}
    return {own for own, other, _, inode, _ in _sockets() if other == port and _NAME.format(inode) in names}


def _sockets() -> Iterator[tuple[int, int, int, int, bytes]]:
    """Each connected TCP socket: own port, the other's, bytes that wait, inode, tcp_info."""
    for family in (socket.AF_INET, socket.AF_INET6):
        for content in _dumped(family):
            own, other, unread, unsent, inode = _MESSAGE.unpack_from(content)
            info = dict(_split(content[_MESSAGE.size :], "=HH", 4)).get(_INFO, b"")
            if len(info) < _TIMES.size:
                raise OSError("the kernel does not say when connections were used")
            yield socket.ntohs(own), socket.ntohs(other), unread + unsent, inode, info


def _dumped(family: socket.AddressFamily) -> Iterator[bytes]:
    """The kernel's messages (linux/inet_diag.h), each with attributes."""
    request = struct.pack("=BBBBI", family, socket.IPPROTO_TCP, 1 << (_INFO - 1), 0, _ESTABLISHED) + bytes(48)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as link:
        link.settimeout(5.0)
        link.send(struct.pack("=IHHII", 16 + len(request), _BY_FAMILY, _DUMP, 1, 0) + request)
        while True:
            for kind, content in _split(link.recv(1 << 16), "=IH", 16):
                if kind == _DONE:
                    return
                if kind == _ERROR:
                    raise OSError(-struct.unpack_from("=i", content)[0], "the kernel lists no connections")
                yield content


def _split(data: bytes, header: str, size: int) -> Iterator[tuple[int, bytes]]:
    """(kind, content) of each message or attribute; they begin with length and kind, at multiples of 4 bytes."""
    at = 0
    while at + size <= len(data):
        length, kind = struct.unpack_from(header, data, at)
        yield kind, data[at + size : at + length]
        at += (max(length, size) + 3) & ~3


def close(connections: Iterable[Connection], pid: int) -> bool:
    """Closes connections of a process, as if their clients did. False if that is not allowed for one of them.

    It needs the rights of a debugger (pidfd_getfd(2)), which containers usually do not have.
    """
    inodes = {one.inode for one in connections}
    numbers = [number for number, target in _descriptors(pid).items() if target in map(_NAME.format, inodes)]
    return all([_shut_down(pid, number, inodes) for number in numbers])


def _descriptors(pid: int) -> dict[int, str]:
    """What a process has open, by descriptor; nothing if it has just exited."""
    found = {}
    with suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with suppress(OSError):
                found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


def _shut_down(pid: int, descriptor: int, inodes: set[int]) -> bool:
    """Shuts the socket down that a process has under this number, if it still is one of these. False if forbidden."""
    try:
        process = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        copied = _libc.syscall(_PIDFD_GETFD, process, descriptor, 0)
    finally:
        os.close(process)
    if copied < 0:
        return False
    with socket.socket(fileno=copied) as connection, suppress(OSError):
        if os.fstat(copied).st_ino in inodes:
            connection.shutdown(socket.SHUT_RDWR)
    return True
