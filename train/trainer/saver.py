"""Writes what was trained into the run's folder: the weights as they are exported, and checkpoints to resume from."""

from __future__ import annotations

import dataclasses
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcommon.cli.progress import stage
from cogcommon.errors import CogError, DiskError

from ..distributed.peers import ALONE
from ..distributed.strategy import Runtime
from ..memory.disk import writes
from ..model.ema import EMA
from ..model.method import Exported, Written, of_checkpoint
from ..report.page import write_report
from ..runs import checkpoint as checkpoints
from ..runs.config import settings_json
from ..runs.folder import ValidationLine
from ..runs.log import RunLog
from ..runs.mirror import Mirror
from ..runs.run import Run
from .announce import weights_file_facts

if TYPE_CHECKING:
    import torch


@dataclass
class Saver:
    """Every rank calls each method alike. What is trained is kept, even where a checkpoint finds no room.

    Attributes:
        mirror: keeps the copy of --mirror, on rank 0.
        exported: the weights, once they have been written.
        unsaved: why there is no checkpoint of the last step, if that costs only the resume.
        saved_at: when the last checkpoint was written, or the run was set up (`time.monotonic`).
    """

    run: Run
    runtime: Runtime
    model: Any
    optimizer: Any
    ema: EMA | None
    folder: Path
    log: RunLog
    mirror: Mirror | None = None
    exported: Written | None = None
    unsaved: CogError | None = None
    saved_at: float = field(default_factory=lambda: time.monotonic())

    @property
    def _shadow(self) -> list[torch.Tensor] | None:
        return self.ema.shadow if self.ema else None

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the ``with`` the model is what would be exported."""
        return self.ema.in_place() if self.ema else nullcontext()

    def due(self) -> bool:
        """Whether ``--save-minutes`` have passed, by the clock of process 0."""
        minutes = self.run.settings.save_minutes
        if minutes is None:
            return False
        passed = self.runtime.main and time.monotonic() - self.saved_at >= 60 * minutes
        return bool(self.runtime.all_reduce_max(int(passed)))

    @stage("reading the checkpoint")
    def resume(self, checkpoint: Path) -> None:
        """Read a checkpoint back.

        Raises:
            RunError: it is damaged, does not fit this model, or holds what is not finite.
        """
        checkpoints.load(self.runtime, self.model, self.optimizer, self._shadow, checkpoint)

    def export(self, step: int, line: ValidationLine | None = None) -> Written:
        """Write the weights as they are exported.

        Args:
            line: the validation of that step, which the file then tells of.

        Raises:
            RunError: they are not finite.
            DiskError: the disk is full, or another fault of the file system; nothing of them is left.
        """
        self.exported = self._write(self.folder, step, line)
        return self.exported

    def finish(self, step: int, best: ValidationLine | None) -> Exported | None:
        """Export what is not yet, and load it back; every rank calls it, and rank 0 gets what was found.

        Args:
            step: the last that was made.
            best: the validation of the step to export instead; None: export the last.
        """
        live = best is None or best.step == step
        # Nothing was left to train; or only now is there a loss for the file to tell of.
        if self.exported is None or (live and best and not self.run.method.full):
            self.export(step, best if live else None)
        if not self.runtime.main:
            return None
        if best and not live:
            return self._export_kept(best)
        assert self.exported
        with stage("proving the export"):
            return self.run.method.verify(self.runtime, self.model, self.run.checkpoint, self.exported)

    def _export_kept(self, line: ValidationLine) -> Exported:
        """Write the weights of a checkpoint in the place of the last ones, and load them back; on rank 0 alone.

        Whatever the strategy, they are read from the files, as `cogtrain export` reads them. The live model makes room.

        Args:
            line: the validation of that step.

        Raises:
            RunError, DiskError: as `export`, and `Method.verify`.
        """
        run, alone = self.run, dataclasses.replace(self.runtime, strategy="ddp", config=None, peers=ALONE)
        self.runtime.release(self.runtime.plain(self.model))
        kept = self.folder / checkpoints.checkpoint_name(line.step)
        model = of_checkpoint(run.method, run.checkpoint, kept, alone.dtype)
        model.to(alone.room_for(model))
        written = self._write(self.folder, line.step, line, model=model, runtime=alone)
        with stage("proving the export"):
            return run.method.verify(alone, model, run.checkpoint, written)

    def checkpoint(self, step: int, best: int | None = None) -> None:
        """Write a checkpoint, and the report; once the weights are exported, a checkpoint is for a resume only.

        Args:
            best: the step of one that stays, whatever its age.

        Raises:
            CogError: there is no room for it, and training ends here; says where the weights are.
        """
        run, runtime = self.run, self.runtime
        state = checkpoints.RunState(step, runtime.world, run.resume_facts(), settings_json(run.given))
        try:
            with stage("saving a checkpoint"):
                saved = checkpoints.save(
                    runtime, self.model, self.optimizer, self._shadow, state, self.folder, run.settings.keep,
                    best=best, held=lambda: self.mirror.uploading if self.mirror else (), needs=writes(run).checkpoint,
                )  # fmt: skip
        except checkpoints.NotSaved as failed:
            self.unsaved = failed.fault
        else:
            self.unsaved = None
            self.log.say(f"saved {saved}")
        self.saved_at = time.monotonic()
        if self.unsaved and not self.exported:
            self._rescue(step, self.unsaved)
        if runtime.main:
            write_report(self.folder)
        if self.mirror:
            self.mirror.best = best
            self.mirror.soon()

    def mirrored(self, *, must: bool = True) -> None:
        """Wait until the mirror, if there is one, holds all that the folder does; every rank calls it.

        Args:
            must: else a fault is only said.

        Raises:
            CogError: it does not, and why.
        """
        try:
            with stage("waiting for the mirror"):
                self.runtime.peers.together(lambda: self.mirror.finish() if self.mirror else None)
        except CogError as fault:
            if must:
                raise
            self.log.say(f"note: {fault.what} ({fault.where})")
        if self.mirror:
            checkpoints.prune(self.folder, self.run.settings.keep, self.mirror.best)  # none is on its way any more

    def _rescue(self, step: int, fault: CogError) -> None:
        """Write the weights alone, which take less room than a checkpoint.

        Raises:
            CogError: always: the fault, and where the weights are.
        """
        try:
            rescued = self._write(self.folder / f"step-{step}", step)
            kept = f"; the weights after step {step} are in {rescued.path}"
        except CogError:
            kept = f"; the weights after step {step} found no room either"
        if self.runtime.main:
            raise DiskError(fault.what, where=fault.where, fix=f"{fault.fix}{kept}") from fault
        raise fault

    def _write(
        self, into: Path, step: int, line: ValidationLine | None = None, *, model: Any = None,
        runtime: Runtime | None = None,
    ) -> Written:  # fmt: skip
        """Write the live model's weights, or another's."""
        run = self.run
        go_on = partial(checkpoints.how_to_go_on, self.folder, run.method.name)
        averaged = self.averaged() if model is None else nullcontext()
        with averaged, stage("exporting the weights"):
            return run.method.write(
                runtime or self.runtime, self.model if model is None else model, run.checkpoint, into,
                weights_file_facts(run, step, line), go_on,
            )  # fmt: skip


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
