"""Writes checkpoints to resume from into the run's folder, and sees to it that what was trained is exported."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import InitVar, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcommon.cli.progress import stage
from cogcommon.errors import CogError
from cogcommon.files.failures import room_of
from cogcommon.words import in_bytes

from ..blocks.engine import BlockEngine
from ..distributed.peers import Peers
from ..distributed.strategy import Runtime
from ..memory.disk import writes
from ..memory.estimate import host_needs
from ..memory.room import left_beside
from ..model.ema import EMA
from ..model.method import Exported
from ..report.page import write_report
from ..runs import checkpoint as checkpoints
from ..runs.checkpoint import SavedCheckpoint
from ..runs.config import settings_json
from ..runs.folder import ValidationLine
from ..runs.log import RunLog
from ..runs.mirror.mirror import Mirror
from ..runs.run import Run
from ..runs.saving import NotSaved, Saving, begin_saving, load_checkpoint
from .exporter import Exporter

if TYPE_CHECKING:
    import torch


_COSTS = 5_000_000_000  # bytes of a checkpoint that take several seconds to write


@dataclass
class Saver:
    """Every rank calls each method alike. What is trained is kept, even where a checkpoint finds no room.

    A checkpoint is a snapshot: what it holds is copied to host memory, and a thread writes it beside the next steps.
    Its fault comes up after the step in which it is known, at the latest before the next checkpoint, validation or
    export. What is older goes once it is durable; the mirror is told, and "saved" said, when that is noticed.

    Attributes:
        exporter: writes the weights.
        engine: whose plan tells what the run may take of the host's memory.
        closing: waits for what is being written when a fault ends the run.
        mirror: keeps the copy of --mirror, on rank 0.
        unsaved: why there is no checkpoint of the last step, if that costs only the resume.
        saved_at: when the last checkpoint was begun, or the run was set up (`time.monotonic`).
    """

    run: Run
    runtime: Runtime
    model: Any
    optimizer: Any
    ema: EMA | None
    folder: Path
    log: RunLog
    engine: BlockEngine
    closing: InitVar[ExitStack]
    mirror: Mirror | None = None
    unsaved: CogError | None = None
    saved_at: float = field(default_factory=lambda: time.monotonic())
    _saving: Saving | None = None  # the last checkpoint, until it is known what has become of it
    _best: int | None = None  # that stays beside it
    _said: bool = False
    _lacks: str = ""  # why there is no room for a copy of a checkpoint

    def __post_init__(self, closing: ExitStack) -> None:
        self.exporter = Exporter(self.run, self.runtime, self.model, self.optimizer, self.ema, self.folder)
        closing.callback(self.close)

    @property
    def _shadow(self) -> list[torch.Tensor] | None:
        return self.ema.shadow if self.ema else None

    def due(self) -> bool:
        """Whether ``--save-minutes`` have passed, by the clock of process 0."""
        minutes = self.run.settings.save_minutes
        if minutes is None:
            return False
        passed = self.runtime.main and time.monotonic() - self.saved_at >= 60 * minutes
        return bool(self.runtime.all_reduce_max(int(passed)))

    @stage("reading the checkpoint")
    def resume(self, checkpoint: SavedCheckpoint) -> None:
        """Read a checkpoint back. The average of a run that had none until then begins with its weights.

        Raises:
            RunError: it is damaged, does not fit this model, or holds what is not finite.
        """
        if self.runtime.converts:
            then, now = checkpoint.state.world, self.runtime.world
            name = checkpoint.folder.name
            self.log.say(f"converts {name} from {then} to {now} processes, in a copy beside it that goes again")
        averaged = bool(checkpoint.state.settings.get("ema", True))
        shadow = self._shadow if averaged else None
        load_checkpoint(self.runtime, self.model, self.optimizer, shadow, checkpoint.folder)
        if self.ema and not averaged:
            self.ema.begin()

    def finish(self, step: int, best: ValidationLine | None) -> Exported | None:
        """Export what is not yet, and load it back; every rank calls it, and rank 0 gets what was found.

        The last checkpoint is written meanwhile, and is durable then, or `unsaved` says why not.

        Args:
            step: the last that was made.
            best: the validation of the step to export instead; None: export the last.
        """
        live = best is None or best.step == step
        if not live:  # it may be the one that is being written
            self.settle(step)
        # Nothing was left to train; or only now is there a loss for the file to tell of.
        if self.exporter.exported is None or (live and best and not self.run.method.full):
            self.exporter.export(step, best if live else None)
        found = self.exporter.prove(None if live else best) if self.runtime.main else None
        self.settle(step)
        return found

    def checkpoint(self, step: int, best: int | None = None) -> None:
        """Begin to write a checkpoint of the step that was made last, once the one before is written.

        Where there is room for a copy of it in host memory, it is written beside the next steps, and `settle` says
        what has become of it.

        Args:
            best: the step of one that stays, whatever its age.

        Raises:
            CogError: there is no room for it, and training ends here; says where the weights are.
        """
        self.settle(step)
        self._best, run, runtime = best, self.run, self.runtime
        if run.resume and run.resume.state.step == step and run.resume.folder.parent.samefile(self.folder):
            if runtime.main:  # it is the one that this run goes on from: nothing has been trained since
                self._prune(best)  # a validation that was made up for may have found a better one than before
            self._report()
            return
        state = checkpoints.RunState(step, runtime.world, run.resume_facts(), settings_json(run.given))
        size = writes(run).checkpoint
        try:
            with stage("saving a checkpoint"):
                saving = begin_saving(
                    runtime, self.model, self.optimizer, self._shadow, state, self.folder,
                    room=self._has_room, needs=size, then=partial(self._durable, best),
                )  # fmt: skip
        except NotSaved as failed:
            self._conclude(step, failed.fault)
            return
        finally:
            self.saved_at = time.monotonic()
        self._saving = saving
        if not saving.beside:
            self._say_cost(size)
            self.settle(step)

    def settle(self, step: int, *, wait: bool = True) -> None:
        """Take note of what has become of the last checkpoint, and write the report; every rank calls it.

        Args:
            step: the last that was made, whose weights are rescued where the checkpoint has failed.
            wait: else only if it is known by now.

        Raises:
            CogError: as `checkpoint`.
        """
        if self._saving is None:
            return
        if not wait and not self.runtime.all_reduce_max(int(self.runtime.main and self._saving.ended)):
            return
        saving, self._saving = self._saving, None
        try:
            with stage("waiting for the checkpoint"):
                saved = saving.end()
        except NotSaved as failed:
            self._conclude(step, failed.fault)
            return
        self.unsaved = None
        self.log.say(f"saved {saved}")
        self._report()

    def close(self) -> None:
        """Wait for what is still being written, where a fault ends the run."""
        saving, self._saving = self._saving, None
        if saving is not None and (fault := saving.wait()):
            self.log.say(f"note: the last checkpoint was not written: {getattr(fault, 'what', fault)}")

    def _conclude(self, step: int, fault: CogError) -> None:
        """Go on without the checkpoint where the weights are exported.

        Raises:
            CogError: they are not.
        """
        self.unsaved = fault
        if not self.exporter.exported:
            self.exporter.rescue(step, fault)
        self._report()

    def _report(self) -> None:
        if self.runtime.main and not self.exporter.exported:  # else the run's end writes it
            write_report(self.folder)
        if self.mirror:
            self.mirror.best = self._best
            self.mirror.soon()

    def _durable(self, best: int | None) -> None:
        checkpoints.drop_set_aside(self.folder)
        self._prune(best)

    def _prune(self, best: int | None) -> None:
        held = self.mirror.uploading if self.mirror else ()
        checkpoints.prune(self.folder, self.run.settings.keep, best, held)

    def _has_room(self, size: int) -> bool:
        """Whether a copy of a checkpoint has room in host memory, and the checkpoint on the disk beyond doubt."""
        runtime, free = self.runtime, room_of(self.folder)
        if free is not None and free < 1.1 * size + writes(self.run).least:
            self._lacks = "the disk has hardly room for it, which is to be known before the next step"
            return False
        needs = host_needs(self.run, gpu=runtime.device.type == "cuda")
        if left_beside(needs, self.engine.plan, runtime.peers.here) < size:
            self._lacks = "host memory has no room for a copy of it beside the run"
            return False
        return True

    def _say_cost(self, size: int) -> None:
        """Say once that training waits for checkpoints, where that is long."""
        if size < _COSTS or self._said:
            return
        self._said = True
        why = self._lacks or "no copy of it can be made in host memory"  # 8-bit states; page-locked memory is refused
        if self.runtime.sharded:
            why = "DeepSpeed writes it from the weights themselves"
        self.log.say(f"training waits while a checkpoint of {in_bytes(size)} is written: {why}")

    def keep(self, step: int, best: int | None) -> None:
        """Save the step that was made last, where a fault of which every rank has heard ends the run.

        It is said if that fails: the fault is what the run ends by.
        """
        there = self.runtime.main and (self.folder / checkpoints.checkpoint_name(step)).exists()
        if step == 0 or self.runtime.all_reduce_max(int(there)):
            return
        try:
            self.checkpoint(step, best)
            self.leave(step)
        except CogError as failed:
            self.log.say(f"note: step {step:,} could not be saved: {failed}")

    def leave(self, step: int) -> None:
        """Wait for the last checkpoint, and for the mirror, where the run stops before its end; every rank calls it.

        Raises:
            CogError: as `checkpoint`.
        """
        self.settle(step)
        finish_mirror(self.mirror, self.runtime.peers, self.log, must=False)


def finish_mirror(mirror: Mirror | None, peers: Peers, log: RunLog, *, must: bool = True) -> None:
    """Wait until the mirror, if there is one, holds all that the folder does; every rank calls it.

    Args:
        must: else a fault is only said.

    Raises:
        CogError: it does not, and why.
    """
    try:
        with stage("waiting for the mirror"):
            peers.together(lambda: mirror.finish() if mirror else None)
    except CogError as fault:
        if must:
            raise
        log.say(f"note: {fault.what} ({fault.where})")
    if mirror:
        checkpoints.prune(mirror.folder, mirror.keep, mirror.best)  # none is on its way any more


def open_mirror(run: Run, folder: Path, done: int, log: RunLog, closing: ExitStack) -> Mirror | None:
    """The mirror that --mirror names, on its way to hold what the run has saved before; on rank 0.

    Args:
        done: the step after which the run goes on.
        closing: ends it when the run ends.

    Raises:
        RunError: it is not this run's.
        StoreError: the store takes nothing, and why.
    """
    settings = run.settings
    if settings.mirror is None:
        return None
    mirror = Mirror(folder, settings.mirror, keep=settings.keep, done=done, say=log.say)
    closing.push(mirror.close)
    mirror.soon()
    return mirror
