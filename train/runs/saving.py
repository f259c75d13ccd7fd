"""Writes a checkpoint, beside the next steps where a copy of it has room in host memory; and reads one back."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcommon.errors import CogError, RunError
from cogcommon.files.atomic import temporary_beside
from cogcommon.files.failures import disk_errors
from cogcommon.files.ownership import replace_folder

from ..distributed.leaving import PeerFailed
from ..distributed.snapshot import STATE_FILE
from ..distributed.strategy import Runtime
from ..model.finite import all_finite
from .checkpoint import RunState, checkpoint_name, how_to_go_on
from .folder import A_CHECKPOINT

if TYPE_CHECKING:
    import torch


class NotSaved(Exception):
    """A checkpoint could not be written; raised on all ranks alike. ``fault`` is what to say of it."""

    def __init__(self, fault: CogError) -> None:
        super().__init__(str(fault))
        self.fault = fault


class Saving:
    """A checkpoint on its way to the disk; each rank has one, for they learn together what becomes of it.

    Attributes:
        beside: a thread of rank 0 writes it from a copy in host memory, while the next steps are made.
    """

    def __init__(self, runtime: Runtime, final: Path, temporary: Path) -> None:
        self.beside = False
        self._peers, self._final, self._temporary = runtime.peers, final, temporary
        self._thread: threading.Thread | None = None
        self._fault: Exception | None = None
        self._after: Exception | None = None  # what has failed once it was durable

    @property
    def ended(self) -> bool:
        """Whether it is durable, or has failed; on ranks other than 0 always."""
        return self._thread is None or not self._thread.is_alive()

    def together(self, act: Callable[[], object]) -> None:
        """Do a part of it on all ranks, or fail on all.

        Raises:
            NotSaved: nothing of the checkpoint is left.
        """
        try:
            self._peers.together(act)
        except CogError as fault:
            if self._peers.main:
                shutil.rmtree(self._temporary, ignore_errors=True)
            raise NotSaved(fault) from fault

    def start(self, act: Callable[[], object], then: Callable[[], object]) -> None:
        """Do the rest of it in a thread, and ``then`` what is to be done once it is durable."""

        def work() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's
            try:
                act()
            except Exception as error:
                self._fault = error
                shutil.rmtree(self._temporary, ignore_errors=True)  # at once: the steps write, too
                return
            try:
                then()
            except Exception as error:
                self._after = error

        self._thread = threading.Thread(target=work, name="cogtrain-checkpoint")
        self._thread.start()

    def wait(self) -> Exception | None:
        """Wait for the thread of this rank; its fault, if it has failed."""
        if self._thread is not None:
            self._thread.join()
        return self._fault

    def end(self) -> Path:
        """Wait until it is durable; every rank calls it.

        Raises:
            NotSaved: the disk is full, or another fault of the file system; nothing of the checkpoint is left.
        """

        def found() -> None:
            if fault := self.wait():
                raise fault

        if self.beside:
            self.together(found)
        if self._after:
            raise self._after
        return self._final


def begin_saving(
    runtime: Runtime,
    model: Any,
    optimizer: Any,
    shadow: list[torch.Tensor] | None,
    state: RunState,
    run: Path,
    *,
    room: Callable[[int], bool] = lambda size: False,
    needs: int = 0,
    then: Callable[[], object] = lambda: None,
) -> Saving:
    """Begin to write a checkpoint; every rank calls it. Once it has returned, steps may change all that it holds.

    Args:
        shadow: this rank's part of the moving average of the weights.
        room: whether so many bytes are free for a copy in host memory, on rank 0; where not, or where DeepSpeed writes
            (from the live weights, in collectives), the checkpoint is written before this returns.
        needs: bytes that it takes, about, for the message of a disk that is full.
        then: called on rank 0 as soon as it is durable, perhaps in the thread: older ones can go.

    Raises:
        RunError: a weight, or a number of the optimizer's state, is not finite.
        NotSaved: the disk is full, or another fault of the file system; nothing of the checkpoint is left.
    """
    _check_finite(runtime, model, optimizer, shadow, f"step {state.step}", "resume the last checkpoint")
    final = run / checkpoint_name(state.step)
    temporary = Path(runtime.peers.broadcast(str(temporary_beside(final))))

    def begin() -> None:
        temporary.mkdir(parents=True)

    def commit() -> None:
        (temporary / STATE_FILE).write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
        replace_folder(temporary, final, A_CHECKPOINT)  # the same step is there after a resume from an older one

    def write(act: Callable[[], None]) -> Callable[[], None]:
        def told() -> None:
            with disk_errors(final, needs=needs, go_on=lambda: how_to_go_on(run, state.facts["method"])):
                act()

        return told

    saving, main = Saving(runtime, final, temporary), runtime.main
    saving.together(write(begin) if main else lambda: None)
    live, copy = runtime.snapshot(model, optimizer, shadow), None
    if live is not None and live.plain and room(live.nbytes):
        with suppress(RuntimeError, MemoryError):  # the system gives no page-locked memory: training waits, instead
            copy = live.copied()
    saving.beside = bool(runtime.all_reduce_max(int(copy is not None)))
    if copy is not None:
        snapshot = copy

        def rest() -> None:
            snapshot.write(temporary)
            commit()

        saving.start(write(rest), then)
    elif not saving.beside:
        saving.together(write(lambda: runtime.save_state(model, live, temporary)))
        saving.together(write(commit) if main else lambda: None)
        if main:
            then()
    return saving


def load_checkpoint(
    runtime: Runtime, model: Any, optimizer: Any, shadow: list[torch.Tensor] | None, folder: Path
) -> None:
    """Read a checkpoint back; every rank calls it.

    Raises:
        RunError: it is damaged, does not fit this model, or holds what is not finite.
    """
    runtime.load_state(model, optimizer, shadow, folder)
    _check_finite(runtime, model, optimizer, shadow, str(folder), "resume an older one")


def _check_finite(
    runtime: Runtime, model: Any, optimizer: Any, shadow: list[torch.Tensor] | None, where: str, do: str
) -> None:
    if runtime.all_reduce_max(int(not all_finite(runtime.held(model, optimizer, shadow)))):
        raise (
            RunError(
                "the weights, or the optimizer's state, are not finite", where=where, fix=f"{do}, with a lower --lr"
            )
            if runtime.main
            else PeerFailed()
        )
