"""What a run shows and writes while it trains: metrics.jsonl, and a bar or plain lines."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cogcommon.cli.terminal import Console
from cogcommon.files.atomic import commit_bytes

from .folder import METRICS_FILE, StepLine, ValidationLine, loss_text
from .tracker import Tracker

if TYPE_CHECKING:
    import torch

_LINE_EVERY = 5.0  # seconds between plain lines
_GIB = 2**30


def peak_gib(device: torch.device) -> float:
    """Most memory held since `reset_peak`: of the GPU by the allocator, on a CPU by the process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / _GIB
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB


def reset_peak(device: torch.device) -> None:
    """Count the most memory held anew from here; on a CPU the system counts from the start."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def cut_metrics(folder: Path, step: int) -> None:
    """Take out lines of steps after ``step``: a resumed run makes them again."""
    path = folder / METRICS_FILE
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):
            continue  # the line that a kill cut short
    commit_bytes(path, "".join(kept).encode())


class RunLog:
    """Shows a run's steps, on a terminal as a bar, elsewhere as plain lines, and writes metrics.jsonl.

    Args:
        folder: of the run; None on ranks other than 0, which show and write nothing.
        steps: of the whole run.
        done: steps that were made before.
        tracker: gets the numbers of metrics.jsonl, too.
    """

    def __init__(self, folder: Path | None, steps: int, done: int, tracker: Tracker | None = None) -> None:
        self.folder = folder
        self.steps = steps
        self._tracker = tracker
        self.console = Console(soft_wrap=True)
        self._done = done
        self._at_start = done
        self._started = time.perf_counter()
        self._last_line = -_LINE_EVERY
        self._bar: Progress | None = None
        if folder is not None and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,  # what stays is the run's last lines: the losses, and what to type next
            )
            self._task = self._bar.add_task("", total=steps, completed=done, note="")

    def __enter__(self) -> RunLog:
        self._started = time.perf_counter()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._tracker is not None:
            self._tracker.finish()

    def say(self, text: str) -> None:
        """One line for the reader, above the bar."""
        if self.folder is not None:
            self.console.print(text)
            self.console.file.flush()

    def step(self, metrics: StepLine) -> None:
        self._done = metrics.step
        self.write(asdict(metrics))
        if self.folder is None:
            return
        note = (
            f"loss {loss_text(metrics.loss)}  lr {metrics.lr:.2g}  {metrics.s_per_step:.2f} s/step  "
            f"peak {metrics.peak_gib:.1f} GiB"
        )
        now = time.perf_counter()
        if self._bar is not None:
            self._bar.update(self._task, completed=metrics.step, note=note)
        if metrics.step == self.steps or (self._bar is None and now - self._last_line >= _LINE_EVERY):
            self._last_line = now
            left = (now - self._started) / max(1, self._done - self._at_start) * (self.steps - self._done)
            self.say(f"step {metrics.step}/{self.steps}  {note}  ETA {clock(left)}")

    def validation(self, line: ValidationLine) -> None:
        self.write(asdict(line))
        best = ""
        if line.best_step is not None:
            best = ", the best so far" if line.best_step == line.step else f"; the best is step {line.best_step}"
        self.say(f"step {line.step}/{self.steps}  {line}{best}")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        if self._tracker is not None:
            known = {name: value for name, value in line.items() if name != "step" and value is not None}
            self._tracker.log(known, line["step"])
        if self.folder is not None:
            with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")


def clock(seconds: float) -> str:
    """``1:02:03``"""
    whole = int(seconds)
    return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
