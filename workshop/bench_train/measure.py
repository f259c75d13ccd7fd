"""One row of the benchmark as the product runs it, in this process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogcommon.model.device import dtype_of
from cogcommon.words import GIB
from cogtrain.distributed.signals import StopRequest
from cogtrain.offload.pinned import locked_bytes
from cogtrain.runs.folder import METRICS_FILE, read_metrics, read_run
from cogtrain.runs.log import peak_gib
from cogtrain.runs.run import Run
from cogtrain.trainer.trainer import train

from .allocations import Allocations
from .machine import BenchMachine
from .rows import BenchRow
from .slower_link import SlowerLink, hold
from .subject import RandomCheckpoint, random_checkpoint, random_run, random_shards

if TYPE_CHECKING:
    import torch
    from diffusers import CogVideoXTransformer3DModel

_PROFILED, _KERNELS = 2, 40


@dataclasses.dataclass(frozen=True)
class Prepared(RandomCheckpoint):
    """A checkpoint whose transformer has been made, once, before the GPU was free.

    ``apart`` is not empty where weights may be trained where they lie: then each gets memory of its own
    when it is loaded, and not before, when the row that is being measured may need that memory.
    """

    made: list[Any] = dataclasses.field(default_factory=list)
    apart: list[bool] = dataclasses.field(default_factory=list)

    def load_transformer(self, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
        transformer = self.made.pop() if self.made else super().load_transformer(dtype)
        for parameter in transformer.parameters() if self.apart else ():
            parameter.data = parameter.data.clone()
        return transformer

    def make(self, dtype: torch.dtype) -> None:
        self.made.append(super().load_transformer(dtype))


class _Enough(Exception):
    """As many steps as are measured have been made."""


class _Deaf(StopRequest):
    """Takes no signal: each ends a measurement at once, as it ends any program."""

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        yield self


class _Steps:
    """Counts the steps of a run, and ends it from inside after some, without its checkpoint and export.

    Args:
        steps: that are measured. A step is logged when the next one is queued, so one more is made.
        measured: called then.
        profile: make two more, under the profiler.
        trace: make one more, and remember every allocation.
        link: that copies are held to.
    """

    def __init__(
        self, steps: int, measured: Callable[[], None], profile: bool, trace: bool, link: SlowerLink | None = None
    ) -> None:
        self._steps = steps + 1
        self._link = link
        self._measured = measured
        self._more: list[_Profiled | Allocations] = []
        if profile:
            self._more.append(_Profiled())
        if trace:
            self._more.append(Allocations())
        self._watch: _Profiled | Allocations | None = None
        self._until = 0
        self.first_peak_gib = 0.0
        self.copied: dict[str, float] = {}
        self.found: dict[str, list[str]] = {}
        self.machine = BenchMachine()

    def after_step(self, step: int) -> None:
        """Called by the trainer.

        Raises:
            _Enough: all is measured.
        """
        import torch

        self.machine.look()
        if torch.cuda.is_available() and step == 1:
            # The first step compiles and tries; what it held more than the others is told apart.
            self.first_peak_gib = peak_gib(torch.device("cuda"))
            torch.cuda.reset_peak_memory_stats()
        if self._link and step == 1:
            self._link.begin()
        if step == self._steps:
            if self._link:
                self.copied = self._link.found(step - 1)
            self._measured()
            if not torch.cuda.is_available():
                raise _Enough
        if step >= self._steps:
            self._look(step)

    def _look(self, step: int) -> None:
        """Begin or end what is looked at once all is measured; not every machine allows it."""
        import torch

        torch.cuda.synchronize()
        watch, self._watch = self._watch, None
        try:
            if watch is not None and step < self._until:
                self._watch = watch
                return
            if watch is not None:
                self.found[watch.name] = watch.end()
            if not self._more:
                raise _Enough
            watch = self._more.pop(0)
            watch.begin()
            self._watch, self._until = watch, step + watch.steps
        except _Enough:
            raise
        except Exception as error:
            assert watch is not None
            self.found[watch.name] = [f"{type(error).__name__}: {error}"[:300]]


class _Profiled:
    """Kernels and copies of a step."""

    name, steps = "kernels", _PROFILED

    def begin(self) -> None:
        from torch.profiler import ProfilerActivity, profile

        self._profiler = profile(activities=[ProfilerActivity.CUDA])
        self._profiler.__enter__()

    def end(self) -> list[str]:
        self._profiler.__exit__(None, None, None)
        return _longest(self._profiler)


def _longest(profiler: Any) -> list[str]:
    """Kernels and copies by the time they take in a step."""
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)
    return [
        f"{row.self_device_time_total / 1000 / _PROFILED:8.1f} ms {row.count // _PROFILED:5d} x {row.key[:110]}"
        for row in rows[:_KERNELS]
    ]


def prepare(row: BenchRow) -> Run:
    """The run that a row measures, weights made in host memory."""
    import torch

    settings = dataclasses.replace(
        row.settings,
        compile=row.compile,
        out=Path(tempfile.mkdtemp(prefix="cogtrain-bench-")),
        steps=1000,
        warmup=0,
        nproc=None,
    )
    checkpoint = random_checkpoint(row.family, row.shape)
    known = {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}
    prepared = Prepared(**known)
    run = random_run(settings, prepared, random_shards(prepared, row.bucket), row.processes)
    if run.precision == "fp16" and not torch.cuda.is_available():
        run = dataclasses.replace(run, precision="bf16")
    if run.method.full and run.strategy == "ddp":
        prepared.apart.append(True)
    prepared.make(run.method.weight_dtype(dtype_of(run.precision), run.strategy != "ddp"))
    return run


def product(run: Run, row: BenchRow, measured: Callable[[Mapping[str, Any]], None]) -> Mapping[str, Any]:
    """Seconds and bytes of the run as `cogtrain lora` would make it: its own trainer, data and log.

    Args:
        measured: gets the result before a profile is taken.

    Raises:
        ValueError: the link is slower than the row's.
    """
    import torch

    link = hold(torch.device("cuda", torch.cuda.current_device()), row.link * 1e9) if row.link else None
    steps = _Steps(row.steps, lambda: measured(_result(run, row, steps)), row.profile, row.memory_trace, link)
    with contextlib.suppress(_Enough):
        train(run, _Deaf(), after_step=steps.after_step)
    return {**_result(run, row, steps), **steps.found}


def _result(run: Run, row: BenchRow, steps: _Steps) -> Mapping[str, Any]:
    assert run.settings.out is not None
    if not (run.settings.out / METRICS_FILE).exists():
        return {}  # not the first process: that one writes for all
    lines = read_metrics(run.settings.out / METRICS_FILE)[0][: row.steps]
    facts = read_run(run.settings.out).facts
    counted = lines[row.settling :]
    medians = {
        name: statistics.median(getattr(line, name) for line in counted)
        for name in ("s_per_step", "data_s", "forward_s", "backward_s", "optimizer_s")
    }
    return medians | {
        "steps": len(counted),
        "compile_s": sum(line.compile_s for line in lines),
        "peak_gib": max(line.peak_gib for line in lines),
        "first_peak_gib": steps.first_peak_gib,
        "kept_gib": lines[-1].kept_gib,
        "locked_gib": locked_bytes() / GIB,
        "plan": facts.plan,
        "block_plan": facts.block_plan,
        "attention": facts.attention,
        **steps.copied,
        **steps.machine.found(run),
        "losses": [round(line.loss or math.nan, 5) for line in lines],
        "norms": [round(line.grad_norm or math.nan, 5) for line in lines],
        "all_s": [round(line.s_per_step, 3) for line in lines],
    }


def write(result: Mapping[str, Any], file: Path) -> None:
    file.write_text(json.dumps(dict(result)) + "\n", encoding="utf-8")
