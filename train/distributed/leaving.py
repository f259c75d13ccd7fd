"""How all processes of a run leave when one of them fails or dies.

A process that fails alone would leave the others waiting for it in the middle of a computation, for as long as the
network library lets them. So each watches for the failure of any other beside its work, and leaves, too; the first
that has failed says why, and no other.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from cogcommon.cli.terminal import show_error
from cogcommon.errors import RunError

from .signals import Stopped

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

_State = Literal["well", "failed", "gone"]  # of the run; gone: rank 0 has ended, and the store with it
_LOOK = 0.5  # seconds between looks for a peer that has failed
_GRACE = 3.0  # seconds for a process to leave by itself, once a peer has failed
_FAILED = "cogtrain/failed"  # the store's key for the rank that has failed first


class PeerFailed(RunError):
    """Another process of the run has an error, and says it."""

    def __init__(self) -> None:
        super().__init__("another process of the run has failed")


class Leaving:
    """One process's part in leaving together.

    Args:
        store: that all processes are connected to; a connection of its own, so that a look never waits for another
            request.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store = store
        self._rank = rank
        self._left = threading.Event()

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Leave when a peer fails, and have the peers leave when this process fails.

        Raises:
            PeerFailed: in place of an error that came of a peer's failure.
        """
        threading.Thread(target=self._watch, daemon=True, name="cogtrain-peers").start()
        try:
            yield
        except (PeerFailed, Stopped):
            raise
        except Exception as error:
            reason = self._reason(error)
            if reason is error:
                raise
            raise reason from error
        finally:
            self._left.set()

    def _reason(self, error: Exception) -> Exception:
        """The exception that this process raises for its error; the others learn of the failure from the store."""
        until = time.monotonic() + (_GRACE if _is_networks(error) else 0)
        while (state := self._state()) == "well" and time.monotonic() < until:
            time.sleep(_LOOK)  # a peer that has failed may be about to write so into the store
        if state == "well" and self._is_first():
            if self._rank == 0:
                time.sleep(2 * _LOOK)  # the others read the store once more, before it ends with this process
            return _ended() if _is_networks(error) else error
        return _ended() if state == "gone" and self._speaks else PeerFailed()

    @property
    def _speaks(self) -> bool:
        """Whether it is this process that reports the death of rank 0: rank 1 does, for all."""
        return self._rank == 1

    def _state(self) -> _State:
        try:
            return "failed" if self._store.check([_FAILED]) else "well"
        except RuntimeError:
            return "gone"

    def _is_first(self) -> bool:
        mine = str(self._rank)
        try:
            return bool(self._store.compare_set(_FAILED, "", mine) == mine.encode())
        except RuntimeError:
            return False

    def _watch(self) -> None:
        while not self._left.wait(_LOOK):
            state = self._state()
            # A process that leaves by itself closes its files, and says what it has to.
            if state == "well" or self._left.wait(_GRACE):
                continue
            if state == "gone" and self._speaks:
                show_error(_ended())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(2)  # whatever its other threads wait for


def _is_networks(error: Exception) -> bool:
    """Whether an error says that a peer does not answer."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def _ended() -> RunError:
    """The error for a peer that has died."""
    if "TORCHELASTIC_RUN_ID" in os.environ:  # the launcher reports which process died, and why
        time.sleep(1)
        return PeerFailed()
    return RunError(
        "another process of the run has ended without a word",
        where="its own output and the system's log say why, for example that memory ran out",
        fix="run the same command with --out and the folder of the run: it continues from its last checkpoint",
    )
