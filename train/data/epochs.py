"""Epochs: which samples each pass over a run's shards trains, and in which steps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .caption_draw import Ints
from .sampler import Sampler
from .shard_set import ShardSet


@dataclass(frozen=True)
class Epoch:
    """One pass over samples.

    Args:
        number: from 0; it enters the order of the samples, and what is drawn for them.
        after: optimizer steps of the run before its first.
        shards: that hold its samples.
        sampler: gives its batches.
    """

    number: int
    after: int
    shards: ShardSet
    sampler: Sampler

    @property
    def last(self) -> int:
        """Its last step; steps count from 1."""
        return self.after + self.sampler.steps_per_epoch

    def batch(self, step: int) -> tuple[Ints, Ints | None]:
        """Of a step, the samples of its global batch, and which time the epoch trains each (`Sampler.turns`)."""
        place, turns = step - self.after - 1, self.sampler.turns(self.number)
        return self.sampler.epoch(self.number)[place], None if turns is None else turns[place]

    def at(self, step: int) -> Epoch:
        """The epoch of a later step, where every epoch has the same samples."""
        passed = (step - self.after - 1) // self.sampler.steps_per_epoch
        after = self.after + passed * self.sampler.steps_per_epoch
        return dataclasses.replace(self, number=self.number + passed, after=after)
