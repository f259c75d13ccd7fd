"""The settings of what is asked before a run: `cogtrain plan` and `doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cogcommon.cli.settings import setting

from .training import Optimizer


@dataclass(frozen=True)
class ForecastSettings:
    """Settings of ``cogtrain plan``."""

    shards: list[str] = setting(
        [], "the training shards: tars, globs, brace ranges or URLs", shown="none: plan for --model and --resolution"
    )
    model: str | None = setting(
        None, "without shards: the checkpoint, by hub id (no network is asked), folder or form; with them: another "
        "checkpoint of the same family", shown="THUDM/CogVideoX-5b; the one the shards were made for",
    )  # fmt: skip
    resolution: str | None = setting(None, "without shards: FxHxW of the clips", shown="the model's own")
    steps: int = setting(500, "steps of which the time is told")
    repeat: list[str] = setting([], "with shards: as for training", shown="none")
    method: Literal["lora", "sft", "both"] = setting("both", "what to train")
    gpu: str | None = setting(
        None, "a card by name, as 4090, a100-80 or l4; or its memory: 24GB as it is sold, 22GiB as it is free; "
        "none: to train on CPUs",
        shown="this machine's",
    )  # fmt: skip
    gpus: int | None = setting(None, "GPUs, one process each", shown="this machine's, at least 1")
    host: str | None = setting(
        None, "memory of the host, as 64GB", shown="what is free here; with --gpu, as much as it takes"
    )
    link: float | None = setting(
        None, "GB/s that copies between host and GPU get in each direction, as on a slower slot (doctor times them)",
        shown="as the card's maker has it",
    )  # fmt: skip
    rank: int = setting(128, "rank of the LoRA")
    batch_size: int = setting(1, "samples per process and accumulation step")
    optimizer: Optimizer = setting("adamw", "as for training")
    ema: float = setting(0.0, "as for training")
    all: bool = setting(False, "show every strategy and memory setting, not only the best few")
    check: bool = setting(False, "run two steps of the advised command here, and compare the peak")
    json: bool = setting(False, "print the result as JSON")


@dataclass(frozen=True)
class DoctorSettings:
    """Settings of ``cogtrain doctor``."""

    json: bool = setting(False, "print the result as JSON")
