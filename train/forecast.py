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
from typing import Any

from cogcommon.errors import RunError, SettingError
from cogcommon.names import command_line, json_text
from cogcommon.words import counted

from .measured import Measured, gpu_here, measured
from .run import Run, open_run
from .run_folder import METRICS_FILE, read_metrics
from .settings import LoraSettings, Memory, PlanSettings, SftSettings
from .step.attention import Kernel
from .step.demand import Demand, choices
from .step.seconds import RELATIVE, seconds
from .step.trial import flash4_is_there
from .zero_config import Strategy

_GIB = 2**30


@dataclass(frozen=True)
class Forecast:
    """One line of the table. Memory in GiB, for each process; computed, but for what is called measured."""

    method: str
    strategy: Strategy
    memory: Memory
    peak_gib: float
    host_gib: float
    fits: bool
    computed_s: float | None  # a step, on ``computed_on``; None where we have measured nothing like it
    computed_on: str
    s_per_step: float | None  # measured by us, where it was, on ``measured_on``
    measured_gib: float | None  # the peak there
    measured_on: str | None
    command: str


def run(settings: PlanSettings) -> None:
    """The command.

    Raises:
        CogError: anything that the user can put right.
    """
    from cogcommon.terminal import Console

    card, gpus = _machine(settings)
    found = forecasts(settings, card, gpus)
    advised = {
        method: next((line for line in found if line.method == method and line.fits), None)
        for method in dict.fromkeys(line.method for line in found)
    }
    if settings.json:
        print(json_text([dataclasses.asdict(line) for line in found]))
    else:
        console = Console(soft_wrap=True)
        console.print(_table(found))
        console.print(
            f"for each of {counted(gpus, 'GPU')} of {card / _GIB:.0f} GB; all is computed but what is called measured\n"
        )
        for method, line in advised.items():
            console.print(line.command if line else f"{method}: nothing fits; encode with a smaller --resolution")
    if settings.check:
        check([line for line in advised.values() if line])


def forecasts(settings: PlanSettings, card: int, gpus: int) -> list[Forecast]:
    """Every strategy and memory setting, in the order in which they are advised; LoRA first.

    Args:
        card: bytes of memory of each GPU.
    """
    import torch

    from cogcommon.device import quiet_libraries

    quiet_libraries()
    common: dict[str, Any] = {
        "shards": settings.shards, "model": settings.model, "batch_size": settings.batch_size, "resume": "never",
    }  # fmt: skip
    wanted = {"lora": LoraSettings(rank=settings.rank, **common), "sft": SftSettings(**common)}
    lines: list[Forecast] = []
    for method, train in wanted.items():
        if settings.method not in (method, "both"):
            continue
        planned = open_run(train, torch.device("cuda"), gpus)  # as on a machine that has one
        lines += [_line(planned, settings, needs, card, gpus, _gpu(settings)) for needs in choices(planned, card)]
    return lines


def _line(planned: Run, settings: PlanSettings, needs: Demand, card: int, gpus: int, gpu: str) -> Forecast:
    kernel: Kernel = "flash4" if settings.gpu is None and gpu_here() and flash4_is_there() else "cudnn"
    same = _measured(planned, needs, gpus, kernel)
    takes = seconds(planned, needs, gpu, kernel)
    words = ["cogtrain", planned.method.name, "--shards", *_as_glob(settings.shards), "--strategy", needs.strategy]
    words += ["--memory", needs.memory, "--nproc", str(gpus)]
    if settings.model:
        words += ["--model", settings.model]
    if settings.batch_size != 1:
        words += ["--batch-size", str(settings.batch_size)]
    if isinstance(planned.settings, LoraSettings):
        words += ["--rank", str(settings.rank)]
    return Forecast(
        method=planned.method.name,
        strategy=needs.strategy,
        memory=needs.memory,
        peak_gib=round(needs.peak / _GIB, 2),
        host_gib=round(needs.host / _GIB, 2),
        fits=needs.fits(card),
        computed_s=None if takes is None else round(takes * planned.settings.accumulate, 3),
        computed_on=gpu,
        s_per_step=same.s_per_step if same else None,
        measured_gib=same.peak_gib if same else None,
        measured_on=same.gpu if same else None,
        command=command_line(*words),
    )


