"""Follows a run's held-out losses: which step is the best so far, and whether it is time to end."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path

from cogcommon.words import counted

from ..distributed.peers import Peers
from ..runs.checkpoint import list_checkpoints, step_of
from ..runs.folder import METRICS_FILE, ValidationLine, finite, lowest, read_metrics
from ..settings.training import TrainSettings
from ..validation.validate import Validation


@dataclass
class Best:
    """The lowest of a run's held-out losses; every rank holds the same.

    Attributes:
        lines: validations so far, oldest first.
        kept: of which of them there is a checkpoint that ``--keep-best`` can keep.
    """

    settings: TrainSettings
    lines: list[ValidationLine] = field(default_factory=list)
    kept: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, settings: TrainSettings, folder: Path, peers: Peers, validation: Validation | None) -> Best:
        """What ``metrics.jsonl`` and the checkpoints of a run say; every rank calls it.

        Args:
            folder: of the run, in the state after the step that it goes on from.
            validation: that goes on; losses of other held-out samples are not compared with its own.
        """
        found: tuple[list[ValidationLine], set[int]] = ([], set())
        if peers.main and (validation or settings.keep_best):  # which a finished run keeps without held-out samples
            lines = read_metrics(folder / METRICS_FILE)[1]
            if validation and validation.held_out:
                base = math.nan if validation.base_loss is None else validation.base_loss
                lines = [line for line in lines if line.base_val_loss == finite(base)]
            found = lines, {step_of(path) for path in list_checkpoints(folder)}
        return cls(settings, *peers.broadcast(found))

    @property
    def line(self) -> ValidationLine | None:
        """Of the checkpoint that ``--keep-best`` keeps; None without one."""
        return lowest([line for line in self.lines if line.step in self.kept]) if self.settings.keep_best else None

    @property
    def step(self) -> int | None:
        return self.line.step if self.line else None

    @property
    def waited(self) -> int:
        """Validations since the lowest loss."""
        best = lowest(self.lines)
        return sum(line.step > (best.step if best else 0) for line in self.lines)

    @property
    def enough(self) -> bool:
        """Whether ``--patience`` has come to its end."""
        return bool(self.settings.patience) and self.waited >= self.settings.patience

    def take(self, line: ValidationLine) -> ValidationLine:
        """Take in a validation; it comes back with the step that is the best now.

        With ``--keep-best`` a checkpoint must be written if that is its own.
        """
        self.lines.append(line)
        before = self.line
        if line.val_loss is not None and (before is None or lowest([before, line]) is line):
            self.kept.add(line.step)
        return dataclasses.replace(line, best_step=self.step)

    def why(self) -> str:
        """Why a run ends before its last step."""
        best = lowest(self.lines)
        since = f" since step {best.step:,}" if best else ""
        return f"{counted(self.waited, 'validation')} without a lower held-out loss{since} (--patience)"
