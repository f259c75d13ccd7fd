"""A row's processes, as the one who measures sees them."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from .rows import BenchRow


class Started:
    """The processes of a row, one a GPU: they make their weights, then wait for their turn."""

    def __init__(self, row: BenchRow, out: Path) -> None:
        self._row = row
        self._out = out
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        command = [sys.executable, "-m", "workshop.bench_train", "--worker", json.dumps(dataclasses.asdict(row))]
        self._processes = [
            subprocess.Popen(
                [*command, "--out", str(out)], stdin=subprocess.PIPE, stdout=self._said, stderr=subprocess.STDOUT,
                env=os.environ | environment,
            )
            for environment in _environments(row.processes)
        ]  # fmt: skip

    def go(self) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(OSError):  # it has died while preparing; what it said tells of what
                process.stdin.write(b"go\n")
                process.stdin.flush()

    def kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()

    def finish(self, seconds: float) -> dict[str, Any]:
        """The row's result; or, and perhaps besides, its fault in one line."""
        result: dict[str, Any] = dataclasses.asdict(self._row) | {
            "row": self._row.name, "command": self._row.command, "bucket": str(self._row.bucket),
            "date": datetime.date.today().isoformat(),
        }  # fmt: skip
        code = self._wait(seconds)
        fault = f"given up after {seconds:.0f} s" if code is None else None
        self.kill()
        self._said.seek(0)
        said = self._said.read()
        with (self._out / "bench.log").open("a", encoding="utf-8") as log:
            log.write(f"\n== {self._row.name}\n{said}")
        if code:
            lines = said.strip().splitlines()
            faults = [line for line in lines if "Error" in line] or lines or [""]
            fault = f"exit {code}: {faults[-1][:300]}"
        file = result_file(self._row, self._out)
        if file.exists():
            result |= json.loads(file.read_text(encoding="utf-8"))
            file.unlink()
        return result | ({"failed": fault} if fault else {})

    def _wait(self, seconds: float) -> int | None:
        """The exit code, of the first that fails; None when the time is over before all have ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            codes = [process.poll() for process in self._processes]
            failed = next((code for code in codes if code), None)
            if failed or None not in codes:
                return failed or 0
            time.sleep(0.05)
        return None


def _environments(processes: int) -> list[dict[str, str]]:
    """What torchrun would set for each of several processes; nothing for one."""
    if processes == 1:
        return [{}]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    threads = {"OMP_NUM_THREADS": max(1, (os.cpu_count() or 1) // processes)}
    return [
        {name: str(value) for name, value in (threads | common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        for rank in range(processes)
    ]


def result_file(row: BenchRow, out: Path) -> Path:
    return out / f".{row.name.replace('/', '-')}.json"
