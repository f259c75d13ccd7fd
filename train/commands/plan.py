"""``cogtrain plan``: whether it fits, how long it takes and what to type; then the settings to choose from."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from cogcommon.cli.names import json_text
from cogcommon.cli.progress import say, stage
from cogcommon.errors import RunError
from cogcommon.model.cards import sizes_note
from cogcommon.model.device import EMULATED
from cogcommon.store.store import without_secrets
from cogcommon.words import GIB, counted, in_bytes, in_gib, in_words

from ..blocks.trial import INSTALL_FLASH4
from ..memory.estimate import Intent
from ..memory.machine import HOSTS, Machine, host_memory, machine_for
from ..runs.folder import METRICS_FILE, read_metrics
from ..runs.run import Run
from ..settings.planning import ForecastSettings
from .forecast import TrainForecast, lines_of, on_fewer_gpus, wanted_runs

_NAMES = {"lora": "LoRA", "sft": "Full fine-tuning"}
_TOO_SMALL = {
    "GPU memory": "GPU too small", "host memory": "host too small", "GPU and host memory": "both too small",
}  # fmt: skip
_SHOWN = {"lora": 3, "sft": 2}  # lines of each method, unless all are asked for


def run(settings: ForecastSettings) -> None:
    """The command.

    Raises:
        CogError: anything that the user can put right.
    """
    machine = machine_for(settings)
    if settings.gpu and (note := sizes_note(settings.gpu)):
        say(f"note: {note}")
    with stage("computing what fits"):
        runs = wanted_runs(settings, machine)
        found = [line for run in runs for line in _lines(run, machine)]
    if settings.json:
        print(without_secrets(json_text([dataclasses.asdict(line) for line in found])))
    else:
        _show(runs, found, machine, settings)
    if settings.check:
        check([line for method in _methods(found) if (line := advised(found, method))])


def _show(
    runs: Sequence[Run | Intent], lines: Sequence[TrainForecast], machine: Machine, settings: ForecastSettings
) -> None:  # fmt: skip
    from cogcommon.cli.terminal import Console

    run = runs[0]
    console = Console(soft_wrap=True)
    console.width = max(80, console.width)  # the terminal breaks lines of the table where a cell would be cut
    sizes = ", ".join(map(str, run.buckets))
    here, host, *rest = machine.described()
    console.print(f"{run.checkpoint.name} at {sizes}, {here}")
    console.print(host + (f"; {run.shards.described}" if isinstance(run, Run) else ""))
    for line in rest:
        console.print(line)
    console.print(f"{run.repeated}\n" if isinstance(run, Run) and run.repeated else "")
    for method in _methods(lines):
        own = [run for run in runs if run.method.name == method]
        for number, words in enumerate(_answer(own, lines, method, machine, settings)):
            console.print(f"{_NAMES[method]}: {words}" if number == 0 else f"  {words}")
        console.print()
    shown = lines if settings.all else best_few(lines)
    console.print(_table(shown))
    if len(shown) < len(lines):
        console.print(f"{counted(len(lines) - len(shown), 'line')} more: --all")
    if not machine.bf16 and any(line.precision == "bf16" for line in lines):
        console.print("note: " + EMULATED.format(machine.name))


def _lines(run: Run | Intent, machine: Machine) -> list[TrainForecast]:
    """Those of a run; where none fits for want of host memory, those that fit on fewer GPUs, too."""
    lines = lines_of(run, machine)
    if not any(line.fits for line in lines) and any(line.lacks == "host memory" for line in lines):
        lines += on_fewer_gpus(run, machine)
    return lines


def _methods(lines: Sequence[TrainForecast]) -> list[Literal["lora", "sft"]]:
    return list(dict.fromkeys(line.method for line in lines))


def advised(lines: Sequence[TrainForecast], method: str) -> TrainForecast | None:
    """The first line of a method that fits; None where nothing does."""
    return next((line for line in lines if line.method == method and line.fits), None)


def _answer(
    runs: Sequence[Run | Intent],
    lines: Sequence[TrainForecast],
    method: Literal["lora", "sft"],
    machine: Machine,
    settings: ForecastSettings,
) -> Iterator[str]:
    """Whether it fits, how long it takes, what it writes, and the command; a line each.

    Args:
        runs: those of the method.
    """
    line, steps, batch = advised(lines, method), settings.steps, settings.batch_size
    each, them = ("process", "processes") if machine.cpu else ("GPU", "GPUs")
    nothing = ""
    if line is None or line.gpus < machine.gpus:
        nothing = f"nothing fits; {_remedy(runs, dataclasses.replace(settings, method=method), machine)}"
    if line is None:
        yield nothing
        return
    host = f"{line.host_total_gib:.1f} GiB of host memory"
    on = f" on {counted(line.gpus, each, them)} of {machine.gpus}" if nothing else ""
    yield f"fits{on}, in " + (host if machine.cpu else f"{line.peak_gib:.1f} GiB of GPU memory and {host}")
    if nothing:
        yield f"on all {machine.gpus} {nothing}"
    if line.s_per_step:
        yield f"{_time(line.s_per_step, steps)}, measured"
    elif line.computed_s:
        published = machine.speed is not None and machine.speed.published
        yield _time(line.computed_s, steps) + (", by the card's published speed" if published else ", computed")
    elif not machine.untimed:  # which stands above
        yield from line.no_seconds.split("; ")
    if line.flash4_s:
        yield f"{line.flash4_s:.2f} s with FlashAttention 4: {INSTALL_FLASH4}"
    if line.gpus > 1:
        samples = f"{batch * line.gpus * steps:,} samples in global batches of {batch * line.gpus:,}"
        yield f"{samples}: as many as {steps * line.gpus:,} steps on one {each}"
    disk, export, checkpoint = (in_bytes(1e9 * size) for size in (line.disk_gb, line.export_gb, line.checkpoint_gb))
    yield f"writes up to {disk}: weights of {export}, and checkpoints of {checkpoint} each"
    yield _saves(line, machine)
    yield without_secrets(line.command)


def _saves(line: TrainForecast, machine: Machine) -> str:
    """When checkpoints are written: they take host memory that is free beside what the run takes, or none."""
    size = 1e9 * line.checkpoint_gb
    if line.strategy != "ddp" or (machine.host is not None and GIB * line.host_total_gib + size > machine.host):
        return "training waits while a checkpoint is written"
    where = "where" if machine.host is None else "since"
    return f"checkpoints: written beside steps {where} {in_bytes(size)} more of host memory is free"


def _time(seconds: float, steps: int) -> str:
    return f"{seconds:.2f} s a step, {in_words(steps * seconds)} for {counted(steps, 'step')}"


def best_few(lines: Sequence[TrainForecast]) -> list[TrainForecast]:
    """The first lines of each method that fit; of a method of which none does, the smallest."""
    shown = []
    for method in _methods(lines):
        of_method = [line for line in lines if line.method == method]
        fitting = [line for line in of_method if line.fits]
        shown += fitting[: _SHOWN[method]] or [
            min(of_method, key=lambda line: (line.lacks != "host memory", line.peak_gib))
        ]
    return shown


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


def _remedy(runs: Sequence[Run | Intent], settings: ForecastSettings, machine: Machine) -> str:
    """What to do where nothing of the settings' method fits: lighter settings or a larger host, either of which does.

    The host's memory is named as --host takes it, which is more than has to be free there.
    """
    lighter: dict[str, dict[str, Any]] = {
        "with --batch-size 1": {"batch_size": 1}, "with --optimizer adamw": {"optimizer": "adamw"},
        "without --ema": {"ema": 0.0}, "with --rank 16": {"rank": 16 if settings.method == "lora" else settings.rank},
    }  # fmt: skip
    asked = {name: change for name, change in lighter.items() if dataclasses.replace(settings, **change) != settings}
    ways = []
    for names in [*([name] for name in asked), *([[*asked]] if len(asked) > 1 else [])]:
        changed = {field: value for name in names for field, value in asked[name].items()}
        lightened = wanted_runs(dataclasses.replace(settings, **changed), machine)
        if _fit(lightened, machine):
            ways.append(" and ".join(names))
            break
    if host := _least_host(runs, machine):
        ways.append(_with_host(host, settings))
    elif asked and not ways and (host := _least_host(lightened, machine)):  # by all of them at once
        ways.append(" and ".join([*asked, _with_host(host, settings)]))
    if not ways:
        return "encode with a smaller --resolution, or take a larger card"
    return ", or ".join([f"{ways[0]} it would", *ways[1:]])


def _with_host(gb: int, settings: ForecastSettings) -> str:
    if settings.host:
        return f"with --host {gb}GB"
    return f"with {in_gib(host_memory(f'{gb}GB'))} of host memory free (--host {gb}GB)"


def _fit(runs: Sequence[Run | Intent], machine: Machine) -> bool:
    return any(line.fits for run in runs for line in lines_of(run, machine))


def _least_host(runs: Sequence[Run | Intent], machine: Machine) -> int | None:
    """The least memory of a host, in --host's GB, on which something fits; None where more does not help.

    It is tried, not added up: with more memory than it takes itself a run may be planned in another way.
    """
    if machine.host is None:
        return None

    def does(gb: int) -> bool:
        return _fit(runs, dataclasses.replace(machine, host=host_memory(f"{gb}GB")))

    found = bisect_left(HOSTS, True, key=does)
    return HOSTS[found] if found < len(HOSTS) else None


def _table(lines: Sequence[TrainForecast]) -> Any:
    """At most 80 characters wide."""
    from rich.table import Table

    shown = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    timed = any(line.computed_s for line in lines)
    tried = any(line.s_per_step for line in lines)
    counts = len({line.gpus for line in lines}) > 1
    names = ["", "strategy", "memory", *(["GPUs"] if counts else []), "GPU GiB", "host GiB"]
    for name in [*names, *(["s/step"] if timed else []), *(["measured"] if tried else []), ""]:
        shown.add_column(name, justify="left" if name in ("", "strategy", "memory") else "right")
    for line in lines:
        cells = [line.method, line.strategy, line.memory, *([str(line.gpus)] if counts else [])]
        cells += [f"{line.peak_gib:.1f}", f"{line.host_total_gib:.1f}"]
        if timed:
            cells.append(f"{line.computed_s:.2f}" if line.computed_s else "-")
        if tried:
            cells.append(f"{line.s_per_step:.2f}" if line.s_per_step else "-")
        verdict = "fits" if line.fits else _TOO_SMALL[line.lacks]
        shown.add_row(*cells, verdict, style=None if line.fits else "dim")
    return shown
