"""What came of a training, for a script that started it (``--json``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cogcommon.cli.names import json_text

from ..runs.checkpoint import list_checkpoints
from ..runs.folder import exported_weights, read_run
from .page import seconds_a_step


def outcome(folder: Path, resume: str | None = None) -> str:
    """What the files of a run say of it, as JSON: the same of one that has just ended as of one that ended long ago.

    Args:
        resume: the command that goes on with it, where it was stopped; it has then no weights to show.

    Raises:
        RunError: no run folder, or a damaged one.
    """
    run = read_run(folder)
    last = run.steps[-1] if run.steps else None
    shown = run.exported if resume is None else last and last.step
    held_out = run.validation_at(shown) if shown else None
    weights = exported_weights(folder) if resume is None else None
    checkpoints = list_checkpoints(folder)
    told: dict[str, Any] = {
        "out": str(folder),
        "steps": last.step if last else 0,
        "of": run.facts.steps,
        "ended": run.facts.ended or None,
        "loss": last and last.loss,
        "s_per_step": last and seconds_a_step(run),
        "peak_gib": max((line.peak_gib for line in run.steps), default=None),
        "weights": weights and str(weights),
        "weights_step": run.exported if weights else None,
        "val_loss": held_out and held_out.val_loss,
        "base_val_loss": held_out and held_out.base_val_loss,
        "checkpoint": str(checkpoints[-1]) if checkpoints else None,
        "resume": resume,
    }
    return json_text(told)
