"""``cogtrain plan``: what each strategy and memory setting would take, which of them fits, and the command."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cogcommon.cli.names import command_line, json_text
from cogcommon.errors import RunError
from cogcommon.model.device import EMULATED, Precision, default_precision
from cogcommon.words import in_bytes

from ..distributed.optimizer import check_optimizer
from ..distributed.zero_config import Strategy, choose_strategy
from ..memory.disk import writes
from ..memory.estimate import Estimate, Intent, Trains, choices
from ..memory.machine import Machine, machine_for
from ..memory.measured import Measured, measured
from ..memory.seconds import seconds
from ..model.method import method_of
from ..runs.folder import METRICS_FILE, read_metrics
from ..runs.run import Run, open_run
from ..settings import ForecastSettings, LoraSettings, Memory, SftSettings, TrainSettings
from ..store.store import without_secrets

if TYPE_CHECKING:
    import torch

    from cogcommon.model.checkpoint import Checkpoint
    from cogcommon.model.families import Resolution

_GIB = 2**30


@dataclass(frozen=True)
class TrainForecast:
    """One line of the table. Memory in GiB; computed, but for what is called measured."""

    method: str
    strategy: Strategy
    memory: Memory
    precision: Precision
    peak_gib: float  # of the GPU, for each process
    host_gib: float  # of the host while it trains, for each process
    host_total_gib: float  # of the host at its worst moment, by all processes on it: loading, training or exporting
    fits: bool  # GPU and host
    lacks: Literal["", "GPU memory", "host memory", "GPU and host memory"]
    computed_s: float | None  # a step, on ``computed_on``; None where there is nothing to compute it from
    computed_on: str | None
    s_per_step: float | None  # measured by us, where it was, on ``measured_on``
    measured_gib: float | None  # the peak there
    measured_on: str | None
    checkpoint_gb: float  # on the disk, in powers of 1000 as disks are sold; each
    export_gb: float  # on the disk: the trained weights
    disk_gb: float  # on the disk at the fullest moment: the export, ``keep`` checkpoints and one in the making
    keep: int  # --keep
    command: str


def run(settings: ForecastSettings) -> None:
    """The command.

    Raises:
        CogError: anything that the user can put right.
    """
    from cogcommon.cli.terminal import Console

    machine = machine_for(settings)
    runs = _open_runs(settings, machine)
    found = [line for run in runs for line in lines_of(run, machine)]
    advised = {
        method: next((line for line in found if line.method == method and line.fits), None)
        for method in dict.fromkeys(line.method for line in found)
    }
    if settings.json:
        print(without_secrets(json_text([dataclasses.asdict(line) for line in found])))
    else:
        console = Console(soft_wrap=True)
        console.print(f"{runs[0].shards.described} of {', '.join(map(str, runs[0].buckets))}\n")
        console.print(_table(found))
        console.print(machine.described() + "; all is computed but what is called measured\n")
        if not machine.bf16 and any(line.precision == "bf16" for line in found):
            console.print("note: " + EMULATED.format(machine.name) + "\n")
        for method, line in advised.items():
            lines = [line for line in found if line.method == method]
            console.print(without_secrets(line.command) if line else f"{method}: nothing fits; {_remedy(lines)}")
            if line:
                sizes = (line.disk_gb, line.export_gb, line.checkpoint_gb)
                disk, export, each = (in_bytes(1e9 * size) for size in sizes)
                console.print(
                    f"  writes up to {disk}: weights of {export}, and checkpoints of {each} each "
                    f"(--keep {line.keep}, and one in the making)"
                )
    if settings.check:
        check([line for line in advised.values() if line])


def forecasts(settings: ForecastSettings, machine: Machine) -> list[TrainForecast]:
    """Every strategy and memory setting for shards, in the order in which they are advised; LoRA first."""
    return [line for run in _open_runs(settings, machine) for line in lines_of(run, machine)]


def _open_runs(settings: ForecastSettings, machine: Machine) -> list[Run]:
    from cogcommon.model.device import quiet_libraries

    quiet_libraries()
    return [open_run(train, _device(machine), machine.gpus) for train in _wanted(settings)]


def forecasts_for(
    settings: ForecastSettings, checkpoint: Checkpoint, buckets: Sequence[Resolution], machine: Machine
) -> list[TrainForecast]:
    """The same for a model and sizes, of which there need be no shards.

    Raises:
        SettingError: the model cannot take a size, or the settings do not go together.
    """
    lines = []
    for bucket in buckets:
        checkpoint.check_resolution(bucket)
    for train in _wanted(settings):
        method = method_of(train)
        strategy = choose_strategy(train, full=method.full, gpus=0 if machine.cpu else machine.gpus)
        check_optimizer(train, strategy)
        precision = train.precision or default_precision(checkpoint.family, _device(machine))
        lines += lines_of(
            Intent(train, method, checkpoint, tuple(buckets), strategy, precision, machine.gpus), machine
        )  # fmt: skip
    return lines


def _device(machine: Machine) -> torch.device:
    """As on a machine that has one."""
    import torch

    return torch.device("cpu" if machine.cpu else "cuda")


def _wanted(settings: ForecastSettings) -> list[TrainSettings]:
    """Settings of the runs to compare."""
    common: dict[str, Any] = {
        "shards": settings.shards, "model": settings.model, "batch_size": settings.batch_size, "resume": "never",
        "optimizer": settings.optimizer, "ema": settings.ema,
    }  # fmt: skip
    if settings.optimizer == "prodigy":
        common["lr"] = 1.0
    if settings.optimizer == "prodigy" or settings.ema:
        common["strategy"] = "ddp"
    wanted = {"lora": LoraSettings(rank=settings.rank, **common), "sft": SftSettings(**common)}
    return [train for method, train in wanted.items() if settings.method in (method, "both")]


def lines_of(run: Trains, machine: Machine) -> list[TrainForecast]:
    """A run under every strategy and memory setting."""
    found = choices(run, machine.gpu, machine.host, machine.together, machine.speed, gpu=not machine.cpu)
    return [_line(run, needs, machine) for needs in found]


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
        peak_gib=round(needs.peak / _GIB, 2),
        host_gib=round(needs.host / _GIB, 2),
        host_total_gib=round(total / _GIB, 2),
        fits=not lacks,
        lacks=" and ".join(lacks) + " memory" if lacks else "",  # type: ignore[arg-type]
        computed_s=None if takes is None else round(takes * run.settings.accumulate, 3),
        computed_on=machine.computed_on,
        s_per_step=same.s_per_step if same else None,
        measured_gib=same.peak_gib if same else None,
        measured_on=same.gpu if same else None,
        checkpoint_gb=round(disk.checkpoint / 1e9, 6),
        export_gb=round(disk.export / 1e9, 6),
        disk_gb=round(disk.total / 1e9, 6),
        keep=disk.keep,
        command=command_line(*_words(run, needs)),
    )


def _words(run: Trains, needs: Estimate) -> list[str]:
    """The command, as typed."""
    settings = run.settings
    words = ["cogtrain", run.method.name, "--shards", *(_as_glob(settings.shards) or ["out/*.tar"])]
    words += ["--strategy", needs.strategy, "--memory", needs.memory, "--nproc", str(run.world)]
    if settings.model:
        words += ["--model", settings.model]
    if settings.batch_size != 1:
        words += ["--batch-size", str(settings.batch_size)]
    if settings.optimizer != "adamw":
        words += ["--optimizer", settings.optimizer]
    if settings.optimizer == "prodigy":
        words += ["--lr", "1"]
    if settings.ema:
        words += ["--ema", f"{settings.ema:g}"]
    if isinstance(settings, LoraSettings):
        words += ["--rank", str(settings.rank)]
    return words


def _as_glob(shards: Sequence[str]) -> list[str]:
    """``out/*.tar`` again, where a shell has made many words of it."""
    folders = {Path(shard).parent for shard in shards}
    if len(shards) > 1 and len(folders) == 1 and not any("://" in shard for shard in shards):
        (folder,) = folders
        if sorted(folder.glob("*.tar")) == sorted(map(Path, shards)):
            return [str(folder / "*.tar")]
    return list(shards)


def _measured(run: Trains, needs: Estimate, machine: Machine) -> Measured | None:
    """The newest run of the same thing; None where nobody has measured it."""
    settings = run.settings
    if run.checkpoint.transformer_config["num_layers"] != run.checkpoint.family.layers:
        return None  # a built-in model: of the family's form, not of its size
    if settings.optimizer != "adamw" or settings.ema:
        return None
    (resolution,) = run.buckets if len(run.buckets) == 1 else (None,)
    same = {
        "family": run.checkpoint.family.name,
        "method": run.method.name,
        "rank": getattr(settings, "rank", None),
        "resolution": str(resolution),
        "batch_size": settings.batch_size,
        "gpus": machine.gpus,
        "strategy": needs.strategy,
        "block_plan": needs.plan.fields(),
        "attention": machine.kernel,
    }
    runs = (run for run in measured() if all(getattr(run, name) == value for name, value in same.items()))
    return next((run for run in runs if not run.faster_since), None)


def check(lines: Sequence[TrainForecast]) -> None:
    """Make two steps of each command, and say how far its peak is from what was computed.

    Raises:
        RunError: a run has failed; what it said stands above.
    """
    for line in lines:
        with tempfile.TemporaryDirectory(prefix="cogtrain-plan-") as folder:
            words = [*shlex.split(line.command)[1:], "--steps", "2", "--out", folder]
            done = subprocess.run([sys.executable, "-m", "cogtrain", *words], stdout=subprocess.DEVNULL)
            steps, _ = read_metrics(Path(folder) / METRICS_FILE)
        if done.returncode != 0 or not steps:
            raise RunError("two steps of the advised command failed", where=without_secrets(line.command))
        peak = max(step.peak_gib for step in steps)
        off = f", {peak / line.peak_gib - 1:+.0%}" if line.peak_gib else ""
        takes = f", computed {line.computed_s:.2f}" if line.computed_s else ""
        print(
            f"checked: {line.method} {line.strategy} {line.memory}: peak {peak:.1f} GiB, "
            f"computed {line.peak_gib:.1f}{off}; {steps[-1].s_per_step:.2f} s for the second step{takes}",
            file=sys.stderr,
        )


def _remedy(lines: Sequence[TrainForecast]) -> str:
    """What to do where no line fits."""
    of_card = [line for line in lines if line.lacks == "host memory"]
    if of_card:
        least = min(line.host_total_gib for line in of_card)
        return f"the GPU would do with {least:.0f} GiB of host memory"
    return "encode with a smaller --resolution"


def _table(lines: Sequence[TrainForecast]) -> Any:
    from rich.table import Table

    shown = Table(box=None, header_style="bold")
    on = lines[0].computed_on if lines else None
    names = ["", "strategy", "memory", "GPU GiB", "host GiB", *([f"s/step, {on}"] if on else []), "measured", ""]
    for name in names:
        shown.add_column(name, justify="right" if "GiB" in name or "s/" in name else "left")
    for line in lines:
        was = "-"
        if line.s_per_step:
            was = f"{line.s_per_step:.2f} s/step, {line.measured_gib:.1f} GiB ({line.measured_on})"
        cells = [line.method, line.strategy, line.memory, f"{line.peak_gib:.1f}", f"{line.host_total_gib:.1f}"]
        if on:
            cells.append(f"{line.computed_s:.2f}" if line.computed_s else "-")
        verdict = "fits" if line.fits else f"too little {line.lacks}"
        shown.add_row(*cells, was, verdict, style=None if line.fits else "dim")
    return shown
