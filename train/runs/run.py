"""A run that can start: what it trains, with what, and for how long."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogcommon.model.checkpoint import Checkpoint
from cogcommon.model.device import Precision
from cogcommon.model.families import Resolution

from ..data.epochs import Epoch
from ..data.prompts import Prompt
from ..data.repeats import described, told
from ..data.sampler import Sampler
from ..data.shard_set import ShardSet
from ..distributed.groups import DataGroups, data_groups
from ..model.method import Method
from ..settings.training import Strategy, TrainSettings
from .checkpoint import SavedCheckpoint
from .folder import RUNS, embedding_file
from .follow import Followed
from .global_batch import FACT

REVISION, STRATEGY, PRECISION = "revision of the base model", "--strategy", "--precision"  # facts of a checkpoint


@dataclass(frozen=True)
class Run:
    """A run that can start.

    Attributes:
        settings: with the accumulation steps that make up its global batch; ``given`` is as they were asked for.
    """

    settings: TrainSettings
    given: TrainSettings
    method: Method
    shards: ShardSet
    held_out: ShardSet | None
    checkpoint: Checkpoint  # of the base model
    sampler: Sampler
    steps: int
    strategy: Strategy
    precision: Precision
    world: int  # processes
    resume: SavedCheckpoint | None
    notes: tuple[str, ...]  # what the user should know, one sentence each
    followed: Followed | None = None  # with --follow; shards and sampler are of the epoch at which it was opened
    nothing_left: bool = False  # to train; its settings, too, are then those that its last step was made with
    prompts: tuple[Prompt, ...] = ()  # whose videos validation makes, beside those of held-out captions

    @property
    def buckets(self) -> tuple[Resolution, ...]:
        """Sizes of its samples; where more are to come, those that they can have."""
        return tuple(self.shards.contract.buckets if self.followed else self.shards.buckets)

    @property
    def validated_buckets(self) -> tuple[Resolution, ...]:
        """Sizes of what validation runs: held-out samples, and videos of prompts."""
        return (*(self.held_out.buckets if self.held_out else ()), *(prompt.size for prompt in self.prompts))

    @property
    def new_prompts(self) -> list[Prompt]:
        """Those that T5 has to embed first: the run's folder keeps the embeddings."""
        folder = run_folder(self)
        return [prompt for prompt in self.prompts if not embedding_file(folder, prompt.name).is_file()]

    @property
    def groups(self) -> DataGroups:
        return data_groups(self.world)

    @property
    def newest(self) -> Epoch:
        """With --follow the newest epoch, whose samples are those of now; else the first."""
        return self.followed.newest if self.followed else Epoch(0, 0, self.shards, self.sampler)

    def epoch_of(self, step: int) -> Epoch:
        """The epoch that a step belongs to; with --follow one of the last two."""
        return self.followed.epoch_of(step) if self.followed else self.newest.at(step)

    @property
    def global_batch(self) -> int:
        return self.sampler.global_batch

    @property
    def repeated(self) -> str:
        """What --repeat makes of an epoch, in words; empty without it."""
        times = self.sampler.times
        return "" if times is None else told(times, self.sampler.samples, "clip" if self.sampler.draw else "sample")

    def resume_facts(self) -> dict[str, Any]:
        """What a resumed run must have in common with its checkpoint."""
        return {
            "method": self.method.name,
            "base model": f"{self.checkpoint.family.name} {self.checkpoint.name}",
            REVISION: self.checkpoint.fingerprint,
            "--follow": self.settings.follow,
            # What each epoch is over, and how often it trains a sample, its own record says.
            "shards": self.shards.contract.fingerprint if self.followed else self.shards.fingerprint,
            FACT: self.global_batch,
            "--captions": self.settings.captions,
            "--repeat": "" if self.followed else described(self.sampler.times),
            "--seed": self.settings.seed,
            STRATEGY: self.strategy,
            PRECISION: self.precision,
            "--optimizer": self.settings.optimizer,
            **self.method.resume_facts(),
        }


def run_folder(run: Run) -> Path:
    """Where the run lives: as asked, where it is resumed, else a new time-stamped one."""
    if run.settings.out is not None:
        return run.settings.out
    if run.resume is not None:
        return run.resume.folder.parent
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return RUNS / f"{run.checkpoint.family.name}-{run.method.name}-{stamp}"
