"""Encode on several GPUs of one host: one process and one slice of the shards for each.

The processes share nothing but the output folder, so one that dies takes only
its own clips in flight along; the next run finishes its slice.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import IO

from cogcommon.cli.interrupt import SIGNALS, unheard
from cogcommon.cli.names import plain
from cogcommon.cli.progress import paused, shown
from cogcommon.cli.streams import guard_output, outlive_output
from cogcommon.errors import AGAIN, CogError, RunError, SettingError
from cogcommon.files.failures import machines_fault

from ..plan.slice import Slice
from ..processes.pool import default_workers
from ..settings.encode import EncodeSettings
from ..store.outlet import read_beside
from .report import Rejection, Report


def gpu_count(gpus: str, found: int) -> int:
    """How many processes to start: 1 without a GPU.

    Raises:
        SettingError: ``gpus`` is neither all nor a number, or more than there are.
    """
    if gpus == "all":
        return max(1, found)
    if not re.fullmatch(r"[1-9]\d*", gpus):
        raise SettingError(f"{gpus!r} is neither all nor a number", where="--gpus", fix="--gpus all or --gpus 2")
    if int(gpus) > max(1, found):
        raise SettingError(f"{gpus} GPUs are asked for, {found} are here", where="--gpus", fix="--gpus all")
    return int(gpus)


def encode_in_parts(settings: EncodeSettings, part: Slice, parts: int) -> Report:
    """Encode a slice with ``parts`` processes, one a GPU, and add up their reports.

    Raises:
        RunError: a process failed, or was killed; what the others committed stays good.
    """
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    workers = max(1, (settings.workers or default_workers()) // parts)
    slices = [part.split(index, parts) for index in range(parts)]
    children: list[SpawnProcess] = []
    for index, own in enumerate(slices):
        given = replace(settings, worker=str(own), gpus="1", workers=workers)
        child = context.Process(target=_child, args=(given, index, parts), name=f"cogprep-gpu-{index}")
        with unheard():
            child.start()
        children.append(child)
    try:
        with paused():  # the children say what they do
            for child in children:
                child.join()
    finally:
        for child in children:
            if child.is_alive():
                child.terminate()
    if failed := {index: child.exitcode or 0 for index, child in enumerate(children) if child.exitcode != 0}:
        raise _error(failed, slices)
    reports = [_read_report(settings.out, own) for own in slices]
    return add_up(reports, part, time.perf_counter() - started)


def _error(failed: Mapping[int, int], slices: Sequence[Slice]) -> RunError:
    """The error for processes that have failed; what a person must see to decides its code.

    Args:
        failed: exit codes by GPU; -n: killed by signal n.
    """
    said = [code for code in failed.values() if code > 0]
    killed = [-code for code in failed.values() if code < 0]
    what = [f"{len(said)} of {len(slices)} processes failed (see above)"] if said else []
    if killed:
        what.append(f"{len(killed)} of {len(slices)} processes killed by signal {killed[0]}")
    where = ", ".join(f"gpu {index}, slice {slices[index]}" for index in failed)
    error = RunError(
        "; ".join(what),
        where=where + ("; the system's log says whether memory ran out" if signal.SIGKILL in killed else ""),
        fix="run the same command again; finished shards are kept",
    )
    if said:
        error.code = max(said)  # 2 before 1: the user can put it right
    else:
        error.code = 128 + killed[0] if killed[0] in SIGNALS else AGAIN
    return error


def _read_report(out: Path, own: Slice) -> Report:
    values = json.loads(read_beside(out, Report.name_of(own)))
    for name in ("rejections", "kept_samples", "postponed_samples"):
        values[name] = [Rejection(**sample) for sample in values[name]]
    return Report(**values)


def add_up(reports: Sequence[Report], part: Slice, total_s: float) -> Report:
    """One report of many slices: counts are summed, what every slice says alike is said once."""
    first = reports[0]
    rejections, kept, postponed = (
        sorted({sample for report in reports for sample in getattr(report, name)}, key=lambda sample: sample.line)
        for name in ("rejections", "kept_samples", "postponed_samples")
    )
    # A slice that ended early saw the others' shards unfinished; what is missing now, all miss.
    unfinished = set.intersection(*(set(report.unfinished) for report in reports))
    slowest = max(reports, key=lambda report: report.seconds["total"])
    return replace(
        first,
        encoded=sum(report.encoded for report in reports),
        pictures=sum(report.pictures for report in reports),
        recovered=sum(report.recovered for report in reports),
        dropped=sum(report.dropped for report in reports),
        rejected=len(rejections),
        rejections=rejections,
        kept=len(kept),
        kept_samples=kept,
        postponed=len(postponed),
        postponed_samples=postponed,
        seconds={**slowest.seconds, "total": round(total_s, 3)},
        clips_per_minute=round(sum(report.clips_per_minute for report in reports), 2),
        bound_by=slowest.bound_by,
        advice=slowest.advice,
        tiled=sum(report.tiled for report in reports),
        tone_mapped=sum(report.tone_mapped for report in reports),
        captions_truncated=sum(report.captions_truncated for report in reports),
        profiles_unused=sum(report.profiles_unused for report in reports),
        worker=str(part),
        busy=sorted({name for report in reports for name in report.busy}),
        unfinished=sorted(unfinished),
        unfinished_slices=[str(part)] if unfinished else [],
        usable=any(report.usable for report in reports),
        gpu_busy=min((report.gpu_busy for report in reports if report.gpu_busy is not None), default=None),
    )


class _Prefixed:
    """A stream whose lines say which GPU they come from; no terminal, so bars become lines."""

    def __init__(self, stream: IO[str], prefix: str) -> None:
        self._stream, self._prefix, self._start = stream, prefix, True

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            self._stream.write((self._prefix if self._start else "") + line)
            self._start = line.endswith("\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False


def _child(settings: EncodeSettings, index: int, parts: int) -> None:
    from .part import encode_slice

    os.environ.update(LOCAL_RANK=str(index), LOCAL_WORLD_SIZE=str(parts))
    guard_output()
    outlive_output()
    sys.stderr = _Prefixed(sys.stderr, f"[gpu {index}] ")  # type: ignore[assignment]
    try:
        with shown():
            encode_slice(settings).write(settings.out)
    except Exception as error:
        fault = error if isinstance(error, CogError) else machines_fault(error)
        if fault is None:
            raise
        print(plain(f"error: {fault}"), file=sys.stderr)
        sys.exit(fault.code)
