"""Rows that were measured, added to what the project knows (``measured.jsonl``)."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogtrain.memory.measured import REFERENCE, Measured, add_measured_run, measured

_SAME = ("row", "gpu", "gpus", "resolution", "rank", "precision", "strategy", "attention", "memory")
_NOISE = 0.03  # between two leases of one kind of GPU: 1.6% at most so far


def add_measured(file: Path) -> int:
    """Add the rows of a bench.jsonl that were measured on a GPU, at true shape and to their end.

    Returns:
        How many were new.
    """
    known = set(map(_what, measured()))
    new = 0
    for line in file.read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        if not _comparable(result):
            continue
        run = _measured(result)
        if _what(run) not in known:
            known.add(_what(run))
            add_measured_run(run)
            new += 1
    return new


@dataclass(frozen=True)
class Moved:
    """A row beside the newest of its kind that the project knows."""

    row: str
    s_per_step: float
    seconds: float  # by how much they have grown, as a share
    peak: float  # so the GPU memory's peak
    since: Measured

    @property
    def slower(self) -> bool:
        """By more than two runs of the same code differ."""
        return self.seconds > _NOISE

    def __str__(self) -> str:
        then = f"{self.since.s_per_step:.2f} s on {self.since.date} ({self.since.commit})"
        return f"{self.row}: {self.s_per_step:.2f} s a step, {self.seconds:+.1%} of {then}; peak {self.peak:+.1%}"


def moved(result: Mapping[str, Any]) -> Moved | None:
    """How a result differs from what was measured before; None where the same was never measured, or it is not
    comparable."""
    if not _comparable(result):
        return None
    run = _measured(result)
    for known in measured():
        same = all(getattr(known, name) == getattr(run, name) for name in _SAME)
        if same and not known.faster_since and (run.memory != "auto" or known.block_plan == run.block_plan):
            return Moved(
                run.row, run.s_per_step, run.s_per_step / known.s_per_step - 1, run.peak_gib / known.peak_gib - 1, known
            )
    return None


def _comparable(result: Mapping[str, Any]) -> bool:
    """Whether it was measured to its end, on a GPU, at the model's true shape."""
    true_shape = not result["small"] and not result.get("layers")
    return true_shape and result.get("gpu", "CPU") != "CPU" and "s_per_step" in result


def _what(run: Measured) -> tuple[Any, ...]:
    return run.row, run.gpu, run.gpus, run.card_gib, run.date, run.s_per_step


def _measured(result: Mapping[str, Any]) -> Measured:
    reference = result["kind"] == "reference"
    return Measured(
        row=result["row"],
        command=f"python -m workshop.bench_train {result['row']}" if reference else result["command"],
        family=result["family"],
        method=result["method"],
        rank=result["rank"],
        resolution=result["bucket"],
        batch_size=1,
        precision=result["precision"],
        strategy=result["strategy"],
        memory=REFERENCE if reference else result["memory"],
        plan=result["plan"],
        block_plan=result.get("block_plan"),
        attention=result["attention"],
        gpu=result["gpu"],
        gpus=result["processes"],
        card_gib=round(result["card_gib"], 1),
        s_per_step=round(result["s_per_step"], 3),
        peak_gib=round(max(result["peak_gib"], result["first_peak_gib"]), 2),
        host_gib=round(result["host_gib"], 1),
        locked_gib=round(result["locked_gib"], 1) if "locked_gib" in result else None,
        first_peak_gib=round(result["first_peak_gib"], 2),
        compile_s=round(result["compile_s"], 1),
        date=result["date"],
        commit=_commit(),
        versions=result["versions"],
    )


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip()
