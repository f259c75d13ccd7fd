"""What a run shows and writes while it trains: metrics.jsonl, and lines."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import TYPE_CHECKING, Any

from cogcommon.cli.progress import said, stage
from cogcommon.cli.stages import Stage, clock_time
from cogcommon.cli.terminal import Console
from cogcommon.files.atomic import commit_bytes
from cogcommon.words import GIB

from .folder import METRICS_FILE, StepLine, ValidationLine, loss_text
from .tracker import Tracker

if TYPE_CHECKING:
    import torch

_LINE_EVERY = 5.0  # seconds between plain lines
_RECENT = 9  # steps, whose median is the pace that is shown, and that tells what is left


def peak_gib(device: torch.device) -> float:
    """Most memory held since `reset_peak`: of the GPU by the allocator, on a CPU by the process."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / GIB
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


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
    """Shows a run's steps, elsewhere than on a terminal as plain lines, too, and writes metrics.jsonl.

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
        self._bar = Stage("training", steps, "step", done)
        self.first_notes: tuple[str, ...] = ()  # what stands beside the count until a step is made
        self._last_line = -_LINE_EVERY
        self._recent: deque[float] = deque(maxlen=_RECENT)  # seconds a step, as metrics.jsonl has them

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tracker is not None:
            self._tracker.finish()

    @contextmanager
    def training(self) -> Iterator[None]:
        """Show how far the steps are, inside the ``with``, and at its end how long they took."""
        with stage("training", self.steps, "step", self._bar.done) as self._bar:
            self._bar.notes = self.first_notes
            yield

    def say(self, text: str) -> None:
        """One line for the reader, above the bar."""
        if self.folder is not None:
            said()
            self.console.print(text)
            self.console.file.flush()

    def step(self, metrics: StepLine) -> None:
        self.write(asdict(metrics))
        self._recent.append(metrics.s_per_step)
        a_step = self._bar.measured = median(self._recent)
        loss, lr, pace = f"loss {loss_text(metrics.loss)}", f"lr {metrics.lr:.2g}", f"{a_step:.2f} s/step"
        peak = f"peak {metrics.peak_gib:.1f} GiB"
        self._bar.advance(loss, pace, lr, peak)  # the most important first
        now = time.perf_counter()
        if metrics.step == self.steps or (
            not self.console.is_terminal and now - self._last_line >= _LINE_EVERY
        ):  # fmt: skip
            self._last_line = now
            left = clock_time(a_step * (self.steps - metrics.step))
            self.say(f"step {metrics.step}/{self.steps}  {loss}  {lr}  {pace}  {peak}  ETA {left}")

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