def _as_glob(shards: Sequence[str]) -> list[str]:
    """``out/*.tar`` again, where a shell has made many words of it."""
    folders = {Path(shard).parent for shard in shards}
    if len(shards) > 1 and len(folders) == 1 and not any("://" in shard for shard in shards):
        (folder,) = folders
        if sorted(folder.glob("*.tar")) == sorted(map(Path, shards)):
            return [str(folder / "*.tar")]
    return list(shards)


def _measured(planned: Run, needs: Demand, gpus: int, kernel: Kernel) -> Measured | None:
    """The newest run of the same thing; None where nobody has measured it."""
    if planned.checkpoint.transformer_config["num_layers"] != planned.checkpoint.family.layers:
        return None  # a built-in model: of the family's form, not of its size
    (resolution,) = planned.shards.buckets if len(planned.shards.buckets) == 1 else (None,)
    same = {
        "family": planned.checkpoint.family.name,
        "method": planned.method.name,
        "rank": getattr(planned.settings, "rank", None),
        "resolution": str(resolution),
        "batch_size": planned.settings.batch_size,
        "gpus": gpus,
        "strategy": needs.strategy,
        "plan": str(needs.plan),
        "attention": kernel,
    }
    runs = (run for run in measured() if all(getattr(run, name) == value for name, value in same.items()))
    return next((run for run in runs if not run.faster_since), None)


def check(lines: Sequence[Forecast]) -> None:
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
            raise RunError("two steps of the advised command failed", where=line.command)
        peak = max(step.peak_gib for step in steps)
        off = f", {peak / line.peak_gib - 1:+.0%}" if line.peak_gib else ""
        takes = f", computed {line.computed_s:.2f}" if line.computed_s else ""
        print(
            f"checked: {line.method} {line.strategy} {line.memory}: peak {peak:.1f} GiB, "
            f"computed {line.peak_gib:.1f}{off}; {steps[-1].s_per_step:.2f} s for the second step{takes}",
            file=sys.stderr,
        )


def _machine(settings: PlanSettings) -> tuple[int, int]:
    """Bytes of a GPU, and how many there are."""
    import torch

    here = torch.cuda.device_count()
    card = settings.card
    if card is None and not here:
        raise SettingError(
            "there is no GPU here to plan for", where="--gpu", fix="say how much memory one has: --gpu 24GB"
        )
    if settings.check and (not here or settings.gpu or (settings.gpus or 1) > here):
        raise SettingError(
            "--check runs on the GPUs of this machine only", where="--check", fix="leave out --gpu and --gpus"
        )
    if settings.gpus is not None and settings.gpus < 1:
        raise SettingError(f"{settings.gpus} GPUs", where="--gpus", fix="--gpus 1 or more")
    return card or torch.cuda.get_device_properties(0).total_memory, settings.gpus or max(1, here)


def _gpu(settings: PlanSettings) -> str:
    """Whose seconds are told: this machine's, or those of a GPU that we have measured."""
    here = gpu_here() if settings.gpu is None else None
    return here or next(iter(RELATIVE))


def _table(lines: Sequence[Forecast]) -> Any:
    from rich.table import Table

    shown = Table(box=None, header_style="bold")
    on = lines[0].computed_on if lines else ""
    names = ("", "strategy", "memory", "GPU GiB", "host GiB", f"s/step, {on}", "measured", "")
    for name in names:
        shown.add_column(name, justify="right" if "GiB" in name or "s/" in name else "left")
    for line in lines:
        was = "-"
        if line.s_per_step:
            was = f"{line.s_per_step:.2f} s/step, {line.measured_gib:.1f} GiB ({line.measured_on})"
        shown.add_row(
            line.method, line.strategy, line.memory, f"{line.peak_gib:.1f}", f"{line.host_gib:.1f}",
            f"{line.computed_s:.2f}" if line.computed_s else "-", was,
            "fits" if line.fits else "does not fit", style=None if line.fits else "dim",
        )  # fmt: skip
    return shown
