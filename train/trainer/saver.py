"""Writes what was trained into the run's folder: the weights as they are exported, and checkpoints to resume from."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
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
from ..runs import checkpoint as checkpoints
from ..runs.folder import ValidationLine
from ..runs.log import RunLog
from ..runs.run import Run, settings_json
from .announce import weights_file_facts

if TYPE_CHECKING:
    import torch


@dataclass
class Saver:
    """Every rank calls each method alike. What is trained is kept, even where a checkpoint finds no room.

    Attributes:
        exported: the weights, once they have been written.
        unsaved: why there is no checkpoint of the last step, if that costs only the resume.
    """

    run: Run
    runtime: Runtime
    model: Any
    optimizer: Any
    ema: EMA | None
    folder: Path
    log: RunLog
    exported: Written | None = None
    unsaved: CogError | None = None

    @property
    def _shadow(self) -> list[torch.Tensor] | None:
        return self.ema.shadow if self.ema else None

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the ``with`` the model is what would be exported."""
        return self.ema.in_place() if self.ema else nullcontext()

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
        """Write a checkpoint; once the weights are exported, it is for a resume only.

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
                    best=best, needs=writes(run).checkpoint,
                )  # fmt: skip
        except checkpoints.NotSaved as failed:
            self.unsaved = failed.fault
        else:
            self.unsaved = None
            self.log.say(f"saved {saved}")
        if self.unsaved and not self.exported:
            self._rescue(step, self.unsaved)

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
