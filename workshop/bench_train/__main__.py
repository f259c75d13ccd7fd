"""``python -m workshop.bench_train``: seconds and peak memory of a training step, beside a plain loop's.

A LoRA of each model by default; a row of the public guide's hardware table by its number, full fine-tuning and
several GPUs among them. Each row is a process of its own, or one for each GPU, so that one that runs out of memory
costs one row. The next row's processes make their weights while the one before has the GPU,
unless that computes on the host, too.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .records import NOISE, add_measured, compared, compared_table
from .rows import ROWS, BenchRow, rows_named, table
from .started import Started, result_file

app = typer.Typer(add_completion=False)

_CHECKED = ("2b/fast", "5b/fast", "5b/low")  # of a small step, a large one, and one that streams
_CHECK_MINUTES = 4  # in all, by which a row that is being measured is given up


@app.command()
def main(
    rows: Annotated[
        list[str] | None,
        typer.Argument(help="Rows such as 5b/low, or of the hardware table such as 9 or 9/low; the LoRAs by default."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.jsonl, its tables and bench.log.")] = Path("bench"),
    minutes: Annotated[float, typer.Option(help="No row is begun after this.")] = 60,
    row_seconds: Annotated[float, typer.Option(help="A row that takes longer is given up.")] = 600,
    gpus: Annotated[int | None, typer.Option(help="GPUs for rows of several; those that are here by default.")] = None,
    small: Annotated[bool, typer.Option(help="Tiny shapes: tries the benchmark itself, on a CPU too.")] = False,
    compile: Annotated[
        Literal["auto", "on", "off"], typer.Option(help="auto, on or off: the product's blocks.")
    ] = "auto",
    steps: Annotated[int | None, typer.Option(min=3, help="Steps of each row; by default as few as settle.")] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers of the transformer; as published by default.")
    ] = None,
    resolution: Annotated[str | None, typer.Option(help="F x H x W; the model's native size by default.")] = None,
    within: Annotated[
        float | None, typer.Option(help="GiB of GPU memory that rows may use, as on a smaller card.")
    ] = None,
    link: Annotated[
        list[float] | None,
        typer.Option(
            help="GB/s that our copies between host and GPU are held to, in each direction, as on a slower link; "
            "given several times, each row is measured at each."
        ),
    ] = None,
    plain_steps: Annotated[
        int | None, typer.Option(min=3, help="Steps of plain loops' rows, where only their losses are wanted.")
    ] = None,
    memory_trace: Annotated[bool, typer.Option(help="Who holds the memory at the peak, into bench.jsonl.")] = False,
    keep: Annotated[
        list[Path] | None,
        typer.Option(help="A bench.jsonl: measure nothing, and add its rows to what the project knows."),
    ] = None,
    commit: Annotated[
        str | None, typer.Option(help="With --keep: of the code that was measured; this checkout's by default.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            help="In four minutes: by how much three rows, or those named, have moved from what the project knows. "
            "Exits with 1 if one failed or is slower by more than 3%."
        ),
    ] = False,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure rows one after the other, and print a table."""
    if worker is not None:
        _work(BenchRow(**json.loads(worker)), out)
        return
    if keep:
        for file in keep:
            print(f"{add_measured(file, commit)} rows of {file} added; `make readme` writes the table anew")
        return
    out.mkdir(parents=True, exist_ok=True)
    given = {
        "steps": steps,
        "layers": layers,
        "resolution": resolution,
        "within_gib": within,
        "memory_trace": memory_trace or None,
    }
    changes = {"small": small, "compile": compile} | {name: value for name, value in given.items() if value is not None}
    if link or check:  # seconds alone are asked for
        changes |= {"profile": False, "memory_trace": memory_trace}
    here = gpus or _gpus()
    wanted = [
        dataclasses.replace(row, **changes, processes=row.processes_of(here))  # type: ignore[arg-type]
        for row in _named(rows or (_CHECKED if check else None))
    ]
    if plain_steps:
        wanted = [dataclasses.replace(row, steps=plain_steps) if row.kind == "reference" else row for row in wanted]
    if link:
        _refuse_links(wanted)
        wanted = [dataclasses.replace(row, link=rate) for row in wanted for rate in link]
    if check:
        minutes = min(minutes, _CHECK_MINUTES)
    print(_machine(), flush=True)
    began = time.monotonic()
    results: list[dict[str, Any]] = []
    waiting: Started | None = None
    for index, row in enumerate(wanted):  # it grows while this goes on
        left = minutes * 60 - (time.monotonic() - began)
        started, waiting = waiting or Started(row, out), None
        if left <= 10:
            started.kill()
            print(f"{row.name} and what follows: no time left", flush=True)
            break
        started.go()
        if index + 1 < len(wanted) and not row.on_host:
            waiting = Started(wanted[index + 1], out)
        result = started.finish(min(row_seconds, left))
        results.append(result)
        skipped = str(result.get("failed", "")).startswith("skipped")
        ours = row.kind not in ("reference", "numerics")
        if "s_per_step" not in result and row.compile == "auto" and ours and not skipped:
            wanted.append(dataclasses.replace(row, compile="off", profile=False, memory_trace=False))
        with (out / "bench.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(result) + "\n")
        shown = {name: round(value, 3) for name, value in result.items() if isinstance(value, float)}
        print(f"{time.monotonic() - began:4.0f} s  {row.shown}: {result.get('failed', '')} {shown}", flush=True)
        print(f"      {result.get('losses') or result.get('numerics') or ''}", flush=True)
        if beside := compared(result):
            print(f"      {beside}", flush=True)
        (out / "bench.md").write_text(f"{_machine()}\n\n{table(results)}\n", encoding="utf-8")
    if not check:
        print(table(results), flush=True)
    (out / "compared.md").write_text(f"{_machine()}\n\n{compared_table(results)}\n", encoding="utf-8")
    print(f"\n{compared_table(results)}", flush=True)
    if check and _worse(wanted, results):
        raise typer.Exit(1)


def _named(words: Sequence[str] | None) -> list[BenchRow]:
    """Rows by their names; the LoRAs without any.

    Raises:
        typer.BadParameter: there is no such row.
    """
    try:
        return rows_named(words) if words else list(ROWS)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _refuse_links(rows: list[BenchRow]) -> None:
    """Refuse to hold what is not ours to hold.

    Raises:
        typer.BadParameter: a row copies by other ways than ours, or there is no GPU.
    """
    from cogcommon.model.device import visible_gpus

    if theirs := [row.name for row in rows if not row.copies_by_us]:
        raise typer.BadParameter(
            f"--link holds our own copies between host and GPU; not ours are those of: {' '.join(theirs)}"
        )
    if not visible_gpus():
        raise typer.BadParameter("--link holds copies between host and GPU, and there is no GPU here")


def _worse(wanted: list[BenchRow], results: list[dict[str, Any]]) -> bool:
    """Say which rows are slower than two runs of the same code differ by, failed, or were not reached."""
    found = [(result["row"], compared(result)) for result in results]
    slower = [name for name, row in found if row and row.slower]
    failed = [result["row"] for result in results if "s_per_step" not in result]
    missed = [row.name for row in wanted[len(results) :]]
    new = [name for name, row in found if name not in failed and not (row and row.since)]
    for what, names in (
        (f"slower by more than {NOISE:.0%}", slower),
        ("failed", failed),
        ("not reached", missed),
        ("nothing to compare with is recorded of", new),
    ):
        if names:
            print(f"{what}: {' '.join(names)}", flush=True)
    if not slower + failed + missed + new:
        print(f"none is slower by more than {NOISE:.0%}", flush=True)
    return bool(slower + failed + missed)


def _work(row: BenchRow, out: Path) -> None:
    """A row's process: prepares, waits for its turn, measures; the first of them writes the result."""
    from cogcommon.libraries import quiet_libraries
    from cogcommon.model.device import pick_device

    rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = pick_device(rank)
    quiet_libraries()
    from .machine import lacking
    from .measure import prepare, product, write
    from .numerics import numerics
    from .plain import reference

    def tell(result: Any) -> None:
        if rank == 0:
            write(result, result_file(row, out))

    run = prepare(row) if row.kind != "numerics" else None
    if os.read(0, 3) != b"go\n":
        return  # the one who started it is gone
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)
        if row.within_gib:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, row.within_gib * 2**30 / total))
        torch.cuda.reset_peak_memory_stats()
    if run is None:
        tell(numerics(row, device))
    elif fault := lacking(run, pinned=row.kind != "reference"):
        tell({"failed": f"skipped: {fault}"})
    elif row.kind == "reference":
        tell(reference(run, row, pinned=lacking(run) is None))
    else:
        tell(product(run, row, tell))  # told before the profile is taken, too, which not every machine allows


def _gpus() -> int:
    from cogcommon.model.device import visible_gpus

    return max(1, visible_gpus())


def _machine() -> str:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{name}, torch {torch.__version__}, `python -m workshop.bench_train`"


if __name__ == "__main__":
    app()
