"""Connections between process 0 and all others, by which the end of any is noticed, however it ends.

A kernel closes those of a process that has died. Of a host that has lost its power or its network, nothing answers
what the kernel asks when a connection is silent. Neither needs anything of Python, so a process that is busy for
minutes, with a compiler or a file, does not pass for dead.
"""

from __future__ import annotations

import ipaddress
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

_BYE = b"."
_SILENT, _EVERY, _TIMES = 5, 5, 3  # seconds without a word, between questions, questions: 20 s in all
_DIAL = 10.0  # seconds to connect in


class Connections:
    """One process's ends: on process 0 one to each of the others, on these one to process 0."""

    def __init__(self, ends: Mapping[int, socket.socket]) -> None:
        self._ends = list(ends.values())
        self._selector = selectors.DefaultSelector()
        for rank, end in ends.items():
            _ask_when_silent(end)
            end.setblocking(False)
            self._selector.register(end, selectors.EVENT_READ, rank)

    def wait(self, seconds: float) -> int | None:
        """The rank of a process that has ended without a goodbye; None where none has within so many seconds."""
        if not self._selector.get_map():
            time.sleep(seconds)
        for key, _ in self._selector.select(seconds):
            end: Any = key.fileobj
            try:
                said = end.recv(1)
            except BlockingIOError:
                continue
            except OSError:  # nobody answers at the other end
                said = b""
            self._selector.unregister(end)
            if said != _BYE:
                return int(key.data)
        return None

    def outlive(self, seconds: float) -> None:
        """Wait until the processes at the other ends have ended, but no longer than so many seconds."""
        until = time.monotonic() + seconds
        for end in self._ends:
            with suppress(OSError):
                while time.monotonic() < until:
                    try:
                        if not end.recv(1):
                            break
                    except BlockingIOError:
                        time.sleep(0.05)

    def bye(self) -> None:
        """Tell the others that this process needs them no more."""
        for key in list(self._selector.get_map().values()):
            end: Any = key.fileobj
            with suppress(OSError):
                end.send(_BYE)


def connect(
    rank: int, world: int, master: tuple[str, int], broadcast: Callable[[Any], Any], gather: Callable[[Any], list[Any]]
) -> tuple[Connections, list[int]]:
    """Connect; every process calls it.

    Args:
        master: address and port where the processes have met.
        broadcast, gather: of the processes.

    Returns:
        The connections, and the ranks that cannot reach process 0.
    """
    ends: dict[int, socket.socket] = {}
    if rank == 0:
        with _listening(world) as server:
            token = secrets.token_bytes(16)
            broadcast((server.getsockname()[1], _own_address(master), token))
            reached = gather(True)
            ends = _accept(server, sum(reached) - 1, token)
    else:
        port, address, token = broadcast(None)
        dialled = _dial([address, master[0]], port, token + rank.to_bytes(4))
        reached = gather(dialled is not None)
        if dialled:
            ends = {0: dialled}
    return Connections(ends), [other for other, there in enumerate(reached) if not there]


def _listening(world: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # a container without it
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=world, dualstack_ipv6=True)
    return socket.create_server(("", 0), backlog=world)


def _own_address(master: tuple[str, int]) -> str | None:
    """This host's address as others see it; None where it is the one at which the processes have met."""
    with suppress(OSError):
        family, *_, address = socket.getaddrinfo(*master, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # which sends nothing
            own = str(probe.getsockname()[0])
        return None if ipaddress.ip_address(own.partition("%")[0]).is_loopback else own
    return None


def _dial(addresses: list[str | None], port: int, hello: bytes) -> socket.socket | None:
    for address in addresses:
        if address is not None:
            with suppress(OSError):
                end = socket.create_connection((address, port), _DIAL)
                end.sendall(hello)
                return end
    return None


def _accept(server: socket.socket, count: int, token: bytes) -> dict[int, socket.socket]:
    """The connections of so many processes, by rank; those of strangers are closed."""
    ends: dict[int, socket.socket] = {}
    until = time.monotonic() + _DIAL
    while len(ends) < count and time.monotonic() < until:
        server.settimeout(max(0.1, until - time.monotonic()))
        with suppress(OSError):
            end, _ = server.accept()
            end.settimeout(_DIAL)
            hello = end.recv(len(token) + 4, socket.MSG_WAITALL)
            if hello[:-4] == token:
                ends[int.from_bytes(hello[-4:])] = end
            else:
                end.close()
    return ends


def _ask_when_silent(end: socket.socket) -> None:
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", _SILENT), ("TCP_KEEPINTVL", _EVERY), ("TCP_KEEPCNT", _TIMES)):
        if hasattr(socket, name):  # Linux
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
