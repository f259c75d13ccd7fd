"""What each strategy and memory setting takes of a machine, and the command that trains so: ``plan``'s lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from cogcommon.cli.names import command_line
from cogcommon.errors import SettingError
from cogcommon.model.device import Precision, default_precision
from cogcommon.model.families import BY_NAME, Resolution
from cogcommon.model.published import known_checkpoint
from cogcommon.words import GIB

from ..data.shard_words import unexpanded
from ..distributed.optimizer import check_optimizer
from ..distributed.strategies import STRATEGIES
from ..distributed.zero_config import choose_strategy
from ..memory.disk import writes
from ..memory.estimate import Estimate, Intent, Trains, choices
from ..memory.machine import TRY_IT, Machine
from ..memory.measured import Measured, measured
from ..memory.seconds import seconds, speed_of
from ..model.method import method_of
from ..runs.opening import open_run
from ..runs.run import Run
from ..settings.planning import ForecastSettings
from ..settings.training import LoraSettings, Memory, SftSettings, Strategy, TrainSettings

if TYPE_CHECKING:
    from cogcommon.model.checkpoint import Checkpoint

_FASTER, _WITH_ROOM = 0.95, 0.75  # of auto's seconds, and of the card: when `fast` is advised


@dataclass(frozen=True)
class TrainForecast:
    """One line of the table. Memory in GiB; computed, but for what is called measured."""

    method: Literal["lora", "sft"]
    strategy: Strategy
    memory: Memory
    precision: Precision
    gpus: int  # one process each; or processes, where there are none
    peak_gib: float  # of the GPU, for each process
    host_gib: float  # of the host while it trains, for each process
    host_total_gib: float  # of the host at its worst moment, by all processes on it: loading, training or exporting
    fits: bool  # GPU and host
    lacks: Literal["", "GPU memory", "host memory", "GPU and host memory"]
    computed_s: float | None  # a step, on ``computed_on``; None where there is nothing to compute it from
    computed_on: str | None
    s_per_step: float | None  # measured by us, on such GPUs
    measured_gib: float | None  # the peak there
    no_seconds: str  # where there are neither: why, and what to type
    flash4_s: float | None  # a step with FlashAttention 4, where that is not what is told already
    checkpoint_gb: float  # on the disk, in powers of 1000 as disks are sold; each
    export_gb: float  # on the disk: the trained weights
    disk_gb: float  # on the disk at the fullest moment: the export, ``keep`` checkpoints and one in the making
    keep: int  # --keep
    command: str


def wanted_runs(settings: ForecastSettings, machine: Machine) -> Sequence[Run | Intent]:
    """What is to be planned, for each method: runs over shards; without shards, a model and a size.

    Raises:
        CogError: the shards cannot be trained on, or the model cannot take the size.
    """
    if settings.steps < 1:
        raise SettingError(f"{settings.steps} steps", where="--steps", fix="--steps 1 or more")
    if settings.repeat and not settings.shards:
        raise SettingError("there are no samples to repeat", where="--repeat", fix="--shards, or leave --repeat out")
    if not settings.shards:
        checkpoint = known_checkpoint(settings.model or BY_NAME["5b"].hub_id)
        size = Resolution.parse(settings.resolution) if settings.resolution else checkpoint.native
        return intents(settings, checkpoint, [size], machine)
    if settings.resolution:
        raise SettingError("shards have their resolution", where="--shards, --resolution", fix="leave out one of them")
    return [open_run(train, _device_type(machine), machine.gpus) for train in _wanted(settings)]


def intents(
    settings: ForecastSettings, checkpoint: Checkpoint, buckets: Sequence[Resolution], machine: Machine
) -> list[Intent]:
    """Runs of a model at sizes of which there need be no shards.

    Raises:
        SettingError: the model cannot take a size, or the settings do not go together.
    """
    for bucket in buckets:
        checkpoint.check_resolution(bucket)
    found = []
    for train in _wanted(settings):
        method = method_of(train)
        strategy = choose_strategy(train, full=method.full, gpus=0 if machine.cpu else machine.gpus)
        check_optimizer(train, strategy)
        precision = train.precision or default_precision(checkpoint.family, _device_type(machine))
        found.append(Intent(train, method, checkpoint, tuple(buckets), strategy, precision, machine.gpus))
    return found


def _device_type(machine: Machine) -> str:
    """As on a machine that has one."""
    return "cpu" if machine.cpu else "cuda"


def _wanted(settings: ForecastSettings) -> list[TrainSettings]:
    """Settings of the runs to compare."""
    common: dict[str, Any] = {
        "shards": settings.shards, "model": settings.model, "batch_size": settings.batch_size, "resume": "never",
        "optimizer": settings.optimizer, "ema": settings.ema, "repeat": settings.repeat,
    }  # fmt: skip
    if settings.optimizer == "prodigy":
        common["lr"] = 1.0
    if settings.optimizer == "prodigy" or settings.ema:
        common["strategy"] = "ddp"
    wanted = {"lora": LoraSettings(rank=settings.rank, **common), "sft": SftSettings(**common)}
    return [train for method, train in wanted.items() if settings.method in (method, "both")]


def lines_of(run: Trains, machine: Machine) -> list[TrainForecast]:
    """A run under every strategy and memory setting, in the order in which they are advised."""
    found = choices(run, machine.gpu, machine.host, machine.together, machine.speed, gpu=not machine.cpu)
    lines = [_line(run, needs, machine) for needs in found]
    for number, (auto, fast) in enumerate(pairwise(lines)):
        if fast.memory == "fast" and fast.strategy == auto.strategy and _pays(fast, auto, machine):
            lines[number : number + 2] = fast, auto
    return lines


def _pays(fast: TrainForecast, auto: TrainForecast, machine: Machine) -> bool:
    """Whether `fast` saves time, and leaves room on the card for what else comes: another program, a larger rank."""
    if not (fast.fits and fast.computed_s and auto.computed_s):
        return False
    return fast.computed_s <= _FASTER * auto.computed_s and fast.peak_gib * GIB <= _WITH_ROOM * machine.gpu


def on_fewer_gpus(run: Run | Intent, machine: Machine) -> list[TrainForecast]:
    """What fits a host that has too little memory for a process on each of its GPUs, on the most GPUs that do."""
    for gpus in range(machine.together - 1, 0, -1):
        fewer = lines_of(replace(run, world=gpus), replace(machine, gpus=gpus))
        if fitting := [line for line in fewer if line.fits]:
            return fitting
    return []


def _line(run: Trains, needs: Estimate, machine: Machine) -> TrainForecast:
    same = _measured(run, needs, machine)
    takes = seconds(run, needs, machine.speed, machine.kernel) if machine.speed else None
    total = needs.host_at_most(machine.together)
    disk = writes(run, needs.strategy)
    lacks = [
        name
        for name, enough in (
            ("GPU", needs.fits(machine.gpu)),
            ("host", machine.host is None or total <= machine.host),
        )
        if not enough
    ]
    return TrainForecast(
        method=run.method.name,
        strategy=needs.strategy,
        memory=needs.memory,
        precision=run.precision,
        gpus=machine.gpus,
        peak_gib=round(needs.peak / GIB, 2),
        host_gib=round(needs.host / GIB, 2),
        host_total_gib=round(total / GIB, 2),
        fits=not lacks,
        lacks=" and ".join(lacks) + " memory" if lacks else "",  # type: ignore[arg-type]
        computed_s=None if takes is None else round(takes * run.settings.accumulate, 3),
        computed_on=machine.computed_on,
        s_per_step=same.s_per_step if same else None,
        measured_gib=same.peak_gib if same else None,
        no_seconds="" if takes or same else _no_seconds(needs, machine),
        flash4_s=_with_flash4(run, needs, machine, measured=same is not None),
        checkpoint_gb=round(disk.checkpoint / 1e9, 6),
        export_gb=round(disk.export / 1e9, 6),
        disk_gb=round(disk.total / 1e9, 6),
        keep=disk.keep,
        command=command_line(*_words(run, needs)),
    )


def _no_seconds(needs: Estimate, machine: Machine) -> str:
    if machine.untimed or not STRATEGIES[needs.strategy].stage:
        return machine.untimed
    return f"seconds are not known: what cards exchange was measured of H200s alone; {TRY_IT}"


def _with_flash4(run: Trains, needs: Estimate, machine: Machine, *, measured: bool) -> float | None:
    """Seconds of a step where a GPU whose speed we have measured, all of them Hopper, lacks FlashAttention 4.

    Args:
        measured: so are the seconds without it; what was computed is set beside what was computed.
    """
    if machine.kernel == "flash4" or machine.speed is None or machine.speed.published:
        return None
    with_it = replace(machine, kernel="flash4")
    if measured and (same := _measured(run, needs, with_it)):
        return same.s_per_step
    takes = seconds(run, needs, machine.speed, with_it.kernel)
    return None if takes is None else round(takes * run.settings.accumulate, 3)


def _words(run: Trains, needs: Estimate) -> list[str]:
    """The command, as typed; what is so by default is left out."""
    settings = run.settings
    words = ["cogtrain", run.method.name, "--shards", *(unexpanded(settings.shards) or ["out/*.tar"])]
    if run.method.full or needs.strategy != "ddp":
        words += ["--strategy", needs.strategy]
    if needs.memory != "auto":
        words += ["--memory", needs.memory]
    words += ["--nproc", str(run.world)]
    if settings.model and settings.shards:
        words += ["--model", settings.model]
    if settings.batch_size != 1:
        words += ["--batch-size", str(settings.batch_size)]
    if settings.repeat:
        words += ["--repeat", *settings.repeat]
    if settings.optimizer != "adamw":
        words += ["--optimizer", settings.optimizer]
    if settings.optimizer == "prodigy":
        words += ["--lr", "1"]
    if settings.ema:
        words += ["--ema", f"{settings.ema:g}"]
    if isinstance(settings, LoraSettings) and settings.rank != LoraSettings().rank:
        words += ["--rank", str(settings.rank)]
    return words


def _measured(run: Trains, needs: Estimate, machine: Machine) -> Measured | None:
    """The newest run of the same thing on such GPUs; None where nobody has measured it."""
    settings = run.settings
    if run.checkpoint.transformer_config["num_layers"] != run.checkpoint.family.layers:
        return None  # a built-in model: of the family's form, not of its size
    if settings.optimizer != "adamw" or settings.ema:
        return None
    (resolution,) = run.buckets if len(run.buckets) == 1 else (None,)
    card = speed_of(machine.name)
    if needs.plan.host(needs.load) and card and machine.speed and machine.speed.link != card.link:
        return None  # it copies, and was measured over the card's own link
    same = {
        "family": run.checkpoint.family.name,
        "method": run.method.name,
        "rank": getattr(settings, "rank", None),
        "resolution": str(resolution),
        "batch_size": settings.batch_size,
        "gpu": machine.name,
        "gpus": machine.gpus,
        "strategy": needs.strategy,
        "block_plan": needs.plan.fields(),
        "attention": machine.kernel,
    }
    runs = (run for run in measured() if all(getattr(run, name) == value for name, value in same.items()))
    return next((run for run in runs if not run.faster_since), None)
