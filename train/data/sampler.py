"""The order in which samples are trained: a pure function of (seed, epoch, index).

It depends neither on the number of processes nor on anything that happened before, so
the same global batch gives the same run on 1, 2 or 4 processes, and a resumed run
finds its place by counting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .caption_draw import CaptionDraw, Ints
from .sample_rng import seed_of

# Samples are mixed within this many shards at a time. Remote reads stay among a
# few files (16 shards of 1 GB), and the shards themselves change order each epoch.
WINDOW = 16


@dataclass(frozen=True)
class Sampler:
    """Global batches of each epoch.

    Args:
        shard_of: shard of each sample (N).
        bucket_of: bucket of each sample (N); a batch never mixes buckets.
        global_batch: samples in one optimizer step, over all groups and accumulation.
        seed: of the run.
        draw: takes one sample of each clip an epoch; None: all samples. A clip has one bucket.
        times: how often an epoch trains each sample (N), with a draw all of a clip's as often; None: once.
    """

    shard_of: Ints
    bucket_of: Ints
    global_batch: int
    seed: int
    draw: CaptionDraw | None = None
    times: Ints | None = None

    @cached_property
    def samples(self) -> int:
        """That an epoch has to train, before those are left out that fill no batch."""
        return int(self._bucket_counts.sum())

    @cached_property
    def steps_per_epoch(self) -> int:
        return int(sum(count // self.global_batch for count in self._bucket_counts))

    @cached_property
    def left_over(self) -> int:
        """Samples that each epoch leaves out (other ones each time), because they fill no batch."""
        return int(sum(count % self.global_batch for count in self._bucket_counts))

    def too_small_buckets(self) -> list[int]:
        """Buckets with fewer samples than a global batch: they are never trained."""
        counts = self._bucket_counts
        return [int(bucket) for bucket in np.flatnonzero((counts > 0) & (counts < self.global_batch))]

    @cached_property
    def _bucket_counts(self) -> Ints:
        """Samples of each bucket in an epoch."""
        return np.bincount(self.bucket_of[self._taken(0)[0]])

    def _taken(self, epoch: int) -> tuple[Ints, Ints | None]:
        """The samples of an epoch, in no order, and their `turns`."""
        once = self.draw(epoch) if self.draw else np.arange(len(self.shard_of))
        if self.times is None:
            return once, None
        times = self.times[once]
        first = np.repeat(np.cumsum(times) - times, times)
        return np.repeat(once, times), np.arange(len(first)) - first

    def epoch(self, epoch: int) -> Ints:
        """Sample indices of an epoch's batches: (steps_per_epoch, global_batch)."""
        return self._ordered(epoch)[0]

    def turns(self, epoch: int) -> Ints | None:
        """Of each of these, which time the epoch trains it: 0, 1, ...; None: all for the first time."""
        return self._ordered(epoch)[1]

    def _ordered(self, epoch: int) -> tuple[Ints, Ints | None]:
        if epoch not in self._epochs:
            while len(self._epochs) > 2:  # the reader is ahead of the loop, by one epoch at most
                self._epochs.pop(min(self._epochs))
            self._epochs[epoch] = self._shuffled(epoch)
        return self._epochs[epoch]

    @cached_property
    def _epochs(self) -> dict[int, tuple[Ints, Ints | None]]:
        return {}

    def _shuffled(self, epoch: int) -> tuple[Ints, Ints | None]:
        rng = np.random.Generator(np.random.PCG64(seed_of(self.seed, epoch, "", "order")))
        taken, turns = self._taken(epoch)
        shard_of = self.shard_of[taken]
        shards = np.unique(shard_of)
        place = np.empty(int(shards[-1]) + 1, np.int64)
        place[shards] = rng.permutation(len(shards))
        window_of = place[shard_of] // WINDOW
        stream = np.lexsort((rng.random(len(taken)), window_of))  # places in what is taken
        batches: list[Ints] = []
        ends: list[Ints] = []
        for bucket in np.flatnonzero(self._bucket_counts):
            at = np.flatnonzero(self.bucket_of[taken[stream]] == bucket)
            whole = len(at) // self.global_batch * self.global_batch
            places = at[:whole].reshape(-1, self.global_batch)
            batches.append(stream[places])
            ends.append(places[:, -1])
        # Each batch takes the place of its last sample in the stream.
        ordered = np.concatenate(batches)[np.argsort(np.concatenate(ends), kind="stable")]
        return taken[ordered], None if turns is None else turns[ordered]


@dataclass(frozen=True)
class Slot:
    """One sample's place in a run."""

    sample: int  # index into the shard set
    epoch: int
    slot: int  # place in the global batch
    turn: int = 0  # which time the epoch trains it; what is drawn for it is drawn anew each time


def group_slots(
    batch: Sequence[int] | Ints,
    epoch: int,
    *,
    micro: int,
    group: int,
    groups: int,
    size: int,
    turns: Sequence[int] | Ints | None = None,
) -> list[Slot]:
    """A data-parallel group's part of one accumulation step of a global batch.

    Args:
        batch: sample indices of the global batch; groups * size * accumulation long.
        micro: which accumulation step.
        size: samples a group and accumulation step.
        turns: of the global batch (`Sampler.turns`); None: all 0.
    """
    start = (micro * groups + group) * size
    return [
        Slot(int(batch[slot]), epoch, slot, 0 if turns is None else int(turns[slot]))
        for slot in range(start, start + size)
    ]
