"""Decodes the clips of planned samples in a pool of processes, ahead of whoever takes them and in their order."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from cogcommon.files.memory import free_host_memory
from cogcommon.model.families import Resolution

from ..dataset.surveyed import decode_as_surveyed
from ..plan.plan import PlannedSample, PlannedShard
from ..plan.slice import local_count
from ..processes.pool import WORKER_BYTES, Pool, Task
from ..source.addresses import any_remote
from ..source.clip import ClipFault
from ..source.part import file_named
from ..video.cut import Cut
from ..video.decode import Clip

_DECODED_BYTES = 2 << 30  # decoded clips that wait for the VAE; 51 MB each at 49x480x720


class Decoding:
    """Of one run; use as a context manager, which drops what was begun and never taken.

    Args:
        root: the data root, which sources are relative to.
        cut: how clips are cut.
        fps: of the family.
        pool: decode children.
    """

    def __init__(self, root: Path, cut: Cut, fps: float, pool: Pool) -> None:
        self._root = root
        self._cut = cut
        self._fps = fps
        self._pool = pool
        self._begun: dict[str, Task[Clip | ClipFault]] = {}  # by the sample's key

    def __enter__(self) -> Decoding:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._pool.drop(self._begun.values())
        self._begun.clear()

    def begin(self, shards: Sequence[PlannedShard], beside: int) -> None:
        """Begin the first clips, so that they are there when the models are; fewer, or none, where memory is short.

        None behind an address, nor what comes after it: `remote.ahead` fetches such files, a few at a time and with
        the patience that a store needs.

        Args:
            beside: bytes of host memory that are about to be taken for something else, by each process of this host.
        """
        if not shards:
            return
        each = WORKER_BYTES + max(_clip_bytes(shard.bucket) for shard in shards)
        clips = min(self.window(shards), (free_host_memory() // local_count(os.environ) - beside) // each)
        samples = (planned for shard in shards for planned in shard.samples)
        for planned in islice(samples, max(0, clips)):
            if any_remote(self.files(planned)):
                return
            self._begun[planned.key] = self._pool.begin(decode_as_surveyed, self._arguments(planned))

    def window(self, shards: Sequence[PlannedShard]) -> int:
        """Clips at most that are under way, or decoded and not yet taken."""
        largest = max((_clip_bytes(shard.bucket) for shard in shards), default=1)
        return max(2, min(2 * self._pool.workers, _DECODED_BYTES // largest))

    def clips(self, samples: Iterable[PlannedSample], window: int) -> Iterator[Clip | ClipFault]:
        """The samples' clips.

        Args:
            samples: read as the window moves on.
        """

        def tasks() -> Iterator[tuple[Any, ...] | Task[Clip | ClipFault]]:
            for planned in samples:
                yield self._taken(planned.key) or self._arguments(planned)

        return self._pool.run(decode_as_surveyed, tasks(), window=window)

    def _taken(self, key: str) -> Task[Clip | ClipFault] | None:
        """A clip that was begun; those before it belong to shards that somebody else encodes, and go."""
        for first in list(self._begun):
            task = self._begun.pop(first)
            if first == key:
                return task
            self._pool.drop([task])
        return None

    def files(self, planned: PlannedSample) -> list[Path]:
        """What decoding a sample reads."""
        sample = planned.sample
        return [self._root / name for name in (file_named(sample.source), sample.image) if name]

    def _arguments(self, planned: PlannedSample) -> tuple[Any, ...]:
        sample = planned.sample
        image = self._root / sample.image if sample.image else None
        expected = planned.clip, planned.image_sha256
        return *expected, self._root / sample.source, planned.bucket, self._cut, self._fps, planned.key, image


def _clip_bytes(bucket: Resolution) -> int:
    return bucket.frames * bucket.height * bucket.width * 3
