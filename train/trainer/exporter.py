"""Writes the weights as they are exported, and loads them back."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cogcommon.cli.progress import stage
from cogcommon.errors import CogError, DiskError

from ..blocks.compiler import end_workers
from ..distributed.optimizer import finish_update
from ..distributed.peers import ALONE
from ..distributed.strategy import Runtime
from ..model.ema import EMA
from ..model.method import Exported, Written, of_checkpoint
from ..runs.checkpoint import checkpoint_name, how_to_go_on
from ..runs.folder import ValidationLine
from ..runs.run import Run
from .announce import weights_file_facts


@dataclass
class Exporter:
    """Every rank calls each method alike, but for `prove`.

    Attributes:
        exported: the weights, once they have been written.
    """

    run: Run
    runtime: Runtime
    model: Any
    optimizer: Any
    ema: EMA | None
    folder: Path
    exported: Written | None = None

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the ``with`` the model is what would be exported."""
        return self.ema.in_place() if self.ema else nullcontext()

    def export(self, step: int, line: ValidationLine | None = None) -> Written:
        """Write the weights as they are exported.

        Args:
            line: the validation of that step, which the file then tells of.

        Raises:
            RunError: they are not finite.
            DiskError: the disk is full, or another fault of the file system; nothing of them is left.
        """
        end_workers()
        finish_update(self.optimizer)
        self.exported = self._write(self.folder, step, line)
        return self.exported

    def prove(self, kept: ValidationLine | None) -> Exported:
        """Load back what has been exported; on rank 0 alone.

        Args:
            kept: the validation of a checkpoint that is exported first, in the place of the last weights.

        Raises:
            RunError, DiskError: as `export`, and `Method.verify`.
        """
        if kept:
            return self._export_kept(kept)
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
        kept = self.folder / checkpoint_name(line.step)
        model = of_checkpoint(run.method, run.checkpoint, kept, alone.dtype)
        model.to(alone.room_for(model))
        written = self._write(self.folder, line.step, line, model=model, runtime=alone)
        with stage("proving the export"):
            return run.method.verify(alone, model, run.checkpoint, written)

    def rescue(self, step: int, fault: CogError) -> None:
        """Write the weights alone, which take less room than a checkpoint.

        Raises:
            CogError: always: the fault, and where the weights are.
        """
        finish_update(self.optimizer)
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
        go_on = partial(how_to_go_on, self.folder, run.method.name)
        averaged = self.averaged() if model is None else nullcontext()
        with averaged, stage("exporting the weights"):
            return run.method.write(
                runtime or self.runtime, self.model if model is None else model, run.checkpoint, into,
                weights_file_facts(run, step, line), go_on,
            )  # fmt: skip
