"""All forms trained beside one another on one device, in calls that end in time, each bringing out what there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from cogcommon.model.families import BUILTIN_NAMES

# Every form, and one of them from another seed, which is not shipped: the first was not lucky.
RUNS = (*((form, 0) for form in BUILTIN_NAMES), ("tiny", 1))
_LAST = 10  # seconds that copying takes
_AGAIN = 60  # with fewer seconds left, what failed is not tried again
_CURVE = 40  # points of each loss curve that are brought out


def train_together(
    folder: Path,
    out: Path,
    *,
    minutes: float,
    reserve: float,
    calls: float,
    exam: Sequence[str],
    options: Sequence[str],
    first: Path | None,
    only: Sequence[str] | None,
) -> int:
    """Continue every run in its folder under ``folder`` for so many minutes; then fill ``out``.

    ``out`` gets ``<form>.safetensors`` of each form, ``results.json`` and ``exam.png``. A run that fails
    goes on without compiler and CUDA graphs from where it last saved.

    Args:
        reserve: seconds of the minutes that the exams get.
        calls: in which the runs end, this one included.
        exam, options: words for `workshop.pretrain transformer`.
        first: folder with ``<form>.safetensors`` to begin with.
        only: these forms.

    Returns:
        How many runs failed, even so.
    """
    end = time.time() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    runs = [run for run in RUNS if only is None or run[0] in only]
    workers = max(1, (os.cpu_count() or 1) // 2 - 1)
    fast = ["--graphs", "--compiled"]
    common = [*exam, *options, "--cache", str(folder), "--until", f"{end - reserve:.0f}", "--calls", str(calls),
              "--workers", str(workers)]  # fmt: skip

    def start(run: tuple[str, int], *more: str) -> subprocess.Popen[bytes]:
        form, seed = run
        mine = [_folder(folder, run), "--form", form, "--seed", seed]
        begun = first / f"{form}.safetensors" if first else None
        mine += ["--first", begun] if begun and begun.exists() and seed == 0 else []
        words = [sys.executable, "-m", "workshop.pretrain", "transformer", *map(str, mine), *common, *more]
        with (folder / f"{_folder(folder, run).name}.log").open("ab") as log:
            return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=os.environ | _environment(folder))

    children = {run: start(run, *fast) for run in runs}
    again: set[tuple[str, int]] = set()
    while time.time() < end - _LAST:
        for run, child in children.items():
            if child.poll() and run not in again and time.time() < end - reserve - _AGAIN:
                print(f"{_folder(folder, run).name} failed; again, step by step", flush=True)
                again.add(run)
                children[run] = start(run)
        if all(child.poll() is not None for child in children.values()):
            break
        time.sleep(0.5)
    for child in children.values():
        if child.poll() is None:
            print(f"process {child.pid} is late and is stopped", flush=True)
            child.kill()
    _bring_out(folder, out, runs)
    return sum(child.wait() != 0 for child in children.values())


def _environment(folder: Path) -> dict[str, str]:
    """Compiled code stays for the next call; six processes share the CPUs."""
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_COMPILE_THREADS": "3",
        "OMP_NUM_THREADS": "2",
    }


def _folder(folder: Path, run: tuple[str, int]) -> Path:
    form, seed = run
    return folder / f"{form}-seed{seed}"


def _bring_out(folder: Path, out: Path, runs: Sequence[tuple[str, int]]) -> None:
    from .exam import PICTURE, RESULTS  # late: it imports torch

    out.mkdir(parents=True, exist_ok=True)
    results = {}
    for run in runs:
        mine = _folder(folder, run)
        weights = mine / f"{run[0]}.safetensors"
        if run[1] == 0 and weights.exists():
            (out / weights.name).write_bytes(weights.read_bytes())
        curve = _lines(mine / "metrics.jsonl")
        thinned = curve[:: max(1, len(curve) // _CURVE)] + curve[-1:]
        log = folder / f"{mine.name}.log"
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        said = [line for line in text.splitlines() if not line.startswith('{"step":')]
        results[mine.name] = {"curve": thinned, "exams": _lines(mine / RESULTS), "said": said[-200:]}
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    _picture({run: _folder(folder, run) / PICTURE for run in runs}, out / PICTURE)


def _lines(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def _picture(pictures: Mapping[tuple[str, int], Path], file: Path) -> None:
    """The pictures of all exams beside one another."""
    from PIL import Image, ImageDraw

    columns = {run: Image.open(picture).convert("RGB") for run, picture in pictures.items() if picture.exists()}
    if not columns:
        return
    size = sum(column.width + 8 for column in columns.values()), 16 + max(column.height for column in columns.values())
    page, left = Image.new("RGB", size, "white"), 0
    for (form, seed), column in columns.items():
        ImageDraw.Draw(page).text((left + 2, 2), f"{form}, seed {seed}", fill="black")
        page.paste(column, (left, 16))
        left += column.width + 8
    page.save(file)
