"""Writes what was trained into the run's folder: the weights as they are exported, and checkpoints to resume from."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcommon.errors import CogError, DiskError

from ..distributed.strategy import Runtime
from ..memory.disk import writes
from ..model.ema import EMA
from ..model.method import Written
from ..runs import checkpoint as checkpoints
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

    def resume(self, checkpoint: Path) -> None:
        """Read a checkpoint back.

        Raises:
            RunError: it is damaged, does not fit this model, or holds what is not finite.
        """
        checkpoints.load(self.runtime, self.model, self.optimizer, self._shadow, checkpoint)

    def export(self, step: int) -> Written:
        """Write the weights as they are exported.

        Raises:
            RunError: they are not finite.
            DiskError: the disk is full, or another fault of the file system; nothing of them is left.
        """
        self.exported = self._write(self.folder, step)
        return self.exported

    def checkpoint(self, step: int) -> None:
        """Write a checkpoint; once the weights are exported, it is for a resume only.

        Raises:
            CogError: there is no room for it, and training ends here; says where the weights are.
        """
        run, runtime = self.run, self.runtime
        state = checkpoints.RunState(step, runtime.world, run.resume_facts(), settings_json(run.settings))
        try:
            saved = checkpoints.save(
                runtime, self.model, self.optimizer, self._shadow, state, self.folder, run.settings.keep,
                needs=writes(run).checkpoint,
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

    def _write(self, into: Path, step: int) -> Written:
        run = self.run
        go_on = partial(checkpoints.how_to_go_on, self.folder, run.method.name)
        with self.averaged():
            return run.method.write(
                self.runtime, self.model, run.checkpoint, into, weights_file_facts(run, step), go_on
            )  # fmt: skip
