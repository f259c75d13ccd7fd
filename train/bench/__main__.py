"""``python -m cogtrain.bench``: seconds and peak memory of the LoRA step, beside a plain diffusers + PEFT loop.

Each row is a process of its own, so that one that runs out of memory costs one
row. The next row's process makes its weights while the one before has the GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .rows import ROWS, Row, table

app = typer.Typer(add_completion=False)


@app.command()
def main(
    rows: Annotated[list[str] | None, typer.Argument(help="Rows such as 5b/low; all of them by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for bench.jsonl, bench.md and bench.log.")] = Path("bench"),
    minutes: Annotated[float, typer.Option(help="No row is begun after this.")] = 60,
    row_seconds: Annotated[float, typer.Option(help="A row that takes longer is given up.")] = 600,
    small: Annotated[bool, typer.Option(help="Tiny shapes: tries the benchmark itself, on a CPU too.")] = False,
    compile: Annotated[
        Literal["auto", "on", "off"], typer.Option(help="auto, on or off: the product's blocks.")
    ] = "auto",
    memory_trace: Annotated[bool, typer.Option(help="Who holds the memory at the peak, into bench.jsonl.")] = False,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure rows one after the other, and print a table."""
    if worker is not None:
        _work(Row(**json.loads(worker)), out)
        return
    out.mkdir(parents=True, exist_ok=True)
    wanted = [
        dataclasses.replace(row, small=small, compile=compile, memory_trace=row.memory_trace or memory_trace)
        for row in ROWS
        if not rows or row.name in rows
    ]
    if not wanted:
        raise typer.BadParameter("no such row; there are " + " ".join(row.name for row in ROWS))
    print(_machine(), flush=True)
    began = time.monotonic()
    results: list[dict[str, Any]] = []
    waiting: _Started | None = None
    for index, row in enumerate(wanted):  # it grows while this goes on
        left = minutes * 60 - (time.monotonic() - began)
        started, waiting = waiting or _Started(row, out), None
        if left <= 10:
            started.process.kill()
            print(f"{row.name} and what follows: no time left", flush=True)
            break
        started.go()
        if index + 1 < len(wanted):
            waiting = _Started(wanted[index + 1], out)
        result = started.finish(min(row_seconds, left))
        results.append(result)
        if "s_per_step" not in result and row.compile == "auto" and row.kind in ("fast", "auto", "low"):
            wanted.append(dataclasses.replace(row, compile="off", profile=False, memory_trace=False))
        with (out / "bench.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(result) + "\n")
        shown = {name: round(value, 3) for name, value in result.items() if isinstance(value, float)}
        print(f"{time.monotonic() - began:4.0f} s  {row.name}: {result.get('failed', '')} {shown}", flush=True)
        print(f"      {result.get('losses') or result.get('numerics') or ''}", flush=True)
        (out / "bench.md").write_text(f"{_machine()}\n\n{table(results)}\n", encoding="utf-8")
    print(table(results), flush=True)


class _Started:
    """A row's process: makes its weights, then waits for its turn."""

    def __init__(self, row: Row, out: Path) -> None:
        self._row = row
        self._out = out
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        command = [sys.executable, "-m", "cogtrain.bench", "--worker", json.dumps(dataclasses.asdict(row))]
        self.process = subprocess.Popen(
            [*command, "--out", str(out)], stdin=subprocess.PIPE, stdout=self._said, stderr=subprocess.STDOUT, text=True
        )

    def go(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it has died while preparing; what it said tells of what
            self.process.stdin.write("go\n")
            self.process.stdin.flush()

    def finish(self, seconds: float) -> dict[str, Any]:
        """The row's result; or, and perhaps besides, its fault in one line."""
        result: dict[str, Any] = dataclasses.asdict(self._row) | {"bucket": str(self._row.bucket)}
        fault = None
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
            fault = f"given up after {seconds:.0f} s"
        self._said.seek(0)
        said = self._said.read()
        with (self._out / "bench.log").open("a", encoding="utf-8") as log:
            log.write(f"\n== {self._row.name}\n{said}")
        if code != 0 and fault is None:
            lines = said.strip().splitlines()
            faults = [line for line in lines if "Error" in line] or lines or [""]
            fault = f"exit {code}: {faults[-1][:300]}"
        file = _result_file(self._row, self._out)
        if file.exists():
            result |= json.loads(file.read_text(encoding="utf-8"))
            file.unlink()
        return result | ({"failed": fault} if fault else {})


def _result_file(row: Row, out: Path) -> Path:
    return out / f".{row.family}-{row.kind}.json"


def _work(row: Row, out: Path) -> None:
    """A row's process: prepares, waits for its turn, measures, writes the result."""
    from cogcommon.device import pick_device, quiet_libraries

    device = pick_device()
    quiet_libraries()
    from .measure import prepare, product, reference, write
    from .numerics import numerics

    run = prepare(row) if row.kind != "numerics" else None
    if sys.stdin.readline() != "go\n":
        return  # the one who started it is gone
    if device.type == "cuda":
        import torch

        if row.within_gib:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, row.within_gib * 2**30 / total))
        torch.cuda.reset_peak_memory_stats()
    if run is None:
        result = numerics(row, device)
    else:
        result = (
            reference(run, row)
            if row.kind == "reference"
            # Written before the profile is taken, which not every machine allows.
            else product(run, row, lambda result: write(result, _result_file(row, out)))
        )
    write(result, _result_file(row, out))


def _machine() -> str:
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{name}, torch {torch.__version__}, `python -m cogtrain.bench`"


if __name__ == "__main__":
    app()
