"""Rows that were measured, beside what the project knows (``measured.jsonl``), and added to it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogtrain.memory.measured import REFERENCE, SAME, Measured, add_measured_run, everything_measured

from .achieved import achieved
from .hardware import computed_for

_UNSETTLED = 1.1  # a counted step by another: 1.06 at most where a run had settled, 1.35 and more where it had not
NOISE = 0.03  # between two leases of one kind of GPU: 1.6% at most so far


def add_measured(file: Path, commit: str | None = None) -> int:
    """Add the rows of a bench.jsonl that were measured on a GPU, at true shape and to their end, and had settled.

    Args:
        commit: of the code that was measured, where the file does not say; by default this checkout's.

    Returns:
        How many were new.
    """
    known = set(map(_what, everything_measured()))
    new = 0
    for line in file.read_text(encoding="utf-8").splitlines():
        result = json.loads(line)
        if _unusable(result):
            continue
        run = _measured(result, commit)
        if _what(run) not in known:
            known.add(_what(run))
            add_measured_run(run)
            new += 1
    return new


@dataclass(frozen=True)
class Compared:
    """A row beside the newest of its kind that the project knows, and beside what `cogtrain plan` computes for it."""

    run: Measured
    since: Measured | None
    planned_s: float | None

    @property
    def slower(self) -> bool:
        """By more than two runs of the same code differ."""
        return self.since is not None and self.run.s_per_step / self.since.s_per_step - 1 > NOISE

    @property
    def losses_off(self) -> float | None:
        """The largest difference of a step's loss from what it was, relative; None where that is not known."""
        pairs = zip(self.run.losses, self.since.losses if self.since else (), strict=False)
        return max((abs(now / then - 1) for now, then in pairs), default=None)

    def __str__(self) -> str:
        """A line of `compared_table`."""
        run, since = self.run, self.since
        link = f" at {run.link:g} GB/s" if run.link else ""
        kernel = {"flash4": ", FlashAttention 4", "cudnn": ", cuDNN"}.get(run.attention, "")
        cells = [f"{run.row}{link}{kernel}", f"{run.s_per_step:.2f}", str(achieved(run))]
        if since:
            cells += [f"{since.s_per_step:.2f} ({since.date}, {since.commit})", _off(run.s_per_step, since.s_per_step)]
        else:
            cells += ["never", ""]
        cells += [f"{run.peak_gib:.1f}", _off(run.peak_gib, since.peak_gib) if since else ""]
        cells += ["" if self.losses_off is None else f"{self.losses_off:.3%}"]
        cells += [f"{self.planned_s:.2f}", _off(self.planned_s, run.s_per_step)] if self.planned_s else ["", ""]
        return f"| {' | '.join(cells)} |"


def compared(result: Mapping[str, Any]) -> Compared | None:
    """A result beside what is known; None where it is no figure to compare."""
    if _unusable(result):
        return None
    run = _measured(result)
    planned = computed_for(run)[1] if run.memory != REFERENCE else None
    for known in everything_measured():
        same = all(getattr(known, name) == getattr(run, name) for name in (*SAME, "link"))
        if same and not known.faster_since and (run.memory != "auto" or known.block_plan == run.block_plan):
            return Compared(run, known, planned)
    return Compared(run, None, planned)


def compared_table(results: Iterable[Mapping[str, Any]]) -> str:
    """Rows beside what the project knows of them (``measured.jsonl``) and beside `cogtrain plan`, as Markdown."""
    lines = [
        "| row | s/step | TFLOP/s, of the card's | known | moved | peak GiB | moved | losses moved | plan's s | off |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        if found := compared(result):
            lines.append(str(found))
        elif result["kind"] != "numerics":
            lines.append(f"| {result['row']} | {_unusable(result)} |")
    return "\n".join(lines)


def _off(now: float, then: float) -> str:
    return f"{now / then - 1:+.1%}"


def _unusable(result: Mapping[str, Any]) -> str | None:
    """Why a result is no figure to keep or to compare: nothing was measured, or not what a user's run would take."""
    if "s_per_step" not in result:
        return str(result.get("failed", "not measured"))
    if result["small"] or result.get("layers") or result.get("gpu", "CPU") == "CPU":
        return "not of a true shape, or not on a GPU"
    counted = result.get("all_s", [])[-result["steps"] :]
    if counted and max(counted) > _UNSETTLED * min(counted):
        return f"not settled: its steps took {min(counted):.2f} to {max(counted):.2f} s; --plain-steps or --steps more"
    return None


def _what(run: Measured) -> tuple[Any, ...]:
    return run.row, run.gpu, run.gpus, run.card_gib, run.link, run.date, run.s_per_step


def _measured(result: Mapping[str, Any], commit: str | None = None) -> Measured:
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
        host_gib=None if result["host_gib"] is None else round(result["host_gib"], 1),
        locked_gib=round(result["locked_gib"], 1) if "locked_gib" in result else None,
        first_peak_gib=round(result["first_peak_gib"], 2),
        compile_s=round(result["compile_s"], 1),
        date=result["date"],
        commit=commit or _commit(),
        link=result.get("link"),
        losses=tuple(result["losses"]),
        versions=result["versions"],
    )


def _commit() -> str:
    """This checkout's; nothing where the code is no checkout, or git is not installed."""
    words = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
