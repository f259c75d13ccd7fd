"""How all processes of a run leave when one of them fails or dies.

A process that fails alone would leave the others waiting for it in the middle of a computation, for as long as the
network library lets them. So each watches for the failure of any other beside its work, and leaves, too; the first
that has failed says why, and no other. One that has died is reported by process 0, its own death on each machine.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from cogcommon.cli.terminal import show_error
from cogcommon.errors import AGAIN, CogError, RunError

from . import elastic
from .connections import Connections
from .signals import Stopped

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

# What has come to a process of the run: an error that a person can put right; another; it has died. "gone": process 0
# has died.
_Fault = Literal["refused", "failed", "lost", "gone"]
REFUSED, FAILED = CogError.code, 1  # exit codes, as of any command
LOST = AGAIN
_CODES: dict[str, int] = {"refused": REFUSED, "failed": FAILED, "lost": LOST, "gone": LOST}
_LOOK = 0.5  # seconds between looks for a peer that has failed
_SAYING = 10.0  # seconds for process 0 to say why, and to end
_CLOSING = 60.0  # seconds for it to close its files and its tracker, where the run was asked to stop
_GRACE = 6  # looks in which a process leaves by itself, once a peer has failed; a machine that stands still has none


class PeerFailed(RunError):
    """Another process of the run has an error, and says it; ``code`` is what that one exits with."""

    def __init__(self, code: int = REFUSED) -> None:
        super().__init__("another process of the run has failed")
        self.code = code


class PeerLost(RunError):
    """Another process of the run is not there, or not any more."""

    code = LOST


class Leaving:
    """One process's part in leaving together.

    Args:
        store: that all processes are connected to; a connection of its own, so that a look never waits for another
            request.
        connections: by which a death is noticed.
        hosts: of all processes, by rank: their machines, and the names of these.
        attempt: that no other start of these processes has in the same store.
    """

    def __init__(
        self, store: Store, connections: Connections, rank: int, hosts: Sequence[tuple[str, str]], attempt: str
    ) -> None:
        self._store = store
        self._connections = connections
        self._rank = rank
        self._hosts = hosts
        self._key = f"cogtrain/{attempt}/fault"  # the first one, and the rank that it came to
        self._left = threading.Event()
        self._leaves = threading.Lock()
        self._dead: int | None = None  # the rank of a process that was seen to die

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Leave when a peer fails, and have the peers leave when this process fails.

        Raises:
            PeerFailed, PeerLost: in place of an error that came of a peer's failure.
        """
        for watch in (self._watch_store, self._watch_connections):
            threading.Thread(target=watch, daemon=True, name="cogtrain-peers").start()
        try:
            yield
        except (PeerFailed, Stopped) as end:  # the launcher of process 0 would end it as soon as any other has left
            self._left.set()
            if self._rank != 0:
                self._connections.outlive(_CLOSING if isinstance(end, Stopped) else _SAYING)
            raise
        except Exception as error:
            reason = self._reason(error)
            if reason is error:
                raise
            raise reason from error
        finally:
            self._left.set()
            self._connections.bye()

    def _reason(self, error: Exception) -> Exception:
        """The exception that this process raises for its error; the others learn of the failure from the store."""
        networks, fault = _is_networks(error), self._fault()
        for _ in range(_GRACE if networks else 0):
            if fault:
                break
            time.sleep(_LOOK)  # a peer that has failed may be about to write so into the store
            fault = self._fault()
        if not fault and self._is_first("lost" if networks else _fault_of(error)):
            if self._rank == 0:
                time.sleep(2 * _LOOK)  # the others read the store once more, before it ends with this process
            if not networks:
                return error
            fault = "lost"
        fault = fault or self._fault() or "failed"
        if _CODES[fault] == LOST and "TORCHELASTIC_RUN_ID" in os.environ:
            time.sleep(1)  # the launcher of this host sees first which process died, and says why
        return self._peer_lost() if self._speaks(fault) else PeerFailed(_CODES[fault])

    def _speaks(self, fault: _Fault) -> bool:
        """Whether it is this process that reports a death. A launcher reports those on its own host, with the cause."""
        if _CODES[fault] != LOST:
            return False
        machines = [machine for machine, _ in self._hosts]
        mine, dead = machines[self._rank], 0 if fault == "gone" else self._dead
        here = set(machines) == {mine} if dead is None else machines[dead] == mine
        if here and "TORCHELASTIC_RUN_ID" in os.environ:
            return False
        first = next((rank for rank, machine in enumerate(machines) if machine == mine and rank != 0), self._rank)
        return self._rank == (first if fault == "gone" else 0)

    def _peer_lost(self) -> PeerLost:
        """The error for a peer that has died."""
        who = "another process of the run"
        if self._dead is not None:
            who = f"process {self._dead} of {len(self._hosts)}, on {self._hosts[self._dead][1]},"
        go_on = "run the same command with --out and the folder of the run: it continues from its last checkpoint"
        if elastic.restarts_left() > 0:
            go_on = "nothing: torchrun starts the processes that are left again, and the run continues from its last "
            go_on += "checkpoint"
        return PeerLost(
            f"{who} has ended without a word",
            where="its own output and the system's log say why, for example that memory ran out",
            fix=go_on,
        )

    def _fault(self) -> _Fault | None:
        """What has come to the run; None: nothing."""
        if self._dead == 0:
            return "gone"
        try:
            if not self._store.check([self._key]):
                return None
            fault, rank = self._store.get(self._key).decode().split()
        except RuntimeError:
            return "gone"
        if fault == "lost" and rank.isdecimal():
            self._dead = int(rank)
        return next((known for known in get_args(_Fault) if known == fault), "failed")

    def _is_first(self, fault: _Fault, whose: int | None = None) -> bool:
        """Write the run's first fault into the store; False where there is one.

        Args:
            whose: the rank that is lost, where it is known.
        """
        mine = f"{fault} {whose if fault == 'lost' else self._rank}"
        try:
            return bool(self._store.compare_set(self._key, "", mine) == mine.encode())
        except RuntimeError:
            return False

    def _watch_store(self) -> None:
        while not self._left.wait(_LOOK):
            if fault := self._fault():
                self._leave(fault)

    def _watch_connections(self) -> None:
        while not self._left.is_set():
            dead = self._connections.wait(_LOOK)
            if dead is not None and not self._left.is_set():
                self._dead = dead
                if self._rank == 0:
                    self._is_first("lost", dead)
                self._leave("gone" if dead == 0 else "lost")

    def _leave(self, fault: _Fault) -> None:
        """End this process, if it does not leave by itself: it then closes its files, and says what it has to."""
        if any(self._left.wait(_LOOK) for _ in range(_GRACE)) or not self._leaves.acquire(blocking=False):
            return
        if self._speaks(fault):
            show_error(self._peer_lost())
        sys.stdout.flush()
        sys.stderr.flush()
        self._connections.bye()
        if _CODES[fault] == REFUSED:
            elastic.end_launcher()
        os._exit(_CODES[fault])  # whatever its other threads wait for


def _fault_of(error: Exception) -> _Fault:
    if isinstance(error, PeerLost):
        return "lost"
    return "refused" if isinstance(error, CogError) else "failed"


def _is_networks(error: BaseException | None) -> bool:
    """Whether an error says that a peer does not answer, or came of one that does."""
    import torch.distributed as dist

    if error is None:
        return False
    own = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))
    return own or _is_networks(error.__cause__)
