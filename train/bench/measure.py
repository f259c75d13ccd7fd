"""One row of the benchmark, in this process: the product's own run, or the plain loop beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import Collator, prefetch
from ..inputs import Objective
from ..loop import train
from ..method import Lora
from ..order import Order, rank_slots
from ..progress import peak_gib
from ..run import Run
from ..run_folder import METRICS_FILE, read_metrics
from ..settings import LoraSettings
from ..signals import StopRequest
from ..step.host_memory import locked_bytes
from .allocations import Allocations
from .rows import Row
from .subject import RandomCheckpoint, random_checkpoint, random_shards

if TYPE_CHECKING:
    import torch
    from diffusers import CogVideoXTransformer3DModel

_PROFILED, _KERNELS = 2, 40
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Prepared(RandomCheckpoint):
    """A checkpoint whose transformer has been made, once, before the GPU was free."""

    made: list[Any] = dataclasses.field(default_factory=list)

    def load_transformer(self, dtype: torch.dtype) -> CogVideoXTransformer3DModel:
        return self.made.pop() if self.made else super().load_transformer(dtype)

    def make(self, dtype: torch.dtype) -> None:
        self.made.append(super().load_transformer(dtype))


class _Enough(Exception):
    """As many steps as are measured have been made."""


class _After(StopRequest):
    """Ends a run from inside after a number of steps, without its checkpoint and export.

    Args:
        steps: that are measured. The ledger logs a step when the next one is queued, so one more is made.
        measured: called then.
        profile: make two more, under the profiler.
        trace: make one more, and remember every allocation.
    """

    def __init__(self, steps: int, measured: Callable[[], None], profile: bool, trace: bool) -> None:
        self._made = 0
        self._steps = steps + 1
        self._measured = measured
        self._more: list[_Profiled | Allocations] = []
        if profile:
            self._more.append(_Profiled())
        if trace:
            self._more.append(Allocations())
        self._watch: _Profiled | Allocations | None = None
        self._until = 0
        self.first_peak_gib = 0.0
        self.found: dict[str, list[str]] = {}

    @property
    def signal(self) -> int:  # type: ignore[override]
        """Asked for after every step."""
        import torch

        self._made += 1
        if torch.cuda.is_available() and self._made == 1:
            # The first step compiles and tries; what it held more than the others is told apart.
            self.first_peak_gib = peak_gib(torch.device("cuda"))
            torch.cuda.reset_peak_memory_stats()
        if self._made == self._steps:
            self._measured()
            if not torch.cuda.is_available():
                raise _Enough
        if self._made >= self._steps:
            self._look()
        return 0

    def _look(self) -> None:
        """Begin or end what is looked at once all is measured; not every machine allows it."""
        import torch

        torch.cuda.synchronize()
        watch, self._watch = self._watch, None
        try:
            if watch is not None and self._made < self._until:
                self._watch = watch
                return
            if watch is not None:
                self.found[watch.name] = watch.end()
            if not self._more:
                raise _Enough
            watch = self._more.pop(0)
            watch.begin()
            self._watch, self._until = watch, self._made + watch.steps
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


def prepare(row: Row) -> Run:
    """The run that a row measures, weights made in host memory."""
    import torch

    checkpoint = random_checkpoint(row.family, row.shape)
    known = {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}
    prepared = Prepared(**known)
    prepared.make(torch.bfloat16)
    shards = random_shards(prepared, row.bucket)
    settings = LoraSettings(
        rank=row.rank,
        memory=row.kind if row.kind in ("fast", "auto", "low") else "auto",  # type: ignore[arg-type]
        compile=row.compile,
        out=Path(tempfile.mkdtemp(prefix="cogtrain-bench-")),
        steps=1000,
        lr=1e-4,
        warmup=0,
    )
    return Run(
        settings=settings,
        method=Lora(settings),
        shards=shards,
        held_out=None,
        checkpoint=prepared,
        order=Order(shards.shard_of, shards.bucket_of, 1, settings.seed),
        steps=1000,
        strategy="ddp",
        precision="bf16",  # 2B's fp16 takes the same time, and bf16 needs no scaler in the plain loop
        world=1,
        resume=None,
        notes=(),
    )


def product(run: Run, row: Row, measured: Callable[[Mapping[str, Any]], None]) -> Mapping[str, Any]:
    """Seconds and bytes of the run as `cogtrain lora` would make it: its own loop, data and log.

    Args:
        measured: gets the result before a profile is taken.
    """
    stop = _After(row.steps, lambda: measured(_result(run, row, stop.first_peak_gib)), row.profile, row.memory_trace)
    with contextlib.suppress(_Enough):
        train(run, stop)
    return {**_result(run, row, stop.first_peak_gib), **stop.found}


def _result(run: Run, row: Row, first_peak_gib: float) -> Mapping[str, Any]:
    import torch

    assert run.settings.out is not None
    lines = read_metrics(run.settings.out / METRICS_FILE)[0][: row.steps]
    counted = lines[row.settling :]
    medians = {
        name: statistics.median(getattr(line, name) for line in counted)
        for name in ("s_per_step", "data_s", "forward_s", "backward_s", "optimizer_s")
    }
    return medians | {
        "steps": len(counted),
        "compile_s": sum(line.compile_s for line in lines),
        "peak_gib": max(line.peak_gib for line in lines),
        "first_peak_gib": first_peak_gib,
        "kept_gib": lines[-1].kept_gib,
        "reserved_gib": torch.cuda.max_memory_reserved() / _GIB if torch.cuda.is_available() else 0.0,
        "locked_gib": locked_bytes() / _GIB,
        "losses": [round(line.loss, 5) for line in lines],
        "all_s": [round(line.s_per_step, 3) for line in lines],
    }


def reference(run: Run, row: Row) -> Mapping[str, Any]:
    """The plain loop of diffusers and PEFT, as the public fine-tuning code has it: every block checkpointed,
    autocast, adapters in fp32, torch's AdamW, the loss asked for at every step. Same weights, same samples."""
    import torch

    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    transformer = run.checkpoint.load_transformer(torch.bfloat16)
    run.method.apply(transformer)
    transformer.to(device)
    transformer.enable_gradient_checkpointing()
    transformer.train()
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4)
    objective = Objective.of(run.checkpoint)
    slots = (
        rank_slots(run.order.epoch(epoch)[place], epoch, micro=0, rank=0, world=1, size=1)
        for epoch, place in (divmod(step, run.order.steps_per_epoch) for step in range(row.steps))
    )
    batches = prefetch(run.shards, slots, Collator(objective, run.settings.seed), ahead=2, pin=device.type == "cuda")
    marks: list[Sequence[float]] = []
    losses = []
    for batch in batches:
        times = [_now(device)]
        with torch.autocast(device.type, torch.bfloat16):
            loss = objective.losses(transformer, batch.to(device), torch.bfloat16).mean()
        times.append(_now(device))
        loss.backward()
        times.append(_now(device))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(round(loss.item(), 5))
        times.append(_now(device))
        marks.append(times)
    counted = marks[row.settling :]
    parts = {
        name: statistics.median(times[end] - times[begin] for times in counted)
        for name, begin, end in (
            ("s_per_step", 0, 3), ("forward_s", 0, 1), ("backward_s", 1, 2), ("optimizer_s", 2, 3)
        )
    }  # fmt: skip
    return parts | {
        "steps": len(counted),
        "compile_s": 0.0,
        "peak_gib": peak_gib(device),
        "reserved_gib": torch.cuda.max_memory_reserved() / _GIB if torch.cuda.is_available() else 0.0,
        "losses": losses,
        "all_s": [round(times[3] - times[0], 3) for times in marks],
    }


def _now(device: torch.device) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def write(result: Mapping[str, Any], file: Path) -> None:
    file.write_text(json.dumps(dict(result)) + "\n", encoding="utf-8")
