"""Runs that were measured, kept as data: ``measured.jsonl``, one a line, which `cogtrain plan` and the README read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from cogcommon.model.device import gpu_name

from ..settings.training import Strategy

FILE = "measured.jsonl"
# What two runs must share to be the same thing measured twice, but for the link.
SAME = ("row", "gpu", "gpus", "resolution", "rank", "precision", "strategy", "attention", "memory")
REFERENCE = "reference"  # as ``memory``: not ours, the plain loop of ``workshop.bench_train.plain`` beside it


@dataclass(frozen=True)
class Measured:
    """One run: what it was, on what, and what it took. Seconds and GiB; memory of one process."""

    row: str  # of the benchmark, as 09/low
    command: str  # that a user types for the same
    family: str
    method: str
    rank: int | None  # of a LoRA
    resolution: str
    batch_size: int
    precision: str
    strategy: Strategy
    memory: str  # as --memory, or REFERENCE
    plan: str  # how the blocks were run, in words, for people
    attention: str  # by which kernel (`blocks.attention.Kernel`)
    gpu: str
    gpus: int
    card_gib: float  # GPU memory that the run was given
    s_per_step: float  # median of the steps after the first ones
    peak_gib: float  # of GPU memory, by torch's allocator, the first step and what comes before it included
    block_plan: Mapping[str, Any] | None = None  # `BlockPlan.fields`; None: not ours
    host_gib: float | None = None  # of the host's memory, by how much less there was
    locked_gib: float | None = None  # of it, page-locked by us
    first_peak_gib: float | None = None  # until the end of the first step
    compile_s: float | None = None  # once, beside the steps
    date: str = ""
    commit: str = ""
    link: float | None = None  # GB/s in each direction that copies were held to; None: to nothing
    losses: tuple[float, ...] = ()  # of the first steps, on random weights and samples that are the same everywhere
    faster_since: bool = False  # our code has been made faster: the bytes still hold, the seconds do not
    versions: dict[str, str] = field(default_factory=dict)


def measured() -> tuple[Measured, ...]:
    """All runs that are in the project and had the whole of their machine's link, the newest first."""
    return tuple(run for run in everything_measured() if run.link is None)


@lru_cache
def everything_measured() -> tuple[Measured, ...]:
    """All runs that are in the project, the newest first."""
    lines = resources.files(__package__).joinpath(FILE).read_text(encoding="utf-8").splitlines()
    return tuple(Measured(**json.loads(line)) for line in reversed(lines))


def gpu_here() -> str | None:
    """This machine's GPU, as ``Measured.gpu`` names it."""
    name = gpu_name()
    return name.removeprefix("NVIDIA ") if name else None


def add_measured_run(run: Measured) -> None:
    """Append a run to the project's own."""
    with Path(__file__).with_name(FILE).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(asdict(run)) + "\n")
